"""RLOO with a pathwise control variate: the cotangents of a prompt's other samples predict what a token is worth.

`ĝ_i = Σ_t (A_it − η_i c_t[x_it]) ∇ log π(x_it|x_<t) + η_i Σ_t Σ_v c_t[v] ∇π(v|x_<t)`, where c_t is the mean over the
other samples of their cotangents a_t, each centred (`Σ_k p_k a_k = 0`) and zero for ids that were not kept. c and η do
not depend on sample i, so the estimate is unbiased whatever they are; the better the pathwise gradient predicts the
reward, the less variance. Source: ours (softrl maths, section 4).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softrl.estimators.base import Cost, Problem, UnbiasedFor
from softrl.estimators.pathwise import pathwise_estimate
from softrl.estimators.score_function import RLOO, ScoreEstimate, ScoreOutput, Scores
from softrl.estimators.system import AdjointSettings
from softrl.tokens.relaxation import Relaxation
from softrl.types import HardRollout, Rollout


@dataclass(frozen=True)
class ControlledEstimate:
    """Phase 2's result: RLOO's, and the centred cotangents of every sample of the group, at every sample.

    The M = G·K ids at step t of sample i are those that any sample of its prompt kept at t, by sample.
    """

    score: ScoreEstimate
    ids: Int[Tensor, "N T M"]
    cotangents: Float[Tensor, "N T M"]

    @property
    def rollout(self) -> HardRollout:
        """The samples."""
        return self.score.rollout


@dataclass(frozen=True)
class PathwiseControlVariate:
    """RLOO less a control variate made of the pathwise cotangents of the other samples.

    Args:
        relaxation: a straight-through one, whose hard tokens are draws of the policy.
        settings: how its cotangents are solved for; truncated ones cost less and stay unbiased here.
        coefficient: η, fixed; or "regression": the one that the other samples' rewards suggest, G >= 3.
    Raises:
        ValueError: the relaxation feeds mixtures.
    """

    relaxation: Relaxation
    settings: AdjointSettings = field(default_factory=lambda: AdjointSettings(hops=2))
    coefficient: float | Literal["regression"] = 1.0

    unbiased_for: ClassVar[UnbiasedFor] = "hard"

    def __post_init__(self) -> None:
        if not self.relaxation.feeds_one_hot:
            raise ValueError(
                f"a control variate for sampled tokens needs a straight-through relaxation, got "
                f"{self.relaxation.name!r}, whose rollouts are mixtures"
            )

    @property
    def cost(self) -> Cost:
        sweeps = float("nan") if self.settings.hops is None else self.settings.hops
        return Cost(reward_calls=1, forwards=3, backwards=sweeps + 1, gradient_calls=1)

    def estimate(self, problem: Problem, rollout: Rollout, rewards: Float[Tensor, "N"]) -> ControlledEstimate:
        """Phase 2: the cotangents of every sample, handed to its group.

        Raises:
            ValueError: fewer than two samples a prompt; fewer than three with the regression.
        """
        needed = 3 if self.coefficient == "regression" else 2
        if problem.num_samples < needed:
            raise ValueError(
                f"the pathwise control variate with coefficient={self.coefficient!r} needs {needed} samples "
                f"a prompt (num_generations), got {problem.num_samples}"
            )
        pathwise = pathwise_estimate(
            problem.policy, rollout, self.relaxation, problem.reward, problem.terms, self.settings,
            dict(problem.columns),
        )  # fmt: skip
        total = pathwise.cotangents.weights
        centred = total - (rollout.weights * total).sum(-1, keepdim=True)
        centred = (centred * rollout.support.kept).masked_fill(~rollout.mask[..., None], 0.0)
        group = problem.num_samples
        score = RLOO.estimate(problem, rollout.hard, rewards)
        return ControlledEstimate(
            score, _of_the_group(rollout.support.ids, group), _of_the_group(centred.detach(), group)
        )

    def surrogate(self, problem: Problem, estimate: ControlledEstimate) -> Float[Tensor, "N"]:
        return self.output(problem, estimate).value

    def output(self, problem: Problem, estimate: ControlledEstimate) -> ScoreOutput:
        """Phase 3, with what is logged of it."""
        group, rollout = problem.num_samples, estimate.rollout
        scores = Scores.of(problem, rollout, estimate.ids)
        outputs = scores.outputs
        probs = (outputs.kept_logits[..., 1:] - outputs.log_normalizer[..., None]).exp()
        cotangents = estimate.cotangents.to(probs.dtype).masked_fill(~rollout.mask[..., None], 0.0)
        sampled = estimate.ids == rollout.tokens[..., None]
        # By the sample k that a cotangent comes from; what every sample i makes of it, summed over steps.
        expected = (cotangents * probs).unflatten(-1, (group, -1)).sum(-1)
        taken = (cotangents * sampled).unflatten(-1, (group, -1)).sum(-1)
        values = (taken - expected.detach()).sum(1).unflatten(0, (-1, group))
        returns = (estimate.score.rewards.to(values.dtype) + scores.direct.detach().sum(-1)).unflatten(0, (-1, group))
        eta = self._coefficients(returns, values).flatten()
        others = _others(group, expected).repeat(len(values), 1)[:, None, :] / (group - 1)
        plain = RLOO.output_of(problem, estimate.score, scores)
        predicted, predicted_mean = (taken * others).sum(-1), (expected * others).sum(-1)
        value = plain.value + eta * (predicted_mean - predicted * scores.log_probs).sum(-1)
        return ScoreOutput(value, plain.statistics | {"control_variate/coefficient": eta.detach()})

    def _coefficients(self, returns: Float[Tensor, "B G"], values: Float[Tensor, "B G G"]) -> Float[Tensor, "B G"]:
        """η of every sample; `values[b, j, k]` is what sample k's cotangents predict of sample j's return."""
        if self.coefficient != "regression":
            return torch.full_like(returns, self.coefficient)
        return regressed_coefficients(returns, values)


def regressed_coefficients(returns: Float[Tensor, "B G"], values: Float[Tensor, "B G G"]) -> Float[Tensor, "B G"]:
    """`η_i = Σ_{j≠i} (R_j − R̄_{−i}) f_j / Σ_{j≠i} f_j²`, f_j from the cotangents of neither i nor j.

    Reusing f_j as sample j's own estimate has it, with i's cotangents inside, would bias the gradient.

    Args:
        returns: R_j.
        values: what sample k's cotangents predict of sample j, `Σ_t (c_t[x_jt] − E_π c_t)`, at [b, j, k].
    """
    group = returns.shape[1]
    own = torch.diagonal(values, dim1=1, dim2=2)
    # f[b, i, j]: the mean over k other than i and j.
    f = (values.sum(-1) - own)[:, None, :] - values.transpose(1, 2)
    f = f / (group - 2)
    others = 1.0 - torch.eye(group, dtype=returns.dtype, device=returns.device)
    mean = (others * returns[:, None, :]).sum(-1, keepdim=True) / (group - 1)
    f = f * others
    return ((returns[:, None, :] - mean) * f).sum(-1) / f.square().sum(-1).clamp(min=torch.finfo(f.dtype).tiny)


def _of_the_group(values: Tensor, group: int) -> Tensor:
    """[N, T, K] of every sample, as [N, T, G·K] of all samples of its prompt, at each of them."""
    grouped = values.unflatten(0, (-1, group)).permute(0, 2, 1, 3).flatten(2)  # [B, T, G·K]
    return grouped.repeat_interleave(group, 0)


def _others(group: int, like: Tensor) -> Float[Tensor, "G G"]:
    """1 where a sample is another one."""
    return 1.0 - torch.eye(group, dtype=like.dtype, device=like.device)
