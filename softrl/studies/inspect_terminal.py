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
    ("step", "right"), ("token", "left"), ("fed back", "left"), ("H model", "right"), ("H fed", "right"),
    ("nearest", "left"), ("distance", "right"), ("hard", "left"),
)  # fmt: skip
_LEGEND = (
    "fed back: the heaviest tokens of the mixture and their weights. H: entropy in nats, of the model's prediction "
    "and of what was fed. nearest, distance: the token whose embedding is closest to what was fed, in lengths of an "
    "embedding. hard: what a hard decoder would have said instead of the token; blank where it is the same."
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
    parts += [Rule("steps"), _table(run, other, split, parts_shown), Text(_LEGEND, style="dim")]
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


def _table(run: Run, other: Run | None, split: Parting | None, parts_shown: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title, justify in _COLUMNS:
        table.add_column(title, justify=justify, no_wrap=title in ("step", "H model", "H fed"))  # type: ignore[arg-type]
    if other is not None:
        table.add_column(other.name)
    for step in run.steps:
        cells = _cells(step, parts_shown)
        if other is not None:
            at = step.number - 1
            cells.append(_label(other.steps[at].token) if at < len(other.steps) else Text("ended", "dim"))
        parts_here = split is not None and split.first == step.number - 1
        table.add_row(*cells, style="bold" if parts_here else "")
    return table


def _cells(step: Step, parts_shown: int) -> list[Text]:
    fed = Text("one token", "dim")
    if step.is_soft:
        fed = Text("\n").join(
            Text.assemble((_bar(part.weight), "cyan"), f" {percent(part.weight):>4} ", _label(part.token))
            for part in step.shown(parts_shown)
        )
    is_same = step.likeliest is None or step.likeliest.id == step.token.id
    return [
        Text(str(step.number)), _label(step.token), fed, Text(number(step.entropy)), Text(number(step.fed_entropy)),
        _label(step.nearest), Text(number(step.distance)), Text() if is_same else _label(step.likeliest),
    ]  # fmt: skip


def _label(token: Token | None) -> Text:
    """A token as text and never as rich's markup."""
    return Text("–", "dim") if token is None else Text(token.label, "magenta" if token.is_special else "")  # noqa: RUF001


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
