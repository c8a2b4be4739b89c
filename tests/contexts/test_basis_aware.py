"""The truncation itself: BA-τ, BA-η, drawing, masking, the greedy fallback, and the models it refuses."""

import math

import numpy as np
import pytest
import torch
from helpers import V, gemma3, gpt2, gru, llama
from peft import LoraConfig, get_peft_model
from torch import nn

from softrl.contexts.basis_aware import BasisAware, basis_aware
from softrl.contexts.basis_certificate import proves
from softrl.contexts.basis_directions import svd_directions
from softrl.contexts.basis_models import reward_tags
from softrl.contexts.final_norm import find_final_norm
from softrl.models.policy import Policy


def _drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rule(epsilon=0.02, rule="tau", vocab_size=200, width=12, k=12, **kwargs):
    weight = _drawn(vocab_size, width)
    return weight, BasisAware(svd_directions(weight, k), epsilon, rule, **kwargs)


def test_tau_of_both_rules():
    logits = torch.stack([torch.zeros(200), 5 * torch.eye(200)[0]]).double()
    probs = logits.softmax(-1)
    assert _rule(0.02)[1].tau(probs).tolist() == [0.02, 0.02]
    entropy = -(probs * probs.log()).sum(-1)
    expected = [min(0.02, math.sqrt(0.02) * math.exp(-float(each))) for each in entropy]
    assert _rule(0.02, "eta")[1].tau(probs).tolist() == pytest.approx(expected)
    assert expected[0] == pytest.approx(math.sqrt(0.02) / 200)


def test_mask_accepts_what_is_proved_and_what_is_above_tau():
    weight, rule = _rule(max_candidates=None)
    logits = 1.2 * _drawn(3, 12, seed=1) @ weight.T
    probs = logits.softmax(-1)
    kept = rule.mask(logits)
    found = rule.verdicts(logits, torch.arange(200).expand(3, -1))
    assert (kept == (found.accepted | (probs > 0.02))).all()
    below = kept & (probs <= 0.02)
    assert below.sum() >= 10
    for row, token in torch.nonzero(below).tolist():
        y = rule.directions.lifted(found.certificate[row, token])
        assert proves(weight.numpy(), probs[row].numpy(), token, 0.02, y.numpy())
    assert rule.counts.contexts == 3
    assert rule.counts.accepted >= int(below.sum())
    assert rule.counts.failed == rule.counts.greedy == 0


def test_fewer_candidates_reject_more():
    weight, rule = _rule(max_candidates=None)
    limited = BasisAware(rule.directions, 0.02, "tau", max_candidates=3)
    logits = 1.2 * _drawn(3, 12, seed=1) @ weight.T
    few, many = limited.mask(logits), rule.mask(logits)
    assert (many | ~few).all()
    assert few.sum() < many.sum()


@pytest.mark.parametrize("max_candidates", [None, 3])
def test_best_is_the_best_of_the_mask_for_any_scores(max_candidates):
    weight, rule = _rule(max_candidates=max_candidates)
    logits = 1.2 * _drawn(40, 12, seed=4) @ weight.T
    kept = rule.mask(logits)
    for seed in range(3):
        noise = -torch.log(-torch.log(torch.rand(40, 200, generator=torch.Generator().manual_seed(seed)).double()))
        scores = logits + 3.0 * noise  # so strange that many choices are rejected first
        expected = scores.masked_fill(~kept, -torch.inf).argmax(-1)
        assert (rule.best(logits, scores) == expected).all()
    assert (expected != scores.argmax(-1)).sum() > 10


def test_draws_follow_the_accepted_probabilities():
    """4,000 draws of one context: a χ² of 6 standard deviations has a chance below 1e-6 (fixed seed)."""
    weight, rule = _rule(0.05, vocab_size=30, width=4, k=4, max_candidates=None)
    logits = 1.0 * _drawn(1, 4, seed=2) @ weight.T
    kept = rule.mask(logits)[0]
    expected = (logits.softmax(-1)[0] * kept) / (logits.softmax(-1)[0] * kept).sum()
    many = logits.expand(4000, -1)
    uniform = torch.rand(4000, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = torch.bincount(rule.best(many, many - torch.log(-torch.log(uniform))), minlength=30)
    assert (drawn[~kept] == 0).all()
    chi = ((drawn - 4000 * expected) ** 2 / (4000 * expected))[kept].sum()
    degrees = int(kept.sum()) - 1
    assert degrees >= 4
    assert chi < degrees + 6 * math.sqrt(2 * degrees)


def test_nothing_accepted_falls_back_to_the_likeliest():
    weight = torch.zeros(50, 2, dtype=torch.float64)
    rule = BasisAware(svd_directions(weight, 1), 0.5, "tau")
    logits = 0.01 * _drawn(2, 50, seed=3)
    assert (rule.mask(logits).sum(-1) == 1).all()
    assert rule.counts.greedy == 2
    assert (rule.mask(logits).int().argmax(-1) == logits.argmax(-1)).all()
    scores = _drawn(2, 50, seed=4)
    assert (rule.best(logits, scores) == logits.argmax(-1)).all()
    assert rule.counts.greedy == 6


def test_before_the_norm_accepts_no_more_than_all_of_w():
    policy = Policy(gpt2(tied=False))
    weight = policy.causal_lm.get_output_embeddings().weight.detach()
    norm = find_final_norm(policy)
    hidden = 3.0 * _drawn(20, weight.shape[1], seed=6)
    logits = 0.5 * (weight @ (norm.normalised(hidden) * norm.weight + norm.bias).T).T
    whole = BasisAware(svd_directions(weight, 16), 0.2, "tau", None)
    before = BasisAware(svd_directions(weight, 15, norm), 0.2, "tau", None)
    few = BasisAware(svd_directions(weight, 6, norm), 0.2, "tau", None)
    of_w, deep, of_few = (each.mask(logits) for each in (whole, before, few))
    assert (of_w | ~deep).all()
    assert (deep | ~of_few).all()
    assert (logits.softmax(-1) <= 0.2)[of_few].any()
    assert of_few.sum() < deep.sum() < of_w.sum()


@pytest.mark.parametrize("make", [gpt2, llama])
@torch.no_grad()
def test_certificates_before_a_norm_cannot_use_what_a_normalised_state_lacks(make):
    """Over the columns of W diag(w), by the independent checker, ĥ computed from the state and not from logits."""
    policy = Policy(make(tied=False))
    weight = policy.causal_lm.get_output_embeddings().weight.detach()
    norm = find_final_norm(policy)
    rule = basis_aware(policy, 0.2, "tau", 12, max_candidates=None)
    normalised = norm.normalised(3.0 * _drawn(20, weight.shape[1], seed=6))
    bias = 0.0 if norm.bias is None else norm.bias
    logits = (weight @ (normalised * norm.weight + bias).T).T
    found = rule.verdicts(logits, torch.arange(len(weight)).expand(20, -1))
    probs, columns = logits.softmax(-1).numpy(), (weight * norm.weight).numpy()
    num_proved = 0
    for row, token in torch.nonzero(found.accepted & (logits.softmax(-1) <= 0.2)).tolist():
        y = rule.directions.lifted(found.certificate[row, token]).numpy()
        fixed = np.stack([normalised[row].numpy(), np.ones(weight.shape[1])])[: 1 + norm.centres]
        assert proves(columns, probs[row], token, 0.2, y, orthogonal_to=fixed)
        assert not proves(columns, probs[row], token, 0.2, y + 1e-3 * np.append(normalised[row].numpy(), 0.0), fixed)
        num_proved += 1
    assert num_proved >= 5


def test_models_that_the_theorem_is_not_about():
    with pytest.raises(ValueError, match=r"final_logit_softcapping=3\.0"):
        basis_aware(Policy(gemma3()), 0.01, num_directions=4)
    with pytest.raises(ValueError, match=r"temperature 1, got 0\.7"):
        basis_aware(Policy(llama(), temperature=0.7), 0.01, num_directions=4)
    model = llama(tied=False)
    model.set_output_embeddings(nn.Linear(16, V, bias=True).double())
    with pytest.raises(ValueError, match="its head has a bias"):
        basis_aware(Policy(model), 0.01, num_directions=4)
    adapted = get_peft_model(llama(tied=False), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"without an adapter, got peft\..*Linear; train other modules"):
        basis_aware(Policy(adapted), 0.01, num_directions=4)
    with pytest.raises(ValueError, match="width of the output embedding, 16 here, got 17"):
        basis_aware(Policy(llama()), 0.01, num_directions=17)
    with pytest.raises(ValueError, match="width of the output embedding, 12 here, got 13"):
        basis_aware(Policy(gru()), 0.01, num_directions=13)
    with pytest.raises(ValueError, match="representation must be"):
        basis_aware(Policy(llama()), 0.01, num_directions=4, representation="input")


def test_a_model_tuned_by_rewards_gets_a_warning(tmp_path):
    model = llama()
    (tmp_path / "README.md").write_text("---\ntags:\n- trl\n- softrl\n- soft-rollout\n---\n# A model\n")
    model.config.name_or_path = str(tmp_path)
    with pytest.warns(UserWarning, match=r"soft-rollout.*assumes cross-entropy"):
        basis_aware(Policy(model), 0.01, num_directions=4)
    (tmp_path / "README.md").write_text("---\ntags:\n- trl\n- sft\n---\n# A model\n")
    assert reward_tags(str(tmp_path)) == []
    assert reward_tags("") == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"epsilon": 0.0}, "epsilon must lie"), ({"rule": "p"}, "rule must be"), ({"max_candidates": 0}, "at least 1")],
)
def test_settings_out_of_range(changed, message):
    with pytest.raises(ValueError, match=message):
        _rule(**changed)


def test_processed_logits_are_refused():
    _, rule = _rule()
    logits = torch.zeros(1, 200)
    logits[0, 3] = -torch.inf
    with pytest.raises(ValueError, match="Put basis-aware truncation first"):
        rule.mask(logits)
