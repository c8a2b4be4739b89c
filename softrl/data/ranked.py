"""Sets of completions of one prompt, with rewards or a ranking, as token ids.

The format: `prompt` (text or a conversation), `completions` (a list of texts, or of lists of messages) and `rewards`
(a list of numbers, larger is better) or `ranking` (a list of numbers, 1 is the best, equal ones are ties). Sets may
have different sizes. A text is ended by the end of sequence, as TRL's DPOTrainer ends it.
"""

import math
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softrl.data.prompts import is_conversation, prompt_ids


@dataclass(frozen=True)
class RankedBatch:
    """N sets of S items at most; M completions in all, one a row, set after set."""

    ids: Int[Tensor, "M L"]  # prompt, completion, padding on the right
    attention: Bool[Tensor, "M L"]
    completion: Bool[Tensor, "M L"]
    mask: Bool[Tensor, "N S"]  # which items of a set exist; M of them
    ranks: Float[Tensor, "N S"]  # 1 is the best
    rewards: Float[Tensor, "N S"] | None  # where every row of the data has them

    def to(self, device: torch.device) -> "RankedBatch":
        """The same on another device."""
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return RankedBatch(**moved)

    def by_set(self, values: Float[Tensor, "M"]) -> Float[Tensor, "N S"]:
        """Numbers of rows as a table of sets; 0 where there is no item."""
        return torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device).masked_scatter(self.mask, values)


def ranked_batch(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> RankedBatch:
    """Token ids of several sets.

    Raises:
        ValueError: a row that `check_ranked_row` refuses, or a prompt that leaves no room for a completion.
    """
    sequences, ranks, rewards = [], [], []
    for number, row in enumerate(rows):
        check_ranked_row(row, number)
        prompt = _checked_prompt_ids(row["prompt"], tokenizer, max_length, number)
        for completion in row["completions"]:
            answer = _completion_ids(row["prompt"], completion, prompt, tokenizer)
            sequences.append((len(prompt), [*prompt, *answer][:max_length]))
        ranks.append(_ranks(row))
        rewards.append(row.get("rewards"))
    length, size = max(len(ids) for _, ids in sequences), max(map(len, ranks))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    positions = torch.arange(length)
    attention = torch.stack([positions < len(ids) for _, ids in sequences])
    completion = attention & torch.stack([positions >= start for start, _ in sequences])
    return RankedBatch(
        torch.tensor([ids + [pad] * (length - len(ids)) for _, ids in sequences]),
        attention,
        completion,
        torch.stack([torch.arange(size) < len(row) for row in ranks]),
        _table(ranks, size),
        None if any(row is None for row in rewards) else _table(rewards, size),
    )


def check_ranked_rows(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None, needs: str = ""
) -> None:
    """Look at a whole data set before a run: its last row may be the one that is wrong.

    Args:
        rows, tokenizer, max_length: as in `ranked_batch`; what it would refuse is refused here, but that answers are
            tokenised of the first row only.
        needs: what makes `rewards` needed, for the error's text; empty where a ranking will do.
    Raises:
        ValueError: there are no rows, or a row cannot be learned from; the message names it.
    """
    number = -1
    for number, row in enumerate(rows):
        check_ranked_row(row, number)
        if needs and row.get("rewards") is None:
            raise ValueError(
                f"{needs} needs the column 'rewards', and row {number} has a ranking alone; it has {_given(row)}"
            )
        _checked_prompt_ids(row["prompt"], tokenizer, max_length, number)
        if number == 0:
            ranked_batch([row], tokenizer, max_length)
    if number < 0:
        raise ValueError(
            "the data set has no rows; it needs at least one with prompt, completions, rewards or ranking"
        )


def check_ranked_row(row: dict[str, Any], number: int) -> None:
    """Raise a ValueError that names what is wrong with a row of the data set."""
    for name in ("prompt", "completions"):
        if row.get(name) is None:
            raise ValueError(f"row {number} has no {name!r}; it has {_given(row)}")
    prompt, completions = row["prompt"], row["completions"]
    if not isinstance(prompt, str) and not is_conversation(prompt):
        raise ValueError(f"row {number}: a prompt is text or a list of messages, got {reprlib.repr(prompt)}")
    if not isinstance(completions, list) or len(completions) < 2:
        raise ValueError(f"row {number}: completions must be a list of two or more, got {reprlib.repr(completions)}")
    for completion in completions:
        if not isinstance(completion, str) and not (is_conversation(completion) and not isinstance(prompt, str)):
            raise ValueError(
                f"row {number}: a completion is text, or a list of messages where the prompt is one, got "
                f"{reprlib.repr(completion)}"
            )
    _check_numbers(row, number)


def _check_numbers(row: dict[str, Any], number: int) -> None:
    completions = row["completions"]
    given = [name for name in ("rewards", "ranking") if row.get(name) is not None]
    if not given:
        raise ValueError(f"row {number} has neither 'rewards' nor 'ranking' for its completions; it has {_given(row)}")
    for name in given:
        if not isinstance(row[name], list):
            raise ValueError(f"row {number}: {name} must be a list of numbers, got {reprlib.repr(row[name])}")
        if len(row[name]) != len(completions):
            raise ValueError(f"row {number}: {len(completions)} completions and {len(row[name])} {name}")
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in row[name]):
            raise ValueError(f"row {number}: {name} must be finite numbers, got {reprlib.repr(row[name])}")


def _given(row: dict[str, Any]) -> list[str]:
    """What a row has; readers of files give it the columns of all others, empty."""
    return sorted(name for name, value in row.items() if value is not None)


def _checked_prompt_ids(
    prompt: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None, number: int
) -> list[int]:
    ids = prompt_ids(prompt, tokenizer)
    if not ids:
        raise ValueError(f"row {number}: the prompt is empty; every prompt needs at least one token")
    if max_length is not None and len(ids) >= max_length:
        raise ValueError(
            f"row {number}: the prompt has {len(ids)} tokens and max_length={max_length} leaves no room for its "
            "completions; raise max_length, or leave the row out"
        )
    return ids


def _ranks(row: dict[str, Any]) -> list[float]:
    if row.get("ranking") is not None:
        return [float(rank) for rank in row["ranking"]]
    better = sorted(set(row["rewards"]), reverse=True)
    return [1.0 + better.index(reward) for reward in row["rewards"]]


def _completion_ids(
    prompt: Any, completion: Any, prompt_tokens: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    if isinstance(completion, str):
        ended = completion.removesuffix(tokenizer.eos_token) + tokenizer.eos_token
        ids: list[int] = tokenizer(ended, add_special_tokens=False).input_ids
        return ids
    encoded: Any = tokenizer.apply_chat_template([*prompt, *completion], return_dict=True)
    whole: list[int] = encoded["input_ids"]
    if whole[: len(prompt_tokens)] != prompt_tokens:
        raise ValueError(
            "the chat template writes a prompt otherwise when an answer follows it, so the answer cannot be told "
            "apart; give prompt and completions as text"
        )
    return whole[len(prompt_tokens) :]


def _table(rows: list[Any], size: int) -> Float[Tensor, "N S"]:
    return torch.tensor([[*map(float, row), *[0.0] * (size - len(row))] for row in rows])
