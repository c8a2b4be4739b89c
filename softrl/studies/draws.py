"""What a problem of the variance laboratory returns: independent draws of one estimator's whole gradient estimate."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """D draws at fixed parameters, float64, with what a draw costs.

    `reward_calls` counts rewards evaluated in a draw, all of its samples together; `seconds` is a draw's mean wall
    time, without what is fitted once before the first.
    """

    gradients: Float[Tensor, "D P"]
    reward_calls: float
    seconds: float


def whole_gradients(values: Float[Tensor, "D"], parameters: Sequence[Tensor]) -> Float[Tensor, "D P"]:
    """The gradient of every value, float64; for tiny models, since all of them are computed at once."""
    each = torch.eye(len(values), dtype=values.dtype)
    grads = torch.autograd.grad(values, parameters, each, is_grads_batched=True, allow_unused=True)
    parts = [
        torch.zeros(len(values), p.numel(), dtype=torch.float64) if g is None else g.flatten(1).double()
        for g, p in zip(grads, parameters, strict=True)
    ]
    return torch.cat(parts, 1)


def consecutive(sizes: dict[str, int]) -> dict[str, slice]:
    """Where parts of these sizes lie one after the other."""
    stops = accumulate(sizes.values())
    return {name: slice(stop - size, stop) for (name, size), stop in zip(sizes.items(), stops, strict=True)}
