"""The score-function family on sampled tokens: REINFORCE, RLOO, GRPO differ in what multiplies ∇ log π.

`S_i = w_i Σ_t [sg(A_it) log π(x_it | x_<t) + F_it]`. With KL or entropy in J, A_t holds the terms of later contexts,
and those of each context are differentiated directly: leaving either out is another objective than that of the
pathwise methods. log π is the sampler's own, its temperature and nucleus included.
Source: Williams (1992); softrl maths, section 4.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.estimators.advantages import STD_EPSILON, group_mean, group_std, leave_one_out, returns_to_go
from softrl.estimators.base import Cost, Problem, UnbiasedFor
from softrl.masking import per_sequence_mean, survival_mean
from softrl.models.policy import Policy, evaluating
from softrl.objectives.token_terms import TokenOutputs, token_outputs
from softrl.types import HardRollout

Baseline = Literal["none", "given", "leave_one_out", "group_mean"]
Scale = Literal["none", "group", "batch"]
Normalization = Literal["sum", "sequence_mean", "token_mean", "constant"]


def normalization_weights(mask: Tensor, normalization: Normalization, max_length: int) -> Float[Tensor, "N"]:
    """What multiplies a sequence's sum over tokens, so that the batch's mean is the named reduction.

    "sum": 1, the gradient of J. "sequence_mean": one over the sequence's length (GRPO's). "token_mean": N over the
    batch's tokens (DAPO's). "constant": 1/T (Dr. GRPO's).
    """
    lengths = mask.sum(-1).clamp(min=1).to(torch.get_default_dtype())
    if normalization == "sum":
        return torch.ones_like(lengths)
    if normalization == "sequence_mean":
        return 1.0 / lengths
    if normalization == "token_mean":
        return torch.full_like(lengths, len(lengths)) / lengths.sum()
    return torch.full_like(lengths, 1.0 / max_length)


@dataclass(frozen=True)
class ScoreEstimate:
    """Phase 2's result. `baseline` is that of every token, where it is given from outside."""

    rollout: HardRollout
    rewards: Float[Tensor, "N"]
    baseline: Float[Tensor, "N T"] | None = None


@dataclass(frozen=True)
class Scores:
    """One forward pass over sampled tokens: log π(x_t), the direct terms and what they are made of."""

    log_probs: Float[Tensor, "N T"]
    direct: Float[Tensor, "N T"]
    outputs: TokenOutputs
    hidden: Float[Tensor, "N T D"]

    @classmethod
    def of(cls, problem: Problem, rollout: HardRollout, more_ids: Tensor | None = None) -> "Scores":
        """Run it. `more_ids` [N, T, M] are further ids whose logits are wanted in `outputs`."""
        policy, terms = problem.policy, problem.terms
        hidden = policy.hidden(rollout.prompts, policy.embed(rollout.tokens))
        ids = rollout.tokens[..., None]
        if more_ids is not None:
            ids = torch.cat([ids, more_ids], -1)
        reference, states = None, None
        if terms.kl_weight > 0.0 and terms.reference is not None:
            reference, states = terms.reference, reference_states(terms.reference, rollout)
        outputs = token_outputs(policy, hidden, ids, reference, states, problem.truncation)
        log_probs = (outputs.kept_logits[..., 0] - outputs.log_normalizer).masked_fill(~rollout.mask, 0.0)
        return cls(log_probs, terms.values(outputs).masked_fill(~rollout.mask, 0.0), outputs, hidden)


@dataclass(frozen=True)
class ScoreOutput:
    """S of every sequence, and what is logged of it: numbers a sequence, without a graph."""

    value: Float[Tensor, "N"]
    statistics: dict[str, Float[Tensor, "N"]]


@torch.no_grad()
def score_statistics(problem: Problem, outputs: TokenOutputs, weights: Float[Tensor, "N T"]) -> dict[str, Tensor]:
    """Entropy, and the KL if J has one, in nats a token, each token counted by its weight (a mask or its survival)."""
    weights = weights.to(outputs.entropy.dtype)
    statistics = {"entropy": survival_mean(outputs.entropy, weights)}
    if problem.terms.kl_weight > 0.0:
        statistics["kl"] = survival_mean(outputs.kl, weights)
    return statistics


@torch.no_grad()
def reference_states(reference: Policy, rollout: HardRollout) -> Float[Tensor, "N T E"]:
    """The reference's hidden states on sampled tokens."""
    with evaluating(reference.model):
        return reference.hidden(rollout.prompts, reference.embed(rollout.tokens))


@dataclass(frozen=True)
class ScoreFunction:
    """REINFORCE and its relatives.

    Args:
        baseline: "none"; "given" (a running mean or a learned value, which must not depend on the samples);
            "leave_one_out" (RLOO); "group_mean" (GRPO's, which includes the sample itself).
        scale_rewards: divide advantages by the standard deviation of the group's returns, of the batch's, or not.
        normalization: see `normalization_weights`.
        max_length: T of "constant".
    Raises:
        ValueError: an unknown name.
    """

    baseline: Baseline = "leave_one_out"
    scale_rewards: Scale = "none"
    normalization: Normalization = "sum"
    max_length: int = 1

    relaxation = None

    def __post_init__(self) -> None:
        for name, options in (("baseline", Baseline), ("scale_rewards", Scale), ("normalization", Normalization)):
            if getattr(self, name) not in get_args(options):
                raise ValueError(f"{name} must be one of {get_args(options)}, got {getattr(self, name)!r}")

    @property
    def unbiased_for(self) -> UnbiasedFor:
        scaled = self.scale_rewards != "none" or self.normalization != "sum"
        return None if scaled or self.baseline == "group_mean" else "hard"

    @property
    def cost(self) -> Cost:
        return Cost(reward_calls=1, forwards=2, backwards=1)

    def estimate(
        self,
        problem: Problem,
        rollout: HardRollout,
        rewards: Float[Tensor, "N"],
        baseline: Float[Tensor, "N T"] | float | None = None,
    ) -> ScoreEstimate:
        """Phase 2: nothing but the rewards, and the baseline of every token where one is "given".

        Raises:
            ValueError: a baseline that needs two samples a prompt and has one, or "given" and none is given.
        """
        if self.baseline in ("leave_one_out", "group_mean") and problem.num_samples < 2:
            raise ValueError(
                f"baseline {self.baseline!r} compares the samples of a prompt, so it needs at least 2 of them "
                f"(num_generations), got {problem.num_samples}"
            )
        if self.baseline == "given" and baseline is None:
            raise ValueError('baseline="given" needs one: a number, or a number for every token')
        if baseline is not None and not isinstance(baseline, Tensor):
            baseline = torch.full(rollout.mask.shape, baseline, dtype=rewards.dtype, device=rewards.device)
        return ScoreEstimate(rollout, rewards, baseline)

    def surrogate(self, problem: Problem, estimate: ScoreEstimate) -> Float[Tensor, "N"]:
        return self.output(problem, estimate).value

    def output(self, problem: Problem, estimate: ScoreEstimate) -> ScoreOutput:
        """Phase 3, with what is logged of it."""
        return self.output_of(problem, estimate, Scores.of(problem, estimate.rollout))

    def output_of(self, problem: Problem, estimate: ScoreEstimate, scores: Scores) -> ScoreOutput:
        """The same from a forward pass that somebody has run."""
        mask = estimate.rollout.mask
        advantages = self.advantages(problem, estimate, scores.direct.detach())
        statistics = {"advantages": per_sequence_mean(advantages, mask)}
        statistics |= score_statistics(problem, scores.outputs, mask.to(scores.direct.dtype))
        return ScoreOutput(self.of_scores(problem, estimate, scores), statistics)

    def of_scores(self, problem: Problem, estimate: ScoreEstimate, scores: Scores) -> Float[Tensor, "N"]:
        """S from a forward pass that somebody has run."""
        mask = estimate.rollout.mask
        advantages = self.advantages(problem, estimate, scores.direct.detach())
        weights = normalization_weights(mask, self.normalization, self.max_length).to(scores.log_probs.device)
        per_token = advantages.to(scores.log_probs.dtype) * scores.log_probs + scores.direct
        return weights.to(per_token.dtype) * per_token.masked_fill(~mask, 0.0).sum(-1)

    @torch.no_grad()
    def advantages(
        self, problem: Problem, estimate: ScoreEstimate, direct: Float[Tensor, "N T"]
    ) -> Float[Tensor, "N T"]:
        """`A_t`, from returns that hold the KL and entropy of later contexts."""
        group, mask = problem.num_samples, estimate.rollout.mask
        returns = returns_to_go(estimate.rewards.to(direct.dtype), direct, mask)
        if self.baseline == "leave_one_out":
            advantages = returns - leave_one_out(returns, group)
        elif self.baseline == "group_mean":
            advantages = returns - group_mean(returns, group)
        elif self.baseline == "given":
            assert estimate.baseline is not None
            advantages = returns - estimate.baseline.to(returns.dtype)
        else:
            advantages = returns
        if self.scale_rewards == "group":
            return advantages / (group_std(returns[:, 0], group)[:, None] + STD_EPSILON)
        if self.scale_rewards == "batch":
            return advantages / (returns[:, 0].std() + STD_EPSILON)
        return advantages


REINFORCE = ScoreFunction(baseline="none")
REINFORCE_WITH_BASELINE = ScoreFunction(baseline="given")
RLOO = ScoreFunction(baseline="leave_one_out")
GRPO = ScoreFunction(baseline="group_mean", scale_rewards="group", normalization="sequence_mean")
DR_GRPO = replace(GRPO, scale_rewards="none", normalization="constant")
