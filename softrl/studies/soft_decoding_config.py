"""The recipe of `softrl study soft-decoding`, read and checked, and the runs that it asks for.

Left out: training and measuring (`soft_decoding_run`) and the report (`soft_decoding_report`).
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from softrl.generation.next_token import NextToken
from softrl.generation.soft_settings import Phase, SoftDecoding
from softrl.studies.compare_config import (
    check_keys,
    checked_mapping,
    filled,
    hashed,
    named_settings,
    slug,
    trainer_settings,
)
from softrl.tokens.relaxation import make_relaxation
from softrl.tokens.truncation import Truncation
from softrl.trainers import SoftSFTConfig

_SET_BY_THE_STUDY = ("seed", "output_dir", "resume_from_checkpoint", "completion_only_loss")


@dataclass(frozen=True)
class Tuning:
    """A way to tune the model: its keys over the study's; without any steps, the model as it is."""

    name: str
    settings: dict[str, Any]

    @property
    def is_none(self) -> bool:
        """Whether the model is only measured."""
        return self.settings.get("max_steps") == 0


@dataclass(frozen=True)
class SoftDecodingStudyConfig:
    """A study: a model before and after tuning, decoded hard and soft.

    Args:
        question: what it asks.
        output_dir: where runs and report go.
        model: name or folder of a pretrained model.
        tunings: what is compared: `name` and keys of `SoftSFTConfig`; `max_steps: 0` measures the model as it is.
        decodings: by name, `relaxation`, `top_k`, `max_entropy_nats` of the soft tokens; none of them: the likeliest
            tokens, hard. The first one is what the others are compared with.
        seeds: a run for each tuning and seed; a model that is not tuned is measured once.
        common: keys of `SoftSFTConfig` for every tuning.
        peft: settings of `LoraConfig`; none trains all parameters.
        num_train_texts, num_train_answers: of reviews and of questions with one answer, trained on together.
        num_texts, num_answers: held-out ones to measure with.
        prompt_length_tokens, text_length_tokens: of a review, what is given and what follows.
        answers: settings of `exact_answers`: kinds, num_digits, num_words, num_examples.
        batch_size: of measurements.
        notes: shown in the report.
    """

    question: str
    output_dir: str
    model: str
    tunings: list[Tuning]
    decodings: dict[str, SoftDecoding]
    seeds: list[int]
    common: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] | None = None
    num_train_texts: int = 1024
    num_train_answers: int = 1024
    num_texts: int = 64
    num_answers: int = 200
    prompt_length_tokens: int = 8
    text_length_tokens: int = 32
    answers: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    notes: str = ""

    def runs(self, tunings: list[str] | None = None, seeds: list[int] | None = None) -> list["TuningRun"]:
        """All runs, or those of some tunings and seeds: every tuning of a seed, then the next seed.

        Raises:
            ValueError: a tuning or a seed that the recipe does not have.
        """
        known = [tuning.name for tuning in self.tunings]
        for kind, asked, there in (("tunings", tunings, known), ("seeds", seeds, self.seeds)):
            if unknown := [each for each in asked or [] if each not in there]:
                raise ValueError(f"{kind}: {unknown} are not in the recipe, which has {there}")
        wanted = self.seeds if seeds is None else seeds
        return [
            TuningRun(self, tuning, seed)
            for seed in wanted
            for tuning in self.tunings
            if (tunings is None or tuning.name in tunings) and not (tuning.is_none and seed != wanted[0])
        ]


@dataclass(frozen=True)
class TuningRun:
    """A tuning from a seed."""

    study: SoftDecodingStudyConfig
    tuning: Tuning
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """Keys of `SoftSFTConfig`."""
        return {**self.study.common, **self.tuning.settings, "seed": self.seed}

    def path(self) -> Path:
        """Where its record lies: runs with other settings have another name."""
        study = self.study
        aside = ("question", "output_dir", "tunings", "seeds", "common", "notes", "decodings", "batch_size")
        rest = {each.name: getattr(study, each.name) for each in fields(study) if each.name not in aside}
        decodings = {name: str(decoding) for name, decoding in study.decodings.items()}
        seed = "" if self.tuning.is_none else f"-seed{self.seed}"
        made_of = [{} if self.tuning.is_none else self.settings, rest, decodings]
        return Path(study.output_dir) / "runs" / f"{slug(self.tuning.name)}{seed}-{hashed(made_of)}.json"


def load_config(path: Path, output_dir: str | None = None) -> SoftDecodingStudyConfig:
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
    check_keys(given, SoftDecodingStudyConfig, str(path))
    given["common"] = _settings(given.get("common") or {}, f"{path}, common")
    given["seeds"] = [int(seed) for seed in filled(given, "seeds", path)]
    given["tunings"] = [
        Tuning(name, _settings(settings, f"{path}, tuning {name!r}"))
        for name, settings in named_settings(filled(given, "tunings", path), "tuning", path)
    ]
    decodings = checked_mapping(given["decodings"], f"{path}, decodings")
    if not decodings:
        raise ValueError(f"{path}: decodings is empty; name at least one")
    given["decodings"] = {
        str(name): make_decoding(dict(checked_mapping(each or {}, f"{path}, decoding {name!r}")), f"{path}, {name!r}")
        for name, each in decodings.items()
    }
    return SoftDecodingStudyConfig(**given)


def make_decoding(given: dict[str, Any], where: str) -> SoftDecoding:
    """A decoding from `relaxation`, `top_k`, `max_entropy_nats`, `relaxation_temperature`; hard, likeliest tokens of
    none of them.
    """
    if not given:
        return SoftDecoding(Phase(None, NextToken(greedy=True)))
    name = given.pop("relaxation", "softmax")
    truncation = Truncation(given.pop("top_k", 16))
    temperature, bound = given.pop("relaxation_temperature", 1.0), given.pop("max_entropy_nats", None)
    if given:
        raise ValueError(f"{where}: unknown settings {sorted(given)} of a decoding")
    return SoftDecoding(Phase(make_relaxation(name, truncation, temperature, bound)))


def _settings(given: Any, where: str) -> dict[str, Any]:
    return trainer_settings(given, SoftSFTConfig, _SET_BY_THE_STUDY, where)
