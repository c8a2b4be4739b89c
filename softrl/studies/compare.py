"""`softrl compare`: training methods at equal samples and seconds, evaluated along their runs.

Every run is trained in this process, evaluated on the same held-out prompts by `evaluate_policy`, whoever trained it,
and written as one file when it ends, so that an interrupted study goes on where it stopped. The figures and the page
are made by `compare_report`.
"""

import contextlib
import copy
import gc
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from softrl.assets import resolve_model, write_atomically
from softrl.models.policy import Policy
from softrl.rewards.resolve import resolve_rewards
from softrl.studies.compare_config import CompareConfig, Method, Run
from softrl.tokens.truncation import Truncation
from softrl.trainers import PPOConfig, ReinforceConfig, RolloutConfig, SoftRolloutConfig
from softrl.trainers.evaluation import Judge, Sample, evaluate_policy, summary

Record = dict[str, Any]
_LOGGED = ("reward", "kl", "loss", "grad_norm", "step_time")
_FAILURES = (ValueError, RuntimeError, ArithmeticError)  # of a run's own making; they are shown as failed rows


@dataclass(frozen=True)
class Tools:
    """What `softrl.cli` lends: words to arguments, arguments to a trainer, a judge by name."""

    parse: Callable[[list[str]], tuple[Any, Any, Any]]
    build_trainer: Callable[[Any, Any, Any], Any]
    load_judge: Callable[[str], Judge | None]


@dataclass(frozen=True)
class Cycle:
    """A rollout and the optimizer steps that are taken on it."""

    samples: int
    steps: int

    @staticmethod
    def of(args: Any) -> "Cycle":
        """That of a trainer's arguments: PPO's epochs and TRL's iterations go over a rollout several times."""
        sequences = args.per_device_train_batch_size * args.world_size
        if isinstance(args, RolloutConfig):
            steps = args.steps_per_rollout if isinstance(args, PPOConfig) else 1
            return Cycle(sequences * args.gradient_accumulation_steps, steps)
        batches = args.steps_per_generation
        return Cycle(sequences * batches, args.num_iterations * batches // args.gradient_accumulation_steps)

    def steps_for(self, samples: int, name: str) -> int:
        """Optimizer steps that so many samples make.

        Raises:
            ValueError: they are no whole number of rollouts.
        """
        if samples % self.samples:
            raise ValueError(f"{name}={samples} is not a multiple of the {self.samples} samples of a rollout")
        return samples // self.samples * self.steps

    def samples_after(self, step: int) -> int:
        """Completions drawn by the end of an optimizer step."""
        return -(-step // self.steps) * self.samples


class EvaluationPoints(TrainerCallback):
    """Evaluates along a run, stops it, and counts its seconds: those between a step's beginning and its end.

    Args:
        evaluate: measures the policy as it is now, given the step.
        every_steps: optimizer steps between two evaluations.
        max_seconds: of training; a run that has used them up is evaluated and stopped.
    """

    def __init__(self, evaluate: Callable[[int, float], None], every_steps: int, max_seconds: float | None = None):
        self.evaluate, self.every_steps, self.max_seconds = evaluate, every_steps, max_seconds
        self.seconds = 0.0
        self.failure = ""
        self._begun = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = _now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.seconds += _now() - self._begun
        is_over = self.max_seconds is not None and self.seconds >= self.max_seconds
        if is_over or state.global_step % self.every_steps == 0:
            self.evaluate(state.global_step, self.seconds)
        control.should_training_stop = control.should_training_stop or is_over or bool(self.failure)
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("loss", "grad_norm"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                self.failure = f"{name} is not finite at step {state.global_step}"
                control.should_training_stop = True


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Progress:
    """How far the study is, and when it will be over if it goes on like this."""

    total_samples: int
    done_samples: int = 0
    clock: Callable[[], float] = time.monotonic
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def line(self, run: Run, point: Record, cycle: Cycle, steps: int) -> str:
        """One evaluation point."""
        done = self.done_samples + point["samples"]
        left = (self.total_samples - done) * (self.clock() - self.started) / done if done else math.nan
        numbers = f"reward {point['reward']:.3f}"
        numbers += f", judge {point['judge']:.3f}" if point.get("judge") is not None else ""
        numbers += f", KL {abs(point['kl_completion']):.2f} nats"  # at the start it is zero up to rounding
        pace = f"{point['seconds'] / steps * cycle.steps:.2f} s a rollout" if steps else "start"
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
        scores = [(tuning_score(self.config, self.record(run)), run.settings["learning_rate"]) for run in runs]
        if not scores or any(score is None for score, _ in scores):
            return None
        return max(scores, key=lambda pair: pair[0])[1]  # the first of equals

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
        """Train a run and evaluate it on its way.

        Returns:
            Its settings, evaluation points, training log and last completions; `status` is "done" or what went wrong.
        """
        arguments, args, model_args = self.parsed(run)
        cycle = Cycle.of(args)
        args.max_steps = cycle.steps_for(run.max_samples, "max_samples")
        judge = self._judge(arguments.judge)
        arguments.judge = "none"  # scored at the evaluation points, so that its seconds are not a method's
        trainer = self.tools.build_trainer(arguments, args, model_args)
        evaluator = _PolicyEvaluator(trainer, arguments, model_args, judge)
        points: list[Record] = []
        samples: list[Sample] = []

        def evaluate(step: int, seconds: float) -> None:
            begun = _now()
            samples[:] = evaluator.samples() if step else self._start(run, evaluator)
            drawn = cycle.samples_after(step)
            counts = {"step": step, "samples": drawn, "reward_calls": drawn * _calls_a_sample(args)}
            points.append({**counts, "seconds": seconds, "evaluation_seconds": _now() - begun, **_point(samples)})
            self.write(progress.line(run, points[-1], cycle, step))

        every = cycle.steps_for(run.evaluate_every_samples, "evaluate_every_samples")
        callback = EvaluationPoints(evaluate, every, run.max_seconds)
        for quieted in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(quieted)
        trainer.add_callback(callback)
        status = "done"
        try:
            evaluate(0, 0.0)
            trainer.train()
            status = callback.failure or _broken(points) or "done"
        except _FAILURES as error:
            status = f"{type(error).__name__}: {error}"
        return {
            "stage": run.stage, "method": run.method, "trainer": arguments.trainer, "beta": run.beta,
            "seed": run.seed, "learning_rate": args.learning_rate, "status": status, "settings": run.settings,
            "max_samples": run.max_samples, "samples_a_rollout": cycle.samples, "steps_a_rollout": cycle.steps,
            "points": points, "log": _shortened(trainer.state.log_history),
            "completions": [asdict(sample) for sample in samples],
        }  # fmt: skip

    def _judge(self, name: str) -> Judge | None:
        if name not in self._judges:
            self._judges[name] = self.tools.load_judge(name)
        return self._judges[name]

    def _start(self, run: Run, evaluator: "_PolicyEvaluator") -> list[Sample]:
        """The evaluation before training, which all methods share."""
        from softrl.studies.report import load_samples, save_samples

        path = run.start_path(self.config.output_dir, method_keys())
        if not path.is_file():
            save_samples(evaluator.samples(), path)
        return load_samples(path)


class _PolicyEvaluator:
    """Held-out completions of what a trainer is training, whoever's trainer it is."""

    def __init__(self, trainer: Any, arguments: Any, model_args: Any, judge: Judge | None):
        self.trainer, self.judge = trainer, judge
        args = trainer.args
        self.model = trainer.accelerator.unwrap_model(trainer.model)
        self.policy = Policy(self.model, args.temperature)
        if isinstance(self.model, PeftModel):
            self.reference = Policy(self.model, args.temperature, context=self.model.disable_adapter)
        else:
            frozen = copy.deepcopy(self.model).eval().requires_grad_(False)
            self.reference = Policy(frozen, args.temperature)
        if hasattr(trainer, "rewards"):
            self.reference = trainer.reference or self.reference
            self.rewards = trainer.rewards.rewards
        else:
            name = resolve_model(model_args.model_name_or_path)
            self.rewards = resolve_rewards(
                arguments.reward_funcs, trainer.processing_class, name, differentiates=False
            )

    def samples(self) -> list[Sample]:
        """One completion a held-out prompt; the same random streams for all methods of a seed."""
        args = self.trainer.args
        with self.trainer.accelerator.autocast():
            return evaluate_policy(
                self.policy, self.reference, self.trainer.eval_dataset, self.trainer.processing_class, self.rewards,
                self.judge, reward_weights=args.reward_weights, max_completion_length=args.max_completion_length,
                max_prompt_length=getattr(args, "max_prompt_length", None),
                truncation=Truncation(1, args.top_p, args.min_p or 0.0),
                batch_size=args.per_device_eval_batch_size, seed=args.seed,
            )  # fmt: skip


def method_keys() -> set[str]:
    """Keys that say how a policy is trained, and nothing of how it is sampled and measured."""
    shared = {each.name for each in fields(RolloutConfig)}
    own = {each.name for kind in (SoftRolloutConfig, ReinforceConfig, PPOConfig) for each in fields(kind)}
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


def _point(samples: list[Sample]) -> Record:
    """The metrics of an evaluation, and its numbers by prompt."""
    rewards, judged = [sample.reward for sample in samples], [sample.judge for sample in samples]
    return {**summary(samples), "rewards_by_prompt": rewards, "judge_by_prompt": judged}


def _calls_a_sample(args: Any) -> int:
    """Rewards evaluated a sample: hard and soft ones where a relaxation corrects a score function."""
    return 2 if isinstance(args, ReinforceConfig) and args.estimator == "pathwise_control_variate" else 1


def _broken(points: list[Record]) -> str:
    """What is not finite at the last evaluation."""
    wrong = [name for name in ("reward", "judge", "kl_completion") if not math.isfinite(points[-1].get(name, 0.0))]
    return f"{', '.join(wrong)} not finite at step {points[-1]['step']}" if wrong else ""


def _shortened(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps' rows, without what the report has no use for."""
    rows = [row for row in log_history if "loss" in row]
    return [{"step": row["step"], **{key: row[key] for key in _LOGGED if key in row}} for row in rows]
