"""Rules of learning from thoughts (Quiet-STaR) by weighting log π, and the table of all rules.

See `thought_base` for what a rule is and declares, `thought_sets` for those that compare thoughts with each other.
Axes: M anchors, S thoughts an anchor. Left out: a KL term in J (pass rewards that have it), divisions by standard
deviations.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.estimators.thought_base import ScoredThoughts, ThoughtRule, UnbiasedFor
from softrl.estimators.thought_sets import (
    Listwise,
    NoiseContrastive,
    OneWinner,
    Pair,
    Partition,
    PartitionLearned,
    Ranking,
)

Baseline = Literal["mean", "batch", "none"]
LEAVE_ONE_OUT = "leave_one_out"


def importance(scored: ScoredThoughts, largest: float | None) -> Float[Tensor, "M S"]:
    """`w = π/q` of every thought, at most `largest`; 1 on-policy."""
    return _capped(scored.log_importance(), largest)


def _capped(log_weights: Tensor, largest: float | None) -> Tensor:
    return log_weights.exp().clamp(max=math.inf if largest is None else largest)


@dataclass(frozen=True)
class Weighted(ThoughtRule):
    """Rules of the form `−Σ_s a_s log π(h_s | x)` with constants a, which contain baselines and importance weights.

    Args:
        max_importance: largest importance weight; None caps nothing, and anything else is biased off-policy.
    """

    max_importance: float | None = None

    def __post_init__(self) -> None:
        if self.max_importance is not None and not self.max_importance > 0.0:
            raise ValueError(
                f"max_importance must be positive, or None for no cap, got {self.max_importance}; on-policy thoughts "
                "have the weight 1"
            )

    @abstractmethod
    def coefficients(self, scored: ScoredThoughts) -> Float[Tensor, "M S"]:
        """a: what every thought's log-probability is raised by; constant."""

    def _losses(self, scored: ScoredThoughts) -> Float[Tensor, "M"]:
        # Detached: a is a number of this sample, and its own derivative in π is no part of a score-function estimate.
        return -(self.coefficients(scored).detach() * scored.log_probs).sum(-1)


@dataclass(frozen=True)
class ScoreFunction(Weighted):
    """`a_s = w_s (r_s − b_s) / S`, talk weights `w_s / S`.

    Args:
        positive_only: drop thoughts with a negative advantage (Quiet-STaR's option); biased.
    """

    positive_only: bool = False

    @abstractmethod
    def baselines(self, rewards: Float[Tensor, "M S"]) -> Float[Tensor, "#M #S"]:
        """b."""

    @property
    def unbiased_for(self) -> UnbiasedFor:
        return "mean" if self.max_importance is None and not self.positive_only else None

    def coefficients(self, scored: ScoredThoughts) -> Float[Tensor, "M S"]:
        rewards = scored.used_rewards()
        advantages = rewards - self.baselines(rewards)
        if self.positive_only:
            advantages = advantages.clamp(min=0.0)
        return importance(scored, self.max_importance) * advantages / scored.num_thoughts

    def _talk_weights(self, scored: ScoredThoughts) -> Float[Tensor, "M S"]:
        return importance(scored, self.max_importance) / scored.num_thoughts


@dataclass(frozen=True)
class Reinforce(ScoreFunction):
    """REINFORCE; by default as Quiet-STaR has it, with the mean over the anchor's thoughts as baseline.

    Args:
        baseline: "mean", the thought itself included: (S − 1)/S times the gradient of J's thought part beside all of
            its talk part, so unbiased for neither at any S. "batch", the mean over the other anchors' thoughts, which
            takes one thought an anchor; unbiased, since thoughts of different anchors are drawn independently. "none".
    Source: Williams (1992); Zelikman et al. (2024), arXiv:2403.09629, section 4.4.
    """

    baseline: Baseline = "mean"

    name = "reinforce"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline not in get_args(Baseline):
            raise ValueError(f"baseline must be one of {get_args(Baseline)}, got {self.baseline!r}; 'rloo' is a rule")

    @property
    def unbiased_for(self) -> UnbiasedFor:
        return None if self.baseline == "mean" else super().unbiased_for

    @property
    def least_thoughts(self) -> int:
        return 2 if self.baseline == "mean" else 1

    def _check(self, scored: ScoredThoughts) -> None:
        super()._check(scored)
        if self.baseline == "batch" and len(scored.rewards) < 2:
            raise ValueError(
                f"rewards: baseline 'batch' is a mean over other anchors, got {list(scored.rewards.shape)}, one "
                "anchor; pass more anchors, or take 'mean' or 'none'"
            )

    def baselines(self, rewards: Float[Tensor, "M S"]) -> Float[Tensor, "#M #S"]:
        if self.baseline == "none":
            return torch.zeros_like(rewards)
        if self.baseline == "mean":
            return rewards.mean(-1, keepdim=True)
        return (rewards.sum() - rewards.sum(-1, keepdim=True)) / (rewards.numel() - rewards.shape[1])


@dataclass(frozen=True)
class LeaveOneOut(ScoreFunction):
    """RLOO: REINFORCE with the mean over the anchor's *other* thoughts as baseline.

    Source: Kool, van Hoof and Welling (2019); Ahmadian et al. (2024), arXiv:2402.14740.
    """

    name = "rloo"

    def baselines(self, rewards: Float[Tensor, "M S"]) -> Float[Tensor, "#M #S"]:
        return (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


@dataclass(frozen=True)
class LogMeanExp(Weighted):
    """`a_s = W (L − L_−s)`, `L = log (1/S) Σ_j exp r_j`; talk weights `W softmax(r)`: VIMCO.

    L_−s is L with r_s replaced by the mean of the others. Off-policy all of L is reweighted by `W = Π_s w_s`, whose
    variance grows exponentially in S: exact, and for proposals near the policy only.

    Args:
        max_importance: of W.
    Source: Mnih and Rezende (2016), arXiv:1602.06725; the proposal is the prior here.
    """

    name = "log_mean_exp"

    @property
    def unbiased_for(self) -> UnbiasedFor:
        return "log_mean" if self.max_importance is None else None

    def _set_importance(self, scored: ScoredThoughts) -> Float[Tensor, "M 1"]:
        return _capped(scored.log_importance().sum(-1, keepdim=True), self.max_importance)

    def coefficients(self, scored: ScoredThoughts) -> Float[Tensor, "M S"]:
        rewards, count = scored.used_rewards(), scored.num_thoughts
        others = (rewards.sum(-1, keepdim=True) - rewards) / (count - 1)
        own = torch.eye(count, dtype=torch.bool, device=rewards.device)
        without = torch.where(own, others[:, :, None], rewards[:, None, :]).logsumexp(-1)
        return self._set_importance(scored) * (rewards.logsumexp(-1, keepdim=True) - without)  # log S cancels

    def _talk_weights(self, scored: ScoredThoughts) -> Float[Tensor, "M S"]:
        return self._set_importance(scored) * scored.used_rewards().softmax(-1)


@dataclass(frozen=True)
class SelfNormalized(ThoughtRule):
    """Weights `softmax(r + log π − log q)` of both log π and r: marginal likelihood, reweighted wake-sleep.

    Its gradient is that of `E_q log (1/S) Σ_s w_s exp r_s` with q held, also where q is the policy's copy: consistent
    for the gradient of log p(y | x) as S grows, and unbiased for no objective that moves the proposal.

    Source: Burda et al. (2016), arXiv:1509.00519; Bornschein and Bengio (2015), arXiv:1406.2751.
    """

    name = "self_normalized"

    def _losses(self, scored: ScoredThoughts) -> Float[Tensor, "M"]:
        return -(self._talk_weights(scored) * scored.log_probs).sum(-1)

    def _talk_weights(self, scored: ScoredThoughts) -> Float[Tensor, "M S"]:
        return (scored.used_rewards() + scored.log_importance()).softmax(-1)


@dataclass(frozen=True)
class Trice(Weighted):
    """Visits of a chain to the thoughts, `v_s / S`, less a control variate: `a_s = (v_s − c_s w_s) / S`.

    The chain starts at the first thought, is proposed the others in order, and accepts with probability
    `min(1, exp(l' − l))`, `l = r + log π − log q`: an independence sampler of the posterior p(h | x, y), whose visits
    near the posterior as S grows. It has no memory of earlier steps, so that short chains are biased towards the
    proposal. `w ∇log π` has mean zero, so c changes variance alone. It does nothing for the talk part.

    Args:
        max_importance: of w in the control variate; capped, it is biased.
        control: c. 1 is best where thoughts do not matter (every proposal is accepted, and a is zero), 0 where few
            are accepted. "leave_one_out" is the acceptance rate among the other thoughts; S >= 3.
    Source: Phan et al. (2023), arXiv:2312.02179; theirs remembers a thought an example across steps.
    """

    control: float | Literal["leave_one_out"] = 1.0

    name = "trice"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.control, str) and self.control != LEAVE_ONE_OUT:
            raise ValueError(f"control must be a number or {LEAVE_ONE_OUT!r}, got {self.control!r}")

    @property
    def least_thoughts(self) -> int:
        return 3 if self.control == LEAVE_ONE_OUT else 2

    def coefficients(self, scored: ScoredThoughts) -> Float[Tensor, "M S"]:
        control = self._control(scored) * importance(scored, self.max_importance)
        return self._talk_weights(scored) - control / scored.num_thoughts

    def _control(self, scored: ScoredThoughts) -> Tensor | float:
        if isinstance(self.control, float | int):
            return self.control
        log_weights = scored.used_rewards() + scored.log_importance()
        accepted = (log_weights[:, :, None] - log_weights[:, None, :]).clamp(max=0.0).exp()
        accepted = accepted * (1.0 - torch.eye(scored.num_thoughts, dtype=accepted.dtype, device=accepted.device))
        among_others = accepted.sum((-1, -2))[:, None] - accepted.sum(-1) - accepted.sum(-2)
        return among_others / ((scored.num_thoughts - 1) * (scored.num_thoughts - 2))

    def _talk_weights(self, scored: ScoredThoughts) -> Float[Tensor, "M S"]:
        uniforms = self._needed("uniforms", scored.uniforms, "pass torch.rand(M, S, generator=...) with the thoughts")
        return visit_shares(scored.used_rewards() + scored.log_importance(), uniforms)


def visit_shares(log_weights: Float[Tensor, "M S"], uniforms: Float[Tensor, "M S"]) -> Float[Tensor, "M S"]:
    """How often an independence sampler is at each of S proposals, over S: it is at one after every proposal.

    Args:
        log_weights: log of target over proposal, up to a constant.
        uniforms: in [0, 1); a proposal is accepted where its number is below the ratio. The first ones are not read.
    """
    position = torch.zeros_like(log_weights[:, :1], dtype=torch.long)
    visits = torch.zeros_like(log_weights).scatter(-1, position, 1.0)
    for step in range(1, log_weights.shape[1]):
        ratio = (log_weights[:, step : step + 1] - log_weights.gather(-1, position)).exp()
        position = torch.where(uniforms[:, step : step + 1] < ratio, step, position)
        visits = visits.scatter_add(-1, position, torch.ones_like(ratio))
    return visits / log_weights.shape[1]


_RULES: tuple[type[ThoughtRule], ...] = (
    Reinforce, LeaveOneOut, LogMeanExp, SelfNormalized, Trice,
    Listwise, NoiseContrastive, Ranking, Pair, OneWinner, Partition, PartitionLearned,
)  # fmt: skip
THOUGHT_RULES: dict[str, Callable[..., ThoughtRule]] = {rule.name: rule for rule in _RULES}


def make_thought_rule(name: str, settings: dict[str, Any] | None = None) -> ThoughtRule:
    """The rule of that name with those settings.

    Raises:
        ValueError: an unknown name, or settings that it does not have; the message lists those there are.
    """
    if name not in THOUGHT_RULES:
        raise ValueError(f"rule must be one of {sorted(THOUGHT_RULES)}, got {name!r}")
    chosen, settings = THOUGHT_RULES[name], settings or {}
    known = {field.name for field in fields(chosen())}
    if unknown := set(settings) - known:
        raise ValueError(f"{name} takes the settings {sorted(known)}, got {sorted(unknown)} as well")
    return chosen(**settings)
