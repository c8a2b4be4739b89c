"""One run of `softrl compare`: a trainer trained in this process and evaluated along its way, whoever's it is."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from softrl.assets import resolve_model
from softrl.models.policy import Policy
from softrl.rewards.resolve import resolve_rewards
from softrl.studies.compare_config import Run
from softrl.tokens.truncation import Truncation
from softrl.trainers import ListwisePreferenceConfig, PPOConfig, ReinforceConfig, RolloutConfig
from softrl.trainers.evaluation import Judge, Sample, evaluate_policy, metrics_of_texts, summary

Record = dict[str, Any]
_LOGGED = ("reward", "kl", "loss", "grad_norm", "step_time")
_FAILURES = (ValueError, RuntimeError, ArithmeticError)  # of a run's own making; they are shown as failed rows


@dataclass(frozen=True)
class Cycle:
    """A rollout and the optimizer steps that are taken on it."""

    samples: int
    steps: int

    @staticmethod
    def of(args: Any) -> "Cycle":
        """That of a trainer's arguments: PPO's epochs and TRL's iterations go over a rollout several times.

        Raises:
            ValueError: the trainer has no rollouts.
        """
        if isinstance(args, ListwisePreferenceConfig):
            raise ValueError("ranked completions are read, not sampled, and samples are what methods are compared by")
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
        evaluate: measures the policy as it is now, given the step and the seconds so far.
        every_steps: optimizer steps between two evaluations.
        max_seconds: of training; a run that has used them up is evaluated and stopped.
        every_seconds: of training between two evaluations, whatever the steps.
    """

    def __init__(
        self,
        evaluate: Callable[[int, float], None],
        every_steps: int | None = None,
        max_seconds: float | None = None,
        every_seconds: float | None = None,
    ):
        self.evaluate, self.every_steps, self.max_seconds = evaluate, every_steps, max_seconds
        self.every_seconds = every_seconds
        self.seconds = self._evaluated = 0.0
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
        if is_over or self._is_due(state.global_step):
            self.evaluate(state.global_step, self.seconds)
            self._evaluated = self.seconds
        control.should_training_stop = control.should_training_stop or is_over or bool(self.failure)
        return control

    def _is_due(self, step: int) -> bool:
        if self.every_seconds is not None and self.seconds - self._evaluated >= self.every_seconds:
            return True
        return self.every_steps is not None and step % self.every_steps == 0

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


def measured(
    run: Run,
    trainer: Any,
    evaluator: "PolicyEvaluator",
    start: Callable[[], list[Sample]],
    on_point: Callable[[Record, Cycle], None],
) -> Record:
    """Train a run and evaluate it on its way.

    Args:
        run: its settings and budget.
        trainer: made of them, with `max_steps` set.
        evaluator: measures its policy.
        start: the evaluation before training.
        on_point: is told every evaluation.
    Returns:
        Evaluation points, training log and last completions; `status` is "done" or what went wrong.
    """
    args = trainer.args
    cycle = Cycle.of(args)
    points: list[Record] = []
    samples: list[Sample] = []

    def evaluate(step: int, seconds: float) -> None:
        begun = _now()
        samples[:] = evaluator.samples() if step else start()
        drawn = cycle.samples_after(step)
        counts = {"step": step, "samples": drawn, "reward_calls": drawn * _calls_a_sample(args)}
        point = _point(samples)
        scores = {name: value for name, value in point.items() if name.startswith("rewards/")}
        scores |= metrics_of_texts(evaluator.metrics, samples)
        spent = {"seconds": seconds, "evaluation_seconds": _now() - begun}
        points.append({**counts, **spent, **point, "scores": scores})
        on_point(points[-1], cycle)

    every = cycle.steps_for(run.evaluate_every_samples, "evaluate_every_samples")
    callback = EvaluationPoints(evaluate, every, run.max_seconds)
    for quieted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(quieted)
    trainer.add_callback(callback)
    try:
        evaluate(0, 0.0)
        trainer.train()
        status = callback.failure or _broken(points) or "done"
    except _FAILURES as error:
        status = f"{type(error).__name__}: {error}"
    return {
        "stage": run.stage, "method": run.method, "beta": run.beta, "seed": run.seed,
        "learning_rate": args.learning_rate, "status": status, "settings": run.settings,
        "dtype": str(evaluator.model.dtype).removeprefix("torch."),  # that it ran in, whatever was asked for
        "max_samples": run.max_samples, "samples_a_rollout": cycle.samples, "steps_a_rollout": cycle.steps,
        "points": points, "log": _shortened(trainer.state.log_history),
        "completions": [asdict(sample) for sample in samples],
    }  # fmt: skip


class PolicyEvaluator:
    """Held-out completions of what a trainer is training, whoever's trainer it is."""

    def __init__(self, trainer: Any, arguments: Any, model_args: Any, judge: Judge | None):
        self.trainer, self.judge = trainer, judge
        args = trainer.args
        self.metrics = getattr(trainer, "eval_metrics", {})  # TRL's trainers have none
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
