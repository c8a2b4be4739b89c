"""Texts that a reward model is fitted on: labelled ones, and pairs of which one is preferred; reviews or one's own.

Left out: conversations as pairs, which `trl`'s data sets have in its own format and which are taken as they are.
"""

import random

from datasets import Dataset, DatasetDict

from softrl.data.files import read_data_set
from softrl.data.reviews import LabelledText, Part, load_reviews, pieces, sample, snippets, unit_hash

BUILTIN = "reviews"
PIECE_LENGTH_WORDS = 32  # completions are short, and a classifier of whole reviews reads them poorly
_HELD_OUT_FRACTION = 0.1
_OTHER: dict[str, Part] = {"judge": "reward", "reward": "judge"}


def labelled_texts(name: str, part: Part, num_train: int, num_test: int) -> tuple[Dataset, Dataset]:
    """Texts to fit a classifier on and others to measure it on.

    Args:
        name: "reviews", a file (.csv, .json, .jsonl, .parquet), a folder of `save_to_disk` or a hub name, with columns
            `text` and `label` (0 or 1).
        part: of "reviews": which half is fitted on, "judge" or "reward"; the other one is measured on. They are
            snippets of Rotten Tomatoes and pieces of 32 words of IMDB reviews.
        num_train, num_test: texts at most.
    Returns:
        Training and held-out texts, columns `text` and `label`; with "reviews" also `source`.
    Raises:
        ValueError: an unknown part, data that cannot be read, a missing column, or a label that is neither 0 nor 1.
    """
    if name == BUILTIN:
        _check_part(part)
        return _reviews(part, num_train), _reviews(_OTHER[part], num_test)
    train, test = _loaded(name, ("text", "label"))
    for split in (train, test):
        if wrong := next((label for label in split["label"] if label not in (0, 1)), None):
            raise ValueError(f"dataset_name={name!r}: labels must be 0 and 1, got {wrong!r}")
    return _at_most(train, num_train), _at_most(test, num_test)


def preference_pairs(name: str, part: Part, prompt: str, num_train: int, num_test: int) -> tuple[Dataset, Dataset]:
    """Pairs of texts of which the first is preferred, to fit a reward model on, and others to measure it on.

    Args:
        name: "reviews": a favourable and an unfavourable piece at random; or as in `labelled_texts`, with columns
            `chosen`, `rejected` and, if there is one, `prompt`.
        part: see `labelled_texts`.
        prompt: of "reviews": what stands before both.
        num_train, num_test: pairs at most.
    Returns:
        Training and held-out pairs in TRL's format, columns `prompt`, `chosen`, `rejected`.
    Raises:
        ValueError: an unknown part, data that cannot be read, or a missing column.
    """
    if name == BUILTIN:
        _check_part(part)
        return _pairs(part, prompt, num_train), _pairs(_OTHER[part], prompt, num_test)
    train, test = _loaded(name, ("chosen", "rejected"))
    return _at_most(train, num_train), _at_most(test, num_test)


def _check_part(part: str) -> None:
    if part not in _OTHER:
        raise ValueError(f"part must be one of {sorted(_OTHER)}, got {part!r}")


def _texts(part: Part, num_texts: int) -> tuple[list[LabelledText], list[LabelledText]]:
    """Snippets and pieces, half of each where there are enough."""
    reviews = load_reviews(part)
    short = sample(snippets(reviews), num_texts // 2)
    return short, sample(pieces(reviews, PIECE_LENGTH_WORDS), num_texts - len(short))


def _reviews(part: Part, num_texts: int) -> Dataset:
    short, long = _texts(part, num_texts)
    rows = [(*each, source) for texts, source in ((short, "snippets"), (long, "pieces")) for each in texts]
    random.Random(0).shuffle(rows)
    texts, labels, sources = zip(*rows, strict=True)
    return Dataset.from_dict({"text": list(texts), "label": list(labels), "source": list(sources)})


def _pairs(part: Part, prompt: str, num_pairs: int) -> Dataset:
    texts = sample(pieces(load_reviews(part), PIECE_LENGTH_WORDS), 5 * num_pairs)  # enough of either label
    liked, disliked = ([text for text, label in texts if label == wanted] for wanted in (1, 0))
    count = min(num_pairs, len(liked), len(disliked))
    columns = {"prompt": [prompt] * count, "chosen": liked[:count], "rejected": disliked[:count]}
    return Dataset.from_dict(columns)


def _loaded(name: str, columns: tuple[str, ...]) -> tuple[Dataset, Dataset]:
    """Splits "train" and "test" of a named data set; a tenth is held out where there is no second split."""
    splits = read_data_set(name, (BUILTIN,))
    if "test" not in splits:
        only = next(iter(splits.values()))
        held = [unit_hash(str(row), "held out") < _HELD_OUT_FRACTION for row in only]
        numbers = {wanted: [row for row, is_held in enumerate(held) if is_held == wanted] for wanted in (False, True)}
        splits = DatasetDict(train=only.select(numbers[False]), test=only.select(numbers[True]))
    for split in ("train", "test"):
        if split not in splits or len(splits[split]) == 0:
            raise ValueError(f"dataset_name={name!r} has no rows to {split} on; its splits are {sorted(splits)}")
        if missing := [column for column in columns if column not in splits[split].column_names]:
            raise ValueError(
                f"dataset_name={name!r} lacks the columns {missing}; it has {splits[split].column_names}, and needs "
                f"{list(columns)}"
            )
    return splits["train"], splits["test"]


def _at_most(rows: Dataset, count: int) -> Dataset:
    return rows.select(range(min(count, len(rows))))
