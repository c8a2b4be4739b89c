"""Pointer chasing: follow a random function k times from a start. A task that is deeper than a small transformer.

A sequence lists the n pairs of a function f on n symbols in a random order, a token a pair, then the number of hops k,
the start s and the answer f^k(s):

    c>a a>d b>c d>b ?2 a b

A hop is one lookup, which one layer of attention does, and each needs what the one before it found. So a transformer
has to have a layer a hop, or to guess, or to write down f(s), ..., f^(k-1)(s) on the way. `answer_position` is the
slot of the start, whose next token is the answer. It is the only slot that is worth a thought, and loss and accuracy
belong there alone: pairs, hops and start are random.

The start comes last so that every hop can be the same lookup, of the successor of the latest symbol: also the later
ones, where the symbols on the way are written between start and answer (`worked_answers`).

A pair is one token because two would have to be bound together first, by another layer: with answers alone as the
loss, two layers then take thousands of steps to learn a single hop.

Text can also show its work: `worked_answers` has rows `... ?2 a : d b`, where the mark `:` is followed by the symbols
on the way and then the answer. A model that has read both can learn to do unasked what such rows do in writing.

Right by chance: an answer at random is right once in n times, whatever the kind; `best_guess_accuracy` has what start
and hops alone allow. Networks without enough layers get further, by shortcuts: softrl/studies/LOG.md has how far.
"""

import itertools
import math
import random
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

from datasets import Dataset
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from softrl.data.prompts import Split
from softrl.data.reviews import unit_hash
from softrl.data.vocabulary import listed_tokenizer

Kind = Literal["cycle", "permutation", "function"]

MIN_SYMBOLS, MAX_SYMBOLS = 5, len(string.ascii_lowercase)  # below five a split of cycles might be empty
WORK_MARK = ":"
_TEST_FRACTION = 0.2
_SPLITS = {"train": False, "test": True}


def pointer_tokenizer(num_symbols: int, max_hops: int) -> PreTrainedTokenizerFast:
    """The tokenizer of the task.

    Its ids: three special tokens, n symbols `a`, `b`, ..., questions `?1`, `?2`, ..., and n² pairs `a>a`, `a>b`, ....

    Args:
        num_symbols: n, from 5 to 26.
        max_hops: the largest k, from 1.
    Raises:
        ValueError: a number out of range.
    """
    _check_number("num_symbols", num_symbols, MIN_SYMBOLS, MAX_SYMBOLS)
    _check_number("max_hops", max_hops, 1)
    questions = [f"?{hops}" for hops in range(1, max_hops + 1)]
    symbols = string.ascii_lowercase[:num_symbols]
    pairs = [f"{key}>{value}" for key, value in itertools.product(symbols, repeat=2)]
    return listed_tokenizer([*symbols, *questions, *pairs, WORK_MARK], WhitespaceSplit())


def pointer_chasing(
    tokenizer: PreTrainedTokenizerFast,
    num_rows: int,
    num_symbols: int = 8,
    hops: Sequence[int] = (1, 2, 3),
    kind: Kind = "permutation",
    split: Split = "train",
    seed: int = 0,
) -> Dataset:
    """Questions with their answers, by default where one layer fails and a thought would help (softrl/studies/LOG.md).

    Row number and seed say which, so fewer rows are the first of more. A function belongs to "train" or to "test" (a
    fifth of them) by a hash of its table, so that no function of one split occurs in the other, whatever the seeds,
    starts, hops and orders of pairs.

    Args:
        tokenizer: of `pointer_tokenizer` with `num_symbols` and at least `max(hops)`.
        num_rows: how many.
        num_symbols: n, from 5 to 26.
        hops: the difficulties, each from 1; rows draw one of them uniformly.
        kind: "cycle" (a permutation that is one cycle: with k < n no answer is the start), "permutation", "function".
        split: "train" or "test".
        seed: of everything that is drawn.
    Returns:
        Columns `input_ids` (n + 3 tokens, the answer last), `answer_position` (n + 1: the slot of the start, whose
        next token is the answer), `hops`, `chain_ids` (the symbols between, f(s), ..., f^(k-1)(s)) and `text`.
    Raises:
        ValueError: an argument out of range, or a tokenizer of another task.
    """
    _check_number("num_rows", num_rows, 1)
    _check_number("num_symbols", num_symbols, MIN_SYMBOLS, MAX_SYMBOLS)
    _check_task(hops, kind, split)
    symbols = string.ascii_lowercase[:num_symbols]
    _check_tokenizer(tokenizer, num_symbols, max(hops))
    rows = [_row(symbols, hops, kind, split, f"{seed} {number}") for number in range(num_rows)]
    texts = [" ".join(words) for words, _, _ in rows]
    return Dataset.from_dict(
        {
            "input_ids": tokenizer(texts).input_ids,
            "answer_position": [num_symbols + 1] * num_rows,
            "hops": [hop for _, hop, _ in rows],
            "chain_ids": [tokenizer.convert_tokens_to_ids(chain) for _, _, chain in rows],
            "text": texts,
        }
    )


def worked_answers(tokenizer: PreTrainedTokenizerFast, questions: Dataset) -> Dataset:
    """The same questions with their work shown: the mark, the symbols on the way, and the answer.

    Args:
        tokenizer: of `pointer_tokenizer`.
        questions: of `pointer_chasing`.
    Returns:
        Columns `input_ids`, and `completion_mask`: 1 at what follows the mark.
    """
    mark = tokenizer.convert_tokens_to_ids(WORK_MARK)
    rows = []
    for row in questions:
        work = [*row["chain_ids"], row["input_ids"][-1]]
        asked = [*row["input_ids"][:-1], mark]
        rows.append({"input_ids": asked + work, "completion_mask": [0] * len(asked) + [1] * len(work)})
    return Dataset.from_list(rows)


def best_guess_accuracy(num_symbols: int, hops: int, kind: Kind = "permutation") -> float:
    """The best accuracy of an answer that depends on start and hops alone, not on the pairs.

    "cycle": 1 / (n - 1), any symbol but the start (1 where n divides k). "permutation": d(k) / n with the d(k)
    divisors of k up to n, by naming the start: its cycle's length must divide k. "function": naming the start is
    best too, `sum over c | k of (n - 1)! / (n - c)! / n^c`, the chance that the start lies on a cycle of length c.

    Source: counting; ours.
    """
    _check_number("num_symbols", num_symbols, MIN_SYMBOLS, MAX_SYMBOLS)
    _check_task([hops], kind, "train")
    divisors = [length for length in range(1, num_symbols + 1) if hops % length == 0]
    if kind == "cycle":
        return 1.0 if num_symbols in divisors else 1 / (num_symbols - 1)
    if kind == "permutation":
        return len(divisors) / num_symbols
    return sum(math.perm(num_symbols - 1, length - 1) / num_symbols**length for length in divisors)


def _row(symbols: str, hops: Sequence[int], kind: Kind, split: Split, key: str) -> tuple[list[str], int, list[str]]:
    """Words of a sequence, its hops, and the symbols between start and answer."""
    draw = random.Random(key)
    table = next(table for table in _tables(symbols, kind, draw) if _is_test(table) == _SPLITS[split])
    start, hop = draw.choice(symbols), draw.choice(list(hops))
    path = [start]
    for _ in range(hop):
        path.append(table[symbols.index(path[-1])])
    pairs = list(zip(symbols, table, strict=True))
    draw.shuffle(pairs)
    return [*(f"{key}>{value}" for key, value in pairs), f"?{hop}", start, path[-1]], hop, path[1:-1]


def _tables(symbols: str, kind: Kind, draw: random.Random) -> Iterator[str]:
    """Random functions without end, as the values of all symbols in their order."""
    while True:
        yield _DRAWS[kind](symbols, draw)


def _cycle(symbols: str, draw: random.Random) -> str:
    order = draw.sample(symbols, len(symbols))
    successor = dict(zip(order, order[1:] + order[:1], strict=True))
    return "".join(successor[symbol] for symbol in symbols)


_DRAWS: dict[str, Callable[[str, random.Random], str]] = {
    "cycle": _cycle,
    "permutation": lambda symbols, draw: "".join(draw.sample(symbols, len(symbols))),
    "function": lambda symbols, draw: "".join(draw.choices(symbols, k=len(symbols))),
}


def _is_test(table: str) -> bool:
    return unit_hash(table, "pointer chasing") < _TEST_FRACTION


def _check_number(name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        wanted = f"{least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number, {wanted}, got {value!r}; choose another {name}")


def _check_task(hops: Any, kind: str, split: str) -> None:
    if not isinstance(hops, Sequence) or isinstance(hops, str) or not hops:
        raise ValueError(f"hops must be a list of one number of hops or more, got {hops!r}; pass [2] for two hops")
    for hop in hops:
        _check_number("every number of hops", hop, 1)
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}; choose one of them")
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {tuple(_SPLITS)}, got {split!r}; choose one of them")


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast, num_symbols: int, max_hops: int) -> None:
    known, needed = tokenizer.get_vocab(), pointer_tokenizer(num_symbols, max_hops).get_vocab()
    if missing := [token for token in needed if token not in known]:
        raise ValueError(
            f"tokenizer must have a token for every pair, question and symbol, it lacks {len(missing)}, the first is "
            f"{missing[0]!r}; pass pointer_tokenizer({num_symbols}, {max_hops}), or one of more hops"
        )
