"""A sweep recipe: one question, the runs that answer it, and how the answer is shown.

    title: Base capacity against the gain from a reasoner
    question: Does a larger base model leave less to a reasoner?
    recipe: reasoner/shakespeare        # of `softrl train` or `softrl variance`
    set: {max_steps: 300}               # keys that all trials share
    grid: {base_lm_size: [2, 4, 8], seed: [7, 8, 9]}
    arms:                               # optional; each is crossed with the grid, and may replace its keys
      with a reasoner: {use_reasoner: true}
      without: {use_reasoner: false}
    together: {size: [base_lm_size, reasoner_size]}   # optional; a key that stands for several
    prepare: {proxy: {use_reasoner: false}}           # optional; models made first, by the same recipe with these
                                                      # keys; a value "{prepared}/proxy" is the folder of one
    metric: eval_nll
    direction: minimize
    measures: {eval_nll: mixture, eval_base_nll: base LM}   # optional; several numbers of each run, compared
    columns: {num_parameters: parameters}   # or a list
    report: {x: base_lm_size, scale: log, series: arm, baseline: {arm: without}}

An arm's key with one value that no grid or other arm varies is not shown. Left out: conditions between keys.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from softrl.studies.sweep import ARM, SEED, Arm, Axis, Search, Trial
from softrl.studies.sweep_launch import Values
from softrl.studies.sweep_values import is_number, read_values

MEASURE = "measure"  # as a key of what is shown, where a run has several numbers
DIRECTIONS = ("minimize", "maximize")
SCALES = ("linear", "log", "categories")


@dataclass(frozen=True)
class ReportSpec:
    """How an answer is shown.

    Args:
        x: the key along the axis; the first of the grid by default.
        series: keys whose values are told apart by colour; those that are left over by default.
        facets: a key with a panel for each of its values.
        scale: of x, one of SCALES; linear where all values are numbers, else categories, by default.
        baseline: values of one or more keys; each setting is compared with the one that has these instead of its own,
            seed by seed.
        sort: categories by their means, best first, rather than in the grid's order.
    Raises:
        ValueError: an unknown scale.
    """

    x: str | None = None
    series: tuple[str, ...] | None = None
    facets: str | None = None
    scale: str | None = None
    baseline: Values = field(default_factory=dict)
    sort: bool = False

    def __post_init__(self) -> None:
        if self.scale not in (None, *SCALES):
            raise ValueError(f"report.scale must be one of {SCALES}, got {self.scale!r}")


@dataclass(frozen=True)
class Question:
    """What a sweep recipe says.

    Raises:
        ValueError: an unknown direction, a key that is both set and varied, or a report of keys that nothing varies
            or of a scale that their values do not have.
    """

    title: str
    question: str
    recipe: str
    metric: str
    direction: str = "minimize"
    set: Values = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    arms: Mapping[str, Values] = field(default_factory=dict)
    together: Mapping[str, Sequence[str]] = field(default_factory=dict)
    measures: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    prepare: Mapping[str, Values] = field(default_factory=dict)
    report: ReportSpec = field(default_factory=ReportSpec)
    notes: str = ""

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {DIRECTIONS}, got {self.direction!r}")
        if twice := [key for key in self.grid if key in self.set]:
            raise ValueError(f"set and grid both have {twice}")
        if taken := {ARM, MEASURE} & {*self.set, *self.grid}:
            raise ValueError(f"{sorted(taken)} is not a key of a run; see arms and measures")
        if self.measures and self.metric not in self.measures:
            raise ValueError(f"metric {self.metric!r} must be one of the measures, {list(self.measures)}")
        keys, spec = self.keys, self.report
        named = [spec.x, *(spec.series or ()), spec.facets, *spec.baseline]
        if unknown := [key for key in named if key is not None and key not in keys]:
            raise ValueError(f"report names {unknown}, which nothing varies; the keys are {keys}")
        self._check_scale()

    def _check_scale(self) -> None:
        x, scale = self.x, self.report.scale
        if scale not in (None, scale_of(values := self._values_of(x), scale)):
            needed = "numbers of at least 0" if scale == "log" else "numbers"
            raise ValueError(f"report.scale {scale!r} needs {needed}, but {x} has the values {values}")

    def _values_of(self, key: str) -> list[Any]:
        every = list(self.measures.values()) if key == MEASURE else [v.get(key) for v in self.search().grid()]
        return [value for value in dict.fromkeys(every) if value is not None]

    @property
    def x(self) -> str:
        """The key along the axis; of keys alone the arm is the last that one would put there."""
        keys = self.keys or [SEED]
        return self.report.x or next((key for key in keys if key != ARM), keys[0])

    def search(self, sampler: str = "grid", trials: int | None = None, seed: int = 0, arms: Any = None) -> Search:
        """The trials."""
        axes = tuple(Axis.of(key, values, f"grid: {key}") for key, values in self.grid.items())
        only = None if arms is None else tuple(arms)
        maximize = self.direction == "maximize"
        of_arms = tuple(self._arms())
        return Search(axes, self.metric, maximize, sampler, trials, seed, of_arms, self.set, only, self.together)

    @property
    def keys(self) -> list[str]:
        """Of what is shown, the seed aside."""
        return [key for key in self.search().keys if key != SEED] + ([MEASURE] if self.measures else [])

    def shown(self, trials: Sequence[Trial]) -> list[Trial]:
        """A trial for each of its measures that it has; trials as they are without measures."""
        if not self.measures:
            return list(trials)
        return [
            replace(trial, values={**trial.values, MEASURE: label}, metric=trial.numbers.get(name))
            for trial in trials
            for name, label in self.measures.items()
            if trial.metric is None or name in trial.numbers  # what a run does not measure is no failure
        ]

    def _arms(self) -> list[Arm]:
        varied = {key for given in self.arms.values() for key, value in given.items() if isinstance(value, list)}
        varied |= set(self.grid)
        arms = []
        for label, given in self.arms.items():
            lists = {key: value if isinstance(value, list) else [value] for key, value in given.items()}
            axes = tuple(Axis.of(key, lists[key], f"arms: {label}: {key}") for key in lists if key in varied)
            arms.append(Arm(label, {key: value for key, value in given.items() if key not in varied}, axes))
        return arms

    def with_grid(self, axes: Sequence[Axis], fixed: Sequence[Axis] = ()) -> "Question":
        """With other values of some keys, and with other fixed ones.

        A key's new values replace those of the grid and of every arm that varies it; arms that fix it keep theirs. A
        varied key that is fixed is one with a single value, which tables still show.
        """
        varied = set(self.search().keys)
        new = {axis.key: list(axis.values) for axis in (*axes, *(each for each in fixed if each.key in varied))}
        only_in_arms = varied - set(self.grid)
        arms = {
            label: {key: new.get(key, of) if isinstance(of, list) else of for key, of in given.items()}
            for label, given in self.arms.items()
        }
        grid = {**self.grid, **{key: values for key, values in new.items() if key not in only_in_arms}}
        settings = {**self.set, **{axis.key: axis.values[0] for axis in fixed}}
        return replace(self, grid=grid, arms=arms, set={k: v for k, v in settings.items() if k not in new})


def scale_of(values: Sequence[Any], wanted: str | None) -> str:
    """The scale that values of x have: what is wanted, else the closest to it that can show them."""
    if not values or not all(map(is_number, values)):
        return "categories"
    return "linear" if wanted is None or (wanted == "log" and min(values) < 0) else wanted


def is_sweep_recipe(path: Path) -> bool:
    """Whether a file holds a question, rather than one run."""
    given = read_values(path.read_text(encoding="utf-8"))
    return isinstance(given, dict) and "recipe" in given and ("grid" in given or "arms" in given)


def load_question(path: Path) -> Question:
    """Read a sweep recipe.

    Raises:
        ValueError: a key that is missing or unknown (close ones are named), or a value that makes no sense.
    """
    given = read_values(path.read_text(encoding="utf-8"))
    known = [each.name for each in fields(Question)]
    _check_keys(given, known, str(path))
    if missing := [key for key in ("title", "question", "recipe", "metric") if not given.get(key)]:
        raise ValueError(f"{path}: {missing} must be given")
    for key in ("set", "grid", "arms", "report", "together", "measures", "prepare"):
        if not isinstance(given.get(key, {}), dict):
            raise ValueError(f"{path}: {key} must be a mapping, got {given[key]!r}")
    report = dict(given.get("report", {}))
    _check_keys(report, [each.name for each in fields(ReportSpec)], f"{path}: report")
    if isinstance(report.get("series"), str):
        report["series"] = [report["series"]]
    if report.get("series") is not None:
        report["series"] = tuple(report["series"])
    columns = given.get("columns", {})
    columns = dict(columns) if isinstance(columns, dict) else {name: name for name in columns}
    grid = {key: values if isinstance(values, list) else [values] for key, values in given.get("grid", {}).items()}
    return Question(**{**given, "report": ReportSpec(**report), "columns": columns, "grid": grid})


def _check_keys(given: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected a mapping of keys to values, got {given!r}")
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=3) or list(known)
            raise ValueError(f"{where}: unknown key {key!r}; did you mean one of {close}?")


def asked_on_the_command_line(recipe: str, axes: Sequence[Axis], metric: str, maximize: bool) -> Question:
    """The question that `--config RECIPE --grid ...` asks of a recipe of one run."""
    keys = " and ".join(axis.key for axis in axes)
    grid = {axis.key: list(axis.values) for axis in axes}
    if len(grid) < len(axes):
        raise ValueError(f"--grid: needs different keys, got {[axis.key for axis in axes]}")
    direction = "maximize" if maximize else "minimize"
    return Question(f"{recipe}: {keys}", f"What do {keys} change?", recipe, metric, direction, grid=grid)
