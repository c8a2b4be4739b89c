"""Prompts for the policy: text or a conversation as token ids, and the openings of reviews nobody has fitted on."""

import random
from pathlib import Path
from typing import Any, Literal, cast, get_args

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from softrl.data.reviews import load_reviews, unit_hash

Split = Literal["train", "test"]

_TEST_FRACTION = 0.2


Prompt = str | list[dict[str, Any]]  # text, or a conversation in the format of transformers' chat templates


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt.

    Text is tokenised as it is. A conversation goes through the chat template, which opens the assistant's turn, or
    leaves it open when the last message is the assistant's own.

    Raises:
        ValueError: a conversation, and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return cast(list[int], tokenizer(prompt).input_ids)
    if tokenizer.chat_template is None:
        raise ValueError(
            "a prompt is a conversation, and the tokenizer has no chat template; set tokenizer.chat_template, or give "
            "prompts as text"
        )
    continued = prompt[-1]["role"] == "assistant"
    encoded: Any = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=not continued, continue_final_message=continued, return_dict=True
    )
    return encoded["input_ids"]


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, as chat templates take them."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value)
    )


def review_openings(
    tokenizer: PreTrainedTokenizerBase,
    num_prompts: int,
    prompt_length_tokens: int = 8,
    split: Split = "train",
    seed: int = 0,
    csv_path: Path | None = None,
    reference_length_tokens: int = 0,
) -> Dataset:
    """The first tokens of IMDB reviews, as text, in a random order.

    Train and test come from different reviews, and no opening occurs twice in or across them.

    Args:
        tokenizer: the policy's; it cuts the openings.
        num_prompts: how many, from 1 to as many as there are (the error says how many).
        prompt_length_tokens: tokens an opening has without special tokens, from 1.
        split: "train" or "test"; a fifth of the reviews is for testing.
        seed: of the order; fewer prompts of the same seed are the first of more.
        csv_path: another corpus in the format of `load_reviews`.
        reference_length_tokens: where it is positive, reviews that go on for so long have that as their reference,
            and others are left out.
    Returns:
        A column `prompt`: text that the tokenizer turns back into exactly `prompt_length_tokens` ids (special
        tokens that it may add in front not counted); and, if asked for, a column `reference`, likewise.
    Raises:
        ValueError: a number out of range, an unknown split, or more prompts than there are.
    """
    if prompt_length_tokens < 1:
        raise ValueError(f"prompt_length_tokens must be 1 or more, got {prompt_length_tokens}")
    texts = load_reviews("prompts", csv_path)["text"]
    test = [text for text in texts if split_of(text) == "test"]
    train = [text for text in texts if split_of(text) == "train"]
    lengths = (prompt_length_tokens, reference_length_tokens)
    openings = _openings(tokenizer, test, *lengths)
    if split == "train":
        in_test = {opening for opening, _ in openings}
        openings = [each for each in _openings(tokenizer, train, *lengths) if each[0] not in in_test]
    check_count(num_prompts, len(openings), split, f"different openings of {prompt_length_tokens} tokens")
    random.Random(seed).shuffle(openings)
    columns = {"prompt": [opening for opening, _ in openings[:num_prompts]]}
    if reference_length_tokens:
        columns["reference"] = [going_on for _, going_on in openings[:num_prompts]]
    return Dataset.from_dict(columns)


def split_of(text: str) -> Split:
    """Whether a text is for training or for testing; a fifth is for testing, on every machine the same."""
    return "test" if unit_hash(text, "test") < _TEST_FRACTION else "train"


def check_count(wanted: int, found: int, split: Split, what: str) -> None:
    """Raise a ValueError for an unknown split, no prompts, or more of them than were found."""
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")
    if wanted < 1:
        raise ValueError(f"num_prompts must be 1 or more, got {wanted}")
    if wanted > found:
        raise ValueError(f"num_prompts={wanted}, but the {split} split has {found} {what}; ask for at most that many")


def _openings(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], length_tokens: int, reference_length_tokens: int
) -> list[tuple[str, str]]:
    """Different openings of that many tokens that survive decoding and tokenising again, and how each goes on."""
    if not texts:
        return []
    total = length_tokens + reference_length_tokens
    whole = [ids for ids in tokenizer(list(texts), add_special_tokens=False).input_ids if len(ids) >= total]
    openings = _surviving(tokenizer, [ids[:length_tokens] for ids in whole])
    references: list[str | None] = [""] * len(openings)
    if reference_length_tokens:
        references = _surviving(tokenizer, [ids[length_tokens:total] for ids in whole])
    pairs = zip(openings, references, strict=True)
    kept = {opening: reference for opening, reference in pairs if opening is not None and reference is not None}
    return list(kept.items())


def _surviving(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str | None]:
    """Token ids as texts; None for those that do not survive decoding and tokenising again."""
    if not rows:
        return []
    texts = tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = tokenizer(texts, add_special_tokens=False).input_ids
    return [text if ids == same else None for text, ids, same in zip(texts, rows, again, strict=True)]
