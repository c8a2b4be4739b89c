"""The figure of a sweep: a dot for each seed, the mean and its standard error, and differences to the baseline.

Numbers lie along a horizontal axis, linear or logarithmic (zero stands left of it); words are rows, one below the
other. A setting without a value of x is a horizontal line.
"""

import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softrl.assets import write_atomically
from softrl.studies.html import mean_and_error
from softrl.studies.sweep import SEED, Trial
from softrl.studies.sweep_question import Question, scale_of
from softrl.studies.sweep_summary import Pair, Setting, baseline_words, word
from softrl.studies.variance_style import COLOURS, Style, png, pyplot, styles

_LABEL_WIDTH = 44  # characters of an axis label that fit along a panel


@dataclass(frozen=True)
class _Layout:
    """Which keys go where."""

    x: str
    series: tuple[str, ...]
    facets: str | None
    scale: str
    values: list[Any]  # of x, in order

    def label(self, row: Setting) -> str:
        """Of a row's series."""
        named = [row.values.get(key) for key in self.series]
        if len(named) == 1 and isinstance(named[0], str):
            return str(named[0])
        return ", ".join(f"{key}={word(value)}" for key, value in zip(self.series, named, strict=True))

    def place(self, value: Any) -> float:
        """Where a value of x lies."""
        if self.scale == "categories":
            return float(self.values.index(value))
        if self.scale == "linear":
            return float(value)
        logs = sorted(math.log10(each) for each in self.values if each > 0)
        gap = min((b - a for a, b in itertools.pairwise(logs)), default=1.0)
        return math.log10(value) if value > 0 else (logs[0] if logs else 0.0) - gap


def plot_question(question: Question, rows: Sequence[Setting], path: Path) -> None:
    """The figure of a grid."""
    shown = [row for row in rows if row.metrics]
    layout = _layout(question, shown)
    facets = _facets(layout, shown)
    compared = any(row.pairs for row in shown)
    looks = styles([layout.label(row) for row in shown])
    categories = layout.scale == "categories"
    height = max(3.2, 1.2 + 0.16 * len(layout.values) * (len(looks) + 1)) if categories else 3.9
    plt = pyplot()
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            len(facets), 1 + compared, figsize=(5.6 * (1 + compared) + 0.4, height * len(facets) + 0.5),
            layout="constrained", squeeze=False,
        )  # fmt: skip
    for panels, (title, of_facet) in zip(axes, facets.items(), strict=True):
        draw = _draw_rows if categories else _draw_line
        _panel(panels[0], layout, of_facet, looks, draw, question.metric, title, _metrics)
        if compared:
            paired = [row for row in of_facet if row.pairs]
            name = textwrap.fill(f"{question.metric}: difference to {baseline_words(question)}", _LABEL_WIDTH)
            _panel(panels[1], layout, paired, looks, draw, name, title, lambda row: ([], row.difference))
            (panels[1].axvline if categories else panels[1].axhline)(0.0, color="0.4", linewidth=1.0)
            if categories:
                panels[1].set_ylabel("")
    if len(looks) > 1:
        handles, labels = axes[0][0].get_legend_handles_labels()
        by_label = dict(zip(labels, handles, strict=True))
        figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _write(figure, path)


def _layout(question: Question, rows: Sequence[Setting]) -> _Layout:
    spec = question.report
    keys, x = question.keys or [SEED], question.x
    left = [key for key in keys if key not in (x, spec.facets)]
    values = [row.values[x] for row in rows if row.values.get(x) is not None]
    values = list(dict.fromkeys(values))
    scale = scale_of(values, spec.scale)  # the question's, unless earlier commands ran values that it cannot show
    if scale != "categories":
        values = sorted(values)
    elif any(row.values.get(x) is None for row in rows):
        values.append(None)
    if spec.sort and scale == "categories":
        means = {value: mean_and_error(r.metric[0] for r in rows if r.values.get(x) == value)[0] for value in values}
        values.sort(key=lambda value: means[value], reverse=question.direction == "maximize")
    return _Layout(x, tuple(left) if spec.series is None else spec.series, spec.facets, scale, values)


def _facets(layout: _Layout, rows: Sequence[Setting]) -> dict[str, list[Setting]]:
    if layout.facets is None:
        return {"": list(rows)}
    values = dict.fromkeys(row.values.get(layout.facets) for row in rows)
    return {
        f"{layout.facets} = {word(value)}": [row for row in rows if row.values.get(layout.facets) == value]
        for value in values
    }


def _metrics(row: Setting) -> tuple[list[float], Pair]:
    return list(row.metrics.values()), row.metric


Shown = Callable[[Setting], tuple[list[float], Pair]]


def _panel(
    axis: Any, layout: _Layout, rows: list[Setting], looks: dict[str, Style], draw: Any, name: str, title: str,
    shown: Shown,
) -> None:  # fmt: skip
    for number, (label, look) in enumerate(looks.items()):
        of_series = [row for row in rows if layout.label(row) == label]
        shift = 0.0 if len(looks) == 1 else 0.6 * ((number + 0.5) / len(looks) - 0.5)
        draw(axis, layout, of_series, look, label, shown, shift)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25)
    if layout.scale == "categories":
        axis.set_yticks(range(len(layout.values)), [word(value) for value in layout.values])
        axis.set_ylim(len(layout.values) - 0.4, -0.6)
        axis.set(xlabel=name, ylabel=layout.x)
    else:
        ticks = layout.values if layout.scale == "log" or len(layout.values) <= 10 else None
        if ticks is not None:
            axis.set_xticks([layout.place(value) for value in ticks], [f"{value:g}" for value in ticks])
        axis.set(xlabel=layout.x, ylabel=name)


def _draw_rows(
    axis: Any, layout: _Layout, rows: list[Setting], look: Style, label: str, shown: Shown, shift: float
) -> None:
    for row in rows:
        place = layout.place(row.values.get(layout.x)) + shift
        seeds, (mean, error) = shown(row)
        axis.plot(seeds, [place] * len(seeds), ".", color=look.colour, alpha=0.45, markersize=6)
        axis.errorbar(
            [mean], [place], xerr=[0.0 if math.isnan(error) else error], fmt=look.marker, color=look.colour,
            markersize=5, capsize=3, label=label,
        )  # fmt: skip


def _draw_line(
    axis: Any, layout: _Layout, rows: list[Setting], look: Style, label: str, shown: Shown, shift: float
) -> None:
    del shift
    along = sorted((r for r in rows if r.values.get(layout.x) is not None), key=lambda r: r.values[layout.x])
    for row in along:
        seeds, _ = shown(row)
        axis.plot([layout.place(row.values[layout.x])] * len(seeds), seeds, ".", color=look.colour, alpha=0.45)
    if along:
        pairs = [shown(row)[1] for row in along]
        places = [layout.place(row.values[layout.x]) for row in along]
        errors = [0.0 if math.isnan(error) else error for _, error in pairs]
        axis.errorbar(
            places, [mean for mean, _ in pairs], yerr=errors, marker=look.marker, linestyle=look.line,
            color=look.colour, markersize=5, capsize=3, linewidth=1.5, label=label,
        )  # fmt: skip
    for row in rows:
        if row.values.get(layout.x) is None:
            mean, error = shown(row)[1]
            axis.axhline(mean, color=look.colour, linestyle="--", linewidth=1.3, label=label)
            if not math.isnan(error):
                axis.axhspan(mean - error, mean + error, color=look.colour, alpha=0.12, linewidth=0.0)


def plot_search(keys: Sequence[str], metric: str, trials: Sequence[Trial], path: Path) -> None:
    """Of random trials: the metric against each key, a dot a trial, and the mean over the other keys."""
    count = len(keys)
    figure, axes = pyplot().subplots(1, count, figsize=(4.6 * count, 4.0), layout="constrained", squeeze=False)
    for panel, key in zip(axes[0], keys, strict=True):
        values = sorted({trial.values[key] for trial in trials}, key=lambda v: (isinstance(v, str), v is None, v))
        places = {value: place for place, value in enumerate(values)}
        panel.plot([places[trial.values[key]] for trial in trials], [trial.metric for trial in trials], "o",
                   color=COLOURS[0], alpha=0.6, label="a trial")  # fmt: skip
        means = [mean_and_error(t.metric or 0.0 for t in trials if t.values[key] == value)[0] for value in values]
        panel.plot(range(len(values)), means, "-", color=COLOURS[1], label="mean over the other keys")
        panel.set_xticks(range(len(values)), [word(value) for value in values])
        panel.set(xlabel=key, ylabel=metric)
        panel.grid(alpha=0.25)
    axes[0][0].legend(fontsize=8)
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    with write_atomically(path) as temporary:
        temporary.write_bytes(png(figure, dpi=100))
