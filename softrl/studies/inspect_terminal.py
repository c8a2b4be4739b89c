"""`softrl inspect --terminal`: a run of soft decoding as a table of its steps, by rich."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from softrl.studies.html import number
from softrl.studies.inspect_page import percent, sentence, summary
from softrl.studies.inspect_run import Parting, Reading, Run, Step, Token, parting

_BLOCKS = " ▏▎▍▌▋▊▉█"
_BAR_CELLS = 6
_COLUMNS = (
    ("step", "right"), ("fed back", "left"), ("H", "right"), ("H fed", "right"), ("nearest", "left"), ("far", "right"),
    ("hard", "left"),
)  # fmt: skip
_OTHER_CELLS = 54  # of a table's width: numbers, bars and gaps
_LEGEND = (
    "fed back: the heaviest tokens of the mixture and their weights; a hard step has one. H, H fed: entropy in nats, "
    "of the model's prediction and of what was fed. nearest, far: the token whose embedding is closest to what was "
    "fed, and how far it is, in lengths of an embedding. hard: what a hard decoder would have said. A dot is the "
    "heaviest token again."
)


def show(
    console: Console, run: Run, other: Run | None = None, drawn: Sequence[Reading] = (), parts_shown: int = 3
) -> None:
    """Print a run.

    Args:
        console: where to; a table as wide as it is.
        run: what is shown, step by step.
        other: a run to compare it with.
        drawn: texts drawn from the mixtures of `run`.
        parts_shown: of a mixture, at most.
    """
    split = None if other is None else parting(run.ids, other.ids)
    parts: list[RenderableType] = [
        Rule("prompt"),
        Text(run.prompt),
        Rule("the text, read by the heaviest token of each mixture"),
        _read(run),
    ]
    parts += [Rule("steps"), _table(run, other, split, parts_shown, console.width), Text(_LEGEND, style="dim")]
    if other is not None and split is not None:
        parts += [Rule("where two runs part")]
        for each, same in zip((run, other), split.same, strict=True):
            parts += [Text(f"{sentence(each.name)}:", style="bold"), _compared(each, same, split.first)]
    if drawn:
        parts += [Rule("what else the mixtures hold: a token drawn at every step"), *map(_reading, drawn)]
    lines = [Text(f"· {line}") for line in summary(run, other, split)]
    console.print(Group(*parts, Rule(), *lines))


def _read(run: Run) -> Text:
    text = Text()
    for step in run.steps:
        text.append(step.text, "underline" if step.is_soft else "")
    return text


def _table(run: Run, other: Run | None, split: Parting | None, parts_shown: int, width: int) -> Table:
    """The steps; labels of tokens are cut so that a table of this width has room for them."""
    table, most = Table(box=SIMPLE_HEAD, pad_edge=False), max(6, min(24, (width - _OTHER_CELLS) // 4))
    for title, justify in _COLUMNS:
        table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    if other is not None:
        table.add_column(other.name)
    for step in run.steps:
        cells = _cells(step, parts_shown, most)
        if other is not None:
            at = step.number - 1
            cells.append(_label(other.steps[at].token, most) if at < len(other.steps) else Text("ended", "dim"))
        parts_here = split is not None and split.first == step.number - 1
        table.add_row(*cells, style="bold" if parts_here else "")
    return table


def _cells(step: Step, parts_shown: int, most: int) -> list[Text]:
    parts = step.shown(parts_shown) if step.is_soft else step.kept[:1]
    fed = Text("\n").join(
        Text.assemble((_bar(part.weight), "cyan"), f" {percent(part.weight):>5} ", _label(part.token, most))
        for part in parts
    )
    others = [
        Text("·", "dim") if token is not None and token.id == step.token.id else _label(token, most)
        for token in (step.nearest, step.likeliest)
    ]
    return [
        Text(str(step.number)), fed, Text(number(step.entropy)), Text(number(step.fed_entropy)), others[0],
        Text(number(step.distance)), others[1],
    ]  # fmt: skip


def _label(token: Token | None, most: int) -> Text:
    """A token as text and never as rich's markup."""
    if token is None:
        return Text("–", "dim")  # noqa: RUF001
    text = Text(token.label, "magenta" if token.is_special else "")
    text.truncate(most, overflow="ellipsis")
    return text


def _bar(share: float) -> str:
    eighths = round(8 * _BAR_CELLS * share)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_BLOCKS[part] if part else "")).ljust(_BAR_CELLS)


def _compared(run: Run, same: Sequence[bool], first: int | None) -> RenderableType:
    text = Text()
    for at, (step, is_same) in enumerate(zip(run.steps, same, strict=True)):
        if at == first:
            text.append("‖", "bold red")
        text.append(step.text, "" if is_same else "underline")
    return Padding(text, (0, 0, 1, 2))


def _reading(reading: Reading) -> RenderableType:
    return Padding(Text("".join(reading.texts)), (0, 0, 1, 2))
