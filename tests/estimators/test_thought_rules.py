"""Rules of learning from thoughts: expected gradients by enumeration of all sets of thoughts, against autograd's.

Every set of S thoughts is an anchor of one batch, weighted by its probability, see `thought_problem`.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from estimators.thought_problem import (
    BETA,
    Problem,
    all_sets,
    apart,
    descent,
    expected,
    expected_of_two_anchors,
    numbers,
)

from softrl.estimators.thought_rules import THOUGHT_RULES, LeaveOneOut, LogMeanExp, ScoredThoughts, make_thought_rule

DECLARED = {
    "reinforce, no baseline": ("reinforce", {"baseline": "none"}, (1, 2, 3)),
    "rloo": ("rloo", {}, (2, 3)),
    "log_mean_exp": ("log_mean_exp", {}, (2, 3)),
}
NEITHER = {
    "reinforce": ("reinforce", {}),
    "reinforce, positive": ("reinforce", {"positive_only": True}),
    "reinforce, positive, no baseline": ("reinforce", {"baseline": "none", "positive_only": True}),
    "rloo, positive": ("rloo", {"positive_only": True}),
    "self_normalized": ("self_normalized", {}),
    "trice": ("trice", {}),
    **{name: (name, {}) for name in ("listwise", "nca", "plackett_luce", "dpo", "one_winner", "partition")},
    "partition_learned": ("partition_learned", {}),
}


@pytest.mark.parametrize("off_policy", [False, True], ids=["own", "proposal"])
@pytest.mark.parametrize("name", DECLARED)
def test_declared_rules_have_the_gradient_they_declare(name, off_policy):
    rule_name, settings, counts = DECLARED[name]
    rule = make_thought_rule(rule_name, settings)
    for count in counts:
        truth = Problem().mean() if rule.unbiased_for == "mean" else Problem().log_mean(count)
        assert apart(expected(rule, count, off_policy), truth) < 1e-10
    assert apart(Problem().mean(), Problem().log_mean(2)) > 0.01, "the two objectives have to be told apart"


@pytest.mark.parametrize("off_policy", [False, True], ids=["own", "proposal"])
def test_a_baseline_of_other_anchors_is_unbiased_with_one_thought(off_policy):
    rule = make_thought_rule("reinforce", {"baseline": "batch"})
    assert rule.unbiased_for == "mean"
    for count in (1, 2):
        assert apart(*expected_of_two_anchors(rule, count, off_policy)) < 1e-10
    shifted = make_thought_rule("reinforce", {"baseline": "batch", "positive_only": True})
    assert apart(*expected_of_two_anchors(shifted, 1)) > 0.01


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", NEITHER)
def test_rules_that_declare_neither_are_neither(name, count):
    rule = make_thought_rule(*NEITHER[name])
    assert rule.unbiased_for is None
    gradient = expected(rule, count)
    assert apart(gradient, Problem().mean()) > 0.01
    assert apart(gradient, Problem().log_mean(count)) > 0.01


@pytest.mark.parametrize("name", ["rloo", "reinforce", "log_mean_exp"])
def test_a_cap_is_declared_and_biases_off_policy_only(name):
    settings = {"baseline": "none"} if name == "reinforce" else {}
    rule, free = (make_thought_rule(name, settings | cap) for cap in ({"max_importance": 1.1}, {}))
    assert rule.unbiased_for is None
    assert apart(expected(rule, 2, off_policy=True), expected(free, 2)) > 0.01
    assert apart(expected(rule, 2), expected(free, 2)) < 1e-10


def test_every_rule_is_declared_here():
    assert {name for name, *_ in DECLARED.values()} | {name for name, _ in NEITHER.values()} == set(THOUGHT_RULES)
    assert {rule.name for rule in map(make_thought_rule, THOUGHT_RULES)} == set(THOUGHT_RULES)


@dataclass(frozen=True)
class OwnRewardInBaseline(LeaveOneOut):
    """Planted: the thought itself in its baseline."""

    def baselines(self, rewards):
        return rewards.mean(-1, keepdim=True)


@dataclass(frozen=True)
class BoundWithoutThought(LogMeanExp):
    """Planted: the baseline leaves out another thought than its own."""

    def coefficients(self, scored):
        right = super().coefficients(scored)
        bound = scored.used_rewards().logsumexp(-1, keepdim=True)
        return bound - (bound - right).roll(1, -1)


@dataclass(frozen=True)
class LeakingReward(LeaveOneOut):
    """Planted: the thought part trains the talk part as well."""

    def _losses(self, scored):
        return super()._losses(scored) - 0.1 * scored.rewards.mean(-1)


@pytest.mark.parametrize("planted", [OwnRewardInBaseline, BoundWithoutThought, LeakingReward])
def test_planted_errors_are_seen(planted):
    truth = Problem().log_mean(3) if planted is BoundWithoutThought else Problem().mean()
    assert planted().unbiased_for is not None
    assert apart(expected(planted(), 3), truth) > 0.01


def test_samples_of_another_proposal_taken_for_the_policys_are_seen():
    problem, sets = Problem(), all_sets(2)
    scored = problem.scored(sets, off_policy=True)
    taken = replace(scored, log_proposal=scored.log_probs.detach())
    ascent = (scored.log_proposal.sum(-1).exp() * descent(LeaveOneOut(), taken)).sum()
    assert apart(problem.gradient(ascent), Problem().mean()) > 0.01


@pytest.mark.parametrize("off_policy", [False, True], ids=["own", "proposal"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_mean_as_baseline_scales_the_thought_part(count, off_policy):
    """(S − 1)/S times the thought part of ∇J, beside all of the talk part."""
    problem = Problem()
    thought = problem.gradient((problem.log_policy().exp() * problem.rewards().detach()).sum())
    rule = make_thought_rule("reinforce")
    ours = expected(rule, count, off_policy, talk=False)
    assert apart(ours, (count - 1) / count * thought) < 1e-10
    talk = problem.gradient((problem.log_policy().detach().exp() * problem.rewards()).sum())
    assert apart(expected(rule, count, off_policy) - ours, talk) < 1e-10


@pytest.mark.parametrize("count", [2, 3])
def test_self_normalized_is_the_bound_with_the_proposal_held(count):
    """∇ E_q log mean w exp r with q constant, which nears ∇ log p(y | x) from S = 2 to 4 to 6."""
    problem, sets = Problem(), all_sets(count)
    log_weights = (problem.log_policy() - problem.log_proposal + problem.rewards())[sets]
    chance = problem.log_proposal[sets].sum(-1).exp()
    truth = problem.gradient((chance * log_weights.logsumexp(-1)).sum())
    rule = make_thought_rule("self_normalized")
    assert apart(expected(rule, count, off_policy=True), truth) < 1e-10
    marginal = problem.gradient((problem.log_policy() + problem.rewards()).logsumexp(0))
    distances = [apart(expected(rule, size, off_policy=True), marginal) for size in (2, 4, 6)]
    assert distances[0] > distances[1] > distances[2]


@pytest.mark.parametrize("count", [2, 3])
def test_vargrad_is_reinforce_with_the_mean_as_baseline_and_its_mean_is_known(count):
    problem, sets = Problem(), all_sets(count)
    scored = problem.scored(sets)
    total = (scored.rewards - BETA * scored.log_ratio()).detach()
    rule = make_thought_rule("partition", {"beta": BETA})
    ours = torch.autograd.grad(rule.thought_losses(scored).sum(), scored.log_probs, retain_graph=True)[0]
    reinforce = make_thought_rule("reinforce").thought_losses(replace(scored, rewards=total))
    theirs = torch.autograd.grad(reinforce.sum(), scored.log_probs, retain_graph=True)[0]
    torch.testing.assert_close(ours, 2.0 / BETA * theirs, rtol=1e-10, atol=1e-12)  # of losses: both have their minus
    log_policy = problem.log_policy()
    kept = (log_policy.exp() * (problem.rewards().detach() - BETA * (log_policy - problem.log_prior))).sum()
    truth = 2.0 / BETA * (count - 1) / count * problem.gradient(kept)
    assert apart(expected(rule, count, talk=False), truth) < 1e-10


EVERY = {**{name: (rule, settings) for name, (rule, settings, _) in DECLARED.items()}, **NEITHER}


@pytest.mark.parametrize("off_policy", [False, True], ids=["own", "proposal"])
@pytest.mark.parametrize("name", EVERY)
def test_gradients_go_where_they_may(name, off_policy):
    """log π alone (and log Z); talk weights are constants, sum to 1 on-policy, and to 1 in expectation elsewhere."""
    rule, problem, sets = make_thought_rule(*EVERY[name]), Problem(), all_sets(3)
    made = problem.scored(sets, off_policy)
    leaves = {
        field: getattr(made, field).detach().requires_grad_()
        for field in ("rewards", "log_probs", "log_proposal", "log_prior", "log_z")
    }
    leaves["estimated"] = numbers(*sets.shape, seed=4).requires_grad_()
    trusted = numbers(*sets.shape, seed=5) > 0.0
    scored = ScoredThoughts(**leaves, trusted=trusted, uniforms=made.uniforms)
    rule.thought_losses(scored).sum().backward()
    reached = {field for field, leaf in leaves.items() if leaf.grad is not None and leaf.grad.abs().sum() > 0.0}
    assert reached == {"log_probs"} | ({"log_z"} if rule.name == "partition_learned" else set())
    weights = rule.talk_weights(scored)
    assert not weights.requires_grad
    mean = (scored.log_proposal.sum(-1).exp() * weights.sum(-1)).sum().detach()
    assert float(mean) == pytest.approx(1.0, abs=1e-12)
    if not off_policy:
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(sets), dtype=torch.float64))


@pytest.mark.parametrize("name", EVERY)
def test_trusted_estimates_replace_rewards(name):
    rule, scored = make_thought_rule(*EVERY[name]), Problem().scored(all_sets(2))
    estimated, trusted = numbers(16, 2, seed=4), numbers(16, 2, seed=5) > 0.0
    gated = replace(scored, estimated=estimated, trusted=trusted)
    swapped = replace(scored, rewards=torch.where(trusted, estimated, scored.rewards))
    for function in (rule.thought_losses, rule.talk_weights):
        torch.testing.assert_close(function(gated), function(swapped), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(rule.thought_losses(gated), rule.thought_losses(scored))
    nothing = replace(gated, trusted=torch.zeros_like(trusted))
    assert torch.equal(rule.thought_losses(nothing), rule.thought_losses(scored))
