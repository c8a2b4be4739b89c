"""A run of soft decoding as something to look at: its steps with texts for tokens, what else could have been read from
it, and where two runs part. Plain Python, from the record that generation makes or from its file.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from softrl.generation.soft_record import SoftText
from softrl.studies.inspect_text import TokenTexts, visible

_OF_PARTS = ("ids", "weights", "probs")  # [T][K]
_OF_STEPS = ("is_soft", "likeliest", "entropy", "fed_entropy", "nearest", "distance")  # [T]
_LEAST_WEIGHT = 5e-4  # of a part that is shown: below it a bar cannot be seen
_LEAST_PROB = 0.01  # of one that was not fed


@dataclass(frozen=True)
class Token:
    """A token by itself."""

    id: int
    label: str
    is_special: bool


@dataclass(frozen=True)
class Kept:
    """A part of a mixture: the weight that was fed, and the model's own probability where it is known."""

    token: Token
    weight: float
    prob: float | None


@dataclass(frozen=True)
class Step:
    """A generated token. Entropies are in nats; None is what the record does not say."""

    number: int  # from 1
    token: Token
    text: str  # what it adds to the text
    is_soft: bool
    kept: tuple[Kept, ...]  # in falling order of weight, then of probability
    entropy: float | None
    fed_entropy: float
    likeliest: Token | None
    nearest: Token | None
    distance: float | None

    def shown(self, at_most: int) -> tuple[Kept, ...]:
        """The heaviest parts that can be seen, then likely tokens that were not fed."""
        fed = [part for part in self.kept if part.weight >= _LEAST_WEIGHT] or list(self.kept[:1])
        others = [part for part in self.kept if part.weight == 0.0 and (part.prob or 0.0) >= _LEAST_PROB]
        return tuple([*fed, *others][:at_most])

    def rest(self, at_most: int) -> tuple[int, float]:
        """How many parts that were fed it leaves, and their weight together."""
        shown = self.shown(at_most)
        hidden = [part for part in self.kept if part.weight > 0.0 and part not in shown]
        return len(hidden), sum(part.weight for part in hidden)


@dataclass(frozen=True)
class Run:
    """One generated text.

    Args:
        name: what to call it beside another run.
        prompt: its text.
        steps: T of them.
        bound_nats: the entropy bound of what is fed, if there is one.
        settings: what else to say about it, by name.
    """

    name: str
    prompt: str
    steps: tuple[Step, ...]
    bound_nats: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def ids(self) -> list[int]:
        """The tokens as they are read: the heaviest of every step."""
        return [step.token.id for step in self.steps]

    @property
    def text(self) -> str:
        """The text as it is read."""
        return "".join(step.text for step in self.steps)


def line_of(record: SoftText, row: int, prompt: str) -> dict[str, Any]:
    """A row of a record as a line of a file has it: T entries each, without what stands behind the text's end."""
    live = record.mask[row]
    names = ("tokens", *_OF_PARTS, *_OF_STEPS)
    return {"prompt": prompt, **{name: getattr(record, name)[row][live].tolist() for name in names}}


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a record's file, as `run_of` takes them.

    A line is a JSON object with `tokens` [T] and either `kept` [T], lists of pairs of a token id and its weight, or
    `ids` and `weights` [T][K]. `prompt`, `probs` [T][K], `is_soft`, `likeliest`, `entropy`, `fed_entropy`, `nearest`
    and `distance` [T] may be missing or null; other keys are left alone.

    Raises:
        ValueError: a line is no such object; the message names file and line.
        OSError: the file cannot be read.
    """
    lines = []
    for number, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            lines.append(_checked(json.loads(text)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}; {_EXPECTED}") from error
    if not lines:
        raise ValueError(f"{path} is empty; {_EXPECTED}")
    return lines


_EXPECTED = "expected lines of JSON as softrl generate --output_file writes them"


def _checked(line: Any) -> dict[str, Any]:
    """The line with `ids` and `weights`, once every list in it has its length."""
    if not isinstance(line, dict):
        raise ValueError(f"a JSON {type(line).__name__} and no object")
    if isinstance(line.get("kept"), list):
        ids, weights = ([[pair[place] for pair in step] for step in line["kept"]] for place in (0, 1))
        line = {**line, "ids": ids, "weights": weights}
    if missing := [name for name in ("tokens", "ids", "weights") if not isinstance(line.get(name), list)]:
        raise ValueError(f"no list under {missing[0]!r}")
    steps = len(line["tokens"])
    for name in (*_OF_PARTS, *_OF_STEPS):
        values = line.get(name)
        if values is not None and (not isinstance(values, list) or len(values) != steps):
            raise ValueError(f"{name!r} must be a list of {steps} entries, one for each of 'tokens'")
    for name in _OF_PARTS:
        for number, (ids, values) in enumerate(zip(line["ids"], line.get(name) or line["ids"], strict=True), 1):
            if len(ids) != len(values) or not ids:
                raise ValueError(f"{name!r} of step {number} has {len(values)} entries for {len(ids)} kept ids")
    return line


def run_of(
    line: Mapping[str, Any],
    texts: TokenTexts,
    name: str,
    bound_nats: float | None = None,
    settings: Mapping[str, str] | None = None,
) -> Run:
    """A line as something to look at.

    Args:
        line: see `line_of` and `read_lines`.
        texts: of the model's tokenizer.
        name, bound_nats, settings: see `Run`.
    """
    flow = texts.texts(line["tokens"])
    steps = tuple(_step(line, at, text, texts) for at, text in enumerate(flow))
    return Run(name, _prompt_text(line.get("prompt", "")), steps, bound_nats, settings or {})


def _prompt_text(prompt: Any) -> str:
    """A prompt's text as it is shown; of a conversation, a line a message."""
    if isinstance(prompt, list):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    return "".join(visible(line, inline=True) for line in str(prompt).splitlines(keepends=True))


def _step(line: Mapping[str, Any], at: int, text: str, texts: TokenTexts) -> Step:
    def value(name: str) -> Any:
        return line[name][at] if line.get(name) is not None else None

    def token(token_id: int) -> Token:
        return Token(token_id, texts.label(token_id), texts.is_special(token_id))

    ids, weights = line["ids"][at], line["weights"][at]
    parts = zip(ids, weights, value("probs") or [None] * len(ids), strict=True)
    kept = [Kept(token(each), weight, prob) for each, weight, prob in parts if weight > 0.0 or prob is not None]
    kept.sort(key=lambda part: (-part.weight, -(part.prob or 0.0)))
    fed_entropy = value("fed_entropy")
    if fed_entropy is None:
        fed_entropy = -sum(weight * math.log(weight) for weight in weights if weight > 0.0)
    is_soft, likeliest, nearest = value("is_soft"), value("likeliest"), value("nearest")
    return Step(
        number=at + 1,
        token=token(line["tokens"][at]),
        text=text,
        is_soft=sum(weight > 0.0 for weight in weights) > 1 if is_soft is None else is_soft,
        kept=tuple(kept),
        entropy=value("entropy"),
        fed_entropy=fed_entropy + 0.0,  # −0 of a hard step becomes 0
        likeliest=None if likeliest is None else token(likeliest),
        nearest=None if nearest is None else token(nearest),
        distance=value("distance"),
    )


@dataclass(frozen=True)
class Reading:
    """One of the texts that a run's mixtures hold: a token a step, and what each adds to the text."""

    tokens: tuple[Token, ...]
    texts: tuple[str, ...]


def readings(run: Run, texts: TokenTexts, count: int, seed: int) -> list[Reading]:
    """Texts that the mixtures hold besides the heaviest tokens: a token drawn at every step from what was fed.

    Draws of different steps know nothing of each other, though the mixtures were computed one after another: a reading
    shows what a mixture is made of, and is no text that the model would have written.

    Args:
        run: T steps.
        texts: of the model's tokenizer.
        count: how many readings.
        seed: of the draws.
    """
    draws, found = random.Random(seed), []
    for _ in range(count):
        tokens = [
            draws.choices([part.token for part in step.kept], [part.weight for part in step.kept])[0]
            for step in run.steps
        ]
        found.append(Reading(tuple(tokens), tuple(texts.texts([token.id for token in tokens]))))
    return found


@dataclass(frozen=True)
class Parting:
    """Two runs side by side.

    Args:
        first: the first step, from 0, at which they differ; None where they are the same.
        same: for each run and step, whether the other run has that token at the corresponding place.
    """

    first: int | None
    same: tuple[tuple[bool, ...], tuple[bool, ...]]


def parting(one: Sequence[int], other: Sequence[int]) -> Parting:
    """Where two sequences of tokens part, and what they still have in common behind that, as the longest blocks.

    Source: difflib's SequenceMatcher (Ratcliff and Metzener 1988).
    """
    pairs = zip(one, other, strict=False)
    first = next((at for at, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))
    if first == len(one) == len(other):
        return Parting(None, ((True,) * first, (True,) * first))
    same = ([True] * first + [False] * (len(one) - first), [True] * first + [False] * (len(other) - first))
    for block in SequenceMatcher(None, list(one[first:]), list(other[first:]), autojunk=False).get_matching_blocks():
        for marks, begin in zip(same, (block.a, block.b), strict=True):
            marks[first + begin : first + begin + block.size] = [True] * block.size
    return Parting(first, (tuple(same[0]), tuple(same[1])))
