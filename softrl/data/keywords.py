"""Sentences to be written from their keywords: a task with references, made of one-sentence film reviews.

The prompt lists the words of a sentence that carry its meaning, in their order; the sentence is the reference.
"""

import random
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from softrl.data.prompts import Split, check_count, split_of
from softrl.data.reviews import load_reviews, snippets

_SMALL_WORDS = """
a about all an and any are as at be been but by can do does for from had has have he her him his i if in into is it its
just more most no not of on one or our out own she so some such than that the their them then there these they this
those to too up was we were what when where which who will with would you your
"""
_MIN_KEYWORDS = 3


def review_keywords(
    tokenizer: PreTrainedTokenizerBase,
    num_prompts: int,
    max_reference_length_tokens: int = 24,
    split: Split = "train",
    seed: int = 0,
    csv_path: Path | None = None,
) -> Dataset:
    """Keywords of one-sentence reviews as prompts, the sentences as references, in a random order.

    Args:
        tokenizer: the policy's; it measures the references.
        num_prompts: how many, from 1 to as many as there are (the error says how many).
        max_reference_length_tokens: longer sentences are left out.
        split: "train" or "test"; a fifth of the sentences is for testing.
        seed: of the order; fewer prompts of the same seed are the first of more.
        csv_path: another corpus in the format of `load_reviews`.
    Returns:
        Columns `prompt` and `reference`; the reference begins with the space that follows the prompt.
    Raises:
        ValueError: a number out of range, an unknown split, or more prompts than there are.
    """
    texts = [
        text
        for part in ("reward", "judge")
        for text, _ in snippets(load_reviews(part, csv_path))
        if split_of(text) == split and len(keywords(text)) >= _MIN_KEYWORDS
    ]
    references = [f" {text}" for text in texts]
    ids = tokenizer(references, add_special_tokens=False).input_ids if references else []
    kept = [
        reference for reference, row in zip(references, ids, strict=True) if len(row) <= max_reference_length_tokens
    ]
    check_count(num_prompts, len(kept), split, f"sentences of at most {max_reference_length_tokens} tokens")
    random.Random(seed).shuffle(kept)
    kept = kept[:num_prompts]
    return Dataset.from_dict({"prompt": [prompt_of(reference) for reference in kept], "reference": kept})


def prompt_of(sentence: str) -> str:
    """The prompt that asks for a sentence."""
    return f"Keywords: {', '.join(keywords(sentence))}\nSentence:"


def keywords(sentence: str) -> list[str]:
    """The different words of a sentence that are not mere grammar, in lower case, in order."""
    small = _SMALL_WORDS.split()
    words = (word.strip(".,;:!?\"'()[]-").lower() for word in sentence.split())
    return list(dict.fromkeys(word for word in words if word and word not in small))
