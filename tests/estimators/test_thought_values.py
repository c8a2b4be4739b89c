"""Rules of learning from thoughts: values against loops and formulas written out, and what they refuse."""

import itertools
import math
from dataclasses import replace

import jaxtyping
import pytest
import torch
from estimators.thought_problem import BETA, Problem, all_sets, numbers

from softrl.estimators.thought_rules import THOUGHT_RULES, ScoredThoughts, make_thought_rule
from softrl.objectives import listwise


@pytest.mark.parametrize("with_prior", [True, False])
def test_rankings_against_losses_written_out(with_prior):
    scored = Problem().scored(all_sets(3))
    if not with_prior:
        scored = replace(scored, log_prior=None)
    s = 0.1 * (scored.log_probs - (scored.log_prior if with_prior else 0.0))
    losses = {name: make_thought_rule(name).thought_losses(scored) for name in ("plackett_luce", "dpo", "one_winner")}
    for row, rewards in enumerate(scored.rewards.tolist()):
        first, second, third = sorted(range(3), key=lambda i: -rewards[i])  # stable: the first of equals is in front
        expected_winner = -torch.nn.functional.logsigmoid(s[row, first] - s[row, [second, third]].logsumexp(0))
        torch.testing.assert_close(losses["one_winner"][row], expected_winner, rtol=1e-12, atol=1e-12)
        if len(set(rewards)) == 3:
            ranking = s[row].logsumexp(0) + s[row, [second, third]].logsumexp(0) - s[row, [first, second]].sum()
            torch.testing.assert_close(losses["plackett_luce"][row], ranking, rtol=1e-12, atol=1e-12)
        if rewards[0] != rewards[1]:
            better, worse = (0, 1) if rewards[0] > rewards[1] else (1, 0)
            dpo = -torch.nn.functional.logsigmoid(s[row, better] - s[row, worse])
            torch.testing.assert_close(losses["dpo"][row], dpo, rtol=1e-12, atol=1e-12)


def others_of(values, left_out):
    return [value for i, value in enumerate(values) if i != left_out]


@pytest.mark.parametrize("name", ["rloo", "batch", "log_mean_exp", "leave_one_out"])
def test_baselines_against_loops(name):
    """What no expectation depends on, and variance does."""
    scored = Problem().scored(all_sets(3)[20:32])
    table, rewards = scored.rewards.tolist(), scored.rewards.detach()
    settings = {"batch": ("reinforce", {"baseline": "batch"}), "leave_one_out": ("trice", {"control": name})}
    rule = make_thought_rule(*settings.get(name, (name, {})))
    ours = rule.coefficients(scored)
    for m, s in itertools.product(range(12), range(3)):
        rest = others_of(table[m], s)
        if name == "rloo":
            wanted = (table[m][s] - sum(rest) / 2) / 3
        elif name == "batch":
            wanted = (table[m][s] - sum(map(sum, others_of(table, m))) / 33) / 3
        elif name == "log_mean_exp":
            replaced = torch.tensor([*rest, sum(rest) / 2], dtype=torch.float64)
            wanted = float(rewards[m].logsumexp(0) - replaced.logsumexp(0))
        else:
            rates = [min(1.0, math.exp(rest[i] - rest[1 - i])) for i in (0, 1)]
            wanted = float(rule.talk_weights(scored)[m, s]) - sum(rates) / 2 / 3
        assert float(ours[m, s]) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_talk_weights_of_rules_that_compare_are_normalised_importance():
    scored = Problem().scored(all_sets(3), off_policy=True)
    ratio = (scored.log_probs - scored.log_proposal).detach().exp()
    for name in ("listwise", "nca", "plackett_luce", "dpo", "one_winner", "partition", "partition_learned"):
        weights = make_thought_rule(name).talk_weights(scored)
        torch.testing.assert_close(weights, ratio / ratio.sum(-1, keepdim=True), rtol=1e-12, atol=1e-12)


def test_nca_and_a_learned_log_z_against_formulas_written_out():
    scored = Problem().scored(all_sets(3))
    s, r = scored.log_probs - scored.log_prior, scored.rewards.detach()
    weights = (r / BETA).exp() / (r / BETA).exp().sum(-1, keepdim=True)
    nca = (weights * (1 + (-s).exp()).log() + (1 + s.exp()).log() / 3).sum(-1)
    found = make_thought_rule("nca", {"beta": BETA}).thought_losses(scored)
    torch.testing.assert_close(found, nca, rtol=1e-12, atol=1e-12)
    balance = sum((s[:, i] + scored.log_z - r[:, i] / BETA) ** 2 for i in range(3)) / 3
    found = make_thought_rule("partition_learned", {"beta": BETA}).thought_losses(scored)
    torch.testing.assert_close(found, balance, rtol=1e-12, atol=1e-12)


def test_listwise_is_stationary_at_the_posterior_whatever_the_proposal():
    problem = Problem()
    log_ratio = (problem.rewards() / BETA).detach()
    log_probs = (problem.log_prior + log_ratio).log_softmax(0)[all_sets(3)].requires_grad_()
    scored = replace(problem.scored(all_sets(3), off_policy=True), log_probs=log_probs)
    for name in ("listwise", "partition"):
        loss = make_thought_rule(name, {"beta": BETA}).thought_losses(scored).sum()
        assert torch.autograd.grad(loss, log_probs)[0].abs().max() < 1e-12
    weights = listwise.target_weights(scored.rewards.detach(), BETA)
    assert (weights - 1.0 / 3.0).abs().max() > 0.1, "flat targets show nothing"


def test_large_and_small_numbers_stay_finite():
    """Log-likelihoods of −1,000 nats, and the ones of long thoughts."""
    rewards = -1000.0 + 100.0 * numbers(6, 4)
    log_probs = -500.0 + numbers(6, 4, seed=1)
    given = {"log_prior": log_probs + 1.0, "log_z": numbers(6), "uniforms": torch.full((6, 4), 0.5).double()}
    for name in THOUGHT_RULES:
        leaf = log_probs.clone().requires_grad_()
        scored, rule = ScoredThoughts(rewards, leaf, log_probs, **given), make_thought_rule(name)
        (gradient,) = torch.autograd.grad(rule.thought_losses(scored).sum(), leaf)
        assert gradient.isfinite().all(), name
        assert rule.talk_weights(scored).isfinite().all(), name


def plain(count=2, anchors=3, **changes):
    return ScoredThoughts(
        **{name: numbers(anchors, count) for name in ("rewards", "log_probs", "log_proposal")} | changes
    )


@pytest.mark.parametrize("name", sorted(set(THOUGHT_RULES) - {"partition_learned"}))
def test_one_thought_is_refused_where_nothing_can_be_compared(name):
    rule = make_thought_rule(name)
    for function in (rule.thought_losses, rule.talk_weights):
        with pytest.raises(ValueError, match=rf"rewards: rule '{name}' needs at least 2 .*got \[3, 1\]; sample more"):
            function(plain(1))


@pytest.fixture
def unchecked():
    """As users run it: without jaxtyping's hook, which would be the first to complain here."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plain(log_probs=numbers(3, 4)), r"log_probs must have .*\[M, S\] = \[3, 2\].*got \[3, 4\]; sum"),
        (lambda: plain(log_z=numbers(2)), r"log_z must have the shape \[M\] = \[3\].*got \[2\]"),
        (lambda: plain(rewards=numbers(3)), r"rewards must have the shape .*got \[3\]; one thought"),
        (lambda: plain(anchors=0), r"both at least 1, got \[0, 2\]"),
        (lambda: plain(estimated=numbers(3, 2)), "trusted is missing; pass both or neither"),
        (lambda: plain(estimated=numbers(3, 2), trusted=numbers(3, 2)), "trusted must be boolean, got torch.float64"),
        (lambda: make_thought_rule("partition_learned").thought_losses(plain()), "log_z: rule .* got None; pass"),
        (lambda: make_thought_rule("nca").thought_losses(plain()), "log_prior: rule 'nca' needs it, got None; pass"),
        (lambda: make_thought_rule("trice").talk_weights(plain()), "uniforms: rule 'trice' .*torch.rand"),
        (
            lambda: make_thought_rule("trice", {"control": "leave_one_out"}).talk_weights(plain()),
            "needs at least 3 thoughts",
        ),
        (
            lambda: make_thought_rule("reinforce", {"baseline": "batch"}).thought_losses(plain(anchors=1)),
            r"mean over other anchors, got \[1, 2\].*pass more anchors",
        ),
        (lambda: make_thought_rule("reinforce", {"baseline": "value"}), "baseline must be one of .*got 'value'"),
        (lambda: make_thought_rule("trice", {"control": "other"}), "control must be a number or 'leave_one_out'"),
        (lambda: make_thought_rule("rloo", {"max_importance": 0.0}), "max_importance must be positive.* got 0.0"),
        (lambda: make_thought_rule("listwise", {"beta": -1.0}), "beta must be positive and finite.* got -1.0"),
        (lambda: make_thought_rule("partition", {"log_z": "mean"}), "log_z must be one of .*got 'mean'"),
        (lambda: make_thought_rule("grpo"), "rule must be one of .*got 'grpo'"),
        (lambda: make_thought_rule("rloo", {"beta": 1.0}), r"rloo takes the settings .*got \['beta'\] as well"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
