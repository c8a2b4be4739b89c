"""Questions with one right answer, made by a rule: sums and differences, and words to copy or to reverse.

A prompt shows solved examples and then a question; what follows is the answer and the end of the line:

    reverse: lake horn coin -> coin horn lake
    reverse: milk sand door ->

Small models are right about some of them, so that ways to decode can be told apart, and a supervised tuning on
`completion` has something to learn. An answer is judged by equality with the right one and nothing else, after
`extract_answer` has read it. The default kinds and sizes are such that SmolLM2-135M is neither always right nor always
wrong; it finds no difference of two numbers.
"""

import random
import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from datasets import Dataset

from softrl.data.prompts import Split, split_of

Kind = Literal["addition", "subtraction", "copying", "reversal"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SOMETIMES_RIGHT: tuple[Kind, ...] = ("addition", "copying", "reversal")  # by SmolLM2-135M at the sizes below

WORDS = (
    "apple", "arrow", "bell", "bird", "boat", "bone", "book", "bread", "brick", "chair", "clock", "cloud", "coin",
    "desk", "door", "drum", "egg", "fish", "flag", "flower", "fork", "frog", "gate", "glass", "glove", "grape",
    "hat", "honey", "horn", "horse", "house", "key", "knife", "lake", "lamp", "leaf", "lemon", "milk", "moon",
    "nest", "paper", "pear", "pen", "pipe", "plate", "river", "road", "rope", "salt", "sand", "ship", "shoe",
    "snow", "spoon", "star", "stone", "sugar", "table", "tree", "wall", "wheel", "wind", "window", "wood",
)  # fmt: skip
_MAX_DRAWS = 1000  # of one question, before there seem to be no more


def exact_answers(
    num_rows: int = 200,
    kinds: Sequence[Kind] = SOMETIMES_RIGHT,
    num_digits: int = 2,
    num_copied: int = 6,
    num_reversed: int = 3,
    num_examples: int = 4,
    split: Split = "test",
    seed: int = 0,
) -> Dataset:
    """Different questions behind solved examples of their kind.

    Row number and seed say which, so fewer rows are the first of more. A question belongs to "train" or to "test" (a
    fifth of them) by a hash of its text, whatever the seed; examples are always of "train".

    Args:
        num_rows: how many.
        kinds: of questions, in turn.
        num_digits: of both numbers of a sum or difference, 1 or more; differences are never negative.
        num_copied, num_reversed: words of a list to copy and of one to reverse, 2 to 16, all different.
        num_examples: solved examples before a question, 1 or more; without any a model cannot know the form.
        split: "train" or "test".
        seed: of everything that is drawn.
    Returns:
        Columns `prompt`, `completion` (what follows it, with the space in front and without the line's end), `answer`
        and `kind`.
    Raises:
        ValueError: an argument out of range, or more rows than there are questions.
    """
    _check(num_rows, kinds, num_digits, num_copied, num_reversed, num_examples, split)
    size = {"addition": num_digits, "subtraction": num_digits, "copying": num_copied, "reversal": num_reversed}
    asked: set[str] = set()
    rows = []
    for number in range(num_rows):
        kind = kinds[number % len(kinds)]
        draw = random.Random(f"{seed} {kind} {number}")
        question, answer = _new_question(kind, size[kind], split, draw, asked)
        asked.add(question)
        shown: set[str] = set()
        lines = []
        for _ in range(num_examples):
            example, solved = _new_question(kind, size[kind], "train", draw, shown | {question})
            shown.add(example)
            lines.append(f"{example} {solved}\n")
        rows.append(
            {"prompt": "".join([*lines, question]), "completion": f" {answer}", "answer": answer, "kind": kind}
        )
    return Dataset.from_list(rows)


def extract_answer(text: str, kind: Kind) -> str | None:
    """The answer that a completion gives, in the form of the column `answer`; None where it gives none.

    Only the first line that has anything in it counts. Of a sum or difference: the first whole number of that line,
    without leading zeros; one with a decimal point is not whole, and commas may stand between thousands. Of words: all
    of the line's words, in small letters, with a space between them.

    Args:
        text: whatever a model wrote behind the prompt.
        kind: what was asked.
    """
    line = next((line for line in text.splitlines() if line.strip()), "")
    if kind in ("copying", "reversal"):
        return " ".join(re.findall(r"[^\W\d_]+", line.lower())) or None
    # Digits are spelled out: \d and int() know those of every script, and int() refuses very long numbers.
    number = re.search(r"[-\u2212]?[.,]?[0-9]+(?:[.,][0-9]+)*", line)
    whole = number and re.fullmatch(r"([-\u2212]?)([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)", number.group())
    if not whole:
        return None
    digits = whole.group(2).replace(",", "").lstrip("0") or "0"
    return f"-{digits}" if whole.group(1) and digits != "0" else digits


def _check(
    num_rows: int,
    kinds: Sequence[str],
    num_digits: int,
    num_copied: int,
    num_reversed: int,
    num_examples: int,
    split: str,
) -> None:
    for name, value in (("num_rows", num_rows), ("num_digits", num_digits), ("num_examples", num_examples)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in (("num_copied", num_copied), ("num_reversed", num_reversed)):
        if not 2 <= value <= 16:
            raise ValueError(f"{name} must lie between 2 and 16, got {value}")
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be one or more of {KINDS}, got {tuple(kinds)}")
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")


def _new_question(kind: Kind, size: int, split: Split, draw: random.Random, taken: set[str]) -> tuple[str, str]:
    """A question of that split that is not taken, with its answer."""
    for _ in range(_MAX_DRAWS):
        question, answer = _QUESTIONS[kind](size, draw)
        if question not in taken and split_of(question) == split:
            return question, answer
    raise ValueError(
        f"there are hardly more than {len(taken)} questions of kind {kind!r} and this size in the {split} split; ask "
        "for fewer rows or examples, or for more digits or words"
    )


def _numbers(num_digits: int, draw: random.Random) -> tuple[int, int]:
    least = 10 ** (num_digits - 1) if num_digits > 1 else 0
    return draw.randint(least, 10**num_digits - 1), draw.randint(least, 10**num_digits - 1)


def _addition(num_digits: int, draw: random.Random) -> tuple[str, str]:
    left, right = _numbers(num_digits, draw)
    return f"{left} + {right} =", str(left + right)


def _subtraction(num_digits: int, draw: random.Random) -> tuple[str, str]:
    right, left = sorted(_numbers(num_digits, draw))
    return f"{left} - {right} =", str(left - right)


def _copying(num_words: int, draw: random.Random) -> tuple[str, str]:
    words = " ".join(draw.sample(WORDS, num_words))
    return f"copy: {words} ->", words


def _reversal(num_words: int, draw: random.Random) -> tuple[str, str]:
    words = draw.sample(WORDS, num_words)
    return f"reverse: {' '.join(words)} ->", " ".join(reversed(words))


_QUESTIONS: dict[Kind, Callable[[int, random.Random], tuple[str, str]]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "copying": _copying,
    "reversal": _reversal,
}
