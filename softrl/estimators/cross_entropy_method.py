"""The cross-entropy method: search by a sampling distribution that is fitted to the best of its own draws.

A `Proposal` is a distribution over M independent searches, of values with n parts each, factored over the parts. A
round draws S values of every search, keeps the E with the highest reward, the *elites*, and moves the distribution to
their maximum-likelihood fit, `v ← α v_elites + (1 − α) v`. It follows no gradient of the reward.

Pure: random numbers are given, of [0, 1). Axes: M searches, S samples, E elites, n parts, K codes, d dimensions.
Source: Rubinstein (1999), doi:10.1023/A:1010091220143; de Boer, Kroese, Mannor and Rubinstein (2005),
doi:10.1007/s10479-005-5724-z, algorithms 2.2 and 4.1 (smoothing: equation 25).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softrl.models.latents import categorical_draw, gaussian_draw


@dataclass(frozen=True)
class SearchSettings:
    """How long and how greedily.

    Args:
        num_rounds: from 1.
        num_samples: S, a round.
        num_elites: E of them; about a tenth is usual.
        smoothing: α in (0, 1]; 1 forgets the distribution before.
    Raises:
        ValueError: a number out of range.
    """

    num_rounds: int = 5
    num_samples: int = 32
    num_elites: int = 4
    smoothing: float = 0.7

    def __post_init__(self) -> None:
        if self.num_rounds < 1:
            raise ValueError(f"num_rounds must be at least 1, got {self.num_rounds}")
        if not 1 <= self.num_elites < self.num_samples:
            raise ValueError(
                f"num_elites must be at least 1 and below num_samples={self.num_samples}, or nothing is chosen, got "
                f"{self.num_elites}"
            )
        if not 0.0 < self.smoothing <= 1.0:
            raise ValueError(f"smoothing must lie in (0, 1], got {self.smoothing}; 1 keeps nothing of what was before")


class Proposal(ABC):
    """A sampling distribution of M searches."""

    @abstractmethod
    def sample(self, uniforms: Float[Tensor, "M S n U"]) -> Tensor:
        """S values of every search, [M, S, n] or [M, S, n, d]."""

    @abstractmethod
    def updated(self, elites: Tensor, smoothing: float) -> "Proposal":
        """Moved to the maximum-likelihood fit of the elites, [M, E, n] or [M, E, n, d]."""


@dataclass(frozen=True)
class DiscreteProposal(Proposal):
    """Codes, each part with probabilities of its own."""

    probs: Float[Tensor, "M n K"]

    @classmethod
    def uniform(cls, num_searches: int, num_parts: int, num_codes: int) -> "DiscreteProposal":
        """Every code alike, in float64."""
        return cls(torch.full((num_searches, num_parts, num_codes), 1.0 / num_codes, dtype=torch.float64))

    def sample(self, uniforms: Float[Tensor, "M S n U"]) -> Int[Tensor, "M S n"]:
        log_probs = self.probs.log()[:, None].expand(*uniforms.shape[:3], -1)
        return categorical_draw(log_probs, uniforms[..., 0])

    def updated(self, elites: Int[Tensor, "M E n"], smoothing: float) -> "DiscreteProposal":
        shares = torch.nn.functional.one_hot(elites, self.probs.shape[-1]).to(self.probs.dtype).mean(1)
        return DiscreteProposal(smoothing * shares + (1.0 - smoothing) * self.probs)


@dataclass(frozen=True)
class GaussianProposal(Proposal):
    """Vectors, every dimension with a mean and a standard deviation of its own."""

    mean: Float[Tensor, "M n d"]
    std: Float[Tensor, "M n d"]

    @classmethod
    def standard(cls, num_searches: int, num_parts: int, size: int) -> "GaussianProposal":
        """Standard normal, in float64."""
        zeros = torch.zeros(num_searches, num_parts, size, dtype=torch.float64)
        return cls(zeros, torch.ones_like(zeros))

    def sample(self, uniforms: Float[Tensor, "M S n d"]) -> Float[Tensor, "M S n d"]:
        mean, std = (each[:, None].expand(uniforms.shape) for each in (self.mean, self.std))
        return gaussian_draw(mean, std, uniforms)

    def updated(self, elites: Float[Tensor, "M E n d"], smoothing: float) -> "GaussianProposal":
        fit = (elites.mean(1), elites.std(1, correction=0))
        moved = (
            smoothing * new + (1.0 - smoothing) * old for new, old in zip(fit, (self.mean, self.std), strict=True)
        )
        return GaussianProposal(*moved)


@dataclass(frozen=True)
class SearchResult:
    """What a search ends with: the distribution, and the elites of its last round, best first, with their rewards."""

    proposal: Proposal
    elites: Tensor  # M E n, or M E n d
    rewards: Float[Tensor, "M E"]


def elites_of(values: Tensor, rewards: Float[Tensor, "M S"], num_elites: int) -> tuple[Tensor, Float[Tensor, "M E"]]:
    """The values with the highest rewards, best first; of equal ones those drawn first. And their rewards."""
    order = rewards.argsort(dim=-1, descending=True, stable=True)[:, :num_elites]
    rows = torch.arange(len(values), device=values.device)[:, None]
    return values[rows, order], rewards.gather(-1, order)


@torch.no_grad()
def cross_entropy_search(
    proposal: Proposal,
    score: Callable[[Tensor], Float[Tensor, "M S"]],
    uniforms: Callable[[int], Float[Tensor, "M S n U"]],
    settings: SearchSettings,
) -> SearchResult:
    """Rounds of drawing, choosing and fitting; without gradients.

    Args:
        proposal: where the search starts.
        score: rewards of values [M, S, n, ...]; not finite ones are refused.
        uniforms: random numbers of a round, by its index from 0.
        settings: see there.
    Raises:
        ValueError: a reward is not finite.
    """
    for index in range(settings.num_rounds):
        values = proposal.sample(uniforms(index))
        rewards = score(values)
        if not rewards.isfinite().all():
            raise ValueError(f"score: a reward of round {index} is not finite; elites of such rewards mean nothing")
        elites, best = elites_of(values, rewards, settings.num_elites)
        proposal = proposal.updated(elites, settings.smoothing)
    return SearchResult(proposal, elites, best)
