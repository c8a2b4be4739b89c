"""Plain text to learn thinking from: data-set rows as padded token ids.

The format: a column `text`, or `input_ids` where the text has been tokenised; with the latter, `completion_mask` (as
in TRL) may say which tokens the loss without thoughts counts; with `think_at="given"` also `anchors`, the tokens of
each row to think after, counted from 0 (a row may have none).
"""

from typing import Any

import pyarrow.compute
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from softrl.types import Texts

INDEX_COLUMN, ANCHOR_COLUMN, MASK_COLUMN = "text_index", "anchors", "completion_mask"


def text_rows(
    dataset: Any, name: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None, needs_anchors: bool
) -> Dataset:
    """Rows of token ids with their index, from which a row's random numbers are keyed.

    Args:
        dataset: columns as above; others are left out.
        name: of the argument, for errors.
        tokenizer: for a column `text`; None does for `input_ids`.
        max_length: rows lose what is longer, in tokens, and anchors in it.
        needs_anchors: whether the column `anchors` is read.
    Raises:
        TypeError: not a `datasets.Dataset`.
        ValueError: no rows, a missing column, no tokenizer for texts, or a row of fewer than two tokens.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, got {type(dataset).__name__}; of a stream take rows first: "
            "Dataset.from_list(list(stream.take(n)))"
        )
    columns = dataset.column_names
    if len(dataset) == 0 or not {"text", "input_ids"} & set(columns):
        raise ValueError(
            f"{name} needs at least one row and a column `text` or `input_ids`; it has {len(dataset)} rows and the "
            f"columns {columns}"
        )
    if needs_anchors and ANCHOR_COLUMN not in columns:
        raise ValueError(
            f"{name} has no column {ANCHOR_COLUMN!r}, which think_at='given' reads; it has {columns}. It lists the "
            "tokens of each row to think after, counted from 0"
        )
    if "input_ids" not in columns and tokenizer is None:
        raise ValueError(f"{name} has a column `text` and there is no tokenizer; pass processing_class")
    if _is_ready(dataset, max_length, needs_anchors):
        rows = dataset.select_columns(["input_ids"])
        return rows.add_column(INDEX_COLUMN, list(range(len(rows))))
    rows = [_row(row, index, name, tokenizer, max_length, needs_anchors) for index, row in enumerate(dataset)]
    return Dataset.from_list(rows)


def _is_ready(dataset: Dataset, max_length: int | None, needs_anchors: bool) -> bool:
    """Whether rows are token ids as they should be; going over them one by one takes seconds for a corpus."""
    if "input_ids" not in dataset.column_names or needs_anchors or MASK_COLUMN in dataset.column_names:
        return False
    lengths = pyarrow.compute.list_value_length(dataset.with_format("arrow")["input_ids"])
    bounds = pyarrow.compute.min_max(lengths).as_py()
    return bounds["min"] >= 2 and (max_length is None or bounds["max"] <= max_length)


def _row(
    row: dict[str, Any],
    index: int,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
    needs_anchors: bool,
) -> dict[str, Any]:
    ids = row.get("input_ids")
    if ids is None:
        assert tokenizer is not None
        ids = tokenizer(row["text"]).input_ids
    ids = list(ids)[:max_length]
    if len(ids) < 2:
        raise ValueError(
            f"{name}, row {index}: a text of {len(ids)} tokens has none to predict; leave out what is shorter than two"
        )
    made = {"input_ids": ids, INDEX_COLUMN: index}
    if needs_anchors:
        anchors = row[ANCHOR_COLUMN]
        inside = [anchor for anchor in anchors if anchor < len(ids) - 1]
        if (anchors and not inside) or min(anchors, default=0) < 0:
            raise ValueError(
                f"{name}, row {index}: {ANCHOR_COLUMN}={anchors} holds no token of {len(ids)} that another one "
                "follows, or one below 0; count from 0, within max_length"
            )
        made[ANCHOR_COLUMN] = inside
    if row.get(MASK_COLUMN) is not None:
        if "input_ids" not in row or len(row[MASK_COLUMN]) < len(ids):
            raise ValueError(
                f"{name}, row {index}: {MASK_COLUMN} says of each of input_ids whether it counts, and it has "
                f"{len(row[MASK_COLUMN])} numbers for {len(ids)} tokens"
            )
        made[MASK_COLUMN] = [int(each) for each in row[MASK_COLUMN][: len(ids)]]
    return made


def padded_texts(rows: list[dict[str, Any]], device: torch.device) -> Texts:
    """Rows of token ids, padded on the right (with id 0, which nothing sees)."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int]) -> list[int]:
        return values + [0] * (length - len(values))

    ids = torch.tensor([padded(row["input_ids"]) for row in rows], device=device)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=device)
    counted = None
    if rows[0].get(MASK_COLUMN) is not None:
        counted = torch.tensor([padded(row[MASK_COLUMN]) for row in rows], device=device).bool()
    return Texts(ids, torch.arange(length, device=device) < lengths[:, None], counted)
