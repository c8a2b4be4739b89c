"""Figures of the variance laboratory: the bias-variance plane, error against seconds, and what one number changes."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from softrl.studies.variance import Row
from softrl.studies.variance_config import VarianceConfig, expanded, problem_name
from softrl.studies.variance_style import Style, place_labels, plain_log_ticks, png, pyplot

ROUNDING = 1e-12  # of ‖∇J‖²: what is smaller is an exact zero, seen through rounding
PANELS = (("mse", "mse of one draw"), ("variance", "variance"), ("bias2", "bias²"), ("snr", "signal-to-noise ratio"))


@dataclass(frozen=True)
class Figure:
    """A picture and what to say below it."""

    name: str
    caption: str
    image: bytes


@dataclass(frozen=True)
class Sweep:
    """Rows that differ in one number only, one curve a label; `levels` are those that do not set the number."""

    key: str
    title: str
    curves: dict[str, list[tuple[float, Row]]]
    levels: dict[str, Row] = field(default_factory=dict)


def has_bias(row: Row) -> bool:
    """Whether the interval of bias² stays away from zero."""
    return row.bias2_low > ROUNDING


def plane(name: str, rows: Sequence[Row], style: dict[str, Style]) -> Figure:
    """Bias² over variance of one draw, both on a log scale, with curves of equal mse."""
    figure, axis = pyplot().subplots(figsize=(8.2, 6.2))
    figure.subplots_adjust(0.09, 0.09, 0.985, 0.94)
    variances = [row.variance for row in rows if row.variance > ROUNDING]
    heights = [row.bias2 if has_bias(row) else row.bias2_high for row in rows]
    left, right = _limits(variances)
    bottom, top = _limits([height for height in heights if height > ROUNDING])
    axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top), xlabel="variance / ‖∇J‖²",
             ylabel="bias² / ‖∇J‖²", title=name)  # fmt: skip
    _equal_mse(axis)
    points = []
    for row, height in zip(rows, heights, strict=True):
        at = (row.variance if row.variance > ROUNDING else left * 1.25, height if height > ROUNDING else bottom * 1.25)
        _point(axis, row, at, style[row.estimator])
        points.append(at)
    axis.grid(alpha=0.15)
    place_labels(axis, points, [row.estimator for row in rows])
    caption = (
        "Nearer to the lower left is better; grey curves join equal errors of one draw. A filled marker has a bias "
        "that its interval tells from zero; a hollow one with an arrow down lies at the upper end of its interval, "
        "as an upper bound. An arrow to the left: no variance at all."
    )
    return Figure("plane", caption, png(figure))


def _limits(values: list[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    margin = max((high / low) ** 0.12, 1.8)
    return low / margin, high * margin


def _equal_mse(axis: Any) -> None:
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    low, high = math.floor(math.log10(max(left, bottom))), math.ceil(math.log10(right + top))
    for exponent in range(low, high + 1):
        total = 10.0**exponent
        shares = [10 ** (-9 + 9 * k / 200) for k in range(201)]
        xs = [total * share for share in shares] + [total * (1 - share) for share in reversed(shares[:-1])]
        line = [(x, total - x) for x in sorted(xs) if x < total]
        axis.plot(*zip(*line, strict=True), color="0.82", linewidth=0.9, zorder=0)
        if bottom < total < top:
            axis.annotate(
                f"mse {total:g}", (left, total), (3, 2), textcoords="offset points", fontsize=6.5, color="0.45"
            )


def _point(axis: Any, row: Row, at: tuple[float, float], style: Style) -> None:
    biased, noisy = has_bias(row), row.variance > ROUNDING
    axis.plot(*at, marker=style.marker, color=style.colour, markersize=7, markeredgewidth=1.4, zorder=3,
              markerfacecolor=style.colour if biased else "white")  # fmt: skip
    if biased and noisy:
        ends = [[max(row.bias2 - row.bias2_low, 0.0)], [max(row.bias2_high - row.bias2, 0.0)]]
        axis.errorbar(*at, yerr=ends, color=style.colour, linewidth=1.0, zorder=2)
    for away in ([] if biased else [(0, -16)]) + ([] if noisy else [(-16, 0)]):
        arrow = {"arrowstyle": "<-", "color": style.colour, "linewidth": 1.2, "shrinkA": 0.0, "shrinkB": 4.0}
        axis.annotate("", at, away, textcoords="offset points", arrowprops=arrow)


def budgets(name: str, rows: Sequence[Row], style: dict[str, Style]) -> Figure:
    """Mse against the seconds that are spent on averaging draws."""
    figure, axis = pyplot().subplots(figsize=(8.2, 6.0))
    figure.subplots_adjust(0.09, 0.09, 0.7, 0.94)  # by hand: laying out takes matplotlib as long as drawing
    cheapest = min(row.seconds for row in rows)
    longest = max(1e3 * cheapest, 10.0 * max(row.seconds for row in rows))
    shown = [row for row in rows if _error(row, row.seconds) > ROUNDING]
    for row in sorted(shown, key=lambda row: -_error(row, longest)):
        look = style[row.estimator]
        seconds = [row.seconds * (longest / row.seconds) ** (k / 60) for k in range(61)]
        errors = [_error(row, spent) for spent in seconds]
        axis.plot(seconds, errors, look.line, color=look.colour, marker=look.marker, markersize=5, linewidth=1.3,
                  markevery=[0, 40], label=row.estimator)  # fmt: skip
    axis.set(xscale="log", yscale="log", xlim=(cheapest * 0.8, longest), xlabel="seconds spent on one estimate",
             ylabel="mse / ‖∇J‖²", title=name)  # fmt: skip
    axis.grid(alpha=0.25)
    figure.legend(loc="upper left", bbox_to_anchor=(0.7, 0.95), fontsize=7.5, frameon=False)
    exact = [row.estimator for row in rows if row not in shown]
    caption = (
        "Error of the mean of as many draws as fit into the seconds; a curve starts at one draw. It ends level where "
        "a bias is left; one that its interval does not tell from zero counts as none. The legend is in the order of "
        "the curves at the right end."
    ) + (f" Left out, since they have no error at all: {', '.join(exact)}." if exact else "")
    return Figure("seconds", caption, png(figure))


def _error(row: Row, seconds: float) -> float:
    bias2 = row.bias2 if has_bias(row) else 0.0
    return bias2 + row.variance * row.seconds / seconds


def sweeps_of_problems(config: VarianceConfig, rows: Sequence[Row]) -> Iterator[Sweep]:
    """One for each number in which problems of one entry of the recipe differ."""
    for spec in config.problems:
        lists = {key: value for key, value in spec.settings.items() if isinstance(value, list)}
        for key in filter(lambda key: _numbers(lists[key]), lists):
            others = {name: value for name, value in spec.settings.items() if name != key}
            for rest in expanded(others):
                values = {problem_name(spec, rest | {key: value}): value for value in lists[key]}
                told = "".join(f", {name} {rest[name]}" for name in lists if name != key)
                curves = _curves((row.estimator, values[row.problem], row) for row in rows if row.problem in values)
                yield Sweep(key.split(".")[-1], spec.name + told, curves)


def sweeps_of_estimators(rows: Sequence[Row]) -> Iterator[Sweep]:
    """One for each numeric setting that some estimator of a problem has at several values."""
    settings = [json.loads(row.settings)["estimator"] for row in rows]
    for key in dict.fromkeys(key for each in settings for key in each["settings"]):
        found, levels = [], {}
        for row, each in zip(rows, settings, strict=True):
            value = each["settings"].get(key)
            rest = ", ".join(f"{k} {v}" for k, v in each["settings"].items() if k != key)
            label = ", ".join(filter(None, (each["name"], rest)))
            if value is None:
                levels[label] = row
            elif _numbers([value, None]):
                found.append((label, value, row))
        curves = {label: points for label, points in _curves(found).items() if len(points) > 1}
        if curves:
            yield Sweep(key, rows[0].problem, curves, {k: row for k, row in levels.items() if k in curves})


def _numbers(values: list[Any]) -> bool:
    """Whether these are at least two different numbers; None is one of no value."""
    known = [value for value in values if value is not None]
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in known) and len(set(values)) > 1


def _curves(points: Any) -> dict[str, list[tuple[float, Row]]]:
    curves: dict[str, list[tuple[float, Row]]] = {}
    for label, value, row in points:
        curves.setdefault(label, []).append((value, row))
    return {label: sorted(known, key=lambda point: point[0]) for label, known in curves.items()}


def swept(sweep: Sweep, style: dict[str, Style]) -> Figure:
    """Error, its two parts and the signal-to-noise ratio against one number."""
    figure, axes = pyplot().subplots(2, 2, figsize=(8.6, 7.4))
    rows = -(-(len(sweep.curves) + len(sweep.levels)) // 3)
    figure.subplots_adjust(0.08, 0.1 + 0.023 * rows, 0.985, 0.91, wspace=0.2, hspace=0.38)
    looks = _looks(sweep, style)
    for axis, (name, title) in zip(axes.flat, PANELS, strict=True):
        for label, points in sweep.curves.items():
            look = looks[label]
            _curve(axis, name, label, points, look)
            level = sweep.levels.get(label)
            if level is not None and getattr(level, name) > ROUNDING:
                axis.axhline(getattr(level, name), color=look.colour, linewidth=0.9, linestyle=(0, (1, 2)),
                             label=f"{label}, {sweep.key} not set")  # fmt: skip
        _axis(axis, sweep, name, title)
    figure.suptitle(sweep.title)
    named = axes.flat[0].get_legend_handles_labels()
    figure.legend(*named, loc="lower center", ncols=3, fontsize=7.5, frameon=False)
    caption = (
        f"Error, its two parts and the signal-to-noise ratio of one draw against {sweep.key}; bars are 95% intervals. "
        "A hollow bias² lies at the upper end of an interval that reaches zero: it is at most that."
    )
    return Figure(f"by-{sweep.key}", caption, png(figure))


def _looks(sweep: Sweep, style: dict[str, Style]) -> dict[str, Style]:
    """A curve of several estimators looks like one of them, of a colour that no other curve has if there is one."""
    looks: dict[str, Style] = {}
    for label, points in sweep.curves.items():
        own = [style[label]] if label in style else [style[row.estimator] for _, row in points]
        taken = {look.colour for look in looks.values()}
        looks[label] = next((look for look in own if look.colour not in taken), own[0])
    return looks


def _curve(axis: Any, name: str, label: str, points: list[tuple[float, Row]], look: Style) -> None:
    looks = {"color": look.colour, "marker": look.marker, "markersize": 5}
    shown = [(x, row) for x, row in points if row.variance > ROUNDING or name in ("mse", "bias2")]
    if name == "bias2":
        bounds = [(x, row.bias2_high) for x, row in shown if not has_bias(row) and row.bias2_high > ROUNDING]
        axis.plot(*zip(*bounds, strict=True) if bounds else ([], []), linestyle="", markerfacecolor="white", **looks)
        shown = [(x, row) for x, row in shown if has_bias(row)]
    shown = [(x, row) for x, row in shown if getattr(row, name) > ROUNDING]
    values = [getattr(row, name) for _, row in shown]
    ends = [
        [max(value - getattr(row, f"{name}_low"), 0.0) for value, (_, row) in zip(values, shown, strict=True)],
        [max(getattr(row, f"{name}_high") - value, 0.0) for value, (_, row) in zip(values, shown, strict=True)],
    ]
    ends[0] = [min(low, 0.9 * value) for low, value in zip(ends[0], values, strict=True)]
    axis.errorbar([x for x, _ in shown], values, ends, linestyle=look.line, label=label, linewidth=1.2, elinewidth=0.8,
                  **looks)  # fmt: skip


def _axis(axis: Any, sweep: Sweep, name: str, title: str) -> None:
    values = sorted({x for points in sweep.curves.values() for x, _ in points})
    if values[0] > 0 and values[-1] / values[0] >= 4:
        axis.set_xscale("log")
    axis.set_xticks(values, [f"{value:g}" for value in values], minor=False)
    axis.minorticks_off()
    plain_log_ticks(axis, [getattr(row, name) for points in sweep.curves.values() for _, row in points])
    axis.set(title=title, xlabel=sweep.key)
    axis.grid(alpha=0.25)
