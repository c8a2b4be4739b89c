"""Thoughts in the variance laboratory: a tiny model that thinks, all of whose thoughts can be enumerated.

J is the mean over anchors of what a thought is worth, `E_h r(h)`, r the log-likelihood of the true tokens that follow.
Its gradient has two parts: the thought's, through π(h), and the talk part's, through r at fixed thoughts. Every
estimator is given the same thoughts at the same draw, through the model's own rollout and pass. Left out: from a
recipe's words to estimators, see `thought_methods`.
"""

import time
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from softrl.estimators.exact import all_sequences
from softrl.estimators.moments import Truth
from softrl.estimators.soft_thoughts import soft_thought_pass
from softrl.estimators.system import AdjointSettings
from softrl.estimators.thought_base import ScoredThoughts, ThoughtRule
from softrl.estimators.thought_exact import ThoughtTruth, expected_value
from softrl.estimators.thoughts import ThoughtExtras, log_proposal, scored_thoughts, trusted_value
from softrl.models.branches import BranchAttention
from softrl.models.policy import evaluating
from softrl.models.thinking import ThinkingLM
from softrl.rewards.surrogate import RewardSurrogate
from softrl.rollouts.anchors import Anchors
from softrl.rollouts.thoughts import (
    ThoughtPass,
    ThoughtSource,
    joined_thoughts,
    thought_embeds,
    thought_pass,
    thought_rollout,
)
from softrl.studies.draws import Draws, consecutive, whole_gradients
from softrl.studies.language import parameter_group
from softrl.tokens.noise import SequenceRandom, sequence_seed
from softrl.tokens.relaxation import Relaxation
from softrl.types import Support, Texts, Thoughts, rows_of

Part = Literal["thought", "whole"]
# Where sampled thoughts come from: π, the prior, or both. "mixture" tosses a coin for each, which makes them
# independent draws of (π + prior) / 2; "halves" takes S/2 of each, as QuietSTaRTrainer's mixture does: they are not.
Proposal = Literal["policy", "prior", "mixture", "halves"]
Reference = Literal["none", "policy", "prior"]  # of scores; "policy": its own frozen copy, as at the start of a run
Prior = Literal["model", "uniform"]

_ATTENTION: BranchAttention = "dense"  # the gradients of a batch of draws at once need torch's own operations alone
_POLICY, _PRIOR, _CHAIN, _COIN = range(4)  # streams of random numbers of a text's draw


@dataclass(frozen=True)
class ThoughtEstimator:
    """A rule for sampled thoughts, or a relaxation of soft ones.

    Args:
        unbiased_for: "hard" the truth here, "soft" the objective of soft thoughts, "other" another of
            `thought_exact`'s; None: nothing.
        reward_calls: rewards that a draw reads, in expectation; one that a surrogate replaces is not read.
        rule, relaxation: one of the two.
        adjoint: of soft thoughts.
        proposal, reference: of sampled ones.
        surrogate: replaces rewards of the anchors where it trusts itself about all thoughts.
        log_z: of every anchor, for the rule that reads it.
    """

    unbiased_for: str | None
    reward_calls: float
    rule: ThoughtRule | None = None
    relaxation: Relaxation | None = None
    adjoint: AdjointSettings = field(default_factory=AdjointSettings)
    proposal: Proposal = "policy"
    reference: Reference = "none"
    surrogate: RewardSurrogate | None = None
    log_z: Float[Tensor, "M"] | None = None


@dataclass(frozen=True)
class EveryThought:
    """log π, log prior and r of all H = V^n thoughts at all M anchors; the first and the last with their graph."""

    log_probs: Float[Tensor, "M H"]
    log_prior: Float[Tensor, "M H"]
    rewards: Float[Tensor, "M H"]
    thoughts: Thoughts
    passed: ThoughtPass
    embeds: Float[Tensor, "N A H n D"]


@dataclass
class ThoughtProblem:
    """A model that thinks at fixed parameters, texts, and where it thinks.

    Args:
        name, description: for tables and reports.
        model: what is differentiated.
        prior: another model that proposes thoughts, or that scores are relative to; None: the uniform distribution.
        texts, anchors: N texts, A anchors in each, all of which a true token follows.
        n_talk: true tokens that a thought is scored by.
        num_samples: S.
        objective: what the truth is the gradient of, see `thought_exact`.
        part: the gradient through π alone, or all of it.
        seed: of all draws.
        batch: draws that share a pass.
    """

    name: str
    description: str
    model: ThinkingLM
    prior: ThinkingLM | None
    texts: Texts
    anchors: Anchors
    n_talk: int = 1
    num_samples: int = 2
    objective: ThoughtTruth = "mean"
    part: Part = "thought"
    seed: int = 0
    batch: int = 8

    def __post_init__(self) -> None:
        self._sampled: dict[tuple[int, int, int, str], tuple[Thoughts, float]] = {}

    @property
    def num_anchors(self) -> int:
        """M, of all texts."""
        return self.anchors[0].numel()

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that the part reaches, group by group."""
        left_out = {"pause", "log_z"} | ({"end", "mixing"} if self.part == "thought" else set())
        named = [
            (name, value)
            for name, value in self.model.named_parameters()
            if value.requires_grad and name.split(".")[0] not in left_out
        ]
        return dict(sorted(named, key=lambda item: thought_group(item[0])))

    @cached_property
    def groups(self) -> dict[str, slice]:
        """Where each group of parameters lies in a gradient."""
        sizes: dict[str, int] = {}
        for name, parameter in self.parameters.items():
            sizes[thought_group(name)] = sizes.get(thought_group(name), 0) + parameter.numel()
        return consecutive(sizes)

    def truth(self) -> Truth:
        """The gradient of the objective, or the thought's part of it, by enumeration of all thoughts."""
        every = self.every_thought()
        rewards = every.rewards.detach() if self.part == "thought" else every.rewards
        value = expected_value(every.log_probs, rewards, self.objective, self.num_samples).mean()
        return Truth(whole_gradients(value[None], list(self.parameters.values()))[0])

    def every_thought(self) -> EveryThought:
        """All thoughts as samples of one pass."""
        n = self.model.thinking.n_thought
        ids, _ = all_sequences(self.model.policy.vocab_size, n)
        thoughts = self.given(ids.expand(*self.anchors[0].shape, -1, -1))
        passed, embeds = self.passed(thoughts, 1)
        log_probs, log_prior = passed.log_probs.sum(-1).flatten(0, 1), self.log_prior(thoughts, 1).flatten(0, 1)
        return EveryThought(log_probs, log_prior, passed.rewards.flatten(0, 1), thoughts, passed, embeds)

    def given(self, ids: Int[Tensor, "N A S n"]) -> Thoughts:
        """Thoughts of these tokens, at the anchors of as many repetitions of the texts as there are rows."""
        fed = torch.ones(*ids.shape, 1, dtype=self.model.policy.dtype)
        support = Support(ids[..., None], torch.zeros_like(fed), fed.bool(), torch.zeros_like(ids))
        return Thoughts(*self._anchors(len(ids) // len(self.texts.ids)), support, fed)

    def _texts(self, count: int) -> Texts:
        return Texts(self.texts.ids.repeat(count, 1), self.texts.mask.repeat(count, 1))

    def _anchors(self, count: int) -> tuple[Int[Tensor, "N A"], Bool[Tensor, "N A"]]:
        return self.anchors[0].repeat(count, 1), self.anchors[1].repeat(count, 1)

    def passed(self, thoughts: Thoughts, count: int) -> tuple[ThoughtPass, Float[Tensor, "N A S n D"]]:
        """Hard thoughts about `count` repetitions of the texts, with a graph, and their embeddings."""
        embeds = thought_embeds(self.model, thoughts, "policy")
        return thought_pass(self.model, self._texts(count), thoughts, self.n_talk, embeds, _ATTENTION), embeds

    @torch.no_grad()
    def log_prior(self, thoughts: Thoughts, count: int) -> Float[Tensor, "N A S"]:
        """log of the prior's probability of whole thoughts."""
        if self.prior is None:
            uniform = torch.tensor(float(self.model.policy.vocab_size), dtype=thoughts.fed.dtype).log()
            return (-thoughts.length * uniform).expand(thoughts.fed.shape[:3])
        embeds = thought_embeds(self.prior, thoughts, "policy")
        return thought_pass(self.prior, self._texts(count), thoughts, 1, embeds).log_probs.sum(-1)

    # Draws

    def draws(self, estimator: ThoughtEstimator, first: int, count: int, seed: int | None = None) -> Draws:
        """Estimates number `first` to `first + count - 1`; the same numbers whatever is drawn beside them."""
        gradients, seconds, seed = [], 0.0, self.seed if seed is None else seed
        for start in range(first, first + count, self.batch):
            numbers = range(start, min(start + self.batch, first + count))
            thoughts, took = self.thoughts(estimator, numbers, seed)
            started = time.perf_counter()
            with evaluating(self.model):
                values = self.values(estimator, thoughts, self._random(numbers, seed, _CHAIN))
                gradients.append(whole_gradients(values, list(self.parameters.values())))
            seconds += took + time.perf_counter() - started
        return Draws(torch.cat(gradients), estimator.reward_calls, seconds / count)

    def _random(self, numbers: range, seed: int, stream: int, num_samples: int | None = None) -> SequenceRandom:
        """Streams keyed by draw and text; every one has a row a thought."""
        keys = [(seed, number, text, stream) for number in numbers for text in range(len(self.texts.ids))]
        rows = self.anchors[0].shape[1] * (self.num_samples if num_samples is None else num_samples)
        return SequenceRandom([sequence_seed(*key) for key in keys], rows=rows)

    def thoughts(self, estimator: ThoughtEstimator, numbers: range, seed: int) -> tuple[Thoughts, float]:
        """Thoughts of some draws, and the seconds they took; sampled ones are kept for the next estimator."""
        if estimator.relaxation is not None:
            started = time.perf_counter()
            made = self._rolled_out(numbers, seed, _POLICY, self.num_samples, estimator.relaxation)
            return made, time.perf_counter() - started
        key = (seed, numbers.start, len(numbers), estimator.proposal)
        if key not in self._sampled:
            started = time.perf_counter()
            made = self._proposed(estimator.proposal, numbers, seed)
            self._sampled[key] = (made, time.perf_counter() - started)
        return self._sampled[key]

    def _proposed(self, proposal: Proposal, numbers: range, seed: int) -> Thoughts:
        if proposal in ("policy", "prior"):
            return self._rolled_out(numbers, seed, _POLICY if proposal == "policy" else _PRIOR, self.num_samples)
        count = self.num_samples // (2 if proposal == "halves" else 1)
        both = [self._rolled_out(numbers, seed, stream, count) for stream in (_POLICY, _PRIOR)]
        if proposal == "halves":
            return joined_thoughts(*both)
        coin = self._random(numbers, seed, _COIN).exponential(1, torch.float64).view(both[0].fed.shape[:3])
        own = (coin < torch.tensor(2.0).log())[..., None]  # the median of Exp(1)
        return self.given(torch.where(own, both[0].tokens, both[1].tokens))

    def _rolled_out(
        self, numbers: range, seed: int, stream: int, num_samples: int, relaxation: Relaxation | None = None
    ) -> Thoughts:
        thinker = self.model if stream == _POLICY or self.prior is None else self.prior
        source: ThoughtSource = "random" if stream == _PRIOR and self.prior is None else "policy"
        random = self._random(numbers, seed, stream, num_samples)
        count = len(numbers)
        return thought_rollout(
            thinker, self._texts(count), *self._anchors(count), random, num_samples, source, relaxation
        )

    def values(self, estimator: ThoughtEstimator, thoughts: Thoughts, random: SequenceRandom) -> Float[Tensor, "D"]:
        """What is ascended, of every draw: its gradient is the estimate."""
        count = len(thoughts.anchors) // len(self.texts.ids)
        if estimator.rule is None:
            return self._soft_values(estimator, thoughts, count)
        scored = self.scored(estimator, thoughts, random)
        return torch.stack([self.ascents(estimator, each).mean() for each in self._by_draw(scored, count)])

    def _by_draw(self, scored: ScoredThoughts, count: int) -> list[ScoredThoughts]:
        """Apart, since a rule may read all anchors of its draw."""
        return [rows_of(scored, slice(k * self.num_anchors, (k + 1) * self.num_anchors)) for k in range(count)]

    def ascents(self, estimator: ThoughtEstimator, scored: ScoredThoughts) -> Float[Tensor, "M"]:
        """Of one draw's anchors."""
        assert estimator.rule is not None
        given = scored if estimator.log_z is None else replace(scored, log_z=estimator.log_z)
        thought = -estimator.rule.thought_losses(given)
        if self.part == "thought":
            return thought
        return thought + (estimator.rule.talk_weights(given) * given.rewards).sum(-1)

    def scored(self, estimator: ThoughtEstimator, thoughts: Thoughts, random: SequenceRandom) -> ScoredThoughts:
        """Sampled thoughts as a rule reads them."""
        count = len(thoughts.anchors) // len(self.texts.ids)
        passed, embeds = self.passed(thoughts, count)
        own = passed.log_probs.sum(-1).detach()
        reads_prior = estimator.proposal != "policy" or estimator.reference == "prior"
        prior = self.log_prior(thoughts, count) if reads_prior else own
        mixed = "mixture" if estimator.proposal == "halves" else estimator.proposal
        reference = {"none": None, "policy": own, "prior": prior}[estimator.reference]
        uniforms = random.exponential(1, torch.float64).neg().exp().view(own.shape)
        extras = ThoughtExtras(log_proposal(own, prior, mixed), reference, uniforms, estimator.surrogate)
        return scored_thoughts(self.model, thoughts, passed, extras, embeds)

    def _soft_values(self, estimator: ThoughtEstimator, thoughts: Thoughts, count: int) -> Float[Tensor, "D"]:
        assert estimator.relaxation is not None
        value = None if estimator.surrogate is None else partial(trusted_value, estimator.surrogate, thoughts)
        soft = soft_thought_pass(
            self.model, self._texts(count), thoughts, self.n_talk, estimator.relaxation, estimator.adjoint,
            value, _ATTENTION,
        )  # fmt: skip
        total = soft.thought if self.part == "thought" else soft.thought + soft.talk
        return total.view(count, -1).mean(1)


def thought_group(name: str) -> str:
    """ "start, end", "mixing", or what `parameter_group` says of the LM's own."""
    first = name.split(".")[0]
    return {"start": "start, end", "end": "start, end", "mixing": "mixing"}.get(first) or parameter_group(name)
