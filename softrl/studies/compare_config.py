"""The recipe of `softrl compare`, read and checked, and the runs that it asks for.

Left out: training (`compare`) and the report (`compare_report`).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

CRITERIA = ("reward", "objective")
# The study sets them for every run.
_SET_BY_THE_STUDY = ("seed", "beta", "max_steps", "num_train_epochs", "output_dir", "resume_from_checkpoint")
_QUIET = {
    "save_strategy": "no", "eval_strategy": "no", "report_to": "none", "logging_steps": 1, "disable_tqdm": True,
    "log_completions": False,
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A training method: its keys over the base's, and the KL weights and learning rates that replace the study's."""

    name: str
    settings: dict[str, Any]
    betas: tuple[float, ...]
    learning_rates: tuple[float, ...] | None


@dataclass(frozen=True)
class Tuning:
    """How a learning rate is chosen for every method, each with the same budget.

    Args:
        learning_rates: what is tried; a method may name as many others.
        max_samples: completions of a run.
        seed: of these runs, none of the study's.
        beta: KL weight; by default the middle one of the study.
        criterion: `reward` (hard, held out) or `objective` (that less beta times the KL per completion), the
            largest of a run's evaluation points.
        max_kl_nats: only points within so much KL per completion count.
    """

    learning_rates: list[float]
    max_samples: int
    seed: int = 100
    beta: float | None = None
    criterion: str = "reward"
    max_kl_nats: float | None = None


@dataclass(frozen=True)
class CompareConfig:
    """A study: methods on the same model, prompts, reward, sampler and held-out evaluation.

    Args:
        question: what it asks.
        output_dir: where runs and report go.
        base: a recipe of `softrl train`, by name or path.
        methods: what is compared.
        seeds, betas: a run for each method, KL weight and seed.
        max_samples: completions that a run trains on.
        evaluate_every_samples: so many completions between two evaluations.
        max_seconds: a run also stops after so many seconds of training, evaluation excluded.
        common: keys over the base's.
        tuning: how learning rates are chosen; None keeps those of the recipe.
        equal_kl_nats: where the report interpolates, nats a completion.
        reference: the method that the report takes differences from; the first one by default.
        notes: shown in the report.
        base_settings: the keys of the base recipe.
    """

    question: str
    output_dir: str
    base: str
    methods: list[Method]
    seeds: list[int]
    betas: list[float]
    max_samples: int
    evaluate_every_samples: int
    max_seconds: float | None = None
    common: dict[str, Any] = field(default_factory=dict)
    tuning: Tuning | None = None
    equal_kl_nats: list[float] = field(default_factory=lambda: [1.0, 2.0, 3.0])
    reference: str | None = None
    notes: str = ""
    base_settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tuning_beta(self) -> float:
        """The KL weight of tuning runs."""
        if self.tuning is not None and self.tuning.beta is not None:
            return self.tuning.beta
        return self.betas[len(self.betas) // 2]

    def tuning_runs(self, method: Method) -> list["Run"]:
        """A method's runs at each learning rate; none without tuning."""
        tuning = self.tuning
        if tuning is None:
            return []
        rates = method.learning_rates or tuning.learning_rates
        return [self._run(method, self.tuning_beta, tuning.seed, rate, tuning.max_samples, "tuning") for rate in rates]

    def run(self, method: Method, beta: float, seed: int, learning_rate: float | None) -> "Run":
        """A run of the comparison; without a learning rate, with that of the recipe."""
        return self._run(method, beta, seed, learning_rate, self.max_samples, "main")

    def _run(
        self, method: Method, beta: float, seed: int, learning_rate: float | None, max_samples: int, stage: str
    ) -> "Run":
        merged = {**self.base_settings, **self.common, **method.settings}
        settings = {key: value for key, value in merged.items() if key not in _SET_BY_THE_STUDY}
        settings |= {**_QUIET, "beta": beta, "seed": seed}
        if learning_rate is not None:
            settings["learning_rate"] = learning_rate
        return Run(
            stage, method.name, beta, seed, settings, max_samples, self.evaluate_every_samples, self.max_seconds
        )


@dataclass(frozen=True)
class Run:
    """One training run: a method at a KL weight, from a seed."""

    stage: str
    method: str
    beta: float
    seed: int
    settings: dict[str, Any]
    max_samples: int
    evaluate_every_samples: int
    max_seconds: float | None

    @property
    def words(self) -> list[str]:
        """The settings as a command line of `softrl train`; one that is None is left at its default."""
        words: list[str] = []
        for key, value in self.settings.items():
            if value is not None:
                words += [f"--{key}", *(map(_word, value) if isinstance(value, list) else [_word(value)])]
        return words

    @property
    def label(self) -> str:
        """What the progress shows."""
        rate = f", learning rate {self.settings.get('learning_rate')}" if self.stage == "tuning" else ""
        return f"{self.method}, beta {self.beta:g}, seed {self.seed}{rate}"

    def path(self, output_dir: str | Path) -> Path:
        """Where its record lies: runs with other settings or budgets have another name."""
        budget = [self.max_samples, self.evaluate_every_samples, self.max_seconds]
        name = f"{slug(self.method)}-beta{self.beta:g}-seed{self.seed}-{hashed([self.settings, budget])}.json"
        return Path(output_dir) / "runs" / name

    def start_path(self, output_dir: str | Path, method_keys: set[str]) -> Path:
        """Where the evaluation before training lies, which runs share that differ in `method_keys` only."""
        shared = {key: value for key, value in self.settings.items() if key not in method_keys}
        return Path(output_dir) / "runs" / f"start-seed{self.seed}-{hashed(shared)}.json"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def hashed(value: Any) -> str:
    """A short name of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# Reading


def load_config(path: Path, find_recipe: Callable[[str], Path]) -> CompareConfig:
    """Read a recipe.

    Args:
        path: of the recipe.
        find_recipe: a path from the name or path of its base.
    Raises:
        ValueError: not a mapping, an unknown or missing key, or a value that makes no study; the key is named.
    """
    given = checked_mapping(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    check_keys(given, CompareConfig, str(path), hidden={"base_settings"})
    base = find_recipe(str(given["base"]))
    values = dict(given)
    values["base_settings"] = checked_mapping(yaml.safe_load(base.read_text(encoding="utf-8")), str(base))
    values["common"] = checked_mapping(given.get("common") or {}, f"{path}, common")
    _refuse_set_keys(values["common"], f"{path}, common")
    values["betas"] = [float(beta) for beta in filled(given, "betas", path)]
    values["seeds"] = [int(seed) for seed in filled(given, "seeds", path)]
    if given.get("tuning") is not None:
        values["tuning"] = _tuning(given["tuning"], path, values["seeds"])
    values["methods"] = list(_methods(filled(given, "methods", path), values, path))
    _check_numbers(values, path)
    names = [method.name for method in values["methods"]]
    if given.get("reference") not in (None, *names):
        raise ValueError(f"{path}: reference must be one of the methods {names}, got {given['reference']!r}")
    return CompareConfig(**values)


def _tuning(given: Any, path: Path, seeds: list[int]) -> Tuning:
    where = f"{path}, tuning"
    check_keys(checked_mapping(given, where), Tuning, where)
    rates = [float(rate) for rate in filled(given, "learning_rates", where)]
    tuning = Tuning(**{**given, "learning_rates": rates})
    if tuning.criterion not in CRITERIA:
        raise ValueError(f"{where}: criterion must be one of {CRITERIA}, got {tuning.criterion!r}")
    if tuning.seed in seeds:
        raise ValueError(f"{where}: seed {tuning.seed} is one of the study's seeds {seeds}; tune on another one")
    return tuning


def _methods(given: list[Any], values: dict[str, Any], path: Path) -> Iterator[Method]:
    for name, settings in named_settings(given, "method", path):
        betas, rates = settings.pop("betas", values["betas"]), settings.pop("learning_rates", None)
        where = f"{path}, method {name!r}"
        _refuse_set_keys(settings, where)
        _check_rates(settings, rates, values.get("tuning"), where)
        yield Method(name, settings, tuple(map(float, betas)), None if rates is None else tuple(map(float, rates)))


def _check_rates(settings: dict[str, Any], rates: list[float] | None, tuning: Tuning | None, where: str) -> None:
    if tuning is not None and "learning_rate" in settings:
        raise ValueError(f"{where}: `learning_rate` is given, but `tuning` chooses it; leave one of them out")
    if rates is not None and (tuning is None or len(rates) != len(tuning.learning_rates)):
        raise ValueError(
            f"{where}: `learning_rates` replaces those of `tuning`, as many of them, so that every method has the "
            f"same budget; got {rates}"
        )


def _check_numbers(values: dict[str, Any], path: Path) -> None:
    for key in ("max_samples", "evaluate_every_samples"):
        if not isinstance(values[key], int) or values[key] < 1:
            raise ValueError(f"{path}: {key} must be a positive integer, got {values[key]!r}")
    budgets = {"max_samples": values["max_samples"]}
    if values.get("tuning") is not None:
        budgets["tuning: max_samples"] = values["tuning"].max_samples
    for key, budget in budgets.items():
        if budget % values["evaluate_every_samples"]:
            raise ValueError(
                f"{path}: {key}={budget} is not a multiple of evaluate_every_samples="
                f"{values['evaluate_every_samples']}; the last evaluation is at the end of a run"
            )
    seconds = values.get("max_seconds")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"{path}: max_seconds must be positive, got {seconds!r}")


def checked_mapping(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected a mapping of keys to values, got {given!r}")
    return given


def check_keys(given: dict[str, Any], kind: type, where: str, hidden: set[str] | frozenset[str] = frozenset()) -> None:
    known = [each for each in fields(kind) if each.name not in hidden]
    names = {each.name for each in known}
    if unknown := sorted(set(given) - names):
        raise ValueError(f"{where}: unknown keys {unknown}; the keys are {sorted(names)}")
    required = {each.name for each in known if each.default is MISSING and each.default_factory is MISSING}
    if missing := sorted(required - set(given)):
        raise ValueError(f"{where}: missing keys {missing}")


def filled(given: dict[str, Any], key: str, where: Any) -> list[Any]:
    values = given[key]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}: {key} must be a list of at least one, got {values!r}")
    return values


def _refuse_set_keys(settings: dict[str, Any], where: str) -> None:
    if taken := sorted(set(settings) & {*_SET_BY_THE_STUDY, *_QUIET}):
        raise ValueError(f"{where}: {taken} are set by the study (`seeds`, `betas`, `max_samples`); leave them out")


def named_settings(given: list[Any], kind: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Mappings with a `name`, each with its other keys.

    Raises:
        ValueError: one has no name, or that of another one.
    """
    seen: set[str] = set()
    for number, each in enumerate(given, 1):
        settings = dict(checked_mapping(each, f"{path}, {kind} {number}"))
        name = settings.pop("name", None)
        if not isinstance(name, str) or not slug(name) or slug(name) in seen:
            raise ValueError(f"{path}, {kind} {number}: `name` is {name!r}; every {kind} needs one of its own")
        seen.add(slug(name))
        yield name, settings


def trainer_settings(given: Any, config_class: type, taken: tuple[str, ...], where: str) -> dict[str, Any]:
    """Keys of a trainer's configuration.

    Args:
        given: a mapping.
        config_class: whose fields they are.
        taken: keys that the study sets itself.
        where: for errors.
    Raises:
        ValueError: not a mapping, a key of `taken`, or one that the class does not have.
    """
    settings = dict(checked_mapping(given, where))
    if set_here := sorted(set(settings) & set(taken)):
        raise ValueError(f"{where}: {set_here} are set by the study; leave them out")
    known = {each.name for each in fields(config_class)}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"{where}: unknown keys {unknown}; they are those of {config_class.__name__}")
    return settings
