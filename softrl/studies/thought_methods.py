"""From a recipe's words to estimators of thoughts: rules, soft thoughts, and surrogates fitted before the draws."""

import math
from dataclasses import fields, replace
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softrl.estimators.pathwise import unbiased_for
from softrl.estimators.system import AdjointSettings
from softrl.estimators.thought_base import ThoughtRule
from softrl.estimators.thought_rules import THOUGHT_RULES, Reinforce, make_thought_rule
from softrl.estimators.thought_sets import NoiseContrastive, PartitionLearned
from softrl.estimators.thoughts import log_proposal, surrogate_inputs, trusted_value
from softrl.rewards.surrogate import Pooling, RewardSurrogate
from softrl.studies.language import PILOT_SEED
from softrl.studies.methods import RELAXATION_KEYS, Method, check_settings, made_relaxation
from softrl.studies.thought_problem import (
    EveryThought,
    Proposal,
    Reference,
    ThoughtEstimator,
    ThoughtProblem,
)
from softrl.tokens.relaxation import RELAXATIONS
from softrl.tokens.truncation import Truncation

SURROGATES = ("none", "gated", "always")
_SURROGATE_KEYS = ("surrogate", "surrogate_spread", "pooling", "pilot_draws")
_ADJOINT_KEYS = ("hops", "feedback_discount", "adjoint_clip")
_PILOT_DRAWS = 64
_SPREAD = 0.1  # nats
_FIT_STEPS, _LEARNING_RATE = 400, 1e-2


def make_thought_estimator(method: Method, problem: ThoughtProblem) -> ThoughtEstimator:
    """The estimator that a recipe names, with its surrogate fitted where it has one.

    A rule takes its own settings and `proposal`, `reference`; a relaxation those of `make_relaxation` and `hops`,
    `feedback_discount`, `adjoint_clip`. Both take `surrogate` (none, gated: where it trusts itself about all thoughts
    of an anchor, always), the `surrogate_spread` in nats below which its members agree and its error is small enough,
    `pooling`, and `pilot_draws` that it is fitted on; as many others tell its error.

    Raises:
        ValueError: an unknown name, a setting that the method does not have, or one outside its range.
    """
    if method.name in RELAXATIONS:
        return _soft(method, problem)
    if method.name not in THOUGHT_RULES:
        known = sorted((*THOUGHT_RULES, *RELAXATIONS))
        raise ValueError(f"unknown estimator {method.name!r}; of thoughts it must be one of {known}")
    return _by_rule(method, problem)


def _soft(method: Method, problem: ThoughtProblem) -> ThoughtEstimator:
    keys = [key for key in RELAXATION_KEYS if key != "relaxation"]
    check_settings(method, *keys, *_ADJOINT_KEYS, *_SURROGATE_KEYS)
    relaxation = made_relaxation(method, Truncation(problem.model.policy.vocab_size), method.name)
    relaxation.truncation.check_vocabulary(problem.model.policy.vocab_size)
    adjoint = AdjointSettings(**{key: method.settings[key] for key in _ADJOINT_KEYS if key in method.settings})
    surrogate = _surrogate(method, problem, "policy")
    declared = unbiased_for(relaxation, adjoint) if surrogate is None else None
    scored = float(problem.num_anchors * problem.num_samples)
    return _with_costs(ThoughtEstimator(declared, scored, None, relaxation, adjoint, surrogate=surrogate), problem)


def _by_rule(method: Method, problem: ThoughtProblem) -> ThoughtEstimator:
    own = [each.name for each in fields(THOUGHT_RULES[method.name]())]
    check_settings(method, *own, "proposal", "reference", *_SURROGATE_KEYS)
    rule = make_thought_rule(method.name, {key: method.settings[key] for key in own if key in method.settings})
    proposal = _choice(method, "proposal", get_args(Proposal))
    reference = _choice(method, "reference", get_args(Reference))
    _check_rule(rule, proposal, reference, problem)
    surrogate = _surrogate(method, problem, proposal)
    if isinstance(rule, PartitionLearned) and surrogate is not None and surrogate.max_std_nats < math.inf:
        raise ValueError(
            "estimator 'partition_learned': where its log Z converges is known for surrogate: none or always, and not "
            "for rewards that a gate chooses by all thoughts of a draw; got gated"
        )
    scored = float(problem.num_anchors * problem.num_samples)
    made = ThoughtEstimator(
        _declared(rule, proposal, surrogate, problem), scored, rule, proposal=proposal, reference=reference,
        surrogate=surrogate,
    )  # fmt: skip
    if isinstance(rule, PartitionLearned):
        made = replace(made, log_z=_converged_log_z(rule.beta, made, problem))
    return _with_costs(made, problem)


def _choice(method: Method, key: str, known: tuple[str, ...]) -> Any:
    value = method.settings.get(key, known[0])
    if value not in known:
        raise ValueError(f"estimator {method.name!r}: {key} must be one of {list(known)}, got {value!r}")
    return value


def _check_rule(rule: ThoughtRule, proposal: str, reference: str, problem: ThoughtProblem) -> None:
    if problem.num_samples < rule.least_thoughts:
        raise ValueError(
            f"estimator {rule.name!r} needs at least {rule.least_thoughts} thoughts an anchor, got num_samples="
            f"{problem.num_samples}"
        )
    if isinstance(rule, NoiseContrastive) and reference == "none":
        raise ValueError("estimator 'nca' scores thoughts relative to a reference; set reference: policy or prior")
    if proposal == "halves" and problem.num_samples % 2:
        raise ValueError(f"proposal 'halves' takes half of the thoughts from each, got num_samples="
                         f"{problem.num_samples}; make it even, or take 'mixture'")  # fmt: skip


def _declared(
    rule: ThoughtRule, proposal: Proposal, surrogate: RewardSurrogate | None, problem: ThoughtProblem
) -> str | None:
    """A rule's declaration in the report's words. It is of the rewards themselves, and of independent thoughts."""
    declared = rule.unbiased_for
    # Halves are no independent draws; they still serve rules whose coefficients read no other thought of the anchor.
    serves_halves = isinstance(rule, Reinforce) and rule.baseline != "mean"
    if declared is None or surrogate is not None or (proposal == "halves" and not serves_halves):
        return None
    return "hard" if declared == problem.objective else "other"


def _log_proposal(made: ThoughtEstimator, every: EveryThought) -> Float[Tensor, "M H"]:
    """log q of all thoughts; of halves that of one picked at random."""
    mixed = "mixture" if made.proposal == "halves" else made.proposal
    return log_proposal(every.log_probs[None], every.log_prior[None], mixed)[0]


@torch.no_grad()
def _converged_log_z(beta: float, made: ThoughtEstimator, problem: ThoughtProblem) -> Float[Tensor, "M"]:
    """Where a learned log Z stands still at these parameters, exactly: `E_q [r/β − log π + log π_ref]`."""
    every = problem.every_thought()
    rewards = every.rewards
    if made.surrogate is not None:
        rewards = trusted_value(made.surrogate, every.thoughts, every.passed, every.embeds).flatten(0, 1)
    references = {"none": torch.zeros_like(every.log_probs), "policy": every.log_probs, "prior": every.log_prior}
    log_ratio = every.log_probs - references[made.reference]
    return (_log_proposal(made, every).exp() * (rewards / beta - log_ratio)).sum(-1)


@torch.no_grad()
def _with_costs(made: ThoughtEstimator, problem: ThoughtProblem) -> ThoughtEstimator:
    """A scored thought is a reward call; one that an estimate replaces is none, unless the talk part reads its reward.

    Of mixtures, which cannot be enumerated, all count as soon as one may.
    """
    surrogate = made.surrogate
    if surrogate is None or problem.part == "whole":
        return made
    if made.relaxation is not None and not made.relaxation.feeds_one_hot and surrogate.max_std_nats < math.inf:
        return made
    every = problem.every_thought()
    context, read = surrogate_inputs(every.thoughts, every.passed, every.embeds)
    count = read.shape[1]
    said = surrogate(context.repeat_interleave(count, 0), read.flatten(0, 1)[:, None])  # each by itself
    trusted = _all_among(made, every, said.trusted.view(-1, count), problem.num_samples)
    return replace(made, reward_calls=problem.num_samples * float((1.0 - trusted).sum()))


def _all_among(
    made: ThoughtEstimator, every: EveryThought, chosen: Bool[Tensor, "M H"], num_samples: int
) -> Float[Tensor, "M"]:
    """The probability that a draw's S thoughts are all among the chosen ones; exactly 1 where all thoughts are."""

    def among(log_probs: Tensor) -> Tensor:
        return 1.0 - (log_probs.exp() * ~chosen).sum(-1)

    if made.proposal != "halves":
        return among(_log_proposal(made, every)) ** num_samples
    return (among(every.log_probs) * among(every.log_prior)) ** (num_samples // 2)


def _surrogate(method: Method, problem: ThoughtProblem, proposal: Proposal) -> RewardSurrogate | None:
    """Fitted on pilot thoughts of other draws, from the same proposal; its error is that of further ones."""
    if _choice(method, "surrogate", SURROGATES) == "none":
        if unused := sorted(set(_SURROGATE_KEYS[1:]) & set(method.settings)):
            raise ValueError(f"estimator {method.name!r}: {unused} are of a surrogate; set surrogate: gated or always")
        return None
    draws = int(method.settings.get("pilot_draws", _PILOT_DRAWS))
    if draws < 1:
        raise ValueError(f"estimator {method.name!r}: pilot_draws must be at least 1, got {draws}")
    model = problem.model
    spread = float(method.settings.get("surrogate_spread", _SPREAD))
    surrogate = RewardSurrogate(
        len(model.start), model.thinking.n_thought, pooling=_choice(method, "pooling", get_args(Pooling)),
        max_std_nats=spread if _choice(method, "surrogate", SURROGATES) == "gated" else math.inf, seed=problem.seed,
    )  # fmt: skip
    sampler = ThoughtEstimator(None, 0.0, proposal=proposal)
    seen, others = (_pilot(problem, sampler, range(first, first + draws)) for first in (0, draws))
    optimizer = torch.optim.Adam(surrogate.parameters(), lr=_LEARNING_RATE)
    for _ in range(_FIT_STEPS):  # every step on all of the pilot, hence one key of the bootstrap's weights
        optimizer.zero_grad()
        surrogate.loss(*seen).backward()
        optimizer.step()
    surrogate.requires_grad_(False)
    *inputs, rewards = others
    surrogate.observe((surrogate(*inputs).estimated - rewards).square())
    return surrogate


@torch.no_grad()
def _pilot(problem: ThoughtProblem, sampler: ThoughtEstimator, numbers: range) -> tuple[Tensor, Tensor, Tensor]:
    """What a surrogate reads of some draws, and the rewards."""
    thoughts, _ = problem.thoughts(sampler, numbers, PILOT_SEED)
    passed, embeds = problem.passed(thoughts, len(numbers))
    return *surrogate_inputs(thoughts, passed, embeds), passed.rewards.flatten(0, 1).float()
