"""Rules that compare the thoughts of an anchor with each other, whatever they were proposed by.

`objectives.listwise` and `objectives.partition` on scored thoughts; what each loss is, and where it is from, is said
there. All declare None: their targets are policies of the form `π_ref exp(r/β) / Z`, or rankings; J has another one.
Axes: M anchors, S thoughts an anchor.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from softrl.estimators.thought_base import ScoredThoughts, ThoughtRule
from softrl.objectives import listwise
from softrl.objectives.partition import importance_log_z, partition_loss

LogZ = Literal["vargrad", "importance"]


@dataclass(frozen=True)
class SetRule(ThoughtRule):
    """Objectives that compare the thoughts of an anchor, whatever they were proposed by.

    Scores are `s = log π − log π_ref`, or log π where no reference is given. Talk weights are the normalised
    importance weights: 1/S on-policy.

    Args:
        beta: β > 0, the temperature of rewards: the target is `π_ref exp(r/β) / Z`, and with β = 1 the posterior of
            the thought under the prior π_ref. Rankings have `s = β (log π − log π_ref)` and no target of the kind.
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if not (self.beta > 0.0 and math.isfinite(self.beta)):
            raise ValueError(
                f"beta must be positive and finite, a temperature of rewards, got {self.beta}; 1 is usual"
            )

    def _talk_weights(self, scored: ScoredThoughts) -> Float[Tensor, "M S"]:
        return scored.log_importance().softmax(-1)


@dataclass(frozen=True)
class Listwise(SetRule):
    """InfoNCA: cross-entropy of softmax(s) to softmax(r/β), see `objectives.listwise`."""

    name = "listwise"

    def _losses(self, scored: ScoredThoughts) -> Float[Tensor, "M"]:
        weights = listwise.target_weights(scored.used_rewards(), self.beta)
        return listwise.listwise_cross_entropy(scored.log_ratio(), weights)


@dataclass(frozen=True)
class NoiseContrastive(SetRule):
    """NCA. It fixes s itself and not differences alone, so it needs the reference, and thoughts drawn from it."""

    name = "nca"

    def _losses(self, scored: ScoredThoughts) -> Float[Tensor, "M"]:
        weights = listwise.target_weights(scored.used_rewards(), self.beta)
        self._needed("log_prior", scored.log_prior, "pass log π_ref, or use 'listwise', which does without")
        return listwise.noise_contrastive(scored.log_ratio(), weights)


@dataclass(frozen=True)
class Ranking(SetRule):
    """Plackett-Luce on thoughts ranked by reward, equal rewards tied; scores `s = β (log π − log π_ref)`.

    Args:
        beta: here the weight of the reference; default as in DPO.
    """

    beta: float = 0.1

    name = "plackett_luce"

    def _losses(self, scored: ScoredThoughts) -> Float[Tensor, "M"]:
        return _ranking_losses(self.beta * scored.log_ratio(), scored.used_rewards())


@dataclass(frozen=True)
class Pair(Ranking):
    """DPO of the first two thoughts: the better of them against the other; further ones are not read."""

    name = "dpo"

    def _losses(self, scored: ScoredThoughts) -> Float[Tensor, "M"]:
        return _ranking_losses(self.beta * scored.log_ratio()[:, :2], scored.used_rewards()[:, :2])


def _ranking_losses(scores: Float[Tensor, "M S"], rewards: Float[Tensor, "M S"]) -> Float[Tensor, "M"]:
    ranks = (rewards[:, None, :] > rewards[:, :, None]).sum(-1)  # how many are better: ties share a rank
    return listwise.plackett_luce(scores, ranks)


@dataclass(frozen=True)
class OneWinner(Ranking):
    """S-DPO: the thought with the highest reward, the first one of several, against all others."""

    name = "one_winner"

    def _losses(self, scored: ScoredThoughts) -> Float[Tensor, "M"]:
        order = scored.used_rewards().argsort(dim=-1, descending=True, stable=True)
        return listwise.one_winner(self.beta * scored.log_ratio().gather(-1, order))


@dataclass(frozen=True)
class Partition(SetRule):
    """Squared residuals of `s + log Z = r/β`, log Z eliminated within the set or estimated.

    On-policy the expected gradient of VarGrad's thought part is `−2/β · (S − 1)/S` times that of
    `E[r] − β KL(π‖π_ref)`, without reference `E[r] + β H(π)`.

    Args:
        log_z: "vargrad" eliminates it; "importance" estimates it by the same thoughts, `log mean_i exp(r_i/β) π_ref/q`
            (without reference 1 in the place of π_ref), which takes many of them: with thoughts of π_ref it is the
            plain mean of exp(r/β).
    """

    log_z: LogZ = "vargrad"

    name = "partition"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log_z not in get_args(LogZ):
            raise ValueError(f"log_z must be one of {get_args(LogZ)}, got {self.log_z!r}")

    def _losses(self, scored: ScoredThoughts) -> Float[Tensor, "M"]:
        rewards, log_z = scored.used_rewards(), None
        if self.log_z == "importance":
            log_weights = -scored.log_proposal if scored.log_prior is None else scored.log_prior - scored.log_proposal
            log_z = importance_log_z(rewards, self.beta, log_weights.detach())
        return partition_loss(scored.log_ratio(), rewards, self.beta, log_z)


@dataclass(frozen=True)
class PartitionLearned(SetRule):
    """The same with log Z(x) learned: trajectory balance."""

    name = "partition_learned"

    @property
    def least_thoughts(self) -> int:
        return 1

    def _losses(self, scored: ScoredThoughts) -> Float[Tensor, "M"]:
        log_z = self._needed("log_z", scored.log_z, "pass learned ones, or use 'partition', which eliminates them")
        return partition_loss(scored.log_ratio(), scored.used_rewards(), self.beta, log_z)
