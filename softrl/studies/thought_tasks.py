"""What `softrl thoughts compare` trains on: a tokenizer, training and held-out rows, and the rows' difficulties."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from softrl.assets import resolve_model
from softrl.data.characters import character_blocks, character_tokenizer, shakespeare
from softrl.data.pointer_chasing import Kind, pointer_chasing, pointer_tokenizer, worked_answers
from softrl.data.reviews import load_reviews
from softrl.data.texts import ANCHOR_COLUMN, MASK_COLUMN


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
    num_symbols: int = 8,
    hops: tuple[int, ...] | list[int] = (3,),
    kind: Kind = "permutation",
    num_rows: int = 20_000,
    num_eval_rows: int = 500,
    worked: bool = True,
    seed: int = 0,
) -> Task:
    """Pointer chasing, thought about before the answer alone; groups are the numbers of hops.

    Args:
        worked: let every second training row be a worked answer, which is not thought about.
    """
    tokenizer = pointer_tokenizer(num_symbols, max(hops))
    train, test = (
        pointer_chasing(tokenizer, count, num_symbols, list(hops), kind, split, seed)
        for split, count in (("train", num_rows), ("test", num_eval_rows))
    )
    rows = [_asked(train), _asked(test)]
    if worked:
        shown = worked_answers(tokenizer, train)
        shown = shown.add_column(ANCHOR_COLUMN, [[] for _ in shown]).cast(rows[0].features)
        rows[0] = concatenate_datasets([rows[0], shown])
    groups = [f"{number} hop{'s' if number > 1 else ''}" for number in test["hops"]]
    return Task(tokenizer, *rows, groups)


def _asked(questions: Dataset) -> Dataset:
    """Rows that are thought about before the answer, and whose loss is the answer's."""
    answers = [len(ids) - 1 for ids in questions["input_ids"]]
    return Dataset.from_dict(
        {
            "input_ids": questions["input_ids"],
            MASK_COLUMN: [[0] * answer + [1] for answer in answers],
            ANCHOR_COLUMN: [[position] for position in questions["answer_position"]],
        }
    )


def shakespeare_task(model: Any, block_length: int = 128, num_eval_blocks: int = 100) -> Task:
    """Shakespeare by the character; held-out blocks are spread evenly over the held-out works."""
    tokenizer = character_tokenizer(shakespeare("train"))
    train, test = (character_blocks(shakespeare(split), tokenizer, block_length) for split in ("train", "test"))
    count = min(num_eval_blocks, len(test))
    spread = [index * len(test) // count for index in range(count)]
    return Task(tokenizer, train.select_columns(["input_ids"]), test.select(spread).select_columns(["input_ids"]))


def reviews_task(model: Any, length_tokens: int = 64, num_rows: int = 4_000, num_eval_rows: int = 64) -> Task:
    """Beginnings of film reviews, in tokens of a pretrained model."""
    if not isinstance(model, str):
        raise ValueError("task 'reviews' needs the name of a pretrained model as `model`, such as smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    train, test = (
        _tokenised(tokenizer, load_reviews(part)["text"][:count], length_tokens)
        for part, count in (("reward", num_rows), ("prompts", num_eval_rows))
    )
    return Task(tokenizer, train, test)


def _tokenised(tokenizer: PreTrainedTokenizerBase, texts: list[str], length_tokens: int) -> Dataset:
    rows = tokenizer(texts).input_ids
    return Dataset.from_dict({"input_ids": [ids[:length_tokens] for ids in rows if len(ids) > 1]})


TASKS = {"pointer_chasing": pointer_task, "shakespeare": shakespeare_task, "reviews": reviews_task}
