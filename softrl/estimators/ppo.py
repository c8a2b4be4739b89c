"""PPO: clipped ratios over several epochs on the same samples, advantages by GAE from a learned value.

Phase 2 reads the samples once (log π_old, values, KL) and fixes advantages and returns; phase 3 may then be run for
any subset of the sequences, as often as there are epochs. At the first step ρ = 1 and the gradient is that of the
score-function family with GAE as its advantage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.estimators.advantages import generalized_advantages, token_rewards, whitened
from softrl.estimators.base import Cost, Problem, UnbiasedFor
from softrl.estimators.score_function import Normalization, ScoreOutput, Scores, normalization_weights
from softrl.models.policy import evaluating
from softrl.objectives.clipped import clipped_fraction, clipped_objective, clipped_value_loss
from softrl.types import HardRollout, Prompts

ValueFunction = Callable[[Float[Tensor, "N T D"]], Float[Tensor, "N T"]]


@dataclass(frozen=True)
class PPOEstimate:
    """Phase 2's result, all constant."""

    rollout: HardRollout
    old_log_probs: Float[Tensor, "N T"]
    old_values: Float[Tensor, "N T"]
    advantages: Float[Tensor, "N T"]
    returns: Float[Tensor, "N T"]
    kl: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]

    def at(self, rows: Tensor) -> "PPOEstimate":
        """The same for some of the sequences."""
        prompts = self.rollout.prompts
        rollout = HardRollout(
            Prompts(prompts.ids[rows], prompts.mask[rows]), self.rollout.tokens[rows], self.rollout.mask[rows]
        )
        return PPOEstimate(
            rollout, self.old_log_probs[rows], self.old_values[rows], self.advantages[rows], self.returns[rows],
            self.kl[rows], self.entropy[rows],
        )  # fmt: skip


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation.

    Args:
        value: V from the policy's hidden states, [N, T, D] -> [N, T].
        clip_low, clip_high: bounds of the ratio.
        gae_lambda, discount: λ and γ of the advantages.
        whiten: bring advantages to mean 0 and variance 1 over the batch.
        kl_in: "reward": later contexts' KL and entropy are part of the return, as in every other method here, and each
            context's own are differentiated directly. "loss": only the latter, which drops what a token does to later
            contexts: another objective.
        value_coef: weight of the value loss; the value reads detached hidden states.
        value_clip: see `clipped_value_loss`.
        normalization: of the policy's part, see `normalization_weights`.
        max_length: T of "constant".
    Source: Schulman et al. (2017), arXiv:1707.06347; Ouyang et al. (2022), arXiv:2203.02155.
    """

    value: ValueFunction
    clip_low: float = 0.2
    clip_high: float = 0.2
    gae_lambda: float = 0.95
    discount: float = 1.0
    whiten: bool = False
    kl_in: Literal["reward", "loss"] = "reward"
    value_coef: float = 1.0
    value_clip: float | None = None
    normalization: Normalization = "sum"
    max_length: int = 1

    relaxation = None

    @property
    def unbiased_for(self) -> UnbiasedFor:
        plain = self.gae_lambda == self.discount == 1.0 and not self.whiten and self.kl_in == "reward"
        return "hard" if plain and self.normalization == "sum" else None

    @property
    def cost(self) -> Cost:
        """Of one epoch."""
        return Cost(reward_calls=1, forwards=3, backwards=1)

    @torch.no_grad()
    def estimate(self, problem: Problem, rollout: HardRollout, rewards: Float[Tensor, "N"]) -> PPOEstimate:
        """Phase 2: one forward pass without gradients."""
        mask = rollout.mask
        with evaluating(problem.policy.model):
            scores = Scores.of(problem, rollout)
        values = self.value(scores.hidden).to(scores.log_probs.dtype).masked_fill(~mask, 0.0)
        direct = scores.direct if self.kl_in == "reward" else torch.zeros_like(scores.direct)
        earned = token_rewards(rewards.to(direct.dtype), direct, mask)
        advantages = generalized_advantages(earned, values, mask, self.discount, self.gae_lambda)
        returns = advantages + values
        if self.whiten:
            advantages = whitened(advantages, mask)
        return PPOEstimate(
            rollout, scores.log_probs, values, advantages, returns, scores.outputs.kl, scores.outputs.entropy
        )

    def surrogate(self, problem: Problem, estimate: PPOEstimate) -> Float[Tensor, "N"]:
        return self.output(problem, estimate).value

    def output(self, problem: Problem, estimate: PPOEstimate) -> ScoreOutput:
        """Phase 3, the value loss included, for all sequences or some of them (`estimate.at`)."""
        rollout = estimate.rollout
        mask, scores = rollout.mask, Scores.of(problem, rollout)
        log_ratio = (scores.log_probs - estimate.old_log_probs).masked_fill(~mask, 0.0)
        bounds = (estimate.advantages, self.clip_low, self.clip_high)
        per_token = clipped_objective(log_ratio, *bounds) + scores.direct
        weights = normalization_weights(mask, self.normalization, self.max_length)
        lengths = mask.sum(-1).clamp(min=1)
        values = self.value(scores.hidden.detach())  # its own loss does not move the policy
        value_loss = clipped_value_loss(
            values, estimate.old_values.to(values.dtype), estimate.returns.to(values.dtype), self.value_clip
        )
        value_loss = value_loss.masked_fill(~mask, 0.0).sum(-1) / lengths
        total = weights.to(per_token.dtype) * per_token.masked_fill(~mask, 0.0).sum(-1)
        low, high = clipped_fraction(log_ratio.detach(), *bounds)
        statistics = {
            "clip_ratio/low_mean": (low * mask).sum(-1) / lengths,
            "clip_ratio/high_mean": (high * mask).sum(-1) / lengths,
            "approx_kl": 0.5 * log_ratio.detach().square().sum(-1) / lengths,
            "value_loss": value_loss.detach(),
        }
        return ScoreOutput(total - self.value_coef * value_loss.to(total.dtype), statistics)
