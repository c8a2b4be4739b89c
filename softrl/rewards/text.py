"""TRL's reward functions of texts as rewards with a hard face only: black boxes, for score-function trainers.

Left out of what TRL hands to such a function: `trainer_state`, and `None` as a reward for "does not apply".
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softrl.rewards.function import name_of
from softrl.types import SoftTokens


def not_differentiable(name: str, parameters: list[str]) -> str:
    """The message for a function of texts where a reward has to be differentiated."""
    return (
        f"reward function {name!r} is a function of {', '.join(parameters)}: its value cannot be "
        "differentiated in soft tokens. Use ReinforceTrainer, the score-function trainer, which takes such "
        "functions as they are; or pass a differentiable f(tokens: SoftTokens, **columns) -> Tensor [N]"
    )


class TextReward:
    """`f(prompts, completions, completion_ids, **columns) -> list[float]`, as TRL's trainers take it.

    Args:
        function: called with decoded completions, without special tokens; where prompts are conversations, each
            completion is one too: `[{"role": "assistant", "content": text}]`. It gets of TRL's keyword arguments what
            it names, or all with `**kwargs`; `log_extra` and `log_metric` do nothing here.
        tokenizer: the policy's.
        name: what logs call it; default: the function's.
    Raises:
        TypeError: an asynchronous function.
    """

    vocab_size: int | None = None

    def __init__(self, function: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, name: str | None = None):
        self.function = function
        self.tokenizer = tokenizer
        self.name = name or name_of(function)
        if inspect.iscoroutinefunction(function):
            raise TypeError(f"reward function {self.name!r} is asynchronous; pass one that waits for its answers")
        parameters = inspect.signature(function).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._named = None if takes_all else frozenset(parameters)

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """There is none.

        Raises:
            TypeError: always.
        """
        raise TypeError(not_differentiable(self.name, ["texts"]))

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """What the function returns for the decoded tokens.

        Raises:
            ValueError: it returned another number of rewards, or something that is not a number.
        """
        rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        prompts = columns.pop("prompt")
        conversational = not isinstance(prompts[0], str)
        given = {
            "prompts": prompts,
            "completions": [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts,
            "completion_ids": rows,
            "log_extra": _ignored,
            "log_metric": _ignored,
            **columns,
        }
        if self._named is not None:
            given = {key: value for key, value in given.items() if key in self._named}
        return self._as_tensor(self.function(**given), len(rows)).to(ids.device)

    def _as_tensor(self, values: Any, count: int) -> Float[Tensor, "N"]:
        values = list(values)
        if len(values) != count:
            raise ValueError(
                f"reward function {self.name!r} returned {len(values)} rewards for {count} completions; return one a "
                "completion"
            )
        missing = [index for index, value in enumerate(values) if value is None]
        if missing:
            raise ValueError(
                f"reward function {self.name!r} returned None for the sequences {missing[:5]}; return a number for "
                "each, 0.0 where it does not apply"
            )
        return torch.tensor([float(value) for value in values])


def _ignored(*args: Any, **kwargs: Any) -> None:
    """Stands in for TRL's callbacks that log from inside a reward function."""
