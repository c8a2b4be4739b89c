"""Recall of a key from beyond the window: a word announced early, real text longer than the window, then a question.

    [text ...] The word is piano. [text, `distance_tokens` long ...] The word was piano

One of K words is announced, each as likely as the others and independent of the text, so that nothing but the
announcement helps: without it an answer is right once in K times. The default words are younger than Shakespeare,
whose works are the text; any text is searched for the keys. A key had better be one token (`with_keys`): of a word in
several tokens that the text has too, a sum over the text keeps no trace.

Only the answer counts at evaluation (`completion_mask`); to train, everything can. `answer_position` is the slot whose
next token is the (first token of the) answer, and `key_tokens` gives the answers that a model has to choose between.
"""

import copy
import random
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from datasets import Dataset
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from softrl.data.characters import shakespeare
from softrl.data.corpus import corpus_ids
from softrl.data.prompts import Split

KEYS = (
    "computer", "telephone", "coffee", "guitar", "camera", "radio", "bicycle", "robot",
    "rocket", "piano", "chocolate", "banana", "pizza", "penguin", "volcano", "umbrella",
)  # fmt: skip
Scored = Literal["answer", "everything"]
Length = int | tuple[int, int]

_GAP, _ANNOUNCEMENT, _END, _QUESTION = "\n\n", "The word is", ".\n\n", "\n\nThe word was"


def with_keys(tokenizer: PreTrainedTokenizerBase, keys: Sequence[str] = KEYS) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer in which every key with the space before it is one token; new ones come last.

    A model's embeddings have to have room for them: make the model with `len(tokenizer)` tokens, or resize it.

    Raises:
        ValueError: keys that are no words, or fewer than two.
    """
    _check_keys(keys)
    made = copy.deepcopy(tokenizer)
    if lacking := [f" {key}" for key in keys if len(_ids(made, f" {key}")) != 1]:
        made.add_tokens([AddedToken(word, normalized=False) for word in lacking])
    return made


def key_tokens(tokenizer: PreTrainedTokenizerBase, keys: Sequence[str] = KEYS) -> list[list[int]]:
    """The token ids of each key after a space, without those that all keys begin with (the space, where it is one).

    Raises:
        ValueError: keys that are no words, fewer than two, or whose tokens are not different.
    """
    return _key_ids(tokenizer, keys)[1]


def key_recall(
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int,
    distance_tokens: Length = 512,
    key_position_tokens: Length = 0,
    keys: Sequence[str] = KEYS,
    scored: Scored = "answer",
    split: Split = "train",
    filler: str | None = None,
    seed: int = 0,
) -> Dataset:
    """Rows of text with a key and a question.

    Row number, seed and split say which, so fewer rows are the first of more.

    Args:
        tokenizer: any; `with_keys` makes tokens of the keys.
        num_rows: how many.
        distance_tokens: text between announcement and question; of a pair every row draws one from its least to its
            greatest. It has to be longer than what a model reads uncompressed.
        key_position_tokens: text before the announcement, likewise.
        keys: K words, from two, none of which occurs in the filler.
        scored: what `completion_mask` marks: "answer" or "everything".
        split: "train" or "test", of the works of Shakespeare.
        filler: the text; None for Shakespeare's works of that split. Pass different texts for different splits.
        seed: of everything that is drawn.
    Returns:
        Columns `input_ids` (the answer's last token last), `completion_mask`, `key` (its number in `keys`),
        `answer_position`, `key_position` (the slot of the announced key's first token) and `distance_tokens`.
    Raises:
        ValueError: an argument out of range, keys that the filler has or that the tokenizer cannot tell apart, or a
            filler that is too short.
    """
    if isinstance(num_rows, bool) or not isinstance(num_rows, int) or num_rows < 1:
        raise ValueError(f"num_rows must be a whole number, 1 or more, got {num_rows!r}; choose another num_rows")
    if scored not in get_args(Scored):
        raise ValueError(f"scored must be one of {get_args(Scored)}, got {scored!r}; choose one of them")
    distances, positions = (
        _range("distance_tokens", distance_tokens, 1),
        _range("key_position_tokens", key_position_tokens, 0),
    )
    lead, answers = _key_ids(tokenizer, keys)
    text = shakespeare(split) if filler is None else filler
    _check_absent(keys, text)
    pieces = {piece: _ids(tokenizer, piece) for piece in (_GAP, _ANNOUNCEMENT, _END, _QUESTION)}
    ids = corpus_ids(text, tokenizer)
    needed = distances[1] + positions[1]
    if len(ids) < needed:
        raise ValueError(
            f"filler must have {needed} tokens or more for distance_tokens={distance_tokens!r} and "
            f"key_position_tokens={key_position_tokens!r}, got {len(ids)}; pass a longer text, or ask for less"
        )
    rows = []
    for number in range(num_rows):
        draw = random.Random(f"{seed} {split} {number} key recall")
        key, position, distance = draw.randrange(len(keys)), draw.randint(*positions), draw.randint(*distances)
        first = draw.randint(0, len(ids) - position - distance)
        taken = ids[first : first + position + distance].tolist()
        announced = [*(pieces[_GAP] if position else []), *pieces[_ANNOUNCEMENT], *lead]
        row = [*taken[:position], *announced, *answers[key], *pieces[_END]]
        row += [*taken[position:], *pieces[_QUESTION], *lead]
        marked = [int(scored == "everything")] * len(row) + [1] * len(answers[key])
        rows.append(
            {
                "input_ids": row + answers[key], "completion_mask": marked, "key": key,
                "answer_position": len(row) - 1, "key_position": position + len(announced),
                "distance_tokens": distance,
            }
        )  # fmt: skip
    return Dataset.from_list(rows)


def _key_ids(tokenizer: PreTrainedTokenizerBase, keys: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """The tokens that all keys begin with, and what follows them in each."""
    _check_keys(keys)
    ids = [_ids(tokenizer, f" {key}") for key in keys]
    shared = 0
    while all(len(each) > shared + 1 for each in ids) and len({each[shared] for each in ids}) == 1:
        shared += 1
    rests = [each[shared:] for each in ids]
    unknown = getattr(tokenizer, "unk_token_id", None)
    for key, rest in zip(keys, rests, strict=True):
        if rests.count(rest) > 1 or unknown in rest:
            raise ValueError(
                f"keys must be words that the tokenizer tells apart, and it reads {key!r} as {rest}, which is unknown "
                "or another key's; pass with_keys(tokenizer, keys), or other keys"
            )
    return ids[0][:shared], rests


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _check_keys(keys: Any) -> None:
    words = isinstance(keys, Sequence) and not isinstance(keys, str) and all(isinstance(key, str) for key in keys)
    if not words or len(set(keys)) < 2 or len(set(keys)) < len(keys) or not all(map(str.isalpha, keys)):
        raise ValueError(
            f"keys must be two different words of letters or more, got {keys!r}; the default has {len(KEYS)}"
        )


def _check_absent(keys: Sequence[str], text: str) -> None:
    found = {match.group().lower() for match in re.finditer("|".join(map(re.escape, keys)), text, re.IGNORECASE)}
    if found:
        raise ValueError(
            f"keys must not occur in the filler, not as parts of words either, and it has {sorted(found)}; leave "
            "these out, or pass a filler without them"
        )


def _range(name: str, value: Any, least: int) -> tuple[int, int]:
    pair = value if isinstance(value, tuple | list) else (value, value)
    whole = len(pair) == 2 and all(isinstance(each, int) and not isinstance(each, bool) for each in pair)
    if not whole or not least <= pair[0] <= pair[1]:
        raise ValueError(
            f"{name} must be a whole number, {least} or more, or a pair of them, the least first, got {value!r}; "
            f"choose another {name}"
        )
    return pair[0], pair[1]
