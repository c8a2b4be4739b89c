"""Sets of sentences that begin alike, scored: ranked completions made of film reviews.

The prompt is two words that sentences of several reviews begin with ("The acting"), the completions are how those
sentences really go on. They come from the reviews that no classifier was fitted on, as the policy's other prompts do.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softrl.data.prompts import Split, check_count, split_of
from softrl.data.reviews import load_reviews

_BEGINNING_WORDS = 2  # of three, the part of the reviews that this reads has too few to hold any out
_MIN_WORDS = 5
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+")


def review_rankings(
    tokenizer: PreTrainedTokenizerBase,
    num_prompts: int,
    score: Callable[[list[str]], Float[Tensor, "N"]],
    max_length_tokens: int = 24,
    split: Split = "train",
    seed: int = 0,
    csv_path: Path | None = None,
    set_size: int = 4,
) -> Dataset:
    """Sets of completions of the same two words, with rewards, in a random order.

    Train and test come from different reviews and share no sentence; they do share beginnings.

    Args:
        tokenizer: the policy's; it measures the sentences.
        num_prompts: how many sets, from 1 to as many as there are (the error says how many).
        score: gives each of N sentences, beginning included, its reward.
        max_length_tokens: longer sentences are left out.
        split: "train" or "test"; a fifth of the reviews is for testing.
        seed: of the order; fewer sets of the same seed are the first of more.
        csv_path: another corpus in the format of `load_reviews`.
        set_size: completions of a set; no sentence is in two of them.
    Returns:
        Columns `prompt`, `completions` (each begins with the space that follows the prompt) and `rewards`.
    Raises:
        ValueError: a number out of range, an unknown split, or more sets than there are.
    """
    if set_size < 2:
        raise ValueError(f"set_size must be 2 or more, so that there is something to rank, got {set_size}")
    texts = load_reviews("prompts", csv_path)["text"]
    by_split = {which: _sentences(text for text in texts if split_of(text) == which) for which in ("train", "test")}
    wanted = by_split.get(split, [])
    if split == "train":
        held_out = set(by_split["test"])
        wanted = [sentence for sentence in wanted if sentence not in held_out]
    sets = _sets(_short(tokenizer, wanted, max_length_tokens), set_size, random.Random(seed))
    what = f"sets of {set_size} sentences of at most {max_length_tokens} tokens that begin alike"
    check_count(num_prompts, len(sets), split, what)
    sets = sets[:num_prompts]
    rewards = score([sentence for each in sets for sentence in each]).tolist()
    beginnings = [_beginning(each[0]) for each in sets]
    return Dataset.from_dict(
        {
            "prompt": beginnings,
            "completions": [
                [sentence.removeprefix(beginning) for sentence in each]
                for beginning, each in zip(beginnings, sets, strict=True)
            ],
            "rewards": [rewards[start : start + set_size] for start in range(0, len(rewards), set_size)],
        }
    )


def _sentences(texts: Iterable[str]) -> list[str]:
    """The different whole sentences of texts that are long enough to begin as another one does, in order."""
    found = (sentence for text in texts for sentence in _BETWEEN_SENTENCES.split(text))
    return list(dict.fromkeys(each for each in found if len(each.split()) >= _MIN_WORDS and each[-1] in ".!?"))


def _short(tokenizer: PreTrainedTokenizerBase, sentences: list[str], max_length_tokens: int) -> list[str]:
    ids = tokenizer(sentences, add_special_tokens=False).input_ids if sentences else []
    return [sentence for sentence, row in zip(sentences, ids, strict=True) if len(row) <= max_length_tokens]


def _sets(sentences: list[str], size: int, draw: random.Random) -> list[list[str]]:
    """Sentences of equal beginnings in sets; those that are left over when a beginning's sets are full are dropped."""
    groups = defaultdict(list)
    for sentence in sentences:
        groups[_beginning(sentence)].append(sentence)
    sets = []
    for group in groups.values():
        draw.shuffle(group)
        sets += [group[start : start + size] for start in range(0, len(group) - size + 1, size)]
    draw.shuffle(sets)
    return sets


def _beginning(sentence: str) -> str:
    return " ".join(sentence.split()[:_BEGINNING_WORDS])
