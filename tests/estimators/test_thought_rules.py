"""Rules of learning from thoughts: expected gradients by enumeration of all sets of thoughts, against autograd's.

A thought is two tokens of two (four in all), autoregressive; the policy and the talk part share parameters, so that a
wrong scale of either part shows. Every set of S thoughts is an anchor of one batch, weighted by its probability.
"""

import itertools
from dataclasses import dataclass, replace

import jaxtyping
import pytest
import torch

from softrl.estimators.thought_rules import (
    THOUGHT_RULES,
    LeaveOneOut,
    LogMeanExp,
    ScoredThoughts,
    make_thought_rule,
    visit_shares,
)
from softrl.objectives import listwise

H, BETA = 4, 0.7  # thoughts there are


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Problem:
    """log π and r of all four thoughts, functions of the same parameters; a proposal and a reference beside."""

    def __init__(self, seed=0):
        self.parameters = numbers(9, seed=seed).requires_grad_()
        self.coupling = 0.4 * numbers(9, H * 5, seed=seed + 100)
        self.log_proposal = (0.5 * numbers(H, seed=seed + 200)).log_softmax(0)
        self.log_prior = numbers(H, seed=seed + 300).log_softmax(0)

    def log_policy(self):
        first, second = self.parameters[:2].log_softmax(0), self.parameters[2:6].reshape(2, 2).log_softmax(-1)
        return (first[:, None] + second).flatten()

    def rewards(self):
        """log p(y = 0 | h) of five tokens."""
        return (self.parameters @ self.coupling).reshape(H, 5).log_softmax(-1)[:, 0]

    def gradient(self, value):
        return torch.autograd.grad(value, self.parameters)[0]

    def mean(self):
        """∇J."""
        return self.gradient((self.log_policy().exp() * self.rewards()).sum())

    def log_mean(self, count):
        """∇ E log (1/S) Σ exp r."""
        sets = all_sets(count)
        values = self.rewards()[sets].logsumexp(-1) - torch.tensor(count, dtype=torch.float64).log()
        return self.gradient((self.log_policy()[sets].sum(-1).exp() * values).sum())

    def scored(self, sets, off_policy=False, **changes):
        log_probs = self.log_policy()[sets]
        log_proposal = self.log_proposal[sets] if off_policy else log_probs.detach()
        uniforms = torch.full(sets.shape, 0.5, dtype=torch.float64)
        log_z = numbers(len(sets), seed=9)
        given = {"log_prior": self.log_prior[sets], "log_z": log_z, "uniforms": uniforms, **changes}
        return ScoredThoughts(self.rewards()[sets], log_probs, log_proposal, **given)


def all_sets(count):
    return torch.tensor(list(itertools.product(range(H), repeat=count)))


def descent(rule, scored):
    """What a trainer ascends, of every anchor."""
    return (rule.talk_weights(scored) * scored.rewards).sum(-1) - rule.thought_losses(scored)


def expected(rule, count, off_policy=False, problem=None, talk=True, **changes):
    """The exact expected gradient of a rule's ascent, over all H^S sets."""
    problem = problem or Problem()
    sets = all_sets(count)
    scored = problem.scored(sets, off_policy, **changes)
    chance = scored.log_proposal.sum(-1).exp()
    torch.testing.assert_close(chance.sum(), torch.ones((), dtype=torch.float64))
    ascent = descent(rule, scored) if talk else -rule.thought_losses(scored)
    return problem.gradient((chance * ascent).sum())


def expected_of_two_anchors(rule, count, off_policy=False):
    """The same for rules that read other anchors: two independent anchors at once; with the sum of both their ∇J."""
    problems, sets = (Problem(0), Problem(1)), all_sets(2 * count)
    gradients = torch.zeros(9, dtype=torch.float64)
    for joint in sets.reshape(-1, 2, count):
        both = [problem.scored(ids[None], off_policy) for problem, ids in zip(problems, joint, strict=True)]
        names = ("rewards", "log_probs", "log_proposal")
        scored = ScoredThoughts(*(torch.cat([getattr(part, name) for part in both]) for name in names))
        total = (scored.log_proposal.sum().exp() * descent(rule, scored)).sum()
        gradients += sum(torch.autograd.grad(total, [problem.parameters for problem in problems]))
    return gradients, sum(problem.mean() for problem in problems)


def apart(ours, theirs):
    """Relative distance, so that 1e-10 and 0.01 mean something."""
    return float((ours - theirs).norm() / theirs.norm())


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


def walked_shares(log_weights):
    """Expected visits of one row of proposals: both outcomes of every step, followed with their probabilities."""
    visits = torch.zeros_like(log_weights)

    def follow(step, position, probability):
        visits[position] += probability
        if step + 1 == len(log_weights):
            return
        accept = min(1.0, float((log_weights[step + 1] - log_weights[position]).exp()))
        for moved, chance in ((step + 1, accept), (position, 1.0 - accept)):
            if chance > 0.0:
                follow(step + 1, moved, probability * chance)

    follow(0, 0, 1.0)
    return visits / len(log_weights)


@pytest.mark.parametrize("off_policy", [False, True], ids=["own", "proposal"])
def test_visits_against_a_walk_through_all_outcomes(off_policy):
    """10^5 chains of each of 4 sets of 4: 32 z-scores; |z| > 5 has a chance below 2e-5 in all of them."""
    problem = Problem()
    scored = problem.scored(torch.tensor([[0, 1, 2, 3], [3, 1, 1, 0], [2, 2, 0, 1], [1, 3, 0, 2]]), off_policy)
    log_weights = scored.used_rewards() + scored.log_importance()
    generator = torch.Generator().manual_seed(5)
    for row in log_weights:
        many = row.expand(100_000, -1)
        shares = visit_shares(many, torch.rand(many.shape, generator=generator, dtype=torch.float64))
        assert torch.equal(shares.sum(-1), torch.ones(len(shares), dtype=torch.float64))
        error = shares.std(0).clamp(min=1e-12) / len(shares) ** 0.5
        assert ((shares.mean(0) - walked_shares(row)).abs() / error).max() < 5.0


def chain_shares(log_weights, proposal, length):
    """Expected share of time of the chain at every thought, by powers of its transition matrix."""
    moves = proposal * (log_weights[None, :] - log_weights[:, None]).clamp(max=0.0).exp()
    moves = moves + torch.diag(1.0 - moves.sum(-1))
    state, total = proposal, torch.zeros_like(proposal)
    for _ in range(length):
        total, state = total + state, state @ moves
    return total / length


def test_visits_near_the_posterior():
    """Shares of 4,000 chains of 10 and of 400 proposals, against the chain's exact ones: 8 z-scores, |z| > 5 has a
    chance below 5e-6. The exact ones are within 0.03 of p(h | x, y) at 400, and 10 times nearer than at 10."""
    problem, generator = Problem(), torch.Generator().manual_seed(6)
    posterior = (problem.log_policy() + problem.rewards()).softmax(0).detach()
    proposal = problem.log_proposal.exp()
    sets = torch.multinomial(proposal.expand(4000, -1), 400, True, generator=generator)
    uniforms = torch.rand(sets.shape, generator=generator, dtype=torch.float64)
    rule, distance = make_thought_rule("trice"), {}
    for length in (10, 400):
        kept = sets[:, :length]
        weights = rule.talk_weights(problem.scored(kept, True, uniforms=uniforms[:, :length]))
        shares = torch.stack([(weights * (kept == thought)).sum(-1) for thought in range(H)], -1)
        exact = chain_shares(posterior.log() - proposal.log(), proposal, length)
        assert ((shares.mean(0) - exact).abs() / (shares.std(0) / len(sets) ** 0.5)).max() < 5.0
        distance[length] = float((exact - posterior).abs().max())
    assert distance[400] < 0.03
    assert distance[400] < distance[10] / 10
    assert (proposal - posterior).abs().max() > 0.1, "a proposal at its target shows nothing"


@pytest.mark.parametrize("off_policy", [False, True], ids=["own", "proposal"])
def test_trices_control_variate_changes_no_expectation(off_policy):
    """By enumeration at fixed uniforms: the acceptances are then a function of the set."""
    plain = expected(make_thought_rule("trice", {"control": 0.0}), 3, off_policy)
    for control in (1.0, 0.4, "leave_one_out"):
        varied = expected(make_thought_rule("trice", {"control": control}), 3, off_policy)
        assert apart(varied, plain) < 1e-10


def test_trice_has_no_noise_where_thoughts_do_not_matter():
    problem, sets = Problem(), all_sets(3)
    flat = replace(problem.scored(sets), rewards=torch.full(sets.shape, -1.0, dtype=torch.float64))
    for control in (1.0, "leave_one_out"):
        coefficients = make_thought_rule("trice", {"control": control}).coefficients(flat)
        assert coefficients.abs().max() < 1e-12
    assert make_thought_rule("trice", {"control": 0.0}).coefficients(flat).min() > 0.3


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
        (lambda: make_thought_rule("grpo"), "rule must be one of .*got 'grpo'"),
        (lambda: make_thought_rule("rloo", {"beta": 1.0}), r"rloo takes the settings .*got \['beta'\] as well"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(call, message, unchecked):
    with pytest.raises(ValueError, match=message):
        call()
