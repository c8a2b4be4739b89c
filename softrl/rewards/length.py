"""Rewards of length. The soft length is the expected one: `L = Σ_t s_t` tokens, the end-of-sequence token included."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.types import SoftTokens


class LengthReward:
    """`L / scale` without a target, `−((L − target) / scale)²` with one.

    Differentiable through soft stopping alone: with hard stopping no weight changes where a text ends.

    Args:
        target: the wanted length, in tokens; None rewards every further token.
        scale: tokens that are worth one unit; negative, without a target, to reward short texts.
        name: what logs call it.
    Raises:
        ValueError: scale is zero.
    """

    vocab_size: int | None = None

    def __init__(self, target: float | None = None, scale: float = 1.0, name: str = "length") -> None:
        if scale == 0.0:
            raise ValueError("scale must not be zero: it is the number of tokens that are worth one unit of reward")
        self.target = target
        self.scale = scale
        self.name = name

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of the expected length.

        Raises:
            ValueError: a gradient is wanted, and stopping is hard.
        """
        if not tokens.eos_ids and tokens.weights.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"reward {self.name!r} has no gradient with hard stopping: weights change the length only where they "
                "end the text. Turn soft stopping on (soft_stopping=True), or use the hard face with ReinforceTrainer"
            )
        return self._of_length(tokens.survival.sum(-1))

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of the number of tokens."""
        return self._of_length(mask.sum(-1).to(torch.get_default_dtype()))

    def _of_length(self, length_tokens: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        if self.target is None:
            return length_tokens / self.scale
        return -(((length_tokens - self.target) / self.scale) ** 2)
