"""Numbers of `softrl thoughts compare`: means over seeds, differences seed by seed, and who gets there first."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from softrl.studies.html import mean_and_error

Record = dict[str, Any]
Point = dict[str, Any]


@dataclass(frozen=True)
class MethodRow:
    """One method's last evaluations; pairs are a mean over seeds and its standard error.

    Attributes:
        nll, base_nll: of true tokens with and without thoughts, nats.
        accuracy: the true token is the likeliest.
        against: NLL less that of the reference, seed by seed.
        steps, thoughts: of a run, the median over seeds.
        seconds_to_target, thoughts_to_target: of training until the NLL first was below the study's target, the median
            over seeds; None where the median seed never got there. `reached` counts those that did.
    """

    method: str
    is_control: bool
    seeds: int
    failed: int
    nll: tuple[float, float]
    base_nll: tuple[float, float]
    accuracy: tuple[float, float]
    against: tuple[float, float]
    mixing: float
    steps: int
    thoughts: int
    reached: int
    seconds_to_target: float | None
    thoughts_to_target: float | None


def method_rows(records: list[Record], reference: str, target_nll: float | None) -> list[MethodRow]:
    """A row for every method that has been run, in the order of the records."""
    names = dict.fromkeys(record["method"] for record in records)
    of_reference = {
        record["seed"]: last(record)["nll"] for record in finished(records) if record["method"] == reference
    }
    return [_row(name, [r for r in records if r["method"] == name], of_reference, target_nll) for name in names]


def finished(records: list[Record]) -> list[Record]:
    """Runs that ended as they should."""
    return [record for record in records if record["status"] == "done"]


def last(record: Record) -> Point:
    """A run's last evaluation."""
    return record["points"][-1]


def _row(name: str, records: list[Record], of_reference: dict[int, float], target: float | None) -> MethodRow:
    done = finished(records)
    points = [last(record) for record in done]
    pairs = [last(record)["nll"] - of_reference[record["seed"]] for record in done if record["seed"] in of_reference]
    hits = [first_below(record, target) for record in done]
    return MethodRow(
        name, bool(records[0]["control"]), len(done), len(records) - len(done),
        _over_seeds(points, "nll"), _over_seeds(points, "base_nll"), _over_seeds(points, "accuracy"),
        mean_and_error(pairs), mean_and_error(point["mixing"] for point in points)[0],
        round(_median(points, "step")), round(_median(points, "thoughts")),
        sum(hit is not None for hit in hits), _median_to_target(hits, "seconds"), _median_to_target(hits, "thoughts"),
    )  # fmt: skip


def _over_seeds(points: list[Point], name: str) -> tuple[float, float]:
    return mean_and_error(point[name] for point in points)


def _median(points: list[Point], name: str) -> float:
    return median(point[name] for point in points) if points else 0.0


def first_below(record: Record, target_nll: float | None) -> Point | None:
    """The first evaluation whose NLL is below the target; None without a target, or where none is."""
    if target_nll is None:
        return None
    return next((point for point in record["points"] if point["nll"] < target_nll), None)


def _median_to_target(hits: list[Point | None], name: str) -> float | None:
    """The median over seeds, those that never got there counted as infinite."""
    if not hits:
        return None
    value = median(math.inf if hit is None else hit[name] for hit in hits)
    return value if math.isfinite(value) else None


def mean_curve(
    records: list[Record], x: Callable[[Point], float], y: Callable[[Point], float]
) -> tuple[list[float], list[float], list[float]]:
    """Mean and standard error over runs of their n-th evaluations, as far as all have one: x, y, error."""
    length = min(len(record["points"]) for record in records)
    rows = [[record["points"][index] for record in records] for index in range(length)]
    found = [mean_and_error(y(point) for point in row) for row in rows]
    return [sum(map(x, row)) / len(row) for row in rows], [mean for mean, _ in found], [error for _, error in found]


def group_rows(records: list[Record]) -> list[tuple[str, str, tuple[float, float], tuple[float, float]]]:
    """Method, difficulty, NLL and accuracy at the last evaluation, where the task has difficulties."""
    done = finished(records)
    rows = []
    for name in dict.fromkeys(record["method"] for record in done):
        runs = [last(record)["groups"] for record in done if record["method"] == name]
        for group in runs[0]:
            rows.append((name, group, _over_seeds([run[group] for run in runs], "nll"),
                         _over_seeds([run[group] for run in runs], "accuracy")))  # fmt: skip
    return rows
