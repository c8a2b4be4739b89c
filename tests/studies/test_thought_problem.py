"""Thoughts in the laboratory: truths against finite differences, expected gradients of rules by enumeration of all
sets through the real model, declarations by z-scores, planted errors, and settings that cannot be.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import with_float64_norms

from softrl.cli.arguments import find_recipe
from softrl.estimators.moments import bonferroni_bound, largest_z, moments
from softrl.estimators.thought_exact import all_multisets, expected_value
from softrl.estimators.thought_rules import THOUGHT_RULES
from softrl.rewards.surrogate import RewardSurrogate, SurrogateReward
from softrl.studies.draws import whole_gradients
from softrl.studies.methods import Method
from softrl.studies.problems import thinking_lm
from softrl.studies.thought_methods import make_thought_estimator
from softrl.studies.variance import _methods, run
from softrl.studies.variance_config import ProblemSpec, VarianceConfig, expanded, load_config
from softrl.studies.variance_report import contradictions
from softrl.tokens.relaxation import RELAXATIONS

# Nine thoughts after each of two tokens; a seed whose thoughts matter (a test says so).
TINY = {"vocab_size": 3, "n_thought": 2, "num_texts": 1, "text_length": 4, "seed": 5}


def problem_of(**settings):
    problem = thinking_lm("t", **(TINY | settings))
    for model in filter(None, (problem.model, problem.prior)):
        with_float64_norms(model)
    return problem


def made(problem, given):
    return make_thought_estimator(Method.parsed(given), problem)


def apart(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


# Truths


@pytest.mark.parametrize("part", ["thought", "whole"])
@pytest.mark.parametrize("objective", ["mean", "log_mean", "marginal"])
def test_the_truth_against_finite_differences(objective, part):
    """Along three random directions; of the thought's part with the rewards held."""
    problem = problem_of(objective=objective, part=part, n_talk=2)
    truth, held = problem.truth().gradient, problem.every_thought().rewards.detach()
    parameters = list(problem.parameters.values())
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def value(direction, step):
        moves = direction.split([p.numel() for p in parameters])
        for parameter, move in zip(parameters, moves, strict=True):
            parameter.add_(move.view_as(parameter), alpha=step)
        every = problem.every_thought()
        for parameter, move in zip(parameters, moves, strict=True):
            parameter.add_(move.view_as(parameter), alpha=-step)
        rewards = held if part == "thought" else every.rewards
        return by_hand(every.log_probs, rewards, objective, problem.num_samples)

    for _ in range(3):
        direction = torch.randn(len(truth), generator=generator, dtype=torch.float64)
        # a short step: the mixing head has kinks, and one within it would count
        slope = (value(direction, 1e-6) - value(direction, -1e-6)) / 2e-6
        assert float(slope) == pytest.approx(float(direction @ truth), rel=1e-6, abs=1e-9)


def by_hand(log_probs, rewards, objective, num_samples):
    """J without the functions under test: sets of thoughts as sequences, each with its own probability."""
    if objective == "mean":
        return (log_probs.exp() * rewards).sum(-1).mean()
    if objective == "marginal":
        return (log_probs.exp() * rewards.exp()).sum(-1).log().mean()
    total = 0.0
    for sequence in itertools.product(range(log_probs.shape[1]), repeat=num_samples):
        ids = list(sequence)
        total = total + log_probs[:, ids].sum(-1).exp() * rewards[:, ids].exp().mean(-1).log()
    return total.mean()


def test_multisets_stand_for_all_sequences():
    sets, log_counts = all_multisets(4, 3)
    assert len(sets) == math.comb(6, 3)
    assert float(log_counts.exp().sum()) == pytest.approx(4**3)
    counted = {tuple(each): round(math.exp(n)) for each, n in zip(sets.tolist(), log_counts.tolist(), strict=True)}
    assert (counted[(0, 0, 0)], counted[(0, 0, 1)], counted[(0, 1, 2)]) == (1, 3, 6)


def test_the_bound_lies_between_the_mean_and_the_marginal_and_nears_it():
    every = problem_of().every_thought()
    values = [expected_value(every.log_probs, every.rewards, "log_mean", count).mean().item() for count in (1, 2, 6)]
    mean, marginal = (
        expected_value(every.log_probs, every.rewards, objective, 1).mean().item()
        for objective in ("mean", "marginal")
    )
    assert values[0] == pytest.approx(mean)
    assert mean < values[1] < values[2] < marginal


def test_thoughts_matter_and_the_policy_can_be_peaked():
    """A problem whose thoughts are all worth the same, or whose mixing weight is zero, would show nothing."""
    peaked, flat = (problem_of(temperature=temperature).every_thought() for temperature in (0.3, 2.0))
    torch.testing.assert_close(peaked.rewards, flat.rewards, rtol=1e-12, atol=0.0)
    assert flat.rewards.std(-1).min() > 0.05
    assert flat.passed.mixing.abs().min() > 0.1
    entropy = [-(each.log_probs.exp() * each.log_probs).sum(-1).mean().item() for each in (peaked, flat)]
    assert entropy[0] < 0.75 * entropy[1]


# Expected gradients by enumeration


def expected(problem, given, proposal_weights="policy"):
    """The exact expected estimate: every set of S thoughts at all anchors at once, weighted by its probability."""
    estimator = made(problem, given)
    every = problem.every_thought()
    ids = every.thoughts.tokens[0, 0]  # H n
    sets = torch.tensor(list(itertools.product(range(len(ids)), repeat=problem.num_samples)))
    count, (texts, anchors) = len(sets), problem.anchors[0].shape
    rows = ids[sets][:, None, None].expand(-1, texts, anchors, -1, -1).flatten(0, 1)
    scored = problem.scored(estimator, problem.given(rows), problem._random(range(count), 0, 2))
    ascents = problem.ascents(replace(estimator, log_z=repeated(estimator.log_z, count)), scored).view(count, -1)
    chance = chances(every, sets, estimator.proposal)
    torch.testing.assert_close(chance.sum(0), torch.ones_like(chance[0]))
    value = (chance * ascents).sum(0).mean()
    return whole_gradients(value[None], list(problem.parameters.values()))[0]


def repeated(log_z, count):
    return None if log_z is None else log_z.repeat(count)


def chances(every, sets, proposal):
    """Probability of every set at every anchor, [Q, M]."""
    own, prior = every.log_probs.detach().exp(), every.log_prior.exp()
    half = sets.shape[1] // 2
    places = {
        "policy": [own] * (2 * half), "prior": [prior] * (2 * half), "mixture": [(own + prior) / 2] * (2 * half),
        "halves": [own] * half + [prior] * half,
    }[proposal]  # fmt: skip
    return torch.stack([place[:, sets[:, s]] for s, place in enumerate(places)]).prod(0).T


def rule(name, **settings):
    return {"name": name, **settings}


HARD = {
    "reinforce, no baseline": rule("reinforce", baseline="none"),
    "rloo": rule("rloo"),
}
NOT_HARD = {
    "reinforce": rule("reinforce"),
    "reinforce, positive": rule("reinforce", positive_only=True),
    "rloo, positive": rule("rloo", positive_only=True),
    "self_normalized": rule("self_normalized"),
    "trice": rule("trice"),
    **{name: rule(name, reference="policy") for name in ("listwise", "nca")},
    # at beta 1 and S = 2 VarGrad's factor would be 2 / 1 * 1/2
    **{name: rule(name, reference="policy", beta=0.7) for name in ("partition", "partition_learned")},
    **{name: rule(name) for name in ("plackett_luce", "dpo", "one_winner")},
}


@pytest.mark.parametrize("part", ["thought", "whole"])
@pytest.mark.parametrize("proposal", ["policy", "prior", "mixture"])
@pytest.mark.parametrize("name", HARD)
def test_unbiased_rules_have_the_gradient_of_j(name, proposal, part):
    problem = problem_of(part=part)
    given = HARD[name] | {"proposal": proposal}
    assert made(problem, given).unbiased_for == "hard"
    assert apart(expected(problem, given), problem.truth().gradient) < 1e-10


@pytest.mark.parametrize("part", ["thought", "whole"])
@pytest.mark.parametrize("proposal", ["policy", "prior"])
def test_log_mean_exp_has_that_of_the_bound_and_not_that_of_j(proposal, part):
    problem, of_mean = problem_of(objective="log_mean", part=part), problem_of(part=part)
    given = rule("log_mean_exp", proposal=proposal)
    assert made(problem, given).unbiased_for == "hard"
    assert made(of_mean, given).unbiased_for == "other"
    assert made(problem, "rloo").unbiased_for == "other"
    assert apart(expected(problem, given), problem.truth().gradient) < 1e-10
    assert apart(expected(problem, given), of_mean.truth().gradient) > 0.01


def test_all_rules_are_here():
    assert {given["name"] for given in (*HARD.values(), *NOT_HARD.values())} | {"log_mean_exp"} == set(THOUGHT_RULES)


@pytest.mark.parametrize("name", NOT_HARD)
def test_rules_without_a_declaration_are_biased_here(name):
    problem = problem_of()
    assert made(problem, NOT_HARD[name]).unbiased_for is None
    assert apart(expected(problem, NOT_HARD[name]), problem.truth().gradient) > 0.05


@pytest.mark.parametrize("name", ["reinforce", "partition"])
def test_these_are_off_by_a_factor_only(name):
    """(S − 1)/S of REINFORCE with its own thought in the baseline; 2/β times that of VarGrad at the reference."""
    problem = problem_of()
    factor = {"reinforce": 0.5, "partition": 2.0 / 0.7 * 0.5}[name]
    given = rule("reinforce") if name == "reinforce" else rule("partition", beta=0.7, reference="policy")
    assert apart(expected(problem, given), factor * problem.truth().gradient) < 1e-10


def test_at_the_reference_listwise_is_twice_nca():
    problem = problem_of()
    listwise, nca = (expected(problem, rule(name, reference="policy")) for name in ("listwise", "nca"))
    assert apart(listwise, 2.0 * nca) < 1e-10


def test_halves_bias_a_leave_one_out_baseline_and_no_other():
    """The others of a thought of the policy are more often the prior's, so that its baseline is another one."""
    problem = problem_of()
    truth = problem.truth().gradient
    given = rule("rloo", proposal="halves")
    assert made(problem, given).unbiased_for is None
    assert apart(expected(problem, given), truth) > 0.05
    plain = rule("reinforce", baseline="none", proposal="halves")
    assert made(problem, plain).unbiased_for == "hard"
    assert apart(expected(problem, plain), truth) < 1e-10


# Draws

UNBIASED_DRAWS = {  # through the problem's own sampling, which the enumeration above leaves out
    "reinforce, other anchors": rule("reinforce", baseline="batch"),
    "rloo, mixture": rule("rloo", proposal="mixture"),
    "reinforce, halves": rule("reinforce", baseline="batch", proposal="halves"),
    "log_mean_exp": rule("log_mean_exp"),
}


def moving(gradients):
    return gradients.std(0) > 1e-12


@pytest.mark.parametrize("name", UNBIASED_DRAWS)
def test_declared_estimators_are_within_a_bound(name):
    """The largest z-score of 256 draws; a false alarm has a chance of at most 1e-3 for each (fixed seeds)."""
    objective = "log_mean" if name == "log_mean_exp" else "mean"
    problem = problem_of(num_samples=2, objective=objective, part="whole")
    estimator = made(problem, UNBIASED_DRAWS[name])
    assert estimator.unbiased_for == "hard"
    gradients, truth = problem.draws(estimator, 0, 256).gradients, problem.truth().gradient
    where = moving(gradients)
    assert truth[~where].abs().max() < 1e-9 if bool((~where).any()) else True
    assert largest_z(gradients[:, where], truth[where]) < bonferroni_bound(int(where.sum()) + 1)


@pytest.mark.parametrize("name", sorted(RELAXATIONS))
def test_soft_thoughts_are_biased_here_and_seen_to_be(name):
    problem = problem_of(num_samples=4)
    # the colder a mixture, the nearer it is to sampled tokens; at 2 its bias shows
    estimator = made(problem, rule(name, temperature=2.0 if name == "gumbel_softmax" else 1.0))
    assert estimator.unbiased_for == ("soft" if name in ("softmax", "gumbel_softmax") else None)
    measured = moments(problem.draws(estimator, 0, 96).gradients, problem.truth())
    assert measured.bias2.low > 0.01


def test_one_token_straight_through_of_a_reward_linear_in_it_is_exact():
    """The soft thoughts' own pass, held to what is known of them: a linear r_ψ in the surrogate's place."""
    problem = problem_of(n_thought=1, num_samples=4)
    slope = torch.randn(len(problem.model.start), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    estimator = replace(made(problem, "straight_through"), surrogate=Linear(slope))
    every = problem.every_thought()
    rewards = (every.embeds.detach() @ slope).sum(-1).flatten(0, 1)
    value = (every.log_probs.exp() * rewards).sum(-1).mean()
    truth = whole_gradients(value[None], list(problem.parameters.values()))[0]
    gradients = problem.draws(estimator, 0, 4).gradients
    assert apart(gradients, truth.expand(4, -1)) < 1e-5  # without noise; surrogates read float32


class Linear(RewardSurrogate):
    """The sum of the embeddings along a direction."""

    def __init__(self, slope):
        super().__init__(len(slope))
        self.slope = slope

    def forward(self, context, thoughts):
        estimated = (thoughts.double() @ self.slope).sum(-1)
        return SurrogateReward(estimated, torch.zeros_like(estimated), torch.ones_like(estimated).bool())


def test_a_planted_bias_of_a_twentieth_is_a_contradiction():
    """RLOO with 16 thoughts has a variance of about 0.05 along ∇J: 5% are more than five standard errors of 600."""
    problem = problem_of(num_samples=16)
    truth = problem.truth()
    gradients = problem.draws(made(problem, "rloo"), 0, 600).gradients
    spread = float((gradients @ truth.gradient).std() / truth.gradient.square().sum()) / len(gradients) ** 0.5
    assert spread < 0.05 / 5.0
    assert abs(moments(gradients, truth).bias_z) < 4.0
    assert abs(moments(1.05 * gradients, truth).bias_z) > 4.0


def test_the_report_contradicts_a_wrong_declaration(tmp_path, monkeypatch):
    """REINFORCE with its own thought in the baseline, declared unbiased: it is half of ∇J at S = 2."""
    from softrl.studies import thought_methods

    monkeypatch.setattr(thought_methods, "_declared", lambda *_: "hard")
    spec = ProblemSpec("t", "thoughts", ["rloo", "reinforce"], TINY)
    rows, _ = run(VarianceConfig("Which?", str(tmp_path), [spec], draws=96), lambda words: None)
    assert [row.estimator for row in contradictions([row for row in rows if row.group == "all"])] == ["reinforce"]


@pytest.mark.parametrize("name", ["rloo", "trice", "st_gumbel", "gumbel_softmax"])
def test_draws_do_not_depend_on_how_they_are_batched(name):
    def draws(batch, *parts):
        problem = problem_of(num_samples=3, num_texts=2, part="whole")
        problem.batch = batch
        estimator = made(problem, name)
        return torch.cat([problem.draws(estimator, first, count).gradients for first, count in parts])

    whole = draws(16, (0, 12))
    torch.testing.assert_close(draws(5, (0, 7), (7, 5)), whole, rtol=0, atol=1e-12)
    assert (whole[0] - whole[1]).norm() > 1e-3


def test_straight_through_gumbel_thinks_the_same_thoughts():
    problem = problem_of(num_samples=4)
    hard, soft = (problem.thoughts(made(problem, name), range(8), 0)[0] for name in ("rloo", "st_gumbel"))
    assert torch.equal(hard.tokens, soft.tokens)


# Recipes and settings


@pytest.mark.parametrize("name", ["thoughts", "thoughts_models", "thoughts_options"])
def test_the_shipped_recipes_name_estimators_that_can_be_made(name, monkeypatch):
    """Loading parses names only; here each is made, with surrogates that are hardly fitted."""
    monkeypatch.setattr("softrl.studies.thought_methods._FIT_STEPS", 1)
    for spec in load_config(find_recipe(f"studies/{name}")).problems:
        problem = thinking_lm("t", **next(expanded(spec.settings)))
        for method in _methods(spec):
            make_thought_estimator(method, problem)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": "whole"}, "parts"),
        ({"part": "talk"}, r"part must be one of \['thought', 'whole'\]"),
        ({"objective": "maximum"}, "objective must be one of"),
        ({"prior": "none"}, "prior must be one of"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"n_thought": 0}, "n_thought must be at least 1"),
        ({"vocab_size": 10, "n_thought": 4}, r"V\^n = 10\^4 thoughts are too many"),
        ({"text_length": 1}, "text_length must leave a token to predict"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"objective": "log_mean", "num_samples": 20}, "too many to enumerate for objective 'log_mean'"),
    ],
)
def test_bad_settings_name_what_is_wrong(tmp_path, settings, message):
    spec = ProblemSpec("t", "thoughts", ["rloo"], TINY | settings)
    with pytest.raises(ValueError, match=message):
        run(VarianceConfig("Which?", str(tmp_path), [spec], draws=4), lambda words: None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rlo", "unknown estimator 'rlo'"),
        (rule("rloo", beta=1.0), r"no setting \['beta'\]"),
        (rule("rloo", proposal="posterior"), "proposal must be one of"),
        (rule("listwise", reference="base"), "reference must be one of"),
        (rule("listwise", beta=0.0), "beta must be positive"),
        (rule("nca"), "set reference: policy or prior"),
        (rule("trice", control="leave_one_out"), "at least 3 thoughts"),
        (rule("rloo", surrogate=True), "surrogate must be one of"),
        (rule("rloo", pilot_draws=4), r"\['pilot_draws'\] are of a surrogate"),
        (rule("rloo", surrogate="always", pilot_draws=0), "pilot_draws must be at least 1"),
        (rule("rloo", surrogate="gated", surrogate_spread=0.0), "max_std_nats must be positive"),
        (rule("rloo", surrogate="always", pooling="max"), "pooling must be one of"),
        (rule("partition_learned", surrogate="gated", pilot_draws=4), "known for surrogate: none or always"),
        (rule("st_gumbel", proposal="prior"), r"no setting \['proposal'\]"),
        (rule("st_gumbel", hops=-1), "hops must be at least 0"),
        (rule("st_gumbel", top_k=9), "larger than the vocabulary"),
        (rule("st_gumbel", method="sequential"), r"no setting \['method'\]"),
    ],
)
def test_bad_estimators_name_what_is_wrong(given, message):
    with pytest.raises(ValueError, match=message):
        made(problem_of(), given)


def test_halves_need_an_even_number():
    with pytest.raises(ValueError, match="make it even"):
        made(problem_of(num_samples=3), rule("rloo", proposal="halves"))
