"""Guidance against hand calculation, and its gradients against float64 finite differences of a dense formula."""

import pytest
import torch
from helpers import ALL_RELAXATIONS, V, random_for, relaxation_of

from softrl.tokens.guidance import Guide, coin_amounts, floored, guided, mixed
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import SoftmaxMixture
from softrl.tokens.truncation import Truncation
from softrl.types import Support

N = 6


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


TRUE_FIRST = torch.tensor([[True, False, False]])


@pytest.mark.parametrize(
    ("rule", "weights", "amount", "expected"),
    [
        (mixed, [0.2, 0.5, 0.3], 0.5, [0.6, 0.25, 0.15]),
        (mixed, [0.2, 0.5, 0.3], 1.0, [1.0, 0.0, 0.0]),
        (mixed, [0.2, 0.5, 0.3], 0.0, [0.2, 0.5, 0.3]),
        (floored, [0.2, 0.5, 0.3], 0.6, [0.6, 0.25, 0.15]),  # the rest halves: 0.4 / 0.8
        (floored, [0.7, 0.2, 0.1], 0.6, [0.7, 0.2, 0.1]),  # has it already
        (floored, [0.0, 0.75, 0.25], 0.2, [0.2, 0.6, 0.2]),  # was not kept
        (floored, [1.0, 0.0, 0.0], 0.4, [1.0, 0.0, 0.0]),
        (floored, [1.0, 0.0, 0.0], 1.0, [1.0, 0.0, 0.0]),
        (floored, [0.2, 0.5, 0.3], 1.0, [1.0, 0.0, 0.0]),
    ],
)
def test_rules_by_hand(rule, weights, amount, expected):
    leaf = rows(weights).requires_grad_()
    result = rule(leaf, TRUE_FIRST, rows(amount))
    torch.testing.assert_close(result, rows(expected), rtol=0.0, atol=1e-15)
    (gradient,) = torch.autograd.grad(result.square().sum(), leaf)
    assert gradient.isfinite().all()


def test_a_nearly_certain_true_token_is_not_divided_by_rounding():
    weights = torch.tensor([[1.0 - 6e-8, 0.0, 0.0]], requires_grad=True)
    result = floored(weights, TRUE_FIRST, torch.ones(1))
    assert result.tolist() == [[1.0, 0.0, 0.0]]
    (gradient,) = torch.autograd.grad(result.sum(), weights)
    assert gradient.isfinite().all()


def logits_and_targets(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(N, V, dtype=torch.float64, generator=generator)
    ranks = torch.tensor([0, 1, 3, 6, 12, 20])  # of the true token: kept, removed by the nucleus, outside of K
    return logits, logits.argsort(-1, descending=True).gather(-1, ranks[:, None])[:, 0]


def guided_support(relaxation, amount):
    logits, targets = logits_and_targets()
    guide = Guide(targets[:, None], torch.full((N, 1), amount, dtype=torch.float64))
    support = guide.joined(relaxation.draw(logits, random_for(N)), 0)
    return logits, targets, support


@pytest.mark.parametrize("rule", ["mix", "floor"])
@pytest.mark.parametrize("name", ALL_RELAXATIONS)
def test_what_is_fed_is_the_base_s_token_guided_over_the_vocabulary(name, rule):
    """Independently: scattered over the vocabulary, where no id can be lost or counted twice."""
    base, amount = relaxation_of(name), 0.35
    relaxation = guided(base, rule)
    logits, targets, support = guided_support(relaxation, amount)
    assert support.ids.shape[-1] == base.truncation.top_k + 1
    plain = base.draw(logits, random_for(N))
    dense = torch.zeros(N, V, dtype=torch.float64)
    own = base.fed(base.weights(logits.gather(-1, plain.ids), plain), plain)
    dense.scatter_add_(-1, plain.ids, own)
    one_hot = torch.nn.functional.one_hot(targets, V).double()
    if rule == "mix":
        expected = amount * one_hot + (1 - amount) * dense
    else:
        true = dense.gather(-1, targets[:, None])
        lifted = true.clamp(min=amount)
        expected = torch.where(one_hot.bool(), lifted, dense * torch.where(true < 1, (1 - lifted) / (1 - true), 1.0))
    weights = relaxation.weights(logits.gather(-1, support.ids), support)
    found = torch.zeros(N, V, dtype=torch.float64).scatter_add_(-1, support.ids, relaxation.fed(weights, support))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(N, dtype=torch.float64))
    assert (weights[~support.kept] == 0.0).all()
    kept_twice = ((support.ids[..., None] == support.ids[..., None, :]) & support.kept[..., None]).sum(-2)
    assert (kept_twice[support.kept] == 1).all()


@pytest.mark.parametrize("rule", ["mix", "floor"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"max_entropy_nats": 0.8}])
@pytest.mark.parametrize("name", ["softmax", "gumbel_softmax"])
def test_gradients_are_finite_differences(name, settings, rule):
    relaxation = guided(relaxation_of(name, **settings), rule)
    logits, _, support = guided_support(relaxation, 0.35)
    kept = logits.gather(-1, support.ids)
    assert torch.autograd.gradcheck(lambda z: relaxation.weights(z, support), kept.requires_grad_(), atol=1e-6)


def test_the_true_token_is_added_where_the_nucleus_removed_it_or_k_left_it_out():
    relaxation = guided(relaxation_of("softmax", top_k=7, min_p=0.3), "floor")
    _, targets, support = guided_support(relaxation, 0.2)
    assert (support.ids[:, -1] == targets).all()
    inside = ((support.ids[:, :-1] == targets[:, None]) & support.kept[:, :-1]).any(-1)
    assert 0 < inside.sum() < N
    assert torch.equal(support.kept[:, -1], ~inside)


def test_settings_may_be_tensors_that_carry_gradients():
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    relaxation = guided(SoftmaxMixture(Truncation(5)), "mix")
    object.__setattr__(relaxation.base, "temperature", temperature)
    logits, _, support = guided_support(relaxation, 0.25)
    value = relaxation.weights(logits.gather(-1, support.ids), support).square().sum()
    (gradient,) = torch.autograd.grad(value, temperature)

    def at(number):
        other = guided(SoftmaxMixture(Truncation(5), number), "mix")
        return other.weights(logits.gather(-1, support.ids), support).square().sum().item()

    assert gradient.item() == pytest.approx((at(0.7 + 1e-6) - at(0.7 - 1e-6)) / 2e-6, rel=1e-6)


def test_guidance_survives_what_records_go_through():
    relaxation = guided(relaxation_of("softmax"), "mix")
    *_, support = guided_support(relaxation, 0.5)
    stacked = Support.stacked([support, support])
    assert stacked.guidance.shape == (N, 2)
    assert torch.equal(stacked.flat().guidance, stacked.guidance.flatten())
    assert torch.equal(stacked.at(slice(None), 1).guidance, support.guidance)


def test_coins_are_keyed_by_sequence_and_come_as_often_as_asked_for():
    def drawn(indices, probability, step=0):
        return coin_amounts(0.25, probability, 500, SequenceRandom.keyed(3, step, indices, 1))

    both = drawn([0, 1], 0.3)
    assert set(both.unique().tolist()) == {0.25, 1.0}
    # A share of 1,000 coins: standard error 0.0145, so five of them; chance of a false failure 6e-7 (fixed seed).
    assert (both == 1.0).float().mean().item() == pytest.approx(0.3, abs=0.0725)
    assert torch.equal(drawn([1], 0.3), both[1:])
    assert not torch.equal(drawn([0, 1], 0.3, step=1), both)
    assert (both == 1.0).logical_and(drawn([0, 1], 0.6) < 1.0).sum() == 0  # common numbers for every probability
    assert (drawn([0, 1], 0.0) == 0.25).all()
    assert (drawn([0, 1], 1.0) == 1.0).all()
