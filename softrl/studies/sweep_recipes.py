"""Keys of a variance recipe as a sweep addresses them, and what a trial of one measures."""

import copy
import difflib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from softrl.studies.lab_problems import MakeTrainer
from softrl.studies.sweep import TrialError
from softrl.studies.variance import Row, run
from softrl.studies.variance_config import ProblemSpec, VarianceConfig, load_config

METRICS = tuple(field.name for field in fields(Row) if field.type in (float, "float"))


def is_variance_recipe(path: Path) -> bool:
    """Whether `softrl variance` reads it, rather than `softrl train`."""
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    return isinstance(given, dict) and "problems" in given


def with_values(config: VarianceConfig, values: dict[str, Any]) -> VarianceConfig:
    """The study with other values at some keys.

    A dotted key is a path, `problems.0.settings.steps` or `problems.0.estimators.3.hops`. A bare one is the study's
    own (`draws`), or is set in every problem's settings and every estimator that has it: `steps`, `hops`.

    Raises:
        ValueError: nothing has that key; the message names close ones.
    """
    for key, value in values.items():
        config = _dotted(config, key, value) if "." in key else _bare(config, key, value)
    return config


def _bare(config: VarianceConfig, key: str, value: Any) -> VarianceConfig:
    if key in ("draws", "seed"):
        problems = [replace(spec, draws=None) if key == "draws" else spec for spec in config.problems]
        return replace(config, problems=problems, **{key: value})
    problems = copy.deepcopy(config.problems)
    having = [place for spec in problems for place in _places(spec) if key in place]
    for place in having:
        place[key] = value
    if not having:
        known = {name for spec in config.problems for place in _places(spec) for name in place} | {"draws", "seed"}
        close = difflib.get_close_matches(key, known, n=3) or sorted(known)
        raise ValueError(f"unknown key {key!r}: no problem and no estimator of the recipe sets it; it sets {close}")
    return replace(config, problems=problems)


def _places(spec: ProblemSpec) -> Iterator[dict[str, Any]]:
    yield spec.settings
    yield from (each for each in spec.estimators if isinstance(each, dict))


def _dotted(config: VarianceConfig, path: str, value: Any) -> VarianceConfig:
    first, *middle, last = path.split(".")
    problems = copy.deepcopy(config.problems)
    if first != "problems" or not middle:
        raise ValueError(f"unknown key {path!r}: a path starts with problems.0, as in problems.0.settings.steps")
    place: Any = problems
    for part in middle:
        place = _inside(place, part, path)
    if isinstance(place, ProblemSpec) and hasattr(place, last):
        problems[problems.index(place)] = replace(place, **{last: value})
    elif isinstance(place, dict):  # a setting may be left out of the recipe; the problem knows its own names
        place[last] = value
    else:
        raise ValueError(f"unknown key {path!r}: there is no {last!r}")
    return replace(config, problems=problems)


def _inside(place: Any, part: str, path: str) -> Any:
    if isinstance(place, list) and part.isdigit() and int(part) < len(place):
        return place[int(part)]
    if isinstance(place, ProblemSpec) and part in ("settings", "estimators"):
        return getattr(place, part)
    if isinstance(place, dict) and isinstance(place.get(part), dict):
        return place[part]
    raise ValueError(f"unknown key {path!r}: there is no {part!r}")


def rows_of(rows: list[Row], estimator: str | None) -> list[Row]:
    """All parameters together; one estimator's where it is named.

    Raises:
        ValueError: none has that label.
    """
    whole = [row for row in rows if row.group == "all"]
    chosen = [row for row in whole if estimator in (None, row.estimator)]
    if not chosen:
        raise ValueError(f"no estimator {estimator!r}; there are {sorted({row.estimator for row in whole})}")
    return chosen


def variance_objective(
    path: Path, metric: str, folder: Path, make_trainer: MakeTrainer
) -> Callable[[dict[str, Any]], float]:
    """A trial of a variance recipe: the metric's mean over its problems and estimators.

    Args:
        path: the recipe.
        metric: a number of a row, or `LABEL:metric` for that of one estimator.
        folder: of the draws, which trials share.
        make_trainer: see `variance.run`.
    Raises:
        ValueError: an unknown metric.
    """
    estimator, _, name = metric.rpartition(":")
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; it must be one of {list(METRICS)}, or LABEL:metric")
    config = load_config(path, {"output_dir": str(folder)})

    def objective(values: dict[str, Any]) -> float:
        rows, _ = run(with_values(config, values), make_trainer)
        chosen = [getattr(row, name) for row in rows_of(rows, estimator or None)]
        mean = sum(chosen) / len(chosen)
        if mean != mean:
            raise TrialError(f"{metric} is not a number at {values}")
        return mean

    return objective
