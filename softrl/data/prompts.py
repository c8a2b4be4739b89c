"""Prompts for the policy: text or a conversation as token ids, and the openings of reviews nobody has fitted on."""

import random
from pathlib import Path
from typing import Any, Literal, cast

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


def review_openings(
    tokenizer: PreTrainedTokenizerBase,
    num_prompts: int,
    prompt_length_tokens: int = 8,
    split: Split = "train",
    seed: int = 0,
    csv_path: Path | None = None,
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
    Returns:
        One column `prompt`: text that the tokenizer turns back into exactly `prompt_length_tokens` ids (special
        tokens that it may add in front not counted).
    Raises:
        ValueError: a number out of range, an unknown split, or more prompts than there are.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    if prompt_length_tokens < 1 or num_prompts < 1:
        raise ValueError(
            f"num_prompts and prompt_length_tokens must be 1 or more, got {num_prompts} and {prompt_length_tokens}"
        )
    texts = load_reviews("prompts", csv_path)["text"]
    test = [text for text in texts if unit_hash(text, "test") < _TEST_FRACTION]
    train = [text for text in texts if unit_hash(text, "test") >= _TEST_FRACTION]
    openings = _openings(tokenizer, test, prompt_length_tokens)
    if split == "train":
        in_test = set(openings)
        openings = [text for text in _openings(tokenizer, train, prompt_length_tokens) if text not in in_test]
    if num_prompts > len(openings):
        raise ValueError(
            f"num_prompts={num_prompts}, but the {split} split has {len(openings)} different openings of "
            f"{prompt_length_tokens} tokens; ask for at most that many"
        )
    random.Random(seed).shuffle(openings)
    return Dataset.from_dict({"prompt": openings[:num_prompts]})


def _openings(tokenizer: PreTrainedTokenizerBase, texts: list[str], length_tokens: int) -> list[str]:
    """Different openings of that many tokens that survive decoding and tokenising again."""
    if not texts:
        return []
    cut = [ids[:length_tokens] for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]
    cut = [ids for ids in cut if len(ids) == length_tokens]
    openings = tokenizer.batch_decode(cut, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = tokenizer(openings, add_special_tokens=False).input_ids if openings else []
    kept = [text for text, ids, same in zip(openings, cut, again, strict=True) if ids == same]
    return list(dict.fromkeys(kept))
