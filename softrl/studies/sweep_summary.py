"""A sweep's trials as a table: seeds are folded to a mean and its standard error, settings compared seed by seed.

Left out: corrections for the number of comparisons; that of the table's rows is up to who reads it.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softrl.assets import write_atomically
from softrl.studies.html import mean_and_error, number, with_error
from softrl.studies.sweep import SEED, Search, Trial
from softrl.studies.sweep_launch import Values
from softrl.studies.sweep_question import Question

Pair = tuple[float, float]  # mean over seeds, its standard error


@dataclass(frozen=True)
class Setting:
    """One setting's trials, folded.

    Attributes:
        values: its keys, without the seed.
        metrics: by seed.
        failed: trials that did.
        metric: mean and standard error.
        difference: to the baseline, over the seeds that both have.
        pairs: how many these are; 0 for the baseline itself, or where there is none.
        better: in how many of them this setting is the better one.
        columns: further numbers by name.
        seconds: mean of a trial.
    """

    values: Values
    metrics: dict[Any, float]
    failed: int
    metric: Pair
    difference: Pair
    pairs: int
    better: int
    columns: dict[str, Pair]
    seconds: float

    @property
    def differs(self) -> bool:
        """By more than two standard errors."""
        mean, error = self.difference
        return abs(mean) > 2.0 * error  # False where either is NaN


def settings(question: Question, trials: Sequence[Trial]) -> list[Setting]:
    """In the grid's order, whatever the order of running; those that only earlier commands ran come last."""
    grid = [Trial(values, None, math.nan) for values in question.search().grid()]
    groups: dict[str, list[Trial]] = {_name(trial.values): [] for trial in question.shown(grid)}
    for trial in question.shown(trials):
        groups.setdefault(_name(trial.values), []).append(trial)
    by_seed = {
        name: {t.values.get(SEED): t.metric for t in group if t.metric is not None} for name, group in groups.items()
    }
    folded = []
    for name, group in groups.items():
        if group:
            other = _baseline(question, group[0].values, groups)
            folded.append(_folded(question, group, by_seed[name], by_seed.get(other or "", {})))
    return folded


def _name(values: Values) -> str:
    return repr(sorted((key, value) for key, value in values.items() if key != SEED and value is not None))


def _baseline(question: Question, values: Values, groups: dict[str, list[Trial]]) -> str | None:
    """The setting that one is compared with: equal in all keys but the baseline's, or without a value there."""
    if not question.report.baseline:
        return None
    wanted = {**{key: value for key, value in values.items() if key != SEED}, **question.report.baseline}
    if _name(wanted) in groups:
        found = [_name(wanted)]
    else:  # of an arm that leaves keys as the recipe has them, whatever they are elsewhere
        candidates = {name: group[0].values for name, group in groups.items() if group}
        found = [
            name for name, of in candidates.items()
            if all(of.get(key) == value for key, value in question.report.baseline.items())
            and all(of.get(key) in (None, value) for key, value in wanted.items())
        ]  # fmt: skip
    return found[0] if len(found) == 1 and found[0] != _name(values) else None


def _folded(question: Question, group: list[Trial], mine: dict[Any, float], other: dict[Any, float]) -> Setting:
    sign = 1.0 if question.direction == "maximize" else -1.0
    differences = [mine[seed] - other[seed] for seed in mine if seed in other]
    numbers = [trial.numbers for trial in group if trial.metric is not None]
    columns = {
        name: mean_and_error(each[name] for each in numbers if math.isfinite(each.get(name, math.nan)))
        for name in question.columns
    }
    return Setting(
        {key: value for key, value in group[0].values.items() if key != SEED}, mine, len(group) - len(numbers),
        mean_and_error(mine.values()), mean_and_error(differences), len(differences),
        sum(sign * difference > 0.0 for difference in differences), columns,
        mean_and_error(trial.seconds for trial in group if trial.metric is not None)[0],
    )  # fmt: skip


def word(value: Any) -> str:
    """A value as YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def baseline_words(question: Question) -> str:
    """What settings are compared with; a label speaks for itself."""
    return ", ".join(
        str(value) if isinstance(value, str) else f"{key}={word(value)}"
        for key, value in question.report.baseline.items()
    )


def header(question: Question) -> list[str]:
    """Of the table's columns."""
    keys = question.keys
    compared = [f"difference to {baseline_words(question)}", "better"] if question.report.baseline else []
    return [*keys, "n", question.metric, *compared, *question.columns.values(), "seconds"]


def cells(question: Question, row: Setting) -> list[str]:
    """One row of the table."""
    keys = [word(row.values.get(key)) for key in question.keys]
    count = f"{len(row.metrics)}" + (f" ({row.failed} failed)" if row.failed else "")
    decimals = _decimals(row.metric[0])
    compared = [with_error(*row.difference, signed=True, decimals=decimals), _better(row)]
    shown = [_column(*pair) for pair in row.columns.values()]
    metric = with_error(*row.metric, decimals=decimals)
    return [*keys, count, metric, *(compared if question.report.baseline else []), *shown, number(row.seconds)]


def _better(row: Setting) -> str:
    return f"{row.better} of {row.pairs}" if row.pairs else ""


def _column(mean: float, error: float) -> str:
    if mean == int(mean) if math.isfinite(mean) else False:
        return f"{int(mean):,}"  # a count, the same for all seeds
    return with_error(mean, error, decimals=_decimals(mean))


def _decimals(value: float) -> int:
    """Four significant digits, at most six decimals."""
    if not math.isfinite(value) or value == 0.0:
        return 4
    return min(max(3 - math.floor(math.log10(abs(value))), 0), 6)


def findings(question: Question, rows: Sequence[Setting]) -> list[str]:
    """Settings that differ from the baseline by more than two standard errors, in words."""
    lines = []
    for row in rows:
        if not row.differs:
            continue
        label = ", ".join(f"{key}={word(value)}" for key, value in row.values.items() if value is not None)
        verdict = "better" if (row.difference[0] > 0.0) == (question.direction == "maximize") else "worse"
        size = with_error(abs(row.difference[0]), row.difference[1], decimals=_decimals(row.metric[0]))
        lines.append(f"{label}: {verdict} than the baseline by {size} ({row.better} of {row.pairs} seeds better).")
    if lines or not question.report.baseline:
        return lines
    if all(row.pairs < 2 for row in rows):
        return ["With one seed there is no standard error by which to tell a difference from chance."]
    return ["No setting differs from the baseline by more than two standard errors."]


def write_results(search: Search, trials: Sequence[Trial], path: Path, others: Iterable[str] = ()) -> None:
    """A row for each trial: its keys, the metric, and the other numbers that are named."""
    further = [name for name in dict.fromkeys(others) if name != search.metric]
    rows = []
    for trial in trials:
        numbers = [trial.metric, *(trial.numbers.get(name) for name in further)]
        state = "failed" if trial.metric is None else "finished"
        shown = [word(trial.values.get(key)) for key in search.keys]
        digits = ["" if value is None else f"{value:.6g}" for value in numbers]
        rows.append([*shown, *digits, f"{trial.seconds:.3g}", state])
    _write_rows(path, [*search.keys, search.metric, *further, "seconds", "state"], rows)


def write_summary(question: Question, rows: Sequence[Setting], folder: Path) -> None:
    """summary.csv with all digits, and summary.md, a row for each setting."""
    keys = question.keys
    pairs = [name for column in question.columns for name in (column, f"{column}_se")]
    names = [*keys, "n", "failed", question.metric, f"{question.metric}_se", "difference", "difference_se", "pairs",
             "better", *pairs, "seconds"]  # fmt: skip
    full = [
        [*(word(row.values.get(key)) for key in keys), len(row.metrics), row.failed,
         *map(_digits, (*row.metric, *row.difference)), row.pairs, row.better,
         *(_digits(value) for pair in row.columns.values() for value in pair), _digits(row.seconds)]
        for row in rows
    ]  # fmt: skip
    _write_rows(folder / "summary.csv", names, full)
    lines = [_markdown(header(question)), "|" + "---|" * len(header(question))]
    lines += [_markdown(cells(question, row)) for row in rows]
    with write_atomically(folder / "summary.md") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _digits(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.7g}"


def _markdown(words: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in words) + " |"


def _write_rows(path: Path, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with write_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)
