"""The labelled reviews, cleaned and split into three parts that share no text.

"prompts" gives the policy its prompts and no classifier is ever fitted on it; "reward" fits the reward that the
policy is trained on; "judge" fits the judge that it is measured by. Each classifier is tested on the other's part.
"""

import csv
import hashlib
import html
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from datasets import Dataset

from softrl import assets

Part = Literal["prompts", "reward", "judge"]
LabelledText = tuple[str, int]  # 1 favourable, 0 not

IMDB = "imdb"
ROTTEN_TOMATOES = "rotten_tomatoes"

# Of the IMDB reviews, 2,400 of 24,900. The one-sentence snippets of Rotten Tomatoes make poor prompts: none.
_PROMPTS_FRACTION = 0.0965
# The control characters 0x80-0x9f are punctuation of Windows' code page, read as Latin-1 by whoever made the corpus.
_WINDOWS_PUNCTUATION = {
    code: character for code in range(0x80, 0xA0) if (character := bytes([code]).decode("cp1252", errors="ignore"))
}


def load_reviews(part: Part, csv_path: Path | None = None) -> Dataset:
    """The reviews of one part, in the order of the corpus.

    The split depends on nothing but each text: a hash of it, so it is the same on every machine.

    Args:
        part: "prompts" (about 2,400, IMDB only), "reward" or "judge" (about 15,500 each, both sources).
        csv_path: a file in the corpus's format, columns text, label, source; default: the cached corpus.
    Returns:
        Columns `text` (cleaned, not empty, no duplicates), `label` (1 favourable, 0 not), `source` ("imdb" or
        "rotten_tomatoes").
    Raises:
        ValueError: unknown part.
        AssetError: the corpus is not cached and cannot be fetched.
    """
    if part not in get_args(Part):
        raise ValueError(f"part must be one of {get_args(Part)}, got {part!r}")
    rows = [row for row in _cleaned_rows(csv_path or assets.reviews_csv()) if _part_of(row[0], row[2]) == part]
    texts, labels, sources = zip(*rows, strict=True) if rows else ((), (), ())
    return Dataset.from_dict({"text": list(texts), "label": list(labels), "source": list(sources)})


def snippets(reviews: Dataset) -> list[LabelledText]:
    """The texts from Rotten Tomatoes, whole."""
    return [(row["text"], row["label"]) for row in reviews if row["source"] == ROTTEN_TOMATOES]


def pieces(reviews: Dataset, length_words: int) -> list[LabelledText]:
    """Consecutive pieces of IMDB reviews, each with its review's label; what is left at the end is dropped."""
    found = []
    for row in reviews:
        words = row["text"].split() if row["source"] == IMDB else []
        for start in range(0, len(words) - length_words + 1, length_words):
            found.append((" ".join(words[start : start + length_words]), row["label"]))
    return found


def sample(texts: list[LabelledText], size: int) -> list[LabelledText]:
    """That many of the texts, or all if there are fewer; always the same ones."""
    return random.Random(0).sample(texts, min(size, len(texts)))


def clean(text: str, source: str) -> str:
    """The text as people write it: no markup, single spaces, and no spaces before punctuation in snippets."""
    text = html.unescape(text).translate(_WINDOWS_PUNCTUATION)
    text = re.sub(r"</?(?:br|i|b|em|hr|p)\s*/?>", " ", text)
    if source == ROTTEN_TOMATOES:  # these come tokenised: `" a film , " he said .`
        text = re.sub(r'" (.*?) "', r'"\1"', text)
        text = re.sub(r"\s+([.,;:!?)\]%])", r"\1", text)
        text = re.sub(r"([(\[])\s+", r"\1", text)
    return " ".join(text.split())


def unit_hash(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on the text and the salt alone, uniform over texts."""
    digest = hashlib.sha256(f"{salt}\n{text}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _cleaned_rows(path: Path) -> Iterator[tuple[str, int, str]]:
    """Text, label, source of every review, the first of equal texts only."""
    seen = set()
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = clean(row["text"], row["source"])
            if text and text not in seen:
                seen.add(text)
                yield text, int(row["label"]), row["source"]


def _part_of(text: str, source: str) -> Part:
    if source == IMDB and unit_hash(text, "prompts") < _PROMPTS_FRACTION:
        return "prompts"
    return "reward" if unit_hash(text, "halves") < 0.5 else "judge"
