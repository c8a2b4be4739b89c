"""Which tokens a step may use: nucleus rules on the clean distribution, then the K best by score.

Truncation comes first and the relaxation temperature after it, on the kept support. It masks weights, never ids.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Truncation:
    """Rules of truncation.

    Args:
        top_k: number of ids kept a step (K). With Gumbel noise these are the K largest *perturbed* logits.
        top_p: keep the smallest set of most probable tokens whose mass reaches `top_p` (Holtzman et al. 2020).
        min_p: keep tokens with `p_i >= min_p * max p` (Nguyen et al. 2024).
    Raises:
        ValueError: top_k < 1, top_p outside (0, 1], min_p outside [0, 1).
    """

    top_k: int
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}; 1.0 switches it off")
        if not 0.0 <= self.min_p < 1.0:
            raise ValueError(f"min_p must lie in [0, 1), got {self.min_p}; 0.0 switches it off")

    @property
    def has_nucleus(self) -> bool:
        """Whether `top_p` or `min_p` may remove tokens."""
        return self.top_p < 1.0 or self.min_p > 0.0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError when K is larger than the vocabulary."""
        if self.top_k > vocab_size:
            raise ValueError(
                f"top_k={self.top_k} is larger than the vocabulary, V={vocab_size}; choose top_k <= {vocab_size}"
            )


def nucleus(logits: Float[Tensor, "N V"], truncation: Truncation) -> Bool[Tensor, "N V"]:
    """The tokens that `top_p` and `min_p` leave, judged on the clean distribution softmax(logits).

    The most probable token always stays.
    """
    kept = torch.ones_like(logits, dtype=torch.bool)
    if truncation.min_p > 0.0:
        kept &= logits >= logits.amax(-1, keepdim=True) + torch.tensor(truncation.min_p).log()
    if truncation.top_p < 1.0:
        ordered, order = logits.sort(-1, descending=True)
        probs = ordered.softmax(-1)
        mass_before = probs.cumsum(-1) - probs
        inside = mass_before < truncation.top_p
        inside[..., 0] = True
        kept &= torch.zeros_like(kept).scatter(-1, order, inside)
    return kept


def sampler_log_probs(
    logits: Float[Tensor, "N V"], truncation: Truncation, tokens: Int[Tensor, "N"] | None = None
) -> Float[Tensor, "N V"]:
    """log π of the sampler: the nucleus of softmax(logits), renormalised; −inf outside it.

    `tokens` are ids that were sampled already. They count as inside, come what may: an engine that computes in another
    precision may draw one from just beyond the edge.
    """
    if not truncation.has_nucleus:
        return logits.log_softmax(-1)
    inside = nucleus(logits, truncation)
    if tokens is not None:
        inside = inside.scatter(-1, tokens[:, None], True)
    return logits.masked_fill(~inside, -torch.inf).log_softmax(-1)


def largest(
    scores: Float[Tensor, "N V"], top_k: int
) -> tuple[Float[Tensor, "N K"], Int[Tensor, "N K"], Bool[Tensor, "N K"]]:
    """The K largest scores in falling order, their ids, and whether each is finite, i.e. inside the nucleus."""
    values, ids = scores.topk(top_k, dim=-1)
    return values, ids, torch.isfinite(values)
