"""One run of `softrl thoughts compare`: a model that is taught to think for some seconds, measured along its way."""

import gc
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from softrl.assets import resolve_model, write_atomically, write_folder_atomically
from softrl.models.small import small_llama
from softrl.studies.compare_run import EvaluationPoints
from softrl.studies.thought_config import ThoughtRun, ThoughtStudyConfig
from softrl.studies.thought_tasks import TASKS, Task
from softrl.trainers import QuietSTaRConfig, QuietSTaRTrainer
from softrl.trainers.thought_evaluation import ThoughtSample, by_position, summary

Record = dict[str, Any]
_FAILURES = (ValueError, RuntimeError, ArithmeticError)  # of a run's own making; they are shown as failed rows
_SHOWN_EACH = 12  # thoughts in a record: those that helped most, and those that harmed most
_QUIET = {
    "save_strategy": "no", "eval_strategy": "no", "report_to": "none", "logging_steps": 50, "disable_tqdm": True,
    "lr_scheduler_type": "constant_with_warmup",
}  # fmt: skip


class ThoughtStudy:
    """The runs of a study.

    Args:
        config: the study.
        write: prints a line of progress.
    """

    def __init__(self, config: ThoughtStudyConfig, write: Callable[[str], None] | None = None):
        self.config = config
        self.write = write or (lambda line: print(line, flush=True))
        self._task: Task | None = None

    @property
    def task(self) -> Task:
        """Made once for all runs."""
        if self._task is None:
            self._task = TASKS[self.config.task](self.config.model, **self.config.task_settings)
        return self._task

    def check(self) -> None:
        """Make every method's configuration before the first is trained.

        Raises:
            ValueError: a setting out of range; the method is named.
        """
        for method in self.config.methods:
            try:
                training_arguments(self.config.run(method, self.config.seeds[0]), "unused")
            except (ValueError, TypeError) as error:
                raise ValueError(f"method {method.name!r}: {error}") from error

    def train(self, methods: list[str] | None = None, seeds: list[int] | None = None) -> None:
        """Whatever has not been run yet; every finished run is kept."""
        self.check()
        missing = [run for run in self.config.runs(methods, seeds) if not run.path().is_file()]
        for number, run in enumerate(missing):
            left = (len(missing) - number) * self.config.max_seconds / 60.0
            self.write(f"{run.method.name}, seed {run.seed}: {len(missing) - number} runs, {left:.0f} min to go")
            make_start(run, self.task, self.write)
            record = measured(run, self.task, self.write)
            path = run.path()
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(path) as temporary:
                temporary.write_text(json.dumps(record), encoding="utf-8")
            gc.collect()  # a trainer and its model refer to each other
            if record["status"] != "done":
                self.write(f"{run.method.name}: FAILED, {record['status']}; delete {path} to run it again")

    def records(self) -> list[Record]:
        """All finished runs of the recipe."""
        found = [(run, run.path()) for run in self.config.runs()]
        return [
            {
                **json.loads(path.read_text(encoding="utf-8")),
                "method": run.method.name,
                "control": run.method.is_control,
            }
            for run, path in found
            if path.is_file()
        ]


def training_arguments(run: ThoughtRun, folder: str) -> QuietSTaRConfig:
    """The trainer's arguments of a run."""
    return QuietSTaRConfig(**{"output_dir": folder, "max_steps": 10**9, **_QUIET, **run.settings})


def measured(run: ThoughtRun, task: Task, write: Callable[[str], None]) -> Record:
    """Train a run and evaluate it on its way."""
    points: list[Record] = []
    samples: list[ThoughtSample] = []
    status, trained, begun = "done", 0.0, time.monotonic()
    with TemporaryDirectory() as folder:
        try:
            args = training_arguments(run, folder)
            trainer = make_trainer(run, task, args)

            def evaluate(step: int, seconds: float) -> None:
                samples[:] = measure(trainer)
                counts = {"step": step, "seconds": seconds, "thoughts": trainer.thoughts_sampled}
                points.append(counts | summary(samples))
                points[-1]["groups"] = _by_group(samples, task)
                write(
                    f"{run.method.name}, seed {run.seed}: {seconds:.0f}/{run.study.max_seconds:.0f} s, step {step}, "
                    f"nll {points[-1]['nll']:.3f}, without {points[-1]['base_nll']:.3f}"
                )

            callback = EvaluationPoints(
                evaluate, max_seconds=run.study.max_seconds, every_seconds=run.study.evaluate_every_seconds
            )
            for quieted in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(quieted)
            trainer.add_callback(callback)
            evaluate(0, 0.0)
            trainer.train()
            status = callback.failure or status
            trained = callback.seconds
        except _FAILURES as error:
            status = f"{type(error).__name__}: {error}"
    if points and not math.isfinite(points[-1]["nll"]):
        status = f"nll not finite at step {points[-1]['step']}"
    return {
        "seed": run.seed, "settings": run.settings, "status": status, "points": points,
        "seconds": trained, "total_seconds": time.monotonic() - begun,
        "mixing_by_position": by_position(samples, "mixing"), "gain_by_position": _gains(samples),
        "thoughts": shown_thoughts(samples, task),
    }  # fmt: skip


def make_trainer(run: ThoughtRun, task: Task, args: QuietSTaRConfig) -> QuietSTaRTrainer:
    """The trainer of a run, from the model that all methods of its seed start from."""
    study = run.study
    adapter = None if study.peft is None else LoraConfig(**study.peft)
    model: Any = first_model(run, task) if study.pretrain is None else str(run.start_path())
    return QuietSTaRTrainer(model, args, task.train, task.test, processing_class=task.tokenizer, peft_config=adapter)


def first_model(run: ThoughtRun, task: Task) -> Any:
    """A pretrained model's name, or a small one with random weights."""
    if isinstance(run.study.model, str):
        return resolve_model(run.study.model)
    return small_llama(task.tokenizer, seed=run.seed, **run.study.model)


def make_start(run: ThoughtRun, task: Task, write: Callable[[str], None]) -> None:
    """Train a seed's start without thoughts, unless it is there already."""
    folder = run.start_path()
    if run.study.pretrain is None or folder.is_dir():
        return
    write(f"seed {run.seed}: a start for all methods, {run.study.pretrain['max_steps']} steps without thoughts")
    settings = {**run.study.common, **run.study.pretrain, "thoughts": "none", "estimator": "rloo", "seed": run.seed}
    settings.pop("estimator_settings", None)
    settings |= {"disable_tqdm": False, "logging_steps": 10**9}  # a bar alone
    with TemporaryDirectory() as scratch:
        trainer = QuietSTaRTrainer(
            first_model(run, task), QuietSTaRConfig(**{"output_dir": scratch, **_QUIET, **settings}), task.train,
            processing_class=task.tokenizer,
        )  # fmt: skip
        trainer.train()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with write_folder_atomically(folder) as temporary:
        trainer.model.lm.save_pretrained(temporary)


def measure(trainer: QuietSTaRTrainer) -> list[ThoughtSample]:
    """Thoughts about the whole held-out set."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad():
        return [sample for rows in trainer.get_eval_dataloader() for sample in trainer.measure(model, rows)]


def _by_group(samples: list[ThoughtSample], task: Task) -> dict[str, dict[str, float]]:
    """Summaries of the task's difficulties."""
    if task.groups is None:
        return {}
    found: dict[str, list[ThoughtSample]] = {}
    for sample in samples:
        found.setdefault(task.groups[sample.text_index], []).append(sample)
    return {name: summary(of) for name, of in sorted(found.items())}


def _gains(samples: list[ThoughtSample]) -> dict[int, float]:
    base, mixed = by_position(samples, "base"), by_position(samples, "mixed")
    return {slot: base[slot] - mixed[slot] for slot in base}


def shown_thoughts(samples: list[ThoughtSample], task: Task) -> list[Record]:
    """Decoded thoughts beside their text: those that helped most first, then those that harmed most."""
    every = [
        (base - mixed, sample, index)
        for sample in samples
        for index, (base, mixed) in enumerate(zip(sample.base, sample.mixed, strict=True))
        if sample.thoughts[index]
    ]
    every.sort(key=lambda each: -each[0])
    chosen = every[:_SHOWN_EACH] + every[-_SHOWN_EACH:] if len(every) > 2 * _SHOWN_EACH else every
    decode = task.tokenizer.decode
    rows = []
    for gain, sample, index in chosen:
        ids, slot = task.test[sample.text_index]["input_ids"], sample.slots[index]
        shown = asdict(sample)
        rows.append(
            {
                "before": decode(ids[max(0, slot - 30) : slot + 1]),
                "thought": decode(shown["thoughts"][index]),
                "next": decode(ids[slot + 1 : slot + 2]),
                "gain": gain,
                "base": shown["base"][index],
                "mixed": shown["mixed"][index],
                "mixing": shown["mixing"][index],
            }
        )
    return rows
