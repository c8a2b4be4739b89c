"""From data-set rows to padded prompts, and from token ids back to text."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softrl.types import Prompts

INDEX_COLUMN = "prompt_index"


@dataclass(frozen=True)
class PromptBatch:
    """B prompts, their indices in the data set, and its columns with one entry a *sequence* (N = B * G)."""

    prompts: Prompts
    indices: list[int]
    columns: dict[str, list[Any]]


def indexed(dataset: Any, name: str) -> Dataset:
    """The data set with each row's index as a column, from which its random numbers are keyed.

    Raises:
        TypeError: not a `datasets.Dataset`, or prompts that are not strings.
        ValueError: no rows, or no `prompt` column.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, got {type(dataset).__name__}; a stream has no row indices to key "
            "random numbers by, so take rows of it first: Dataset.from_list(list(stream.take(n)))"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; it needs at least one row with a `prompt`")
    if "prompt" not in dataset.column_names:
        raise ValueError(f"{name} needs a column `prompt`; it has {dataset.column_names}")
    if not isinstance(dataset[0]["prompt"], str):
        raise TypeError(
            f"{name}: prompts must be strings, got {type(dataset[0]['prompt']).__name__}; turn conversations into "
            "text first: tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)"
        )
    if INDEX_COLUMN in dataset.column_names:
        return dataset
    return dataset.add_column(INDEX_COLUMN, list(range(len(dataset))))


def prompt_batch(
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    max_prompt_length: int | None,
    device: torch.device,
) -> PromptBatch:
    """Tokenise and left-pad the prompts of rows in which each prompt stands `num_samples` times in a row."""
    first_rows = rows[::num_samples]
    encoded = [tokenizer(row["prompt"]).input_ids for row in first_rows]
    if max_prompt_length is not None:
        encoded = [ids[-max_prompt_length:] for ids in encoded]
    for row, ids in zip(first_rows, encoded, strict=True):
        if not ids:
            raise ValueError(f"the prompt of row {row[INDEX_COLUMN]} is empty; every prompt needs at least one token")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    length = max(map(len, encoded))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in encoded], device=device)
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != INDEX_COLUMN}
    return PromptBatch(Prompts(ids, mask), [row[INDEX_COLUMN] for row in first_rows], columns)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, mask: Tensor) -> list[str]:
    """Texts of token ids [N, T] where the mask is True, without special tokens."""
    rows = [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
