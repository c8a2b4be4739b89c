"""The recipe of `softrl thoughts compare`, read and checked, and the runs that it asks for.

Left out: tasks (`thought_tasks`), training (`thought_run`) and the report (`thought_report`).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from softrl.studies.compare_config import (
    check_keys,
    checked_mapping,
    filled,
    hashed,
    named_settings,
    slug,
    trainer_settings,
)
from softrl.studies.thought_tasks import TASKS
from softrl.trainers import QuietSTaRConfig

_SET_BY_THE_STUDY = ("seed", "max_steps", "num_train_epochs", "output_dir", "resume_from_checkpoint")


@dataclass(frozen=True)
class Method:
    """A way to think, or a control: its keys over the study's."""

    name: str
    settings: dict[str, Any]
    is_control: bool = False


@dataclass(frozen=True)
class ThoughtStudyConfig:
    """A study: ways to think on the same task, model and seconds.

    Args:
        question: what it asks.
        output_dir: where runs and report go.
        task: a name of `thought_tasks.TASKS`.
        methods: what is compared: `name`, `control` (whether it is one), and keys of `QuietSTaRConfig`.
        seeds: a run for each method and seed; a seed is that of weights, data order and draws.
        max_seconds: of training a run, evaluation excluded.
        evaluate_every_seconds: of training between two evaluations.
        task_settings: of the task.
        model: settings of `small_llama`, or the name of a pretrained model.
        peft: settings of `LoraConfig` for a pretrained one; none trains all parameters.
        pretrain: keys of `QuietSTaRConfig`, `max_steps` among them, for a start that all methods of a seed share: a
            model that has learned the training rows without thinking. None: they start from `model`.
        common: keys of `QuietSTaRConfig` for every run.
        reference: the method that the report takes differences from; the first one by default.
        target_nll: the report says who reaches it after how many seconds and thoughts.
        notes: shown in the report.
    """

    question: str
    output_dir: str
    task: str
    methods: list[Method]
    seeds: list[int]
    max_seconds: float
    evaluate_every_seconds: float
    task_settings: dict[str, Any] = field(default_factory=dict)
    model: Any = field(default_factory=dict)
    peft: dict[str, Any] | None = None
    pretrain: dict[str, Any] | None = None
    common: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None
    target_nll: float | None = None
    notes: str = ""

    def run(self, method: Method, seed: int) -> "ThoughtRun":
        """One run."""
        return ThoughtRun(self, method, seed, {**self.common, **method.settings, "seed": seed})

    def runs(self, methods: list[str] | None = None, seeds: list[int] | None = None) -> list["ThoughtRun"]:
        """All runs, or those of some methods and seeds: every method of a seed, then the next seed."""
        return [
            self.run(method, seed)
            for seed in (self.seeds if seeds is None else seeds)
            for method in self.methods
            if methods is None or method.name in methods
        ]

    @property
    def reference_name(self) -> str:
        """The method that differences are taken from."""
        return self.reference or self.methods[0].name


@dataclass(frozen=True)
class ThoughtRun:
    """A method from a seed."""

    study: ThoughtStudyConfig
    method: Method
    seed: int
    settings: dict[str, Any]

    def path(self) -> Path:
        """Where its record lies: runs with other settings, task, model or budget have another name."""
        study = self.study
        made_of = [self.settings, *self._start, study.peft, study.max_seconds, study.evaluate_every_seconds]
        name = f"{slug(self.method.name)}-seed{self.seed}-{hashed(made_of)}.json"
        return Path(study.output_dir) / "runs" / name

    def start_path(self) -> Path:
        """Where the model lies that all methods of this seed start from."""
        return Path(self.study.output_dir) / "starts" / f"seed{self.seed}-{hashed([*self._start, self.seed])}"

    @property
    def _start(self) -> list[Any]:
        return [self.study.task, self.study.task_settings, self.study.model, self.study.pretrain]


def load_config(path: Path, output_dir: str | None = None) -> ThoughtStudyConfig:
    """Read a recipe.

    Args:
        path: of the recipe.
        output_dir: replaces its own.
    Raises:
        ValueError: not a mapping, an unknown or missing key, or a value that makes no study; the key is named.
    """
    given = dict(checked_mapping(yaml.safe_load(path.read_text(encoding="utf-8")), str(path)))
    if output_dir is not None:
        given["output_dir"] = output_dir
    check_keys(given, ThoughtStudyConfig, str(path))
    if given["task"] not in TASKS:
        raise ValueError(f"{path}: task must be one of {sorted(TASKS)}, got {given['task']!r}")
    for name in ("max_seconds", "evaluate_every_seconds"):
        if not isinstance(given[name], int | float) or not given[name] > 0:
            raise ValueError(f"{path}: {name} must be a positive number of seconds, got {given[name]!r}")
    given["common"] = _settings(given.get("common") or {}, f"{path}, common")
    if given.get("pretrain") is not None:
        pretrain = dict(checked_mapping(given["pretrain"], f"{path}, pretrain"))
        steps = pretrain.pop("max_steps", None)
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"{path}, pretrain: max_steps must be a positive integer, got {steps!r}")
        given["pretrain"] = {**_settings(pretrain, f"{path}, pretrain"), "max_steps": steps}
    given["seeds"] = [int(seed) for seed in filled(given, "seeds", path)]
    given["methods"] = _methods(filled(given, "methods", path), path)
    names = [method.name for method in given["methods"]]
    if given.get("reference") not in (None, *names):
        raise ValueError(f"{path}: reference must be one of the methods {names}, got {given['reference']!r}")
    return ThoughtStudyConfig(**given)


def _methods(given: list[Any], path: Path) -> list[Method]:
    methods = []
    for name, settings in named_settings(given, "method", path):
        is_control = bool(settings.pop("control", False))
        methods.append(Method(name, _settings(settings, f"{path}, method {name!r}"), is_control))
    return methods


def _settings(given: Any, where: str) -> dict[str, Any]:
    return trainer_settings(given, QuietSTaRConfig, _SET_BY_THE_STUDY, where)
