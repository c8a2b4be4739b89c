"""Grids and searches over the keys of any recipe, on optuna: what is missing is run, what failed is tried again.

What a trial does is the caller's: a function of the chosen values to a number. Left out: pruning of running trials,
and several objectives.
"""

import csv
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from softrl.assets import write_atomically

SAMPLERS = ("grid", "random", "tpe")
Values = dict[str, Any]


class TrialError(RuntimeError):
    """A trial did not reach its metric; the others go on."""


@dataclass(frozen=True)
class Axis:
    """One key of a recipe and the values that it takes."""

    key: str
    values: tuple[Any, ...]

    @classmethod
    def parsed(cls, text: str) -> "Axis":
        """From `key=value,value`; values are read as YAML would.

        Raises:
            ValueError: no `=`, no value, one that is neither number, word, bool nor null, or one that comes twice.
        """
        key, found, values = text.partition("=")
        if not found or not key or not values:
            raise ValueError(f"--grid {text!r}: expected key=value,value,...")
        parsed = tuple(yaml.safe_load(value) for value in values.split(","))
        if any(isinstance(value, list | dict) for value in parsed) or len(set(parsed)) < len(parsed):
            raise ValueError(f"--grid {text!r}: values must be different numbers, words, true, false or null")
        return cls(key.strip(), parsed)


@dataclass(frozen=True)
class Search:
    """What is searched for.

    Args:
        axes: keys and their values.
        metric: name of the objective, for tables and figures.
        maximize: or minimise.
        sampler: one of SAMPLERS.
        trials: how many in all, those of earlier runs included; None for the whole grid.
        seed: of random and tpe.
    Raises:
        ValueError: an unknown sampler, a key that comes twice, random or tpe without a number of trials.
    """

    axes: tuple[Axis, ...]
    metric: str
    maximize: bool = False
    sampler: str = "grid"
    trials: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"--sampler must be one of {SAMPLERS}, got {self.sampler!r}")
        keys = [axis.key for axis in self.axes]
        if not keys or len(set(keys)) < len(keys):
            raise ValueError(f"--grid: needs one or more different keys, got {keys}")
        if self.trials is None and self.sampler != "grid":
            raise ValueError(f"--sampler {self.sampler} needs --trials")
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"--trials must be at least 1, got {self.trials}")

    def grid(self) -> list[Values]:
        """Every combination, at most `trials` of them."""
        keys = [axis.key for axis in self.axes]
        every = itertools.product(*(axis.values for axis in self.axes))
        return [dict(zip(keys, values, strict=True)) for values in every][: self.trials]


@dataclass(frozen=True)
class Trial:
    """A finished trial: its values, its metric (None if it failed) and how long it took."""

    values: Values
    metric: float | None
    seconds: float


def sweep(search: Search, objective: Callable[[Values], float], folder: Path) -> list[Trial]:
    """Run what is missing; the journal, the table and the figure lie in the folder.

    Args:
        search: keys, values, metric.
        objective: runs a trial; a TrialError marks it as failed, anything else ends the sweep.
        folder: a rerun with the same one goes on.
    Returns:
        Every trial of the search that finished or failed last, in order of running.
    Raises:
        ValueError: the folder holds a sweep of other keys, metric or direction.
    """
    import optuna

    study = _study(search, folder)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # of a run that was interrupted
    left = _enqueue(search, study)

    def run(trial: Any) -> float:
        return objective({axis.key: trial.suggest_categorical(axis.key, axis.values) for axis in search.axes})

    with tqdm(total=left, desc="sweep", unit="trial", disable=None) as bar:
        study.optimize(run, n_trials=left, catch=(TrialError,), callbacks=[lambda *_: bar.update()]) if left else None
    trials = _trials(search, study)
    write_results(search, trials, folder)
    return trials


def _study(search: Search, folder: Path) -> Any:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    samplers = {
        "grid": optuna.samplers.RandomSampler(search.seed),  # never asked: the grid is enqueued
        "random": optuna.samplers.RandomSampler(search.seed),
        "tpe": optuna.samplers.TPESampler(seed=search.seed),
    }
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "trials.log"))), sampler=samplers[search.sampler],
        study_name="softrl sweep", direction="maximize" if search.maximize else "minimize", load_if_exists=True,
    )  # fmt: skip
    known = {"metric": search.metric, "keys": sorted(axis.key for axis in search.axes), "maximize": search.maximize}
    before = study.user_attrs.get("search")
    if before not in (None, known):
        raise ValueError(f"{folder} holds a sweep with {before}, this one has {known}; choose another --output_dir")
    study.set_user_attr("search", known)
    return study


def _enqueue(search: Search, study: Any) -> int:
    """How many trials are left; those of a grid are put in line."""
    from optuna.trial import TrialState

    complete = [trial.params for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    if search.sampler != "grid":
        assert search.trials is not None
        return max(search.trials - len(complete), 0)
    line = [trial.system_attrs.get("fixed_params") for trial in waiting]
    for values in search.grid():
        if values not in complete and values not in line:
            study.enqueue_trial(values)
            line.append(values)
    return len(line)


def _trials(search: Search, study: Any) -> list[Trial]:
    """By values: the last that finished, else the last that failed."""
    from optuna.trial import TrialState

    kept: dict[str, Trial] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL, TrialState.COMPLETE)):
        name, failed = repr(sorted(trial.params.items())), trial.state == TrialState.FAIL
        if set(trial.params) != {axis.key for axis in search.axes} or (failed and name in kept):
            continue
        seconds = trial.duration.total_seconds() if trial.duration is not None else float("nan")
        kept.pop(name, None)
        kept[name] = Trial(dict(trial.params), None if failed else trial.value, seconds)
    return list(kept.values())


def best(search: Search, trials: Sequence[Trial]) -> Trial | None:
    """The one with the best metric, if any finished."""
    known = [trial for trial in trials if trial.metric is not None]
    sign = -1.0 if search.maximize else 1.0
    return min(known, key=lambda trial: sign * (trial.metric or 0.0)) if known else None


def write_results(search: Search, trials: Sequence[Trial], folder: Path) -> None:
    """results.csv, and sweep.png if any trial finished."""
    keys = [axis.key for axis in search.axes]
    with write_atomically(folder / "results.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*keys, search.metric, "seconds", "state"])
        for trial in trials:
            cells = ["" if trial.metric is None else f"{trial.metric:.6g}", f"{trial.seconds:.3g}"]
            state = "failed" if trial.metric is None else "finished"
            writer.writerow([*(_word(trial.values[key]) for key in keys), *cells, state])
    if best(search, trials) is not None:
        _plot(search, [trial for trial in trials if trial.metric is not None], folder / "sweep.png")


def _word(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _plot(search: Search, trials: Sequence[Trial], path: Path) -> None:
    """The metric against each key: a dot a trial, and the mean over the other keys."""
    from softrl.studies.variance_style import png, pyplot

    count = len(search.axes)
    figure, axes = pyplot().subplots(1, count, figsize=(4.6 * count, 4.0), layout="constrained", squeeze=False)
    for panel, axis in zip(axes[0], search.axes, strict=True):
        values = sorted({trial.values[axis.key] for trial in trials}, key=lambda v: (isinstance(v, str), v is None, v))
        places = {value: place for place, value in enumerate(values)}
        panel.plot([places[trial.values[axis.key]] for trial in trials], [trial.metric for trial in trials], "o",
                   color="#0072B2", alpha=0.6, label="a trial")  # fmt: skip
        of_value = {value: [t.metric or 0.0 for t in trials if t.values[axis.key] == value] for value in values}
        means = [sum(metrics) / len(metrics) for metrics in of_value.values()]
        panel.plot(range(len(values)), means, "-", color="#D55E00", label="mean over the other keys")
        panel.set_xticks(range(len(values)), [_word(value) for value in values])
        panel.set(xlabel=axis.key, ylabel=search.metric)
        panel.grid(alpha=0.25)
    axes[0][0].legend(fontsize=8)
    with write_atomically(path) as temporary:
        temporary.write_bytes(png(figure))
