"""Grids and searches over the keys of any recipe, on optuna: what is missing is run, what failed is tried again.

What a trial does is the caller's: a function of the chosen values to its numbers, run by a launcher, here, in threads
that wait for processes, or as jobs of a cluster. Left out: pruning of running trials, and several objectives.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from softrl.studies.sweep_launch import Here, Job, Launcher, TrialError, Values
from softrl.studies.sweep_record import Source, continued
from softrl.studies.sweep_values import comparable, is_number, read_values

SAMPLERS = ("grid", "random", "tpe")
ARM, SEED = "arm", "seed"  # keys of a trial's values: the arm's label, and what results are averaged over
Outcome = float | Mapping[str, float]  # the metric alone, or all of a trial's numbers


@dataclass(frozen=True)
class Axis:
    """One key of a recipe and the values that it takes."""

    key: str
    values: tuple[Any, ...]

    @classmethod
    def parsed(cls, text: str, option: str = "--grid") -> "Axis":
        """From `key=value,value`; values are read as YAML would, and `1e4` as a number.

        Raises:
            ValueError: no `=`, no value, one that is neither number, word, bool nor null, or one that comes twice.
        """
        key, found, values = text.partition("=")
        if not found or not key or not values:
            raise ValueError(f"{option} {text!r}: expected key=value,value,...")
        return cls.of(key.strip(), [read_values(value) for value in values.split(",")], f"{option} {text!r}")

    @classmethod
    def of(cls, key: str, values: Sequence[Any], where: str) -> "Axis":
        """From a list of values.

        Raises:
            ValueError: none, one that is neither number, word, bool nor null, or one that comes twice.
        """
        plain = not any(isinstance(value, list | dict) for value in values)
        if not values or not plain or len(set(values)) < len(values):
            raise ValueError(f"{where}: values must be different numbers, words, true, false or null")
        return cls(key, tuple(values))


@dataclass(frozen=True)
class Arm:
    """One side of a comparison whose sides differ in more than one key.

    Args:
        label: what tables and figures call it.
        fixed: keys with one value, which are not shown.
        axes: its own, instead of the search's of the same key.
    """

    label: str
    fixed: Values = field(default_factory=dict)
    axes: tuple[Axis, ...] = ()


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
        arms: each is crossed with the axes; none is one arm without a label.
        fixed: keys that all trials set alike.
        only_arms: labels of those to run; None for all.
        together: keys that take their value from one that stands for all of them; where that is null they may have
            their own.
    Raises:
        ValueError: an unknown sampler or arm, a key or a label that comes twice, a key that is set beside one that
            stands for it, random or tpe without a number of trials or with arms.
    """

    axes: tuple[Axis, ...]
    metric: str
    maximize: bool = False
    sampler: str = "grid"
    trials: int | None = None
    seed: int = 0
    arms: tuple[Arm, ...] = ()
    fixed: Values = field(default_factory=dict)
    only_arms: tuple[str, ...] | None = None
    together: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"--sampler must be one of {SAMPLERS}, got {self.sampler!r}")
        keys, labels = [axis.key for axis in self.axes], [arm.label for arm in self.arms]
        if not (keys or labels) or len(set(keys)) < len(keys):
            raise ValueError(f"--grid: needs one or more different keys, got {keys}")
        if len(set(labels)) < len(labels):
            raise ValueError(f"arms must have different labels, got {labels}")
        if unknown := set(self.only_arms or ()) - set(labels):
            raise ValueError(f"--arms: there is no {sorted(unknown)}, there are {labels}")
        if self.sampler != "grid" and (self.trials is None or self.arms):
            raise ValueError(f"--sampler {self.sampler} needs --trials, and has no use for arms")
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"--trials must be at least 1, got {self.trials}")
        for arm in self.arms or (None,):
            self._check_together(arm)

    def _check_together(self, arm: Arm | None) -> None:
        named: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in self.fixed.items()}
        named |= {key: (value,) for key, value in (arm.fixed if arm else {}).items()}
        named |= {axis.key: axis.values for axis in self._axes_of(arm)}
        used = [key for key in self.together if any(value is not None for value in named.get(key, ()))]
        owner: dict[str, str] = {}
        for key, member in [(each, member) for each in used for member in self.together[each]]:
            other = member if member != key and member in named else owner.setdefault(member, key)
            if other != key:
                also = "given" if other == member else f"set by {other!r}"
                raise ValueError(
                    f"{key!r} sets {member!r} (together: {list(self.together[key])}), which is {also} as well"
                    f"{f' in arm {arm.label!r}' if arm else ''}; leave out {key!r} or {other!r}"
                )

    @property
    def keys(self) -> list[str]:
        """Of a trial's values, as tables show them: the arm first, the seed last."""
        own = [axis.key for arm in self.arms for axis in arm.axes]
        keys = dict.fromkeys([axis.key for axis in self.axes] + own)
        return [*([ARM] if self.arms else []), *(k for k in keys if k != SEED), *(k for k in keys if k == SEED)]

    def grid(self) -> list[Values]:
        """Every combination, at most `trials` of them; all settings with one seed come before the next seed's."""
        wanted = [arm for arm in self.arms if self.only_arms is None or arm.label in self.only_arms]
        every = [values for arm in wanted or (None,) for values in self._of_arm(arm)]
        seeds = list(dict.fromkeys(values.get(SEED) for values in every))
        return sorted(every, key=lambda values: seeds.index(values.get(SEED)))[: self.trials]

    def every(self) -> list[Values]:
        """The whole grid, which is what another sampler draws from."""
        return replace(self, sampler="grid", trials=None).grid()

    def _of_arm(self, arm: Arm | None) -> Iterator[Values]:
        axes = self._axes_of(arm)
        label = {ARM: arm.label} if arm else {}
        for values in itertools.product(*(axis.values for axis in axes)):
            yield {**label, **dict(zip([axis.key for axis in axes], values, strict=True))}

    def _axes_of(self, arm: Arm | None) -> list[Axis]:
        own = {axis.key: axis for axis in (arm.axes if arm else ())}
        return [own.pop(axis.key, axis) for axis in self.axes] + list(own.values())

    def given(self, values: Values) -> Values:
        """All keys that a trial sets: those of all trials, its arm's, its own."""
        of_arm = next((arm.fixed for arm in self.arms if arm.label == values.get(ARM)), {})
        named = {**self.fixed, **of_arm, **{key: value for key, value in values.items() if key != ARM}}
        expanded = {each: value for key, value in named.items() for each in self.together.get(key, (key,))}
        # The construction has refused members beside a key that sets them; beside null they keep their own values.
        return expanded | {key: value for key, value in named.items() if key in expanded and key not in self.together}

    def set_by_all(self) -> list[str]:
        """Keys that every trial sets, whatever is drawn, so that the recipe's value has no effect."""
        given = [{k for k, value in self.given(values).items() if value is not None} for values in self.every()]
        return sorted(set.intersection(*given)) if given else []


@dataclass(frozen=True)
class Trial:
    """A finished trial: its values, its metric (None if it failed), how long it took, and all of its numbers."""

    values: Values
    metric: float | None
    seconds: float
    numbers: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


def sweep(
    search: Search, launch: Launcher | Callable[[Values], Outcome], folder: Path, source: Source | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> list[Trial]:  # fmt: skip
    """Run what is missing; the journal lies in the folder.

    Args:
        search: keys, values, metric.
        launch: runs trials; a function is called here, one trial after the other. A TrialError marks a trial as
            failed, anything else ends the sweep.
        folder: a rerun with the same one goes on, also with more or other values of the same keys.
        source: what trials are made from; None where that is not known, and not compared.
        prepare: called before the first trial, once the folder is known to go on with this search and source.
    Returns:
        Every trial of the folder that finished or failed last, in order of running.
    Raises:
        ValueError: the folder holds a sweep of other keys, metric, direction or source, or one that is running; or a
            trial has no such metric.
    """
    launcher = launch if isinstance(launch, Launcher) else Here(launch)
    with _locked(folder):
        study = _study(search, folder)
        _record(study, source, folder)
        prepare()
        _run_missing(search, study, launcher)
        return _trials(search, study)


def finished(search: Search, folder: Path) -> list[Trial]:
    """What `sweep` has run in a folder.

    Raises:
        ValueError: the folder holds none, or one of other keys, metric or direction.
    """
    if not (folder / _JOURNAL).is_file():
        raise ValueError(f"{folder} holds no sweep; run it without --only_report")
    return _trials(search, _study(search, folder))


def best(search: Search, trials: Sequence[Trial]) -> Trial | None:
    """The one with the best metric, if any finished."""
    known = [trial for trial in trials if trial.metric is not None]
    sign = -1.0 if search.maximize else 1.0
    return min(known, key=lambda trial: sign * (trial.metric or 0.0)) if known else None


_JOURNAL = "trials.log"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "running.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"a sweep is running in {folder}; wait for it, or choose another --output_dir") from error
    try:
        yield
    finally:
        lock.release()


def _run_missing(search: Search, study: Any, launcher: Launcher) -> None:
    waiting = _missing(search, study)
    left = len(waiting) if search.sampler == "grid" else _left(search, study)
    running: dict[Job, Any] = {}
    with tqdm(total=left, desc="sweep", unit="trial", smoothing=0.1, disable=None) as bar:
        try:
            while left or running:
                started = [_asked(search, study, waiting) for _ in range(min(left, launcher.capacity - len(running)))]
                left -= len(started)
                jobs = launcher.submit([trial.user_attrs["values"] for trial in started])
                running |= dict(zip(jobs, started, strict=True))
                ended = [job for job in running if job.done()]
                for job in ended:
                    _tell(search, study, running[job], job)
                    del running[job]
                bar.update(len(ended))
                if not ended and running:
                    time.sleep(launcher.poll_seconds)
        finally:
            if running:  # stopped, by Ctrl-C or by an error of one trial
                launcher.stop()
            for trial in running.values():
                _fail(study, trial, "interrupted")


def _asked(search: Search, study: Any, waiting: list[Values]) -> Any:
    """The next trial, with its values."""
    trial = study.ask()
    chosen = {axis.key: axis.values for axis in search.axes}
    values = waiting.pop(0) if waiting else {key: trial.suggest_categorical(key, of) for key, of in chosen.items()}
    trial.set_user_attr("values", values)
    return trial


def _tell(search: Search, study: Any, trial: Any, job: Job) -> None:
    try:
        outcome = job.result()
        numbers = dict(outcome) if isinstance(outcome, Mapping) else {search.metric: float(outcome)}
        if search.metric not in numbers:
            raise ValueError(f"a run has no metric {search.metric!r}; it has {sorted(numbers)}")
        if not math.isfinite(numbers[search.metric]):
            raise TrialError(f"{search.metric} is {numbers[search.metric]}")
    except TrialError as error:
        tqdm.write(f"softrl sweep: {trial.user_attrs['values']}: {error}", file=sys.stderr)
        _fail(study, trial, str(error))
    else:
        trial.set_user_attr("numbers", numbers)
        study.tell(trial, numbers[search.metric])


def _fail(study: Any, trial: Any, why: str) -> None:
    from optuna.trial import TrialState

    trial.set_user_attr("error", why)
    study.tell(trial, state=TrialState.FAIL)


def _study(search: Search, folder: Path) -> Any:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / _JOURNAL))), study_name="softrl sweep",
        direction="maximize" if search.maximize else "minimize", load_if_exists=True,
    )  # fmt: skip
    # Another seed for what is drawn later: the same would draw the same again.
    seed = search.seed + len(study.get_trials(deepcopy=False))
    tpe = search.sampler == "tpe"
    study.sampler = optuna.samplers.TPESampler(seed=seed) if tpe else optuna.samplers.RandomSampler(seed)
    together = {key: list(keys) for key, keys in search.together.items()}
    known = {
        "metric": search.metric, "keys": sorted(search.keys), "maximize": search.maximize, "fixed": search.fixed,
        "together": together,
    }  # fmt: skip
    before = {"fixed": {}, "together": {}, **study.user_attrs.get("search", known)}
    if comparable(before) != comparable(known):
        raise ValueError(f"{folder} holds a sweep with {before}, this one has {known}; choose another --output_dir")
    study.set_user_attr("search", known)
    arms, earlier = {arm.label: arm.fixed for arm in search.arms}, study.user_attrs.get("arms", {})
    if changed := [label for label in arms if comparable(earlier.get(label, arms[label])) != comparable(arms[label])]:
        raise ValueError(f"{folder} holds trials of the arms {changed} with other keys; choose another --output_dir")
    study.set_user_attr("arms", {**earlier, **arms})
    return study


def _record(study: Any, source: Source | None, folder: Path) -> None:
    """Compare with what trials were made from; a folder without trials, or of before there were records, has none."""
    if source is not None:
        then = study.user_attrs.get("source") if study.get_trials(deepcopy=False) else None
        study.set_user_attr("source", continued(source, then, folder))


def _missing(search: Search, study: Any) -> list[Values]:
    """What of a grid has not been finished; trials of a run that was interrupted are over."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    complete = [
        comparable(_values(trial)) for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]
    grid = search.grid() if search.sampler == "grid" else []
    return [values for values in grid if comparable(values) not in complete]


def _left(search: Search, study: Any) -> int:
    from optuna.trial import TrialState

    assert search.trials is not None
    return max(search.trials - len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))), 0)


def _values(trial: Any) -> Values:
    return dict(trial.user_attrs.get("values", trial.params))


def _name(values: Values) -> str:
    """Equal for equal values, also where one is written 1e4 and the other 10000."""
    same = {key: float(value) if is_number(value) else value for key, value in comparable(values).items()}
    return repr(sorted(same.items()))


def _trials(search: Search, study: Any) -> list[Trial]:
    """By values: the last that finished, else the last that failed."""
    from optuna.trial import TrialState

    grid = replace(search, only_arms=None).every() if search.sampler == "grid" else []
    asked, kept = {_name(values): values for values in grid}, dict[str, Trial]()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL, TrialState.COMPLETE)):
        values, failed = _values(trial), trial.state == TrialState.FAIL
        name = _name(values)
        error = trial.user_attrs.get("error", "interrupted" if failed else "")
        if not values or error == "interrupted" or (failed and name in kept):
            continue
        numbers = trial.user_attrs.get("numbers", {})
        taken = trial.duration.total_seconds() if trial.duration is not None else math.nan
        kept.pop(name, None)
        seconds = numbers.get("trial_seconds", taken)
        kept[name] = Trial(asked.get(name, values), None if failed else trial.value, seconds, numbers, error)
    return list(kept.values())
