"""The page of `softrl inspect`: a run of soft decoding for someone who has never seen one, in one file.

Everything is on the page and nothing is fetched; without scripts every step can be opened where it stands. What the
tokens hold is escaped by the template, and a content security policy keeps the page from loading anything.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from softrl.assets import write_atomically
from softrl.studies.html import number
from softrl.studies.inspect_run import Parting, Reading, Run, Token, parting

_TEMPLATE, _STYLE, _SCRIPT = (Path(__file__).with_name(f"inspect_page.{kind}") for kind in ("html", "css", "js"))
_PARTS_SHOWN = 8  # of a mixture
_TICKS = 4
_STEPS_BETWEEN_LABELS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Curve:
    """A line of a plot; points are in percent of its height, one a step, None where there is no number."""

    name: str
    kind: str  # of line, in the style sheet
    segments: tuple[str, ...]  # `x,y x,y ...`, x in steps


@dataclass(frozen=True)
class Plot:
    """Lines over steps, as the template draws them: x in steps, y in percent downwards."""

    title: str
    sentence: str
    curves: tuple[Curve, ...]
    ticks: tuple[tuple[float, str], ...]  # y and label
    bound: tuple[float, str] | None


def write_page(
    path: Path, run: Run, other: Run | None = None, drawn: Sequence[Reading] = (), command: str = ""
) -> None:
    """Write the page whole or not at all.

    Args:
        path: where to.
        run: what the page is about.
        other: a run to compare it with.
        drawn: texts drawn from the mixtures of `run`.
        command: how to make the page again.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "percent": percent, "choices": choices, "sentence": sentence}
    environment.filters |= {"indent_of": indent_of, "without_indent": without_indent}
    script = _SCRIPT.read_text(encoding="utf-8")
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        style=_STYLE.read_text(encoding="utf-8"), script=script, script_hash=_hash(script), command=command,
        **page_values(run, other, drawn),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def page_values(run: Run, other: Run | None, drawn: Sequence[Reading]) -> dict[str, Any]:
    """What the template shows."""
    split = None if other is None else parting(run.ids, other.ids)
    largest = max((step.entropy or 0.0 for step in run.steps), default=0.0)
    return {
        "run": run, "other": other, "parting": split, "readings": drawn,
        "plots": plots(run), "step_labels": step_labels(len(run.steps)), "largest_entropy": largest,
        "sentences": summary(run, other, split), "parts_shown": _PARTS_SHOWN, "phases": phases(run),
        "heat": [0.0 if not largest else (step.entropy or 0.0) / largest for step in run.steps],
        "first_shown": next((step.number for step in run.steps if step.is_soft), 1),
        "drawn_at": [_distinct([reading.tokens[at] for reading in drawn]) for at in range(len(run.steps))],
    }  # fmt: skip


def summary(run: Run, other: Run | None, split: Parting | None) -> list[str]:
    """What the page shows, in sentences."""
    steps, soft = run.steps, [step for step in run.steps if step.is_soft]
    if not steps:
        return ["Nothing was generated."]
    lines = [_kinds(len(steps), len(soft))]
    mean = _mean([step.entropy for step in steps])
    if mean is not None:
        lines.append(
            f"On average the model was as unsure as in a fair choice among {choices(mean)} tokens "
            f"({number(mean)} nats of entropy)."
        )
    known = [step for step in soft if step.likeliest is not None]
    if known:
        same = sum(step.likeliest.id == step.token.id for step in known if step.likeliest is not None)
        lines.append(
            f"The heaviest token of a mixture was what a hard decoder would have said there in {same} of {len(known)} "
            "soft steps."
        )
    if other is not None and split is not None:
        lines.append(
            f"Its text is that of the {other.name} to the end."
            if split.first is None
            else f"Its text is that of the {other.name} for {split.first} tokens; they part at step {split.first + 1}."
        )
    return lines


def _kinds(steps: int, soft: int) -> str:
    kinds = "all of them soft" if soft == steps else f"{soft} of them soft and {steps - soft} hard"
    return f"{steps} tokens were generated, {kinds if soft else 'all of them hard'}."


def sentence(name: str) -> str:
    """A name as a heading begins: its first letter large, the others as they are."""
    return name[:1].upper() + name[1:]


def indent_of(text: str) -> str:
    """The spaces that a token's text begins with, which stand before the coloured token; none of spaces alone."""
    return text[: len(text) - len(text.lstrip(" "))] if text.strip(" ") else ""


def without_indent(text: str) -> str:
    """The rest of it."""
    return text[len(indent_of(text)) :]


def phases(run: Run) -> list[tuple[int, int, bool]]:
    """Stretches of soft and of hard steps: first step (from 0), length, whether soft."""
    found: list[tuple[int, int, bool]] = []
    for at, step in enumerate(run.steps):
        if found and found[-1][2] == step.is_soft:
            found[-1] = (found[-1][0], found[-1][1] + 1, step.is_soft)
        else:
            found.append((at, 1, step.is_soft))
    return found


def plots(run: Run) -> list[Plot]:
    """Entropy over steps with its bound, and the distance to the nearest embedding where it is known."""
    entropies: list[tuple[str, str, list[float | None]]] = [
        ("of the model's prediction", "model", [step.entropy for step in run.steps]),
        ("of what was fed back", "fed", [step.fed_entropy for step in run.steps]),
    ]
    sharpened = "" if run.bound_nats is None else ", sharpened where its entropy would exceed the bound"
    words = (
        "High where the model was unsure which token comes next: 0 is certain, 0.7 is two equally likely tokens, 2.3 "
        f"is ten. The mixture that was fed back is made of the likeliest tokens alone{sharpened}."
    )
    found = [_plot("Entropy, nats", words, entropies, run.bound_nats)]
    distances = [step.distance for step in run.steps]
    if any(distance is not None for distance in distances):
        found.append(
            _plot(
                "Distance to the nearest token",
                "How far what was fed back lies from any real token's embedding, in lengths of an embedding; zero for "
                "a hard token.",
                [("of what was fed back", "fed", distances)],
                None,
            )
        )
    return found


def _plot(
    title: str, sentence: str, lines: Sequence[tuple[str, str, list[float | None]]], bound: float | None
) -> Plot:
    known = [value for _, _, values in lines for value in values if value is not None and math.isfinite(value)]
    step, top = _scale(max([*known, bound or 0.0, 1e-3]))
    ticks = tuple((100.0 - 100.0 * at * step / top, f"{at * step:g}") for at in range(round(top / step) + 1))
    curves = tuple(Curve(name, kind, _segments(values, top)) for name, kind, values in lines if any_known(values))
    level = None if bound is None else (100.0 - 100.0 * bound / top, f"{number(bound)}")
    return Plot(title, sentence, curves, ticks, level)


def any_known(values: Sequence[float | None]) -> bool:
    """Whether there is a number among the values."""
    return any(value is not None and math.isfinite(value) for value in values)


def _scale(largest: float) -> tuple[float, float]:
    """A round distance between ticks, and the end of an axis that holds the number, a little above it."""
    raw = largest / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if power * factor >= raw)
    return step, step * math.ceil(1.04 * largest / step)


def _segments(values: Sequence[float | None], top: float) -> tuple[str, ...]:
    """Lines through neighbouring numbers; each is at the middle of its step."""
    parts: list[list[str]] = [[]]
    for at, value in enumerate(values):
        if value is None or not math.isfinite(value):
            parts.append([])
            continue
        parts[-1].append(f"{at + 0.5:g},{100.0 - 100.0 * value / top:.2f}")
    # a line of one point is not drawn; one of no length, with round ends, is
    return tuple(" ".join(part if len(part) > 1 else part * 2) for part in parts if part)


def step_labels(steps: int) -> list[int]:
    """Numbers of steps for an axis, ten at most."""
    between = next((step for step in _STEPS_BETWEEN_LABELS if steps / step <= 10), _STEPS_BETWEEN_LABELS[-1])
    return [1, *range(max(between, 2), steps + 1, between)] if between > 1 else list(range(1, steps + 1))


def percent(share: float | None) -> str:
    """A share for people: `62%`, `3.1%`, `<0.1%`; a dash for None."""
    if share is None:
        return "–"  # noqa: RUF001
    if share < 1e-3:
        return "<0.1%" if share > 0.0 else "0%"
    return f"{100.0 * share:.1f}%" if share < 0.0995 else f"{100.0 * share:.0f}%"


def choices(entropy_nats: float) -> str:
    """Among how many equally likely tokens a choice of this entropy would be, `exp(H)`, in words or digits."""
    count = math.exp(min(entropy_nats, 30.0))
    return f"{count:.1f}" if count < 9.95 else f"{count:,.0f}"


def _distinct(tokens: Sequence[Token]) -> list[tuple[Token, int]]:
    """Different tokens with how often each occurs, the most frequent first."""
    counts = {token: sum(other == token for other in tokens) for token in dict.fromkeys(tokens)}
    return sorted(counts.items(), key=lambda item: -item[1])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _hash(script: str) -> str:
    """What a content security policy calls a script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii')}"
