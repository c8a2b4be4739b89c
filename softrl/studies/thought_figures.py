"""The figures of `softrl thoughts compare`: NLL by seconds and by thoughts, the mixing weight by position."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from softrl.assets import write_atomically
from softrl.studies.thought_tables import Point, Record, finished, mean_curve
from softrl.studies.variance_style import Style, png, pyplot, styles


def draw(records: list[Record], folder: Path) -> dict[str, Path]:
    """All figures as PNG files, by name; those without anything to show are left out."""
    done = finished(records)
    looks = styles([record["method"] for record in records])
    drawers = {"curves": _curves, "positions": _positions}
    paths = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawer in drawers.items():
        figure = drawer(done, looks)
        if figure is not None:
            paths[name] = folder / f"{name}.png"
            with write_atomically(paths[name]) as temporary:
                temporary.write_bytes(png(figure, dpi=110))
    return paths


def _panels(count: int, height: float) -> tuple[Any, Any]:
    plt = pyplot()
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, count, figsize=(11, height), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    return figure, axes[0]


def _curves(records: list[Record], looks: dict[str, Style]) -> Any:
    """NLL with thoughts on the left by seconds, on the right by thoughts; bands are one standard error."""
    if not records:
        return None
    figure, axes = _panels(2, 5.6)
    readers: list[tuple[str, Callable[[Point], float]]] = [
        ("seconds of training", lambda point: point["seconds"]), ("thoughts sampled", lambda point: point["thoughts"]),
    ]  # fmt: skip
    for axis, (label, x) in zip(axes, readers, strict=True):
        for method, look in looks.items():
            runs = [record for record in records if record["method"] == method]
            if not runs or (label.startswith("thoughts") and runs[0]["points"][-1]["thoughts"] == 0):
                continue
            along, mean, error = mean_curve(runs, x, lambda point: point["nll"])
            line = "--" if runs[0]["control"] else "-"
            axis.plot(
                along, mean, line, color=look.colour, marker=look.marker, markersize=4, linewidth=1.4, label=method
            )
            low, high = ([m + s * e for m, e in zip(mean, error, strict=True)] for s in (-1, 1))
            axis.fill_between(
                along, low, high, color=look.colour, alpha=0.12 if len(looks) <= 8 else 0.05, linewidth=0
            )
        axis.set_xlabel(label)
    axes[0].set_ylabel("NLL of held-out true tokens, nats")
    _limit(axes, records)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _limit(axes: Any, records: list[Record]) -> None:
    """Leave out the first evaluation's height, which all methods leave at once."""
    values = [point["nll"] for record in records for point in record["points"][1:]]
    if values:
        room = 0.05 * (max(values) - min(values) + 1e-9)
        for axis in axes:
            axis.set_ylim(min(values) - room, max(values) + room)


def _positions(records: list[Record], looks: dict[str, Style]) -> Any:
    """Weight of thoughts, and what they gain, by position; None where a task thinks at one position only."""
    thinking = [record for record in records if len(record["mixing_by_position"]) > 1 and record["thoughts"]]
    if not thinking:
        return None
    figure, axes = _panels(2, 4.4)
    for axis, (key, label) in zip(
        axes, (("mixing_by_position", "mixing weight"), ("gain_by_position", "NLL gained, nats")), strict=True
    ):
        for method in dict.fromkeys(record["method"] for record in thinking):
            runs = [record[key] for record in thinking if record["method"] == method]
            slots = sorted(map(int, runs[0]))
            means = [sum(run[str(slot)] for run in runs) / len(runs) for slot in slots]
            axis.plot(slots, means, color=looks[method].colour, linewidth=1.2, label=method)
        axis.set_xlabel("position of the token before the thought")
        axis.set_ylabel(label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure
