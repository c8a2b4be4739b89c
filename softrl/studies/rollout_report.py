"""`softrl bench rollout`: run the contenders of `rollout.py` over horizons; a table, a CSV and a figure."""

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from softrl.assets import write_atomically
from softrl.studies.rollout import CONTENDERS, FLOOR, NAIVE, RLOO, Bench, Row, Setting, measure, peak_mib
from softrl.studies.tables import write_csv

PHASES = ("generation", "cotangents", "gradient")


def run(
    setting: Setting,
    horizons: Iterable[int],
    contenders: list[str],
    rounds: int,
    with_memory: bool,
    output: Path,
    append: bool = False,
) -> list[Row]:
    """Measure every contender at every horizon; the CSV is rewritten after each horizon, the figure lies beside it.

    With `append` the rows that the CSV holds stay; measure the same setting then.
    """
    if setting.beta > 0.0:
        contenders = [name for name in contenders if name not in NAIVE]
    rows = read(output) if append else []
    for num_steps in horizons:
        bench = Bench(setting, num_steps)
        measured = measure(bench, contenders, rounds)
        bench.close()
        del bench
        if with_memory:
            measured = [replace(row, peak_mib=peak_mib(setting, row.contender, num_steps)) for row in measured]
        print(table(measured), flush=True)
        rows += measured
        write_csv(rows, output)
        plot(rows, output.with_suffix(".png"))
    return rows


def read(path: Path) -> list[Row]:
    """Rows that `run` wrote; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(cells) for cells in csv.DictReader(file)]


def _row(cells: dict[str, str]) -> Row:
    numbers = {name: float(cells[name]) for name in ("total", *PHASES)}
    memory = float(cells["peak_mib"]) if cells["peak_mib"] else None
    return Row(cells["contender"], int(cells["num_steps"]), rounds=int(cells["rounds"]), peak_mib=memory, **numbers)


def table(rows: list[Row]) -> str:
    """Rows of one horizon as text; the ratio is to TRL's RLOO where it ran, else to the first row."""
    unit = next((row for row in rows if row.contender == RLOO), rows[0])
    lines = [
        f"{'T=' + str(unit.num_steps):<30} {'seconds':>8} {'/ ' + unit.contender:>10} {'generation':>11} "
        f"{'cotangents':>11} {'gradient':>9} {'peak MiB':>9} {'rounds':>7}"
    ]
    for row in rows:
        memory = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        lines.append(
            f"{row.contender:<30} {row.total:>8.2f} {row.total / unit.total:>10.2f} {row.generation:>11.2f} "
            f"{row.cotangents:>11.2f} {row.gradient:>9.2f} {memory:>9} {row.rounds:>7}"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Seconds by horizon, where they go at the one with most contenders, and memory where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    has_memory = any(row.peak_mib is not None for row in rows)
    figure, axes = plt.subplots(1, 2 + has_memory, figsize=(11 + 5 * has_memory, 5), layout="constrained")
    names = [name for name in CONTENDERS if any(row.contender == name for row in rows)]
    colours = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))
    for name in names:
        own = sorted((row for row in rows if row.contender == name), key=lambda row: row.num_steps)
        style = {"color": colours[name], "marker": "o", "linewidth": 2.5 if name in (FLOOR, RLOO) else 1.2}
        axes[0].plot([row.num_steps for row in own], [row.total for row in own], label=name, **style)
        if has_memory:
            known = [row for row in own if row.peak_mib is not None]
            axes[2].plot([row.num_steps for row in known], [row.peak_mib for row in known], **style)
    for axis, title in zip((axes[0], *axes[2:]), ("seconds a step", "peak memory of a step, MiB"), strict=False):
        axis.set(title=title, xlabel="T, tokens", xscale="log", yscale="log")
        axis.set_xticks(sorted({row.num_steps for row in rows}), sorted({row.num_steps for row in rows}), minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    counts = Counter(row.num_steps for row in rows)
    fullest = max(counts, key=lambda num_steps: (counts[num_steps], num_steps))
    shown = [row for row in rows if row.num_steps == fullest and row.contender not in NAIVE]
    start = [0.0] * len(shown)
    for phase in PHASES:
        widths = [getattr(row, phase) for row in shown]
        axes[1].barh([row.contender for row in shown], widths, left=start, label=phase)
        start = [left + width for left, width in zip(start, widths, strict=True)]
    axes[1].invert_yaxis()
    axes[1].set(title=f"where the seconds go at T={fullest}", xlabel="seconds")
    axes[1].legend()
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
