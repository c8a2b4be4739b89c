"""Latent reasoners: what sharing weights means, saving, generation, and what is refused."""

import itertools

import pytest
import torch
from models.latent_reasoners import KINDS, SIZES, V, reasoner, texts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from softrl.models.reasoner import ReasonerForCausalLM
from softrl.models.reasoner_config import WEIGHT_GROUPS, ReasonerConfig

pytestmark = pytest.mark.usefixtures("float64_inside")


def test_mixing_begins_in_the_middle():
    torch.manual_seed(0)
    model = ReasonerForCausalLM(ReasonerConfig(vocab_size=V, learns_log_z=True))
    out = model(texts())
    assert (out.mixing == 0.5).all()
    assert (out.log_z == 0.0).all()
    expected = (out.base_log_probs.exp()[:, :, None] + out.interpreter_log_probs.exp()).log() - torch.tensor(2.0).log()
    torch.testing.assert_close(out.talk_log_probs, expected, rtol=1e-5, atol=1e-5)


# Sharing weights.


@pytest.mark.parametrize("groups", WEIGHT_GROUPS)
def test_what_is_shared_is_counted_and_kept_once(groups, tmp_path):
    model = reasoner(weight_groups=groups, n_thought=1).to(torch.float32)
    core = 2 * (24 * 8 + 24)
    heads, mixing = 2 * (8 * V + V), (16 * 6 + 6) + (6 * 6 + 6) + 7
    thinking = 8 * 8 + (8 * 8 + 8) + 8  # codebook, latent head, start
    embeddings = len({groups[0], groups[1], groups[3]}) * V * 8  # the reasoner reads no text
    assert model.num_parameters() == len(set(groups)) * core + embeddings + heads + mixing + thinking
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - embeddings
    policies = [model._policy(name).decoder for name in ("base_lm", "base_reasoner", "reasoner", "interpreter")]
    for first, second in itertools.combinations(range(4), 2):
        assert (policies[first] is policies[second]) == (groups[first] == groups[second])
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    assert sum(value.numel() for value in kept.values()) == model.num_parameters()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.weight_groups == groups
    ids = texts()
    assert torch.equal(loaded(ids, seed=1).logits, model(ids, seed=1).logits)


@pytest.mark.parametrize("core", ["gru", "transformer"])
@pytest.mark.parametrize("groups", WEIGHT_GROUPS)
def test_every_parameter_is_used(groups, core):
    model, ids = reasoner(weight_groups=groups, core=core, n_thought=2, learns_log_z=True), texts()
    out = model(ids, seed=1)
    (out.logits.square().sum() + out.thought_log_probs.sum() + out.log_z.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_transformer_and_every_setting_survive_saving(tmp_path):
    settings = {
        "core": "transformer", "num_hidden_layers": 2, "weight_groups": "ABBC", **SIZES, "share_lm_head": True,
        "simple_lm_head": False, "learns_log_z": True, **KINDS["gaussian"],
    }  # fmt: skip
    torch.manual_seed(0)
    given = ReasonerConfig(vocab_size=V, **settings)
    model = ReasonerForCausalLM(given).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in settings.items():
        assert getattr(loaded.config, name) == value
    ids = texts()
    torch.testing.assert_close(loaded(ids, seed=1).logits, model(ids, seed=1).logits)


def test_it_generates():
    model, ids = reasoner(), texts(2, 3)
    written = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert written.shape == (2, 7)
    assert torch.equal(written[:, :3], ids)


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_writes_is_said_by_a_seed(kind):
    """Step by step the likeliest token of the same thoughts; 0 is the default, whatever torch's own state is."""
    model, ids = reasoner(**KINDS[kind]), texts(2, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("mixing"):
                parameter.mul_(2.0)  # so that other thoughts lead to other tokens
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for given, seed, count in (({}, 0, None), ({"seed": 4}, 4, None), ({"seed": 4, "num_thoughts": 5}, 4, 5)):
        expected = ids
        for _ in range(8):
            logits = model(expected, seed=seed, num_thoughts=count, row_ids=[0, 0]).logits[:, -1]
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(model.generate(ids, **settings, **given), expected)
    written = {tuple(model.generate(ids, **settings, seed=seed).flatten().tolist()) for seed in range(6)}
    assert len(written) > 1


def test_the_likeliest_text_does_not_hang_on_the_rows_around_it():
    model, ids = reasoner(), texts(3, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("mixing"):
                parameter.mul_(2.0)
    settings = {"max_new_tokens": 8, "pad_token_id": 0}
    for search in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        alone = [model.generate(row[None], **settings, **search) for row in ids]
        assert torch.equal(model.generate(ids, **settings, **search), torch.cat(alone))
    keyed = model.generate(ids[:1].expand(3, -1), do_sample=False, row_ids=[0, 1, 0], **settings)
    assert torch.equal(keyed[0], keyed[2])
    assert not torch.equal(keyed[0], keyed[1])


# What is refused.


def test_bad_requests_are_named():
    model, ids = reasoner(), texts()
    with pytest.raises(ValueError, match="num_thoughts must be at least 1, got 0"):
        model(ids, num_thoughts=0)
    with pytest.raises(ValueError, match="row_ids: expected one for each of 2 texts, got 1"):
        model(ids, row_ids=[1])
    with pytest.raises(ValueError, match=r"vocabulary of 11 tokens is that of all its cores .* make a new model"):
        model.resize_token_embeddings(12)
    small = reasoner(core="transformer", max_position_embeddings=7, n_thought=2)
    assert small(ids).logits.shape == (2, 5, V)
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
    assert small(padded, torch.tensor([[0] * 4 + [1] * 5] * 2)).logits.shape == (2, 9, V), "padding has no position"
    with pytest.raises(
        ValueError, match=r"6 tokens is longer than the 5 that max_position_embeddings=7 .* leaves beside a thought"
    ):
        small(texts(2, 6))
    with pytest.raises(ValueError, match="no reparameterised sample"):
        model(ids, reparameterised=True)
    with pytest.raises(ValueError, match="random numbers to draw latents with, or latents to score"):
        model.think(model.read(ids))
