"""The figures of `softrl compare`: reward against KL, learning curves, diversity; one colour a method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softrl.assets import write_atomically
from softrl.studies.compare_tables import METRICS, Record, curve_beta, finished, mean_at_kl, mean_curve

# Okabe and Ito's palette, told apart with every common colour blindness; yellow is left out on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX*"
_LABELS = {"reward": "hard reward (trained on)", "judge": "judge (never trained on)"}
_GRID_POINTS = 24
_KL_TICKS = (0, 0.5, 2, 5, 10, 20, 40, 80, 160, 320)


def draw(records: list[Record], folder: Path) -> dict[str, Path]:
    """All figures as PNG files, by name; none without a finished run of the comparison."""
    import matplotlib

    matplotlib.use("Agg")
    done = finished(records)
    if not done:
        return {}
    looks = _looks(records)
    drawers = {"frontier": _frontier, "curves": _curves, "diversity": _diversity}
    paths = {}
    for name, drawer in drawers.items():
        paths[name] = folder / f"{name}.png"
        _save(drawer(done, looks), paths[name])
    return paths


def _looks(records: list[Record]) -> dict[str, dict[str, str]]:
    """A colour and a marker for every method, the same in all figures."""
    methods = dict.fromkeys(record["method"] for record in records)
    return {
        method: {"color": COLOURS[index % len(COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        for index, method in enumerate(methods)
    }


def _panels(rows: int, columns: int, height: float) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(rows, columns, figsize=(11, height), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)


def _legend(figure: Any, axis: Any, looks: dict[str, dict[str, str]]) -> None:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        [unique[name] for name in looks if name in unique], [name for name in looks if name in unique],
        loc="outside lower center", ncols=min(len(unique), 5), frameon=False,
    )  # fmt: skip


def _measured(records: list[Record]) -> list[str]:
    """The metrics that all runs have: a study may have no judge."""
    return [name for name in METRICS if all(point.get(name) is not None for r in records for point in r["points"])]


def _of(records: list[Record], method: str) -> list[Record]:
    return [record for record in records if record["method"] == method]


def _band(axis: Any, x: Sequence[float], mean: Sequence[float], error: Sequence[float], look: dict[str, str]) -> None:
    low = [m - e for m, e in zip(mean, error, strict=True)]
    high = [m + e for m, e in zip(mean, error, strict=True)]
    axis.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)  # none where the error is NaN


def _frontier(records: list[Record], looks: dict[str, dict[str, str]]) -> Any:
    """Every evaluation as a point, and the mean over seeds at equal KL as a curve."""
    metrics = _measured(records)
    figure, axes = _panels(1, len(metrics), 5.0)
    for axis, metric in zip(axes.flat, metrics, strict=True):
        for method, look in looks.items():
            runs = _of(records, method)
            points = [point for record in runs for point in record["points"][1:]]
            axis.scatter(
                [point["kl_completion"] for point in points], [point[metric] for point in points], s=18, alpha=0.4,
                linewidths=0, **look,
            )  # fmt: skip
            axis.plot([], [], linewidth=2, markersize=5, label=method, **look)  # for the legend
            curve = frontier_curve(runs, metric)
            if curve:
                kl, mean, error = (list(values) for values in zip(*curve, strict=True))
                axis.plot(kl, mean, color=look["color"], linewidth=2)
                _band(axis, kl, mean, error, look)
        # A run without a KL term goes as the square of the others: equal steps of the root show both.
        axis.set_xscale("function", functions=(np.sqrt, np.square))
        furthest = max(point["kl_completion"] for record in records for point in record["points"])
        ticks = [tick for tick in _KL_TICKS if tick <= max(furthest, _KL_TICKS[1])]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xlim(left=0.0)
        axis.set_xlabel("KL to base, nats a completion (root scale)")
        axis.set_ylabel(_LABELS[metric])
    _legend(figure, axes.flat[0], looks)
    return figure


def frontier_curve(records: list[Record], metric: str) -> list[tuple[float, float, float]]:
    """KL, mean and standard error over seeds, as far as every seed of a method has a run that gets there."""
    seeds = {record["seed"] for record in records}
    if not seeds:
        return []
    furthest = {
        seed: max(p["kl_completion"] for record in records if record["seed"] == seed for p in record["points"])
        for seed in seeds
    }
    end = min(furthest.values())
    curve = []
    for index in range(_GRID_POINTS + 1):
        kl = end * (index / _GRID_POINTS) ** 2
        mean, error, reached = mean_at_kl(records, kl, metric)
        if reached == len(seeds):
            curve.append((kl, mean, error))
    return curve


def _curves(records: list[Record], looks: dict[str, dict[str, str]]) -> Any:
    """Against samples and against seconds, at one KL weight."""
    metrics, beta = _measured(records), curve_beta(records)
    figure, axes = _panels(len(metrics), 2, 4.0 * len(metrics))
    for row, metric in zip(axes, metrics, strict=True):
        for axis, key in zip(row, ("samples", "seconds"), strict=True):
            for method, look in looks.items():
                runs = [record for record in _of(records, method) if record["beta"] == beta]
                curve = mean_curve(runs, metric)
                if curve:
                    x, mean, error = ([point[name] for point in curve] for name in (key, "mean", "error"))
                    axis.plot(x, mean, linewidth=2, markersize=5, label=method, **look)
                    _band(axis, x, mean, error, look)
            axis.set_xlabel("samples" if key == "samples" else "seconds of training (evaluation excluded)")
            axis.set_ylabel(_LABELS[metric])
    figure.suptitle(f"KL weight {beta:g}", fontsize=12)
    _legend(figure, axes.flat[0], looks)
    return figure


def _diversity(records: list[Record], looks: dict[str, dict[str, str]]) -> Any:
    """Distinct-2 and perplexity under the base against the hard reward."""
    panels = {"distinct_2": "distinct-2 of all completions", "base_perplexity": "perplexity under the base"}
    figure, axes = _panels(1, 2, 4.8)
    for axis, (key, label) in zip(axes.flat, panels.items(), strict=True):
        starts = [record["points"][0] for record in records]
        axis.scatter(
            [point["reward"] for point in starts], [point[key] for point in starts], s=60, facecolors="none",
            edgecolors="grey", label="base",
        )  # fmt: skip
        for method, look in looks.items():
            points = [point for record in _of(records, method) for point in record["points"][1:]]
            x, y = [point["reward"] for point in points], [point[key] for point in points]
            axis.scatter(x, y, s=26, alpha=0.6, linewidths=0, label=method, **look)
        axis.set_xlabel(_LABELS["reward"])
        axis.set_ylabel(label)
    axes.flat[1].set_yscale("log")
    for formatter in (axes.flat[1].yaxis.set_major_formatter, axes.flat[1].yaxis.set_minor_formatter):
        formatter(lambda value, position: f"{value:g}")
    _legend(figure, axes.flat[0], {**looks, "base": {}})
    return figure
