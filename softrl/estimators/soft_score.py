"""Policy gradient on soft rollouts: the score function of the Gumbel noise, so no reward need be differentiable.

The weights of a Gumbel-softmax token depend on the kept perturbed logits y only up to a common shift. Their density,
the shift integrated out, is `log f = Σ_S (z_k − y_k) − K log A + const`,
`A = Σ_S e^{z_k − y_k} + e^{−y_(K)} Σ_{v∉S} e^{z_v}`, S the kept set and y_(K) its smallest; y is held constant. The
ids that were not kept enter through A: leaving them out biases the gradient. Source: ours (softrl maths, section 1).
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softrl.estimators.advantages import leave_one_out, returns_to_go
from softrl.estimators.base import Cost, Problem, UnbiasedFor
from softrl.estimators.pathwise import hidden_of_reference
from softrl.estimators.score_function import ScoreOutput, score_statistics
from softrl.masking import survival_mean
from softrl.objectives.token_terms import token_outputs
from softrl.tokens.relaxation import GumbelSoftmax
from softrl.tokens.truncation import Truncation
from softrl.types import Rollout


def kept_log_density(
    log_probs: Float[Tensor, "N T K"], perturbed: Float[Tensor, "N T K"], kept: Bool[Tensor, "N T K"]
) -> Float[Tensor, "N T"]:
    """log f of the kept perturbed log-probabilities up to a constant, differentiable in `log_probs`.

    Args:
        log_probs: log π of the kept ids; those of all ids sum to one.
        perturbed: y = log π + g as drawn, constant.
        kept: False where a nucleus rule removed a kept id.
    """
    num_kept = kept.sum(-1).to(log_probs.dtype)
    differences = (log_probs - perturbed).masked_fill(~kept, 0.0)
    inside = differences.masked_fill(~kept, -torch.inf)
    mass = log_probs.exp().masked_fill(~kept, 0.0).sum(-1)
    unkept = (1.0 - mass).clamp(min=torch.finfo(log_probs.dtype).tiny).log()
    smallest = perturbed.masked_fill(~kept, torch.inf).amin(-1)
    log_a = torch.cat([inside, (unkept - smallest)[..., None]], -1).logsumexp(-1)
    return differences.sum(-1) - num_kept * log_a


@dataclass(frozen=True)
class SoftScoreEstimate:
    """Phase 2's result."""

    rollout: Rollout
    rewards: Float[Tensor, "N"]


@dataclass(frozen=True)
class SoftScoreFunction:
    """REINFORCE on Gumbel-softmax rollouts, with a leave-one-out baseline where a prompt has several samples.

    Args:
        relaxation: how the rollouts are made.
    Raises:
        TypeError: a relaxation whose soft tokens are not Gumbel-softmax mixtures.
    """

    relaxation: GumbelSoftmax = field(default_factory=lambda: GumbelSoftmax(Truncation(64)))

    unbiased_for: ClassVar[UnbiasedFor] = "soft"
    cost: ClassVar[Cost] = Cost(reward_calls=1, forwards=2, backwards=1)

    def __post_init__(self) -> None:
        if not isinstance(self.relaxation, GumbelSoftmax) or self.relaxation.feeds_one_hot:
            raise TypeError(
                f"the density of soft tokens is that of gumbel_softmax, got relaxation {self.relaxation.name!r}"
            )

    def estimate(self, problem: Problem, rollout: Rollout, rewards: Float[Tensor, "N"]) -> SoftScoreEstimate:
        """Phase 2: the rewards of the soft tokens are all that is needed."""
        return SoftScoreEstimate(rollout, rewards.detach())

    def surrogate(self, problem: Problem, estimate: SoftScoreEstimate) -> Float[Tensor, "N"]:
        return self.output(problem, estimate).value

    def output(self, problem: Problem, estimate: SoftScoreEstimate) -> ScoreOutput:
        """Phase 3, with what is logged of it."""
        rollout, policy, terms = estimate.rollout, problem.policy, problem.terms
        support = rollout.support
        embeds = policy.embed_soft(support.ids.flatten(0, 1), rollout.fed.flatten(0, 1))
        hidden = policy.hidden(rollout.prompts, embeds.unflatten(0, rollout.mask.shape))
        reference, states = None, None
        if terms.kl_weight > 0.0:
            with torch.no_grad():
                reference, states = terms.reference, hidden_of_reference(terms, rollout, rollout.fed)
        outputs = token_outputs(policy, hidden, support.ids, reference, states, problem.truncation)
        log_probs = outputs.kept_logits - outputs.log_normalizer[..., None]
        perturbed = (log_probs + support.noise).detach()  # drawn as log π + g: a constant, whatever θ is
        density = kept_log_density(log_probs, perturbed, support.kept)
        survival = rollout.soft_tokens.survival.to(density.dtype)
        direct = terms.values(outputs) * survival
        with torch.no_grad():
            returns = returns_to_go(estimate.rewards.to(density.dtype), direct, rollout.mask)
            if problem.num_samples > 1:
                returns = returns - leave_one_out(returns, problem.num_samples)
        value = (returns * density + direct).masked_fill(~rollout.mask, 0.0).sum(-1)
        statistics = {"advantages": survival_mean(returns, survival), **score_statistics(problem, outputs, survival)}
        return ScoreOutput(value, statistics)
