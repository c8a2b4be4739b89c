"""Relaxation settings that a trainer learns with its model: `LearnedRelaxation` wired into configuration and training.

The module hangs on the trained model, so that the engine wraps it, and is taken off while the model is saved and
loaded. What was learned lies beside the model in `learned_settings.json`, to the last digit; a resumed run, or a new
one from that folder, goes on from it. The gradient is that of the pathwise surrogate, see `softrl.tokens.learned`.
Left out: engines other than one process and DDP; schedules of K or of what is learned; the caller's own optimizer.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers.utils import logging

from softrl.assets import resolve_model, write_atomically
from softrl.tokens.learned import SETTINGS, LearnedRelaxation
from softrl.tokens.relaxation import Relaxation
from softrl.tokens.truncation import Truncation

FILE_NAME = "learned_settings.json"
_ATTRIBUTE = "learned_relaxation"  # of the trained model

logger = logging.get_logger(__name__)


def make_learned(args: Any) -> LearnedRelaxation | None:
    """The settings that a configuration asks for, at their start; None for none.

    Temperature, bound and min-p start where the configuration has them. Its `top_k` stays K, the kept ids, and the
    smooth top-k starts at half of them. A learned min-p takes the place of the hard rule.

    Raises:
        ValueError: nothing would reach the settings, or a start is missing or outside its range.
    """
    names = args.learned_settings
    if not names:
        return None
    _check(args, names)
    num_kept = int(args.schedules()["top_k"].first)
    starts = {
        "temperature": args.relaxation_temperature, "max_entropy_nats": args.max_entropy_nats, "min_p": args.min_p,
        "top_k": num_kept / 2,
    }  # fmt: skip
    truncation = Truncation(num_kept, args.top_p, 0.0 if "min_p" in names else args.min_p)
    try:
        return LearnedRelaxation(truncation, args.relaxation, **{name: float(starts[name]) for name in names})
    except ValueError as error:
        raise ValueError(f"learned_settings={names} cannot start: {error}") from error


def _check(args: Any, names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in SETTINGS]:
        raise ValueError(f"learned_settings must be among {SETTINGS}, got {unknown}")
    if len(set(names)) < len(names):
        raise ValueError(f"learned_settings={list(names)} names a setting twice; name each once")
    schedules = args.schedules()
    if args.hops == 0 or max(schedules["feedback_discount"].ends()) == 0.0:
        raise ValueError(
            f"learned_settings={list(names)} with hops={args.hops} and feedback_discount={args.feedback_discount}: "
            "the feedback is detached, and the settings have no other way to the loss, so they would get no gradient; "
            "leave hops out or give it at least 1, with a discount above 0"
        )
    if "max_entropy_nats" in names and args.max_entropy_nats is None:
        raise ValueError("learned_settings: max_entropy_nats has no start; give the argument max_entropy_nats one")
    if "temperature" in names and args.max_entropy_nats is not None:
        raise ValueError(
            f"learned_settings: max_entropy_nats={args.max_entropy_nats} sets the temperature itself; learn "
            "max_entropy_nats, or leave the bound out to learn the temperature"
        )
    if "max_entropy_nats" in names and args.detach_temperature:
        raise ValueError("detach_temperature=True leaves a learned max_entropy_nats without a gradient; set it False")
    given = {"temperature": "relaxation_temperature", "max_entropy_nats": "max_entropy_nats"}
    for name in [argument for key, argument in given.items() if key in names] + ["top_k"]:
        if not schedules[name].is_constant:
            raise ValueError(f"{name}={getattr(args, name)!r} is a schedule; with learned_settings give it one number")
    if not args.learned_settings_learning_rate > 0.0:
        raise ValueError(f"learned_settings_learning_rate must be positive, got {args.learned_settings_learning_rate}")
    if not args.learned_settings_barrier >= 0.0:
        raise ValueError(f"learned_settings_barrier must not be negative, got {args.learned_settings_barrier}")


def with_learned(base: Relaxation, found: Relaxation, names: Sequence[str]) -> Relaxation:
    """A relaxation of the configuration with what is learned in place of its own numbers.

    Args:
        base: as the configuration has it at this step.
        found: of a `LearnedRelaxation`: its `relaxation()` or `frozen()`.
        names: the learned settings.
    """
    settings: dict[str, Any] = {
        name: getattr(found, name) for name in ("temperature", "max_entropy_nats") if name in names
    }
    return replace(base, truncation=found.truncation, smooth=found.smooth, **settings)


def save_learned(learned: LearnedRelaxation, folder: Path) -> None:
    """Write `learned_settings.json`."""
    with write_atomically(folder / FILE_NAME) as temporary:
        temporary.write_text(json.dumps(learned.to_dict(), indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def load_learned(learned: LearnedRelaxation, folder: Path) -> None:
    """Put settings where those of a folder's file are, the same numbers where the ranges are; without a file, nothing.

    Raises:
        ValueError: the file is broken, or a value lies outside the range that this K has.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return
    try:
        saved = LearnedRelaxation.from_dict(json.loads(path.read_text(encoding="utf-8")))
        for name in set(learned.raw) & set(saved.raw):
            if saved.ranges[name] == learned.ranges[name]:
                learned.raw[name].copy_(saved.raw[name])
            else:
                learned.set_values({name: saved.setting(name).item()})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be gone on from: {error}; remove it to start from the arguments") from error


class LearnedSettingsMixin:
    """
    What lets a trainer learn settings of its relaxation.

    Overrides of [`~transformers.Trainer`]: `create_optimizer` (a group of its own, without weight decay),
    `training_step` (a setting that nothing depended on is not stepped), `_load_from_checkpoint`, `_load_best_model`
    and `_save`. A subclass calls `attach_learned_settings`, rolls out with `learned.frozen()`
    and adds `learned_term` to the loss, made inside the wrapped model's forward.
    """

    learned: LearnedRelaxation | None = None

    def attach_learned_settings(self, model: "str | nn.Module") -> None:
        """Hang them on the trained model, at the values that lie beside it, else at their start.

        Raises:
            ValueError: an engine that shards, or an optimizer of the caller's.
        """
        if (learned := make_learned(self.args)) is None:
            return
        engine = self.accelerator.distributed_type
        if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"learned_settings work on one process and under DDP, not under {engine.value}; use another "
                "accelerate configuration, or leave them out"
            )
        if self.optimizer is not None:
            raise ValueError("learned_settings need a group in the trainer's own optimizer; leave `optimizers` out")
        name = model if isinstance(model, str) else model.config._name_or_path
        if name:
            load_learned(learned, Path(resolve_model(name)))
        self.learned = learned.to(self.accelerator.device)
        self._reported: set[str] = set()
        setattr(self.model, _ATTRIBUTE, self.learned)

    def learned_numbers(self) -> dict[str, float]:
        """The settings as they are logged; warns once of each that has come to its greedy end."""
        if self.learned is None:
            return {}
        values = self.learned.values()
        for sentence in self.learned.report():
            subject = sentence.partition(" has come ")[0]
            if subject not in self._reported and self.is_world_process_zero():
                logger.warning(f"Step {self.state.global_step}: {sentence} (here: learned_settings_barrier).")
            self._reported.add(subject)
        return {f"learned/{name}": value for name, value in values.items()}

    def beside_learned_term(self, depends: bool, function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
        """What a function gives, and `learned_term`: DDP wants all that is differentiated from one forward pass."""
        return function(*arguments), self.learned_term(depends)

    def learned_term(self, depends: bool) -> "Tensor | float":
        """What the loss of a step has beside the objective: the barrier.

        Args:
            depends: whether soft tokens were fed; if not, the term is a zero with a graph, since DDP may wait for a
                gradient of every parameter.
        """
        if self.learned is None:
            return 0.0
        if depends and self.args.learned_settings_barrier > 0.0:
            return self.learned.penalty(self.args.learned_settings_barrier)
        return 0.0 * torch.stack(list(self.learned.raw.values())).sum()

    def training_step(self, *arguments: Any, **settings: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **settings)  # type: ignore[misc]
        for raw in () if self.learned is None else self.learned.raw.values():
            if raw.grad is not None and not raw.grad.any():
                raw.grad = None  # an optimizer with momentum would go on without a gradient
        return loss

    def create_optimizer(self, *arguments: Any, **settings: Any) -> torch.optim.Optimizer:
        made = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*arguments, **settings)  # type: ignore[misc]
        if self.learned is None or made:
            return optimizer
        own = list(self.learned.raw.values())
        for group in optimizer.param_groups:
            group["params"] = [each for each in group["params"] if not any(each is raw for raw in own)]
        rate = self.args.learned_settings_learning_rate
        optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
        return optimizer

    @contextmanager
    def _without_learned_settings(self) -> Iterator[None]:
        """The model as transformers or PEFT know it, to be saved or loaded."""
        if self.learned is None:
            yield
            return
        delattr(self.model, _ATTRIBUTE)
        try:
            yield
        finally:
            setattr(self.model, _ATTRIBUTE, self.learned)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *others: Any, **settings: Any) -> None:
        with self._without_learned_settings():
            super()._load_from_checkpoint(resume_from_checkpoint, *others, **settings)  # type: ignore[misc]
        if self.learned is not None:
            load_learned(self.learned, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        with self._without_learned_settings():
            super()._load_best_model()  # type: ignore[misc]
        if self.learned is not None:
            load_learned(self.learned, Path(self.state.best_model_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with self._without_learned_settings():
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        if self.learned is not None:
            save_learned(self.learned, Path(self.args.output_dir if output_dir is None else output_dir))
