"""Recipes of `softrl variance`: a study, its problems, and what lists and dotted keys among settings stand for."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class ProblemSpec:
    """A problem of a recipe. A list among the settings, or in an estimator's, stands for one of each.

    A key with a dot is one of a mapping: `reward_settings.sharpness`.
    """

    name: str
    kind: str
    estimators: list[Any]
    settings: dict[str, Any] = field(default_factory=dict)
    draws: int | None = None


@dataclass(frozen=True)
class VarianceConfig:
    """A study: its question, its problems, and how many draws each estimator gets unless its problem says so."""

    question: str
    output_dir: str
    problems: list[ProblemSpec]
    draws: int = 256
    seed: int = 0
    notes: str = ""


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> VarianceConfig:
    """Read a recipe.

    Raises:
        ValueError: not a mapping, an unknown or missing key, or nothing to draw.
    """
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(given, dict):
        raise ValueError(f"{path} is not a mapping of keys to values; see recipes/studies/quick.yaml")
    given = given | {key: value for key, value in (overrides or {}).items() if value is not None}
    given["problems"] = [
        _checked(ProblemSpec, problem, f"{path}, problem {number}")
        for number, problem in enumerate(given.get("problems") or [], 1)
    ]
    config = _checked(VarianceConfig, given, str(path))
    if not config.problems:
        raise ValueError(f"{path}: `problems` is empty; a study needs at least one")
    if min([config.draws, *(spec.draws for spec in config.problems if spec.draws is not None)]) < 2:
        raise ValueError(f"{path}: `draws` must be at least 2, or there is no variance to measure")
    return config


def _checked(kind: type, given: Any, where: str) -> Any:
    """A dataclass object of a mapping, or a ValueError that names the key."""
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected a mapping, got {given!r}")
    known = {each.name: each for each in fields(kind)}
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{where}: unknown keys {unknown}; the keys are {sorted(known)}")
    required = {"question", "output_dir", "problems", "name", "kind", "estimators"}
    if missing := sorted((required & set(known)) - set(given)):
        raise ValueError(f"{where}: missing keys {missing}")
    return kind(**given)


def expanded(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One mapping for every combination of the lists among the values."""
    lists = {key: value for key, value in settings.items() if isinstance(value, list)}
    for values in itertools.product(*lists.values()):
        yield settings | dict(zip(lists, values, strict=True))


def problem_name(spec: ProblemSpec, settings: dict[str, Any]) -> str:
    """The entry's name, and what its lists stand at in one of its problems."""
    several = [key for key, value in spec.settings.items() if isinstance(value, list)]
    return ", ".join([spec.name, *(f"{key.split('.')[-1]} {settings[key]}" for key in several)])


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """The same with `{"a.b": c}` as `{"a": {"b": c}}`, beside what "a" has already."""
    whole = {key: value for key, value in settings.items() if "." not in key}
    for key, value in settings.items():
        if "." in key:
            first, rest = key.split(".", 1)
            whole[first] = nested((whole.get(first) or {}) | {rest: value})
    return whole
