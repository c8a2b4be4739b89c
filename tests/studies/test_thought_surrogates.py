"""Surrogates in the laboratory of thoughts: what they cost, what they learn, and a gate that stays shut."""

import pytest
import torch
from studies.test_thought_problem import made, problem_of, rule

from softrl.estimators.thoughts import surrogate_inputs, trusted_value
from softrl.rewards.surrogate import RewardSurrogate


def test_reward_calls_are_those_that_are_read(monkeypatch):
    monkeypatch.setattr("softrl.studies.thought_methods._FIT_STEPS", 10)
    problem = problem_of(num_samples=4)
    calls = problem.num_anchors * 4
    assert made(problem, "rloo").reward_calls == calls
    assert made(problem, rule("rloo", surrogate="always")).reward_calls == 0.0
    every = problem.every_thought()
    always = made(problem, rule("rloo", surrogate="always", pilot_draws=4)).surrogate
    middle = always(*surrogate_inputs(every.thoughts, every.passed, every.embeds)).std_nats.median().item()
    gate = {"surrogate": "gated", "surrogate_spread": middle, "pilot_draws": 4}
    monkeypatch.setattr(RewardSurrogate, "observe", lambda self, errors: None)
    assert made(problem, rule("rloo", **gate)).reward_calls == calls, "of an error that is not known"
    monkeypatch.setattr(RewardSurrogate, "observe", lambda self, errors: self.mean_square_error.zero_())
    own, prior = every.log_probs.exp(), every.log_prior.exp()
    for proposal, each in (("policy", [own] * 4), ("mixture", [(own + prior) / 2] * 4), ("halves", [own, prior] * 2)):
        gated = made(problem, rule("rloo", proposal=proposal, **gate))
        agrees = gated.surrogate(*surrogate_inputs(every.thoughts, every.passed, every.embeds)).std_nats < middle
        sets = torch.einsum("ma,mb,mc,md->mabcd", *each)  # of the probabilities of all draws
        among = torch.einsum("ma,mb,mc,md->mabcd", *[agrees.to(own)] * 4)
        assert gated.reward_calls == pytest.approx(4.0 * (sets * (1.0 - among)).sum().item(), rel=1e-6)
        assert 0.0 < gated.reward_calls < calls
    with_talk = made(problem_of(num_samples=4, part="whole"), rule("rloo", surrogate="always"))
    assert with_talk.reward_calls == calls
    assert made(problem, rule("st_gumbel", surrogate="always", pilot_draws=4)).reward_calls == 0.0
    mixtures = rule("gumbel_softmax", surrogate="gated", pilot_draws=4)
    assert made(problem, mixtures).reward_calls == calls


def test_a_surrogate_learns_the_rewards():
    problem = problem_of(num_samples=4)
    every = problem.every_thought()
    always = made(problem, rule("rloo", surrogate="always", pooling="flatten"))
    assert always.unbiased_for is None
    estimated = trusted_value(always.surrogate, every.thoughts, every.passed, every.embeds).flatten(0, 1)
    weights = every.log_probs.exp()
    error = (weights * (estimated - every.rewards).square()).sum(-1)
    spread = (weights * (every.rewards - (weights * every.rewards).sum(-1, keepdim=True)).square()).sum(-1)
    assert (error < 0.1 * spread).all()
    assert not any(parameter.requires_grad for parameter in always.surrogate.parameters())
    off = float((error / every.rewards.shape[0]).sum().sqrt())  # on thoughts of other draws than it was fitted to
    assert always.surrogate.rmse_nats == pytest.approx(off, rel=0.3)


def test_a_gate_that_trusts_nothing_changes_nothing():
    problem = problem_of()
    shut = made(problem, rule("rloo", surrogate="gated", surrogate_spread=1e-12, pilot_draws=4))
    torch.testing.assert_close(
        problem.draws(shut, 0, 8).gradients, problem.draws(made(problem, "rloo"), 0, 8).gradients
    )
