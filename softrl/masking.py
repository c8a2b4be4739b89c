"""Masked reductions. Token means and sequence means differ in what they weigh, so each has its own name."""

import math

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


def survival_sum(values: Float[Tensor, "N T"], survival: Float[Tensor, "N T"]) -> Float[Tensor, "N"]:
    """`Σ_t s_t v_t`; with hard stopping, where s is the mask, the same as `per_sequence_sum`."""
    return (values * survival).sum(-1)


def survival_mean(values: Float[Tensor, "N T"], survival: Float[Tensor, "N T"]) -> Float[Tensor, "N"]:
    """`Σ_t s_t v_t / Σ_t s_t`; an empty sequence counts as 0."""
    return survival_sum(values, survival) / survival.sum(-1).clamp(min=1.0)


def is_any_of(tokens: Int[Tensor, "*batch"], ids: tuple[int, ...]) -> Bool[Tensor, "*batch"]:
    """Whether each token is one of the ids."""
    return torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype, device=tokens.device))


_LOG_FLOOR = -30.0  # of survival and of each factor: what has ended stays finite in a logarithm and in its gradient


def log_survival(eos_weight: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """`log s_t = max(−30, Σ_{j<t} log max(1 − q_j[eos], e^{−30}))`: the probability that token t is still written.

    It counts the end-of-sequence token itself and nothing after it, as a hard length does. Both maxima are taken
    before the logarithm can overflow, so the gradient is finite; it is zero through a token that ends for certain.

    Args:
        eos_weight: kept weight of all end-of-sequence ids, in [0, 1], shape (N, T).
    Source: ours (softrl maths, section 3).
    """
    going_on = (1.0 - eos_weight).clamp(min=math.exp(_LOG_FLOOR)).log()
    before = torch.cat([torch.zeros_like(going_on[:, :1]), going_on[:, :-1].cumsum(-1)], -1)
    return before.clamp(min=_LOG_FLOOR)


def mask_through_eos(tokens: Int[Tensor, "N T"], eos_ids: tuple[int, ...]) -> Bool[Tensor, "N T"]:
    """True up to and including the first end-of-sequence token, False after it."""
    ends = is_any_of(tokens, eos_ids).long()
    return (ends.cumsum(-1) - ends) == 0
