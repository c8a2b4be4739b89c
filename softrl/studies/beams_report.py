"""What `softrl study beams` has found: accuracies with their intervals, a table and a figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from softrl.assets import write_atomically

SINGLE_ROW = ("greedy", "greedy soft")  # methods that have no width
_NUM_RESAMPLES = 10_000
_Z = 1.959964  # of a 95% interval


@dataclass(frozen=True)
class Item:
    """An answer: what was written, whether it is right, and its price.

    `nll_nats` is of all its tokens under the base model, which reads hard ones, at temperature 1.
    """

    kind: str
    text: str
    right: bool
    forward_tokens: int
    length_tokens: int
    nll_nats: float


@dataclass(frozen=True)
class Answers:
    """All answers of a method, in the order of the questions, and how long they took."""

    items: list[Item]
    seconds: float


@dataclass(frozen=True)
class Row:
    """A method on the questions of a kind, or on all.

    Intervals are of 95%: Wilson's of the accuracy, a bootstrap over questions of the difference to greedy on the same
    ones. `forward_tokens` is a question's mean, `nll_nats` a token's, under the base model.
    """

    method: str
    width: int
    kind: str
    items: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    difference: float
    difference_low: float
    difference_high: float
    forward_tokens: float
    nll_nats: float
    seconds: float


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share. Source: Wilson (1927), equation for the score interval."""
    share, square = right / count, _Z**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(before: Sequence[bool], after: Sequence[bool], seed: int = 0) -> tuple[float, float, float]:
    """Mean of after − before on the same items, and its 95% interval by a bootstrap over items."""
    differences = np.array(after, dtype=float) - np.array(before, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(differences), size=(_NUM_RESAMPLES, len(differences)))
    low, high = np.percentile(differences[drawn].mean(1), [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def label(method: str, width: int) -> str:
    """A method's name at a width."""
    return method if method in SINGLE_ROW else f"{method}, {width}"


def table_rows(answers: Mapping[tuple[str, int], Answers]) -> list[Row]:
    """The rows of methods at widths: all questions first, then each kind of them. ("greedy", 1) has to be there."""
    greedy = answers["greedy", 1].items
    kinds = ["all", *dict.fromkeys(item.kind for item in greedy)]
    return [_row(method, width, kind, own, greedy) for kind in kinds for (method, width), own in answers.items()]


def _row(method: str, width: int, kind: str, own: Answers, greedy: list[Item]) -> Row:
    pairs = [(item, other) for item, other in zip(own.items, greedy, strict=True) if kind in ("all", item.kind)]
    right = [item.right for item, _ in pairs]
    count = len(pairs)
    return Row(
        method, width, kind, count, sum(right) / count, *wilson_interval(sum(right), count),
        *paired_interval([other.right for _, other in pairs], right),
        sum(item.forward_tokens for item, _ in pairs) / count,
        sum(item.nll_nats for item, _ in pairs) / sum(item.length_tokens for item, _ in pairs),
        own.seconds if kind == "all" else math.nan,
    )  # fmt: skip


def print_table(rows: list[Row], what: str) -> None:
    """All questions, and the accuracy on each kind."""
    title = f"{what}; 95% intervals; passes: tokens fed behind the prompt"
    kinds = [kind for kind in dict.fromkeys(row.kind for row in rows) if kind != "all"]
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in ("passes", "right", "less greedy", "base NLL a token", "seconds", *kinds):
        table.add_column(column, justify="right", no_wrap=True)
    for row in (row for row in rows if row.kind == "all"):
        of_kinds = {each.kind: each for each in rows if (each.method, each.width) == (row.method, row.width)}
        change = f"{row.difference:+.3f} ({row.difference_low:+.3f} to {row.difference_high:+.3f})"
        table.add_row(
            label(row.method, row.width), f"{row.forward_tokens:.1f}",
            f"{row.accuracy:.3f} ({row.accuracy_low:.3f} to {row.accuracy_high:.3f})",
            "" if row.method == "greedy" else change,
            f"{row.nll_nats:.3f}", f"{row.seconds:.0f}", *(f"{of_kinds[kind].accuracy:.2f}" for kind in kinds),
        )  # fmt: skip
    Console(width=max(Console().width, 150)).print(table)


def plot(rows: list[Row], path: Path) -> None:
    """Accuracy against forward passes, and the difference of each method to greedy, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.kind == "all"]
    names = list(dict.fromkeys(row.method for row in rows))
    colours = dict(zip(names, matplotlib.colormaps["tab10"].colors, strict=False))
    markers = dict(zip(names, "osD^vP", strict=False))
    figure, (price, change) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for place, name in enumerate(names):
        own = [row for row in rows if row.method == name]
        across = [row.forward_tokens * 1.03 ** (place - len(names) / 2) for row in own]  # side by side, not on top
        bars = [[row.accuracy - row.accuracy_low for row in own], [row.accuracy_high - row.accuracy for row in own]]
        price.errorbar(
            across,
            [row.accuracy for row in own],
            bars,
            marker=markers[name],
            capsize=3,
            label=name,
            color=colours[name],
        )
    price.set_xscale("log", base=2)
    price.xaxis.set_major_formatter("{x:g}")
    price.set_xlabel("tokens fed behind the prompt, mean of a question (set apart a little)")
    price.set_ylabel("share of right answers, 95% interval")
    price.legend(fontsize="small")
    others = [row for row in rows if row.method != "greedy"][::-1]
    for height, row in enumerate(others):
        bars = [[row.difference - row.difference_low], [row.difference_high - row.difference]]
        change.errorbar(
            [row.difference], [height], xerr=bars, marker=markers[row.method], capsize=3, color=colours[row.method]
        )
    change.set_yticks(range(len(others)), [label(row.method, row.width) for row in others])
    change.axvline(0.0, color="grey", linewidth=0.8)
    change.set_xlabel("right answers less greedy's on the same questions, 95% interval")
    for axis in (price, change):
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
