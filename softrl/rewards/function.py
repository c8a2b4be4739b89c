"""A differentiable function of soft tokens as a reward."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.rewards.base import one_hot_tokens
from softrl.types import SoftTokens


class FunctionReward:
    """`f(tokens, **columns)`; its hard face is f on one-hot tokens.

    Args:
        function: from N soft tokens to a tensor [N], differentiable in `tokens.weights`. A token should count by its
            `tokens.survival`. Of the data-set columns it gets those that it names, or all with `**columns`.
        name: what logs call it; default: the function's.
    """

    vocab_size: int | None = None

    def __init__(self, function: Callable[..., Tensor], name: str | None = None) -> None:
        self.function = function
        self.name = name or name_of(function)
        parameters = inspect.signature(function).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._named_columns = None if takes_all else frozenset(list(parameters)[1:])

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """What the function returns."""
        if self._named_columns is not None:
            columns = {key: value for key, value in columns.items() if key in self._named_columns}
        return self.function(tokens, **columns)

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """What the function returns for one-hot tokens."""
        return self.soft(one_hot_tokens(ids, mask), **columns)


def name_of(function: Callable) -> str:
    """A callable's name for logs: its own, that of what a partial wraps, or its class's."""
    wrapped = function.func if isinstance(function, partial) else function
    return getattr(wrapped, "__name__", type(wrapped).__name__).strip("<>")
