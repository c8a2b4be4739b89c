"""The latent reasoner's configuration: partitions of its four modules, and what is refused."""

import itertools

import pytest

from softrl.models.reasoner_config import WEIGHT_GROUPS, ReasonerConfig, canonical_groups


def test_there_are_fifteen_partitions():
    assert len(set(WEIGHT_GROUPS)) == 15
    for letters in itertools.product("ABCD", repeat=4):
        assert canonical_groups("".join(letters)) in WEIGHT_GROUPS
    assert canonical_groups("BBAA") == canonical_groups("xxyy") == "AABB"
    assert ReasonerConfig(weight_groups="DCBA").weight_groups == "ABCD"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"weight_groups": "AAB"}, r"weight_groups must have one letter for each of base_lm, .* got 'AAB'"),
        ({"weight_groups": "AA1B"}, "weight_groups must have one letter"),
        ({"weight_groups": "AABC", "base_lm_size": 4}, r"different sizes share weights: base_lm 4, base_reasoner 32"),
        ({"core": "lstm"}, r"core must be one of \('gru', 'transformer'\), got 'lstm'"),
        ({"latent_kind": "hard"}, r"latent_kind must be one of .* got 'hard'"),
        ({"head_activation": "gelu"}, "set simple_lm_head=False"),
        ({"head_activation": "relu", "simple_lm_head": False}, r"head_activation must be one of .* got 'relu'"),
        ({"n_thought": -1}, "n_thought must be at least 0, got -1"),
        ({"num_latents": 1}, "num_latents must be at least 2, got 1"),
        ({"latent_temperature": 0.0}, "latent_temperature must be positive, from 0.001 to 1000, got 0.0"),
        ({"latent_temperature": 1e-39}, "latent_temperature must be positive, from 0.001 to 1000, got 1e-39"),
        ({"latent_temperature": float("nan")}, "latent_temperature must be positive, from 0.001 to 1000, got nan"),
        ({"min_log_sigma": 3.0}, "must be below max_log_sigma"),
        ({"min_log_sigma": float("nan")}, "must be below max_log_sigma"),
        ({"max_log_sigma": 1000.0}, r"min_log_sigma=-5.0 and max_log_sigma=1000.0 must lie within ±40: beyond"),
        ({"min_log_sigma": -41}, "must lie within ±40"),
        ({"base_lm_size": 2.5}, "base_lm_size must be an integer, got 2.5"),
        ({"n_thought": 1.5}, "n_thought must be an integer, got 1.5"),
        ({"n_thought": True}, "n_thought must be an integer, got True"),
        ({"latent_size": "8"}, "latent_size must be an integer, got '8'"),
        ({"max_log_sigma": "2"}, "max_log_sigma must be a number, got '2'"),
        ({"core": "transformer", "base_lm_size": 6}, r"multiples of 2 \* num_attention_heads = 4, got {'base_lm': 6}"),
    ],
)
def test_bad_configurations_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        ReasonerConfig(**settings)


def test_sizes_of_modules_that_are_not_there_do_not_matter():
    ReasonerConfig(weight_groups="AABB", base_lm_size=4, reasoner_size=8, interpreter_size=8, use_base_lm=False)
    ReasonerConfig(weight_groups="ABBA", reasoner_size=8, use_reasoner=False)
