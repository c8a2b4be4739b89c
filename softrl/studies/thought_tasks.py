"""What `softrl thoughts compare` trains on: a tokenizer, training and held-out rows, and the rows' difficulties."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from softrl.assets import resolve_model
from softrl.data.characters import character_tokenizer, shakespeare_blocks
from softrl.data.pointer_chasing import pointer_chasing, pointer_tokenizer
from softrl.data.reviews import load_reviews
from softrl.data.texts import ANCHOR_COLUMN


@dataclass(frozen=True)
class Task:
    """What a model is taught to think on.

    Attributes:
        tokenizer: of both sets.
        train, test: rows as `softrl.data.texts` reads them.
        groups: what each held-out row counts for, beside the whole; None: nothing.
    """

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    test: Dataset
    groups: list[str] | None = None


def pointer_task(
    model: Any,
    num_symbols: int = 6,
    hops: tuple[int, ...] | list[int] = (1, 2, 3),
    kind: str = "cycle",
    num_rows: int = 20_000,
    num_eval_rows: int = 500,
    seed: int = 0,
) -> Task:
    """Pointer chasing, thought about before the answer alone; groups are the numbers of hops."""
    tokenizer = pointer_tokenizer(num_symbols, max(hops))
    made = [
        pointer_chasing(tokenizer, count, num_symbols, list(hops), kind, split, seed)
        for split, count in (("train", num_rows), ("test", num_eval_rows))
    ]
    rows = [each.add_column(ANCHOR_COLUMN, [[position] for position in each["answer_position"]]) for each in made]
    groups = [f"{hops} hop{'s' if hops > 1 else ''}" for hops in made[1]["hops"]]
    return Task(tokenizer, *rows, groups)
