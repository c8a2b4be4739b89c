"""Checkpoints that are whole or absent, and that say what they are: written aside, listed with hashes, renamed.

Every checkpoint has a `manifest.json`: size and SHA-256 of each file, and the run that wrote it (engine, processes,
sequences a step). Before a run goes on from one, its files are compared with that list, so that a truncated file or a
flipped bit is found by name and not by a strange loss.

All processes write into one folder, on a file system that they share. A file's hash finds damage, not malice; what is
loaded is tensors, by safetensors and by torch's restricted unpickler.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from softrl._store import announce, remove, replace_folder
from softrl.assets import sha256_of, write_atomically

MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished"  # in output_dir: what is being written, and what a run that died was writing
_RESTRICTED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # of torch
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class CheckpointError(OSError):
    """A checkpoint cannot be written; the message says what is left and what to do."""


class NotResumableError(ValueError):
    """A checkpoint is damaged, or of another kind of run; the message says which and what to do."""


@dataclass(frozen=True)
class RunFacts:
    """What a run must have in common with the one whose checkpoint it goes on from.

    Attributes:
        engine: "replicated" (one process or DDP), "fsdp", or "zero1" to "zero3".
        num_processes: how many wrote it.
        sequences_per_step: of all processes and micro-batches.
    """

    engine: str
    num_processes: int
    sequences_per_step: int

    @classmethod
    def of(cls, accelerator: Accelerator, sequences_per_step: int) -> "RunFacts":
        engine = "replicated"
        if accelerator.distributed_type is DistributedType.DEEPSPEED:
            engine = f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
        elif accelerator.distributed_type is DistributedType.FSDP:
            engine = "fsdp"
        return cls(engine, accelerator.num_processes, sequences_per_step)


def write_manifest(folder: Path, facts: RunFacts, accelerator: Accelerator) -> None:
    """List the files of a checkpoint that all processes have written; each process hashes its share of them."""
    accelerator.wait_for_everyone()
    rank, count = accelerator.process_index, accelerator.num_processes
    shares = gather_object([_hashes(folder, _files(folder)[rank::count])])
    if accelerator.is_main_process:
        files = dict(sorted(entry for share in shares for entry in share.items()))
        with write_atomically(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps({"run": asdict(facts), "files": files}, indent=1) + "\n", encoding="utf-8")


def damage(folder: Path, rank: int = 0, count: int = 1) -> str | None:
    """What is wrong with a checkpoint, in words; None if its files are those that were written.

    Args:
        folder: the checkpoint.
        rank, count: hash every `count`-th file only, from the `rank`-th: a process's share.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except OSError:
        return f"it has no {MANIFEST}: another trainer wrote it, or it was copied in part"
    except (ValueError, TypeError, KeyError):
        return f"its {MANIFEST} cannot be read"
    for name, written in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != written["bytes"]:
            return f"{name} has {path.stat().st_size} bytes and was written with {written['bytes']}"
    for name in sorted(files)[rank::count]:
        if sha256_of(folder / name) != files[name]["sha256"]:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def latest_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a folder that is whole; those that are damaged are named and passed over."""
    found = {int(match[1]): path for path in Path(output_dir).glob("*") if (match := _NAME.fullmatch(path.name))}
    for _, path in sorted(found.items(), reverse=True):
        wrong = damage(path)
        if wrong is None:
            return str(path)
        announce(f"passing over {path}: {wrong}")
    return None


def require_resumable(checkpoint: str | Path, facts: RunFacts, accelerator: Accelerator, any_data: bool) -> None:
    """See that a checkpoint is whole and that this run can go on from it, on all processes alike.

    Args:
        checkpoint: its folder.
        facts: this run's.
        accelerator: of this run.
        any_data: whether the run starts its data anew (`ignore_data_skip`), so that steps of another size are fine.
    Raises:
        NotResumableError: a damaged checkpoint, another engine, another number of processes where that matters, or
            steps of another number of sequences.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise NotResumableError(
            f"resume_from_checkpoint={str(checkpoint)!r} is not a folder; pass a checkpoint's, or True"
        )
    found = gather_object([damage(folder, accelerator.process_index, accelerator.num_processes)])
    if wrong := next((each for each in found if each), None):
        raise NotResumableError(
            f"{folder} cannot be resumed from: {wrong}. resume_from_checkpoint=True (on the command line 'latest') "
            "takes the newest checkpoint that is whole; to start a new run from a model's weights, pass the folder as "
            "the model"
        )
    written = RunFacts(**json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["run"])
    if written.engine != facts.engine:
        raise NotResumableError(
            f"{folder} was written under {written.engine} and this run is {facts.engine}: engines lay optimizer "
            "states out differently. Resume with the engine that wrote it, or start a new run from its model"
        )
    if facts.engine.startswith("zero") and written.num_processes != facts.num_processes:
        raise NotResumableError(
            f"{folder} was written by {written.num_processes} processes under {written.engine}, each with its part "
            f"of the optimizer states, and this run has {facts.num_processes}. Resume with --num_processes "
            f"{written.num_processes}, or start a new run from its model"
        )
    if not any_data and written.sequences_per_step != facts.sequences_per_step:
        raise NotResumableError(
            f"{folder} was written by a run of {written.sequences_per_step} sequences a step and this one has "
            f"{facts.sequences_per_step} (per_device_train_batch_size * gradient_accumulation_steps * processes), so "
            "its place in the data would be another. Keep the product, or pass ignore_data_skip to start the data anew"
        )


@contextmanager
def restricted_unpickling(accelerator: Accelerator) -> Iterator[None]:
    """Have DeepSpeed load its files by torch's restricted unpickler, as the host loads all others.

    It asks `torch.load` for the unrestricted one, which would run whatever code a checkpoint from elsewhere holds.
    """
    if accelerator.distributed_type is not DistributedType.DEEPSPEED:
        yield
        return
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_RESTRICTED)
    os.environ[_RESTRICTED] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ[_RESTRICTED]
        if before is not None:
            os.environ[_RESTRICTED] = before


class CheckpointMixin:
    """
    What makes a trainer's checkpoints whole or absent.

    Overrides of [`~transformers.Trainer`]: `train` (what is resumed from is checked first), `_save_checkpoint` and
    `_get_output_dir` (written aside, renamed when all processes are done), `_push_from_checkpoint` (after that), and
    `save_model` (file by file into place). A subclass adds to a checkpoint in `save_own_state`.
    """

    _aside: Path | None = None
    _pushes = False

    @property
    def run_facts(self) -> RunFacts:
        args = self.args
        return RunFacts.of(
            self.accelerator, args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **settings: Any) -> Any:
        """As the host's.

        Raises:
            NotResumableError: there is nothing to resume from, or it is damaged or of another kind of run.
        """
        if resume_from_checkpoint is True:
            found = latest_checkpoint(self.args.output_dir) if self.accelerator.is_main_process else None
            resume_from_checkpoint = gather_object([found])[0]
            if resume_from_checkpoint is None:
                raise NotResumableError(f"{self.args.output_dir} holds no whole checkpoint to resume from")
        if resume_from_checkpoint:
            require_resumable(resume_from_checkpoint, self.run_facts, self.accelerator, self.args.ignore_data_skip)
        return super().train(resume_from_checkpoint, *others, **settings)

    def _prepare_for_training(self, *arguments: Any) -> Any:
        with restricted_unpickling(self.accelerator):
            return super()._prepare_for_training(*arguments)

    def save_own_state(self, folder: Path) -> None:
        """Write what a trainer has beside the host's files into a checkpoint; called on every process."""

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._written_aside(run_dir, f"checkpoint {self.state.global_step}") as aside:
            super()._save_checkpoint(model, trial)
            self.save_own_state(aside / name)
            self._name_best_by_its_place(aside / name, run_dir / name)
            write_manifest(aside / name, self.run_facts, self.accelerator)
            if self.args.should_save:
                replace_folder(aside / name, run_dir / name)
            self.accelerator.wait_for_everyone()
        if self._pushes:
            super()._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:  # not before the new one is whole
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._pushes = True  # the folder has not got its name yet

    def _name_best_by_its_place(self, aside: Path, place: Path) -> None:
        if self.state.best_model_checkpoint == str(aside):
            self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(aside / TRAINER_STATE_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._aside is not None:
            super().save_model(output_dir, _internal_call)
            return
        target = Path(output_dir or self.args.output_dir)
        with self._written_aside(target, "the model") as aside:
            super().save_model(str(aside), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for name in _files(aside):
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    (aside / name).replace(target / name)
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    @contextmanager
    def _written_aside(self, place: Path, what: str) -> Iterator[Path]:
        """A folder beside what is to be made; it is gone afterwards, and what a run that died left there before."""
        aside = place / _UNFINISHED
        if self.args.should_save:
            remove(aside)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._aside = aside
        try:
            yield aside
        except Exception as error:
            raise CheckpointError(
                f"{what} could not be written into {place} ({type(error).__name__}: {error}). Whatever was there "
                "before is as it was. Free space or choose another output_dir, and resume from the latest checkpoint"
            ) from error
        finally:
            self._aside = None
            if self.args.should_save:
                remove(aside)


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST
    )


def _hashes(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}
