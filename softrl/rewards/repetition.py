"""A penalty on n-grams that a text repeats."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softrl.rewards.base import one_hot_tokens
from softrl.types import SoftTokens


class RepetitionPenalty:
    """Minus the expected share of equal pairs among a text's n-grams, in [−1, 0].

    `−Σ_{i<j} s_{j+n−1} M_ij / max(1, Σ_{i<j} s_{j+n−1})`, where `M_ij = Π_{m<n} ⟨q_{i+m}, q_{j+m}⟩` is the probability
    that the n-grams at i and j are equal, were their tokens drawn independently, and s the survival of the later one's
    last token. It is Simpson's index of the n-grams: it does not grow with length, and it is linear in every
    M_ij, so that its gradient does not vanish where a text already loops (that of 1 − distinct-n does).

    Args:
        n: length of the n-grams, in tokens.
        name: what logs call it; default: "repetition_<n>".
    Raises:
        ValueError: n below 1.
    Source: ours; E. H. Simpson (1949), "Measurement of diversity", for the index.
    """

    vocab_size: int | None = None

    def __init__(self, n: int = 2, name: str | None = None) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, the length of the n-grams in tokens; got {n}")
        self.n = n
        self.name = name or f"repetition_{n}"

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Penalties of soft tokens, in float32 at least."""
        precise = torch.promote_types(tokens.weights.dtype, torch.float32)
        rows = zip(tokens.ids, tokens.weights.to(precise), tokens.survival.to(precise), strict=True)
        penalties = [
            checkpoint(_repeated_share, *row, self.n, use_reentrant=False, preserve_rng_state=False) for row in rows
        ]
        return -torch.stack(penalties)

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Penalties of token ids."""
        return self.soft(one_hot_tokens(ids, mask))


def _repeated_share(
    ids: Int[Tensor, "T K"], weights: Float[Tensor, "T K"], survival: Float[Tensor, "T"], n: int
) -> Float[Tensor, ""]:
    """The share of one text. One at a time, and again in the backward pass: it writes out a [T, T K] matrix."""
    matches = _token_matches(ids, weights)
    num_ngrams = max(0, len(ids) - n + 1)
    equal = torch.ones_like(matches[:num_ngrams, :num_ngrams])
    for shift in range(n):
        equal = equal * matches[shift : shift + num_ngrams, shift : shift + num_ngrams]
    written = survival[n - 1 :]  # of the last token of each n-gram
    earlier = torch.arange(num_ngrams, device=ids.device)  # how many n-grams stand before each
    return (equal.triu(1).sum(0) * written).sum() / (earlier * written).sum().clamp(min=1.0)


def _token_matches(ids: Int[Tensor, "T K"], weights: Float[Tensor, "T K"]) -> Float[Tensor, "T T"]:
    """`⟨q_i, q_j⟩` for all pairs of steps, in the vocabulary of the ids that occur in this text."""
    occurring, columns = ids.unique(return_inverse=True)
    dense = weights.new_zeros(len(ids), len(occurring)).scatter_add(1, columns, weights)
    return dense @ dense.T
