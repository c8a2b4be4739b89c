"""QuietSTaRTrainer: every way to learn trains, curricula, where to think, and evaluations against a loop."""

import math

import pytest
import torch
from trainers.quietstar import quietstar

from softrl.estimators.thought_rules import THOUGHT_RULES

pytestmark = pytest.mark.slow  # imports trl

WAYS = {
    **{rule: {"estimator": rule} for rule in THOUGHT_RULES},
    "soft": {"estimator": "soft"},
    "soft, softmax": {"estimator": "soft", "relaxation": "softmax", "max_entropy_nats": 1.0},
    "soft, reinmax, one hop": {"estimator": "soft", "relaxation": "reinmax", "hops": 1, "adjoint_clip": 1.0},
    "positive only": {"estimator_settings": {"positive_only": True}},
    "one thought": {"num_thoughts": 1, "estimator_settings": {"baseline": "batch"}},
    "entropy": {"entropy_weight": 0.1},
    "log_probs": {"mixing": "log_probs"},
    "residual": {"residual_mixing": True, "sigmoid_mixing": False},
    "cooler": {"temperature": 0.7, "thinking_learning_rate": 0.2, "mixing_learning_rate": 0.1},
    "prior": {"estimator": "self_normalized", "proposal": "prior"},
    "mixture": {"estimator": "rloo", "proposal": "mixture"},
    "relative": {"estimator": "dpo", "relative_to_prior": True},
    "surrogate": {"reward_surrogate": True, "surrogate_spread": 100.0},
    "soft, surrogate": {"estimator": "soft", "reward_surrogate": True, "surrogate_spread": 100.0},
    "random": {"thoughts": "random"},
    "pause": {"thoughts": "pause"},
    "none": {"thoughts": "none"},
    "policy weight 0": {"policy_weight": 0.0},
    "no length": {"n_thought": 0},
    "no length, soft": {"n_thought": 0, "estimator": "soft"},
    "by entropy": {"think_at": "entropy", "think_count": 2},
    "given": {"think_at": "given"},
    "every third": {"think_every": 3},
    "dense": {"branch_attention": "dense"},
    "naive": {"branch_attention": "naive", "think_every": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains(tmp_path, way):
    trainer = quietstar(tmp_path, **WAYS[way])
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    still = {"pause", "start", "end"} | {name for name in before if name.startswith(("mixing", "log_z"))}
    if trainer.args.thinks:
        still = {name for name in before if name.startswith("log_z")} if way != "partition_learned" else set()
        still |= set() if way == "pause" else {"pause"}
    assert moved == before.keys() - still
