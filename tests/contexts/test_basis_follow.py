"""Directions that follow a policy's weights: after whatever changes them, and not without a change."""

import pytest
import torch
from helpers import V, gpt2, llama
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from softrl.contexts.basis_aware import basis_aware
from softrl.contexts.final_norm import find_final_norm
from softrl.models.policy import Policy

SETTINGS = {"epsilon": 0.06, "rule": "tau", "num_directions": 8, "max_candidates": None}


def _made(build=llama):
    model = build(seed=3)
    policy = Policy(model)
    return model, policy, basis_aware(policy, **SETTINGS, follow=True)


def _fresh(policy):
    return basis_aware(policy, **SETTINGS)


def _logits(model):
    with torch.no_grad():
        return model(torch.arange(2 * 6).reshape(2, 6)).logits.flatten(0, 1)


def _redrawn(model):
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0.0, 0.4, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("build", [llama, gpt2])
def test_directions_follow_the_output_embedding(build):
    model, policy, rule = _made(build)
    stale = _fresh(policy)
    _redrawn(model)
    logits = _logits(model)
    expected = _fresh(policy).mask(logits)
    assert (rule.mask(logits) == expected).all()
    assert torch.equal(rule.directions.columns, _fresh(policy).directions.columns)
    assert (stale.mask(logits) != expected).any()  # what it would leave otherwise


def test_directions_follow_the_final_norm():
    model, policy, rule = _made()
    with torch.no_grad():
        model.model.norm.weight[::2] *= 3.0
    rule.mask(_logits(model))
    assert torch.equal(rule.directions.columns, _fresh(policy).directions.columns)


def test_draws_follow_too_and_loaded_weights_are_seen():
    model, policy, rule = _made()
    model.load_state_dict(llama(seed=5).state_dict())
    logits = _logits(model)
    rule.best(logits, logits)
    assert torch.equal(rule.directions.columns, _fresh(policy).directions.columns)


def test_nothing_is_computed_without_a_change(monkeypatch):
    from softrl.contexts import basis_aware as module

    model, _, rule = _made()
    calls = []
    original = module.svd_directions
    monkeypatch.setattr(module, "svd_directions", lambda *given: calls.append(1) or original(*given))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.1)  # neither head nor final norm
    for _ in range(2):
        rule.mask(_logits(model))
    assert calls == []
    model.requires_grad_(False)
    rule.source.outdate()  # an optimizer of adapters alone
    rule.mask(_logits(model))
    assert calls == []
    model.model.norm.requires_grad_(True)
    rule.source.outdate()
    for _ in range(2):
        rule.mask(_logits(model))
    assert calls == [1]


def test_a_fused_optimizer_writes_past_the_counters():
    """transformers' default: without `outdate` the directions would stay behind and nothing would say so."""
    model, policy, rule = _made()
    head = model.get_output_embeddings().weight
    optimizer = torch.optim.AdamW([head], lr=0.3, fused=True)
    head.grad = torch.randn(head.shape, generator=torch.Generator().manual_seed(1), dtype=head.dtype)
    version = head._version
    optimizer.step()
    assert head._version == version
    rule.source.outdate()
    rule.mask(_logits(model))
    assert torch.equal(rule.directions.columns, _fresh(policy).directions.columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("centres", [False, True])
def test_norms_of_half_precision_are_found(centres, dtype):
    """To the rounding of the module's output, at a width at which a probe drawn freely has numbers that round to 0."""
    if centres:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=576, n_layer=1, n_head=4, n_positions=8))
        norm = model.transformer.ln_f
    else:
        shape = {"hidden_size": 576, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **shape))
        norm = model.model.norm
    torch.nn.init.uniform_(norm.weight, 1.0, 2.0, generator=torch.Generator().manual_seed(0))
    found = find_final_norm(Policy(model.to(dtype)))
    assert found.centres == centres
    assert (found.weight - norm.weight.double()).abs().max() < 0.02


def test_without_it_directions_stay():
    model, policy, _ = _made()
    rule = _fresh(policy)
    before = rule.directions
    _redrawn(model)
    rule.mask(_logits(model))
    assert rule.directions is before
