"""From data-set rows to padded prompts, and from token ids back to text."""

import reprlib
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softrl.data.prompts import Prompt, is_conversation, prompt_ids
from softrl.data.texts import INDEX_COLUMN as TEXT_INDEX
from softrl.masking import is_any_of
from softrl.types import Prompts

INDEX_COLUMN = "prompt_index"
_TAKEN_COLUMNS = ("reward", "tokens", "ids", "mask")  # arguments of a reward's faces, which columns are passed beside


@dataclass(frozen=True)
class PromptBatch:
    """B prompts, their indices in the data set, and its columns with one entry a *sequence* (N = B * G)."""

    prompts: Prompts
    indices: list[int]
    columns: dict[str, list[Any]]


@dataclass(frozen=True)
class Completions:
    """N completions as hard tokens, the mask of real ones, and which of them ended by themselves."""

    tokens: Int[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    ended: Bool[Tensor, "N"]

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor, eos_ids: tuple[int, ...]) -> "Completions":
        """Completions that ended if they hold an end-of-sequence token."""
        return cls(tokens, mask, (is_any_of(tokens, eos_ids) & mask).any(-1))


def indexed(dataset: Any, name: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The data set with each row's index as a column, from which its random numbers are keyed.

    Raises:
        TypeError: not a `datasets.Dataset`, or prompts that are neither text nor conversations.
        ValueError: no rows, no `prompt` column, a column that a reward could not be given, or conversations and a
            tokenizer without a chat template.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, got {type(dataset).__name__}; a stream has no row indices to key "
            "random numbers by, so take rows of it first: Dataset.from_list(list(stream.take(n)))"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; it needs at least one row with a `prompt`")
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"{name} needs a column `prompt`; it has {dataset.column_names}{_prompt_hint(dataset.column_names)}"
        )
    taken = sorted(set(_TAKEN_COLUMNS) & set(dataset.column_names))
    if taken:
        raise ValueError(
            f"{name} has columns {taken}, which are names of a reward's own arguments; rename them: "
            "dataset.rename_column(...)"
        )
    _encoded(dataset[0]["prompt"], tokenizer, f"{name}, row 0")
    if INDEX_COLUMN in dataset.column_names:
        return dataset
    return dataset.add_column(INDEX_COLUMN, list(range(len(dataset))))


def as_rows(rows: list[Any]) -> list[Any]:
    """The data collator: trainers make tensors of rows themselves."""
    return rows


def indexed_for_evaluation(dataset: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """An evaluation set, or several by name, with row indices."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: indexed(each, f"eval_dataset[{name!r}]", tokenizer) for name, each in dataset.items()}
    return indexed(dataset, "eval_dataset", tokenizer)


def _prompt_hint(columns: list[str]) -> str:
    if {"chosen", "rejected"} <= set(columns):
        return ". What `chosen` and `rejected` begin with is the prompt: dataset.map(trl.extract_prompt)"
    if "messages" in columns:
        return (
            '. Everything before an answer is its prompt: dataset.map(lambda row: {"prompt": row["messages"][:-1]}); '
            "for pairs of answers, see trl.extract_prompt"
        )
    return ""


def prompt_batch(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    max_prompt_length: int | None,
    device: torch.device,
) -> PromptBatch:
    """Tokenise and left-pad the prompts of rows in which each prompt stands `num_samples` times in a row."""
    first_rows = rows[::num_samples]
    encoded = [_encoded(row["prompt"], tokenizer, f"row {row[INDEX_COLUMN]}") for row in first_rows]
    if max_prompt_length is not None:
        encoded = [ids[-max_prompt_length:] for ids in encoded]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    length = max(map(len, encoded))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in encoded], device=device)
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != INDEX_COLUMN}
    return PromptBatch(Prompts(ids, mask), [row[INDEX_COLUMN] for row in first_rows], columns)


def _encoded(prompt: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """Token ids of a prompt, after a look at what it is; `where` names its row."""
    if not isinstance(prompt, str) and not is_conversation(prompt):
        raise TypeError(
            f"{where}: a prompt is text or a list of messages with `role` and `content`, got {reprlib.repr(prompt)}"
        )
    ids = prompt_ids(prompt, tokenizer)
    if not ids:
        raise ValueError(f"{where}: the prompt is empty; every prompt needs at least one token")
    return ids


def prompt_text(prompt: Prompt) -> str:
    """A prompt for people to read; a conversation has a line a message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, mask: Tensor) -> list[str]:
    """Texts of token ids [N, T] where the mask is True, without special tokens."""
    rows = [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


@dataclass
class IndexedCollator:
    """TRL's collator, and each row's index beside what it makes."""

    collator: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        batch[TEXT_INDEX] = torch.tensor([row[TEXT_INDEX] for row in rows])
        return batch


def indexed_rows(dataset: Any, name: str) -> Any:
    """The data set, or each of several, with its rows' indices, from which their random numbers are keyed.

    Raises:
        TypeError: not a `datasets.Dataset`.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {key: indexed_rows(each, f"{name}[{key!r}]") for key, each in dataset.items()}
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, got {type(dataset).__name__}; a stream has no row indices to key "
            "random numbers by, so take rows of it first: Dataset.from_list(list(stream.take(n)))"
        )
    if TEXT_INDEX in dataset.column_names:
        return dataset
    return dataset.add_column(TEXT_INDEX, list(range(len(dataset))))
