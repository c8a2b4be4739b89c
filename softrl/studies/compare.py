"""`softrl compare`: training methods at equal samples and seconds, evaluated along their runs.

Every run is trained in this process, evaluated on the same held-out prompts by `evaluate_policy`, whoever trained it,
and written as one file when it ends, so that an interrupted study goes on where it stopped. The figures and the page
are made by `compare_report`.
"""

import contextlib
import gc
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from softrl.assets import resolve_model, write_atomically, write_folder_atomically
from softrl.studies.compare_config import CompareConfig, Method, Run, hashed
from softrl.studies.compare_run import Cycle, PolicyEvaluator, Record, measured
from softrl.studies.report import load_samples, save_samples
from softrl.trainers import (
    PPOConfig,
    ReinforceConfig,
    ReinforceGANConfig,
    RolloutConfig,
    SoftRolloutConfig,
    TextGANConfig,
)
from softrl.trainers.evaluation import Judge, Sample
from softrl.trainers.trl_config import TrlGRPOConfig, TrlRLOOConfig


@dataclass(frozen=True)
class Tools:
    """What `softrl.cli` lends: words to arguments, arguments to a trainer or to prompts, a judge by name."""

    parse: Callable[[list[str]], tuple[Any, Any, Any]]
    build_trainer: Callable[[Any, Any, Any], Any]
    load_prompts: Callable[[Any, Any], tuple[Dataset, Dataset]]
    load_judge: Callable[[str], Judge | None]


@dataclass
class Progress:
    """How far the study is, and when it will be over if it goes on like this."""

    total_samples: int
    done_samples: int = 0
    clock: Callable[[], float] = time.monotonic
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def line(self, run: Run, point: Record, cycle: Cycle) -> str:
        """One evaluation point."""
        done = self.done_samples + point["samples"]
        left = (self.total_samples - done) * (self.clock() - self.started) / done if done else math.nan
        numbers = f"reward {point['reward']:.3f}"
        numbers += f", judge {point['judge']:.3f}" if point.get("judge") is not None else ""
        numbers += f", KL {abs(point['kl_completion']):.2f} nats"  # at the start it is zero up to rounding
        rollouts = point["samples"] / cycle.samples
        pace = f"{point['seconds'] / rollouts:.2f} s a rollout" if rollouts else "start"
        eta = "" if math.isnan(left) else f"; {left / 60:.0f} min to go"
        return f"{run.label}: {point['samples']}/{run.max_samples} samples, {numbers}, {pace}{eta}"


class Study:
    """The runs of a study.

    Args:
        config: the study.
        tools: see `Tools`.
        write: prints a line of progress.
    """

    def __init__(self, config: CompareConfig, tools: Tools, write: Callable[[str], None] | None = None):
        self.config, self.tools = config, tools
        self.write = write or (lambda line: print(line, flush=True))
        self._judges: dict[str, Judge | None] = {}

    # What there is to do

    def check(self, methods: list[Method]) -> None:
        """Parse the arguments of every method before the first is trained.

        Raises:
            ValueError: an unknown key, one that a method's trainer has no use for, or a budget that its rollouts do
                not divide; the method is named.
        """
        tuning = self.config.tuning
        for method in methods:
            run = self.config.run(method, method.betas[0], self.config.seeds[0], None)
            try:
                parsed = self.parsed(run)
                known = {each.name for arguments in parsed for each in fields(arguments)}
                if unused := sorted(set(method.settings) - known):
                    raise ValueError(f"trainer {parsed[0].trainer!r} has no use for {unused}")
                cycle = Cycle.of(parsed[1])
                cycle.steps_for(run.evaluate_every_samples, "evaluate_every_samples")
                cycle.steps_for(run.max_samples, "max_samples")
                cycle.steps_for(tuning.max_samples if tuning else 0, "tuning: max_samples")
            except ValueError as error:
                raise ValueError(f"method {method.name!r}: {error}") from error

    def parsed(self, run: Run) -> tuple[Any, Any, Any]:
        """The arguments of a run; what the base has for other trainers is left out silently."""
        words = [*run.words, "--output_dir", str(Path(self.config.output_dir) / "work")]
        with contextlib.redirect_stdout(io.StringIO()):
            return self.tools.parse(words)

    def record(self, run: Run) -> Record | None:
        """What a finished run measured; None before."""
        path = run.path(self.config.output_dir)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def learning_rate(self, method: Method) -> float | None:
        """What tuning chose, None without tuning or before it is over."""
        runs = self.config.tuning_runs(method)
        rates = [run.settings["learning_rate"] for run in runs]
        scores = [score for run in runs if (score := tuning_score(self.config, self.record(run))) is not None]
        if not runs or len(scores) < len(runs):
            return None
        return rates[scores.index(max(scores))]

    def main_runs(self, methods: list[Method], betas: list[float] | None, seeds: list[int]) -> list[Run]:
        """Runs of the comparison whose learning rate is known: all methods and KL weights of a seed, then the next."""
        rates = {method.name: self.learning_rate(method) for method in methods}
        return [
            self.config.run(method, beta, seed, rates[method.name])
            for seed in seeds
            for beta in dict.fromkeys(beta for method in methods for beta in method.betas)
            for method in methods
            if beta in method.betas and (betas is None or beta in betas)
            if self.config.tuning is None or rates[method.name] is not None
        ]

    def records(self) -> list[Record]:
        """All that has been measured of the recipe, tuning first."""
        methods = self.config.methods
        tuning = [run for method in methods for run in self.config.tuning_runs(method)]
        planned = [*tuning, *self.main_runs(methods, None, self.config.seeds)]
        found = [(run, self.record(run)) for run in planned]
        return [{**record, "stage": run.stage, "method": run.method} for run, record in found if record is not None]

    # Doing it

    def train(self, methods: list[Method], betas: list[float] | None, seeds: list[int]) -> None:
        """Whatever has not been run yet, tuning first."""
        self.check(methods)
        tuning = [run for method in methods for run in self.config.tuning_runs(method)]
        cells = {(m.name, b, s) for m in methods for b in m.betas for s in seeds if betas is None or b in betas}
        # Runs whose learning rate is still to be tuned count as missing.
        done = sum(self.record(run) is not None for run in self.main_runs(methods, betas, seeds))
        missing_tuning = [run for run in tuning if self.record(run) is None]
        total = sum(run.max_samples for run in missing_tuning) + (len(cells) - done) * self.config.max_samples
        progress = Progress(total)
        for run in missing_tuning:
            self._train_one(run, progress)
        for method in methods if tuning else []:
            self.write(f"{method.name}: learning rate {self.learning_rate(method):g}")
        for run in self.main_runs(methods, betas, seeds):
            if self.record(run) is None:
                self._train_one(run, progress)

    def _train_one(self, run: Run, progress: Progress) -> None:
        path = run.path(self.config.output_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = self.measured(run, progress)
        with write_atomically(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
        progress.done_samples += run.max_samples
        gc.collect()  # a trainer and its model refer to each other
        if record["status"] != "done":
            self.write(f"{run.label}: FAILED, {record['status']}; delete {path} to run it again")

    def measured(self, run: Run, progress: Progress) -> Record:
        """Train and evaluate a run; see `compare_run.measured`."""
        arguments, args, model_args = self.parsed(run)
        args.max_steps = Cycle.of(args).steps_for(run.max_samples, "max_samples")
        judge = self._judge(arguments.judge)
        arguments.judge = "none"  # scored at the evaluation points, so that its seconds are not a method's
        self._use_saved_prompts(arguments, model_args)
        trainer = self.tools.build_trainer(arguments, args, model_args)
        evaluator = PolicyEvaluator(trainer, arguments, model_args, judge)
        record = measured(
            run, trainer, evaluator, lambda: self._start(run, evaluator),
            lambda point, cycle: self.write(progress.line(run, point, cycle)),
        )  # fmt: skip
        return {"trainer": arguments.trainer, **record}

    def _use_saved_prompts(self, arguments: Any, model_args: Any) -> None:
        """Let a run read its prompts from the output folder: cutting them out of a corpus takes seconds every time."""
        made_of = {key: value for key, value in asdict(arguments).items() if "prompt" in key or "dataset" in key}
        made_of["model"] = [model_args.model_name_or_path, model_args.model_revision]
        folder = Path(self.config.output_dir) / f"prompts-{hashed(made_of)}"
        if not folder.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(
                resolve_model(model_args.model_name_or_path), revision=model_args.model_revision
            )
            train, test = self.tools.load_prompts(arguments, tokenizer)
            with write_folder_atomically(folder) as temporary:
                DatasetDict({"train": train, "test": test}).save_to_disk(temporary)
        arguments.dataset_name, arguments.prompt_prefix = str(folder), ""
        arguments.dataset_train_split, arguments.dataset_test_split = "train", "test"

    def _judge(self, name: str) -> Judge | None:
        if name not in self._judges:
            self._judges[name] = self.tools.load_judge(name)
        return self._judges[name]

    def _start(self, run: Run, evaluator: "PolicyEvaluator") -> list[Sample]:
        """The evaluation before training, which all methods share."""
        path = run.start_path(self.config.output_dir, method_keys())
        if not path.is_file():
            save_samples(evaluator.samples(), path)
        return load_samples(path)


def method_keys() -> set[str]:
    """Keys that say how a policy is trained, and nothing of how it is sampled and measured."""
    shared = {each.name for each in fields(RolloutConfig)}
    kinds = (
        SoftRolloutConfig, ReinforceConfig, PPOConfig, TextGANConfig, ReinforceGANConfig, TrlRLOOConfig, TrlGRPOConfig,
    )  # fmt: skip
    own = {each.name for kind in kinds for each in fields(kind)}
    return (own - shared) | {"trainer", "beta", "learning_rate"}


def tuning_score(config: CompareConfig, record: Record | None) -> float | None:
    """What tuning maximises: the criterion's largest value over the points that count; None for a run to be made.

    A run that failed, or has no point within the bound on the KL, scores -infinity.
    """
    tuning = config.tuning
    if record is None or tuning is None:
        return None
    if record["status"] != "done":
        return -math.inf
    weight = record["beta"] if tuning.criterion == "objective" else 0.0
    bound = math.inf if tuning.max_kl_nats is None else tuning.max_kl_nats
    within = [point for point in record["points"][1:] if point["kl_completion"] <= bound]
    return max((point["reward"] - weight * point["kl_completion"] for point in within), default=-math.inf)
