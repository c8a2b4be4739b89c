"""Masked reductions. Token means and sequence means differ in what they weigh, so each has its own name."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def per_sequence_sum(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N"]:
    """Sum over the real tokens of each sequence."""
    return values.masked_fill(~mask, 0.0).sum(-1)


def per_sequence_mean(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N"]:
    """Mean over the real tokens of each sequence; an empty sequence counts as 0."""
    return per_sequence_sum(values, mask) / mask.sum(-1).clamp(min=1)


def token_mean(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, ""]:
    """Mean over all real tokens of the batch: long sequences weigh more than short ones."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def is_any_of(tokens: Int[Tensor, "*batch"], ids: tuple[int, ...]) -> Bool[Tensor, "*batch"]:
    """Whether each token is one of the ids."""
    return torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype, device=tokens.device))


def mask_through_eos(tokens: Int[Tensor, "N T"], eos_ids: tuple[int, ...]) -> Bool[Tensor, "N T"]:
    """True up to and including the first end-of-sequence token, False after it."""
    ends = is_any_of(tokens, eos_ids).long()
    return (ends.cumsum(-1) - ends) == 0
