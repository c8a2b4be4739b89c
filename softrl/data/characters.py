"""Shakespeare by the character: the works as one text, a tokenizer of characters, and blocks to train on.

Whole works are held out, the last four of the alphabet; their speakers occur in no work that is trained on, so the
held-out loss is higher than where a corpus is cut in the middle of a play.
"""

import re
from pathlib import Path

import numpy as np
from datasets import Dataset
from tokenizers import Regex, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from softrl import assets
from softrl.data.prompts import Split
from softrl.data.vocabulary import SPECIAL_TOKENS, listed_tokenizer

HELD_OUT = ("troilus_and_cressida", "twelfth_night", "two_gentlemen_of_verona", "winters_tale")
_SPLITS = {"train": False, "test": True}


def shakespeare(split: Split, folder: Path | None = None) -> str:
    """The works of one split in the order of the alphabet, tidied, as one text.

    Args:
        split: "train" (38 works, 4.1 million characters) or "test" (the four of `HELD_OUT`, half a million).
        folder: other works, a .txt file each, in UTF-8; default: the cached ones.
    Raises:
        ValueError: an unknown split, or a folder without works of it.
        AssetError: the works are not cached and cannot be fetched.
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {tuple(_SPLITS)}, got {split!r}; choose one of them")
    place = assets.shakespeare_texts() if folder is None else folder
    works = [work for work in sorted(place.glob("*.txt")) if (work.stem in HELD_OUT) == _SPLITS[split]]
    if not works:
        raise ValueError(
            f"folder={str(folder)!r} must hold works as .txt files, for split={split!r} "
            f"{'any of' if _SPLITS[split] else 'others than'} {HELD_OUT}, it has none; pass another, or None for the "
            "cached ones"
        )
    return "\n\n\n".join(tidied(work.read_text(encoding="utf-8")) for work in works) + "\n"


def tidied(text: str) -> str:
    """Without spaces at the ends of lines, and with two empty lines at most where there are more."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{4,}", "\n\n\n", lines).strip("\n")


def character_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, line breaks and spaces included, that decodes to exactly what it read.

    Its ids are the sorted characters, behind the special tokens of `softrl/data/vocabulary.py`. A character that it
    does not know becomes `<unk>`.

    Args:
        text: what the characters are taken from; for Shakespeare `shakespeare("train")`, which has all that the
            held-out works have.
    Raises:
        ValueError: an empty text.
    """
    if not text:
        raise ValueError("text must have one character or more to make tokens of, got ''; pass the corpus")
    split = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # `.` would leave out line breaks
    return listed_tokenizer(sorted(set(text)), split, decoders.Fuse())


def character_blocks(text: str, tokenizer: PreTrainedTokenizerBase, block_length_tokens: int = 128) -> Dataset:
    """Consecutive blocks of a text, none overlapping; what is left at the end is dropped.

    Args:
        text: at least one block long.
        tokenizer: of `character_tokenizer`, with all of the text's characters.
        block_length_tokens: characters a block has, from 2, so that there is one to predict.
    Returns:
        Columns `input_ids` and `text`, in the order of the text.
    Raises:
        ValueError: a length out of range, a text that is too short, or characters without a token of their own.
    """
    length = block_length_tokens
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"block_length_tokens must be a whole number, 2 or more, got {length!r}; the default is 128")
    if len(text) < length:
        raise ValueError(
            f"text must have block_length_tokens={length} characters or more, got {len(text)}; pass a longer text, or "
            "ask for shorter blocks"
        )
    ids = character_ids(text, tokenizer)
    count = len(ids) // length
    blocks = [text[start : start + length] for start in range(0, count * length, length)]
    return Dataset.from_dict({"input_ids": ids[: count * length].reshape(count, length), "text": blocks})


def character_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The ids of a text's characters, int64 [length]; as the tokenizer would say, in a hundredth of its time.

    Raises:
        ValueError: characters without a token of their own, or a tokenizer that does not read by the character.
    """
    vocabulary = tokenizer.get_vocab()
    if missing := sorted(set(text) - set(vocabulary)):
        raise ValueError(
            f"tokenizer must have a token for every character of the text, it lacks {missing[:10]}; make it with "
            "character_tokenizer(text) of a text that has them"
        )
    if not reads_characters(tokenizer) or any(name in text for name in SPECIAL_TOKENS):
        raise ValueError(
            "tokenizer must make one token of every character, and it does not with this text; pass one of "
            "character_tokenizer, and a text without the names of its special tokens"
        )
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    table = np.zeros(int(codes.max(initial=0)) + 1, dtype=np.int64)
    for character in set(text):
        table[ord(character)] = vocabulary[character]
    return table[codes]


def reads_characters(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is one of `character_tokenizer`: listed tokens, all of one character but the special ones."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, models.WordLevel):
        return False
    return all(len(token) == 1 for token in tokenizer.get_vocab() if token not in SPECIAL_TOKENS)
