"""A biased pathwise estimate and an unbiased one, mixed for the least mean squared error.

`ĝ = w ĝ_p + (1 − w) ĝ_u` has the least error at `w = (v_u − cov(ĝ_p, ĝ_u)) / E‖ĝ_p − ĝ_u‖²`: the denominator counts
the bias. The weight has to come from other draws than it is used on. Source: ours (softrl maths, section 4).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.estimators.base import Cost, Estimator, Problem, UnbiasedFor
from softrl.estimators.pathwise import Pathwise
from softrl.estimators.score_function import ScoreOutput
from softrl.tokens.relaxation import Relaxation
from softrl.types import Rollout


def combination_weight(pathwise: Float[Tensor, "D P"], unbiased: Float[Tensor, "D P"]) -> float:
    """The pathwise estimate's weight, in [0, 1], from D joint draws of both.

    Args:
        pathwise, unbiased: gradients, or sketches of them, of the same draws.
    Raises:
        ValueError: fewer than two draws.
    """
    count = len(pathwise)
    if count < 2:
        raise ValueError(f"a combination weight needs at least two joint draws, got {count}")
    centred_u, centred_p = unbiased - unbiased.mean(0), pathwise - pathwise.mean(0)
    variance = centred_u.square().sum() / (count - 1)
    covariance = (centred_u * centred_p).sum() / (count - 1)
    distance = (pathwise - unbiased).square().sum() / count
    weight = (variance - covariance) / distance.clamp(min=torch.finfo(distance.dtype).tiny)
    return weight.clamp(0.0, 1.0).item()


@dataclass(frozen=True)
class Combined:
    """A weighted mean of a pathwise estimate and an unbiased one, on the same samples.

    Args:
        pathwise: of a straight-through relaxation.
        unbiased: reads the sampled tokens, or the same relaxation's rollout.
        weight: w in [0, 1], see `combination_weight`.
    Raises:
        ValueError: a weight outside [0, 1], or a pathwise estimator of mixtures.
    """

    pathwise: Pathwise
    unbiased: Estimator
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"weight must lie in [0, 1], got {self.weight}")
        if not self.pathwise.relaxation.feeds_one_hot:
            raise ValueError(
                f"relaxation {self.pathwise.relaxation.name!r} feeds mixtures, so both estimates cannot be made from "
                "the same samples; use a straight-through one"
            )

    @property
    def relaxation(self) -> Relaxation:
        return self.pathwise.relaxation

    @property
    def unbiased_for(self) -> UnbiasedFor:
        return self.unbiased.unbiased_for if self.weight == 0.0 else None

    @property
    def cost(self) -> Cost:
        first, second = self.pathwise.cost, self.unbiased.cost
        return Cost(
            max(first.reward_calls, second.reward_calls),  # one call gives the value and the gradient
            first.forwards + second.forwards - 1,  # the rollout is shared
            first.backwards + second.backwards,
            max(first.gradient_calls, second.gradient_calls),
        )

    def estimate(self, problem: Problem, rollout: Rollout, rewards: Float[Tensor, "N"]) -> tuple[Any, Any]:
        """Phase 2 of both."""
        sampled = rollout.hard if self.unbiased.relaxation is None else rollout
        return (
            self.pathwise.estimate(problem, rollout, rewards),
            self.unbiased.estimate(problem, sampled, rewards),
        )

    def surrogate(self, problem: Problem, estimate: tuple[Any, Any]) -> Float[Tensor, "N"]:
        return self._mixed(problem, estimate, self.unbiased.surrogate(problem, estimate[1]))

    def output(self, problem: Problem, estimate: tuple[Any, Any]) -> ScoreOutput:
        """Phase 3, with what is logged of the unbiased part, which needs an `output` of its own."""
        unbiased = self.unbiased.output(problem, estimate[1])  # type: ignore[attr-defined]
        return ScoreOutput(self._mixed(problem, estimate, unbiased.value), unbiased.statistics)

    def _mixed(self, problem: Problem, estimate: tuple[Any, Any], unbiased: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        pathwise = self.pathwise.surrogate(problem, estimate[0])
        return self.weight * pathwise + (1.0 - self.weight) * unbiased.to(pathwise.dtype)
