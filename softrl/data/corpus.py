"""A text to train a model on from scratch: a tokenizer made of it, and blocks of its tokens.

What takes seconds, training a tokenizer of byte pairs and reading a text with it, is kept in the cache folder, under a
lock, so that the processes of a launch, or the trials of a sweep, do it once. Characters need neither.
"""

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from softrl.assets import cached_folder
from softrl.data.characters import character_ids, character_tokenizer, reads_characters
from softrl.data.vocabulary import LEAST_PAIRS_SIZE, byte_pair_tokenizer

CHARACTERS = "characters"
_TOKENS = "tokens.npy"


def corpus_tokenizer(kind: str | int, text: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a corpus.

    Args:
        kind: "characters", or the size of a vocabulary of byte pairs, from 259.
        text: the corpus.
    Raises:
        ValueError: another kind, or an empty text.
    """
    size = tokenizer_size(kind)
    if size is None or not text:
        return character_tokenizer(text)  # which refuses an empty text
    folder = _cached("pairs", {"text": _digest(text), "size": size}, lambda new: _train(text, size, new))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def tokenizer_size(kind: str | int) -> int | None:
    """The size of a vocabulary of byte pairs, None for "characters"; the command line gives numbers as text.

    Raises:
        ValueError: neither.
    """
    if kind == CHARACTERS:
        return None
    size = int(kind) if str(kind).isdigit() else 0
    if size < LEAST_PAIRS_SIZE:
        raise ValueError(
            f"a corpus's tokenizer must be {CHARACTERS!r} or the size of a vocabulary of byte pairs, "
            f"{LEAST_PAIRS_SIZE} or more, got {kind!r}; 1024 suits a small corpus"
        )
    return size


def corpus_blocks(text: str, tokenizer: PreTrainedTokenizerBase, block_length_tokens: int = 128) -> Dataset:
    """Consecutive blocks of a corpus's tokens, none overlapping; what is left at the end is dropped.

    Args:
        text: at least one block long.
        tokenizer: of `corpus_tokenizer`, or any other; nothing is put between the text's tokens.
        block_length_tokens: from 2, so that there is one to predict.
    Returns:
        A column `input_ids`, in the order of the text.
    Raises:
        ValueError: a length out of range, a text that is too short, or characters that a tokenizer of them lacks.
    """
    length = block_length_tokens
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise ValueError(f"block_length_tokens must be a whole number, 2 or more, got {length!r}; the default is 128")
    ids = corpus_ids(text, tokenizer)
    if len(ids) < length:
        raise ValueError(
            f"text must have block_length_tokens={length} tokens or more, got {len(ids)}; pass a longer text, or ask "
            "for shorter blocks"
        )
    count = len(ids) // length
    return Dataset.from_dict({"input_ids": ids[: count * length].reshape(count, length)})


def corpus_prompts(text: str, tokenizer: PreTrainedTokenizerBase, prompt_length_tokens: int, count: int) -> Dataset:
    """Passages of a corpus to go on from, spread evenly over it.

    Args:
        text, tokenizer: as `corpus_blocks`.
        prompt_length_tokens: of each passage, from 2.
        count: how many there are at most.
    Returns:
        A column `prompt`, the passages as text.
    Raises:
        ValueError: as `corpus_blocks`.
    """
    blocks = corpus_blocks(text, tokenizer, prompt_length_tokens)
    number = min(count, len(blocks))
    chosen = blocks.select([index * len(blocks) // number for index in range(number)])
    return Dataset.from_dict({"prompt": tokenizer.batch_decode(list(chosen["input_ids"]))})


def corpus_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """A corpus's token ids, int64 [length], from the cache where it has been read with this tokenizer before."""
    if reads_characters(tokenizer):
        return character_ids(text, tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python: it has no description to find its tokens by
        return np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int64)
    inputs = {"text": _digest(text), "tokenizer": _digest(backend.to_str())}
    folder = _cached("tokens", inputs, lambda new: _encode(text, backend, new))
    return np.load(folder / _TOKENS).astype(np.int64)


def _train(text: str, size: int, folder: Path) -> dict[str, Any]:
    byte_pair_tokenizer(text, size).save_pretrained(folder)
    return {}


def _encode(text: str, backend: Any, folder: Path) -> dict[str, Any]:
    ids = np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
    np.save(folder / _TOKENS, ids)
    return {"length_tokens": len(ids)}


def _cached(what: str, inputs: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]]) -> Path:
    """A folder of its own for all inputs, so that several corpora and sizes lie side by side."""
    name = f"corpus-{what}-{_digest(repr(sorted(inputs.items())))[:16]}"
    return cached_folder(name, inputs, build, needs_mb=100)


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
