"""What the records of `softrl compare` say: rows, changes with their standard errors, values at equal KL.

Numbers in, numbers out: nothing is trained or drawn here.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from softrl.studies.html import mean_and_error
from softrl.studies.report import paired_change

Record = dict[str, Any]
Point = dict[str, Any]
METRICS = ("reward", "judge")


@dataclass(frozen=True)
class Row:
    """One evaluation of one run; changes are from the same run's start, paired by prompt, with standard errors."""

    stage: str
    method: str
    trainer: str
    beta: float
    seed: int
    learning_rate: float
    status: str
    step: int | None = None
    samples: int | None = None
    reward_calls: int | None = None
    seconds: float | None = None
    evaluation_seconds: float | None = None
    reward: float | None = None
    reward_change: float | None = None
    reward_change_se: float | None = None
    judge: float | None = None
    judge_change: float | None = None
    judge_change_se: float | None = None
    kl_completion_nats: float | None = None
    kl_token_nats: float | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    base_perplexity: float | None = None
    mean_length_tokens: float | None = None
    scores: dict[str, float] = field(default_factory=dict)


def rows_of(records: list[Record]) -> list[Row]:
    """A row for each run and evaluation; one without numbers for a run that failed before its first."""
    return [row for record in records for row in _rows_of_run(record)]


def _rows_of_run(record: Record) -> list[Row]:
    of_run: dict[str, Any] = {
        key: record[key] for key in ("stage", "method", "trainer", "beta", "seed", "learning_rate", "status")
    }
    if not record["points"]:
        return [Row(**of_run)]
    return [
        Row(
            **of_run, step=point["step"], samples=point["samples"], reward_calls=point["reward_calls"],
            seconds=point["seconds"], evaluation_seconds=point["evaluation_seconds"],
            reward=point["reward"], judge=point.get("judge"), **_changes(record, point),
            kl_completion_nats=point["kl_completion"], kl_token_nats=point["kl"], distinct_1=point["distinct_1"],
            distinct_2=point["distinct_2"], base_perplexity=point["base_perplexity"],
            mean_length_tokens=point["completions/mean_length"], scores=point.get("scores", {}),
        )
        for point in record["points"]
    ]  # fmt: skip


def _changes(record: Record, point: Point) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for metric in METRICS:
        if point.get(metric) is not None:
            change, error = change_by_prompt(record, point, metric)
            changes |= {f"{metric}_change": change, f"{metric}_change_se": error}
    return changes


def change_by_prompt(record: Record, point: Point, metric: str) -> tuple[float, float]:
    """Change of `reward` or `judge` from a run's start to a point, and its standard error over paired prompts."""
    key = "rewards_by_prompt" if metric == "reward" else "judge_by_prompt"
    return paired_change(record["points"][0][key], point[key])


def finished(records: Iterable[Record], stage: str = "main") -> list[Record]:
    """The runs of a stage that ended well; those that failed are shown, and counted, but not averaged."""
    return [record for record in records if record["stage"] == stage and record["status"] == "done"]


@dataclass(frozen=True)
class Change:
    """A mean change over seeds.

    Args:
        mean: over seeds.
        error: standard error over seeds; over prompts where there is one seed.
        prompt_error: standard error of the mean from the prompts of each seed alone.
        z: mean over the larger error; few seeds may agree by chance, and all share their prompts.
    """

    mean: float
    error: float
    prompt_error: float

    @property
    def z(self) -> float:
        larger = max(self.error, self.prompt_error)
        return self.mean / larger if larger > 0 else math.nan

    @staticmethod
    def of(records: list[Record], metric: str) -> "Change | None":
        """That of runs that differ in their seeds, from their starts to their ends; None if it was not measured."""
        if not records or any(record["points"][-1].get(metric) is None for record in records):
            return None
        pairs = [change_by_prompt(record, record["points"][-1], metric) for record in records]
        mean, error = mean_and_error(change for change, _ in pairs)
        prompt_error = math.sqrt(sum(each**2 for _, each in pairs)) / len(pairs)
        return Change(mean, prompt_error if len(pairs) == 1 else error, prompt_error)


@dataclass(frozen=True)
class Final:
    """The ends of a method's runs at one KL weight."""

    method: str
    beta: float
    learning_rate: float
    seeds: int
    failed: int
    reward: Change | None
    judge: Change | None
    means: dict[str, tuple[float, float]]  # a metric's mean and standard error over seeds


_AT_THE_END = ("kl_completion", "distinct_2", "base_perplexity", "samples", "seconds", "completions/mean_length")


def finals(records: list[Record]) -> list[Final]:
    """One for each method and KL weight, in the order of the records."""
    result = []
    main = [record for record in records if record["stage"] == "main"]
    for method, beta in sorted_cells(main):
        here = [record for record in main if (record["method"], record["beta"]) == (method, beta)]
        done = finished(here)
        means = {key: mean_and_error(record["points"][-1][key] for record in done) for key in _AT_THE_END}
        means["seconds_a_rollout"] = mean_and_error(
            record["points"][-1]["seconds"] * record["samples_a_rollout"] / record["points"][-1]["samples"]
            for record in done
        )
        changes = {metric: Change.of(done, metric) for metric in METRICS}
        result.append(
            Final(method, beta, here[0]["learning_rate"], len(done), len(here) - len(done), **changes, means=means)
        )
    return result


@dataclass(frozen=True)
class ScoreChange:
    """A further measure of a method's held-out texts at one KL weight: mean and standard error over seeds."""

    method: str
    beta: float
    name: str
    start: tuple[float, float]
    end: tuple[float, float]
    change: tuple[float, float]


def score_changes(records: list[Record]) -> list[ScoreChange]:
    """Scores of `eval_metrics` and single rewards, from the starts of finished runs to their ends."""
    changes = []
    done = finished(records)
    for method, beta in sorted_cells(done):
        here = [record for record in done if (record["method"], record["beta"]) == (method, beta)]
        pairs = [[record["points"][place].get("scores", {}) for record in here] for place in (0, -1)]
        for name in pairs[0][0]:
            start, end = ([scores[name] for scores in of_place] for of_place in pairs)
            differences = [after - before for before, after in zip(start, end, strict=True)]
            changes.append(ScoreChange(method, beta, name, *map(mean_and_error, (start, end, differences))))
    return changes


def sorted_cells(records: list[Record]) -> list[tuple[str, float]]:
    """Methods in the order in which they come, each with its KL weights in rising order."""
    methods = dict.fromkeys(record["method"] for record in records)
    cells = {(record["method"], record["beta"]) for record in records}
    return [cell for method in methods for cell in sorted(cells) if cell[0] == method]


# At equal KL


def at(points: list[Point], key: str, level: float, metric: str) -> float | None:
    """A metric where a run first passes a KL per completion, or a number of seconds.

    Linear between its evaluations; None if it does not get there, or the metric was not measured.
    """
    for before, after in itertools.pairwise(points):
        low = before[key] if before["step"] else 0.0  # a KL starts at zero up to rounding
        high = after[key]
        if low <= level <= high and high > low and after.get(metric) is not None:
            share = (level - low) / (high - low)
            return float(before[metric] + share * (after[metric] - before[metric]))
    return None


def mean_at_kl(records: list[Record], kl_nats: float, metric: str) -> tuple[float, float, int]:
    """Mean over seeds, standard error and number of the seeds that reach a KL.

    Several runs of a seed, with different KL weights, are averaged first: they share their random numbers.
    """
    by_seed: dict[int, list[float]] = {}
    for record in records:
        value = at(record["points"], "kl_completion", kl_nats, metric)
        if value is not None:
            by_seed.setdefault(record["seed"], []).append(value)
    mean, error = mean_and_error(sum(values) / len(values) for values in by_seed.values())
    return mean, error, len(by_seed)


# Differences from another method's run with the same seed and KL weight


def at_equal_samples(run: Record, other: Record, metric: str) -> float | None:
    """Difference at the last evaluation after which both have drawn the same number of samples."""
    others = {point["samples"]: point for point in other["points"]}
    shared = [(point, others[point["samples"]]) for point in run["points"] if point["samples"] in others]
    mine, theirs = shared[-1]
    return None if mine.get(metric) is None else mine[metric] - theirs[metric]


def at_equal_seconds(run: Record, other: Record, metric: str) -> float | None:
    """Difference after as many seconds of training as the shorter run has, linear between evaluations."""
    seconds = min(each["points"][-1]["seconds"] for each in (run, other))
    mine, theirs = (at(each["points"], "seconds", seconds, metric) for each in (run, other))
    return None if mine is None or theirs is None else mine - theirs


def at_equal_kl(run: Record, other: Record, metric: str, kl_nats: float) -> float | None:
    """Difference where each first passes a KL; None if either does not."""
    mine, theirs = (at(each["points"], "kl_completion", kl_nats, metric) for each in (run, other))
    return None if mine is None or theirs is None else mine - theirs


def difference(
    records: list[Record], reference: list[Record], between: Callable[[Record, Record], float | None]
) -> tuple[float, float, int]:
    """Mean over seeds of a method's runs less the reference's, its standard error, and the number of seeds.

    Runs are paired by seed, which gives them the same prompts and random streams, and by KL weight; the pairs of a
    seed are averaged first.
    """
    others = {(record["seed"], record["beta"]): record for record in reference}
    by_seed: dict[int, list[float]] = {}
    for record in records:
        other = others.get((record["seed"], record["beta"]))
        value = None if other is None else between(record, other)
        if value is not None:
            by_seed.setdefault(record["seed"], []).append(value)
    mean, error = mean_and_error(sum(values) / len(values) for values in by_seed.values())
    return mean, error, len(by_seed)


# Curves


def mean_curve(records: list[Record], metric: str) -> list[dict[str, float]]:
    """Mean and standard error over seeds of a metric at the evaluations that all runs of a method and weight have."""
    if not records:
        return []
    shared = min((record["points"] for record in records), key=len)
    curve = []
    for index, point in enumerate(shared):
        here = [record["points"][index] for record in records]
        if any(each["samples"] != point["samples"] or each.get(metric) is None for each in here):
            break
        mean, error = mean_and_error(each[metric] for each in here)
        seconds, _ = mean_and_error(each["seconds"] for each in here)
        curve.append({"samples": point["samples"], "seconds": seconds, "mean": mean, "error": error})
    return curve


def curve_beta(records: list[Record]) -> float:
    """The KL weight that learning curves are shown at: the one with most runs, of equals the middle one."""
    counts: dict[float, int] = {}
    for record in records:
        counts[record["beta"]] = counts.get(record["beta"], 0) + 1
    most = sorted(beta for beta, count in counts.items() if count == max(counts.values()))
    return most[len(most) // 2]
