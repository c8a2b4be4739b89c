"""Callbacks: stopping on Ctrl-C or when a reward is gamed, and a progress bar that shows what matters."""

import os
import signal
from types import FrameType
from typing import Any

from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

_SHOWN = {"reward/hard": "reward", "judge": "judge", "kl": "kl", "reward/gap": "gap", "adjoint/sweeps": "sweeps"}


class InterruptCallback(TrainerCallback):
    """The first Ctrl-C or SIGTERM finishes the step, saves a checkpoint and stops; a second one stops at once.

    Clusters send SIGTERM some seconds before SIGKILL, to some processes or to all of them: what one of a distributed
    run has received, all of them obey, at the end of the same step.

    Attributes:
        signal: what stopped the run; None if nothing did.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        # Of this process. Apart from `signal`, on which all processes have agreed: one may come at any instant, also
        # while they do, and a process that looked at it then would stop a step before the others.
        self._received = 0
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that this signal ended."""
        return 0 if self.signal is None else 128 + self.signal

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._previous = {number: signal.signal(number, self._on_signal) for number in self._SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()
        name = signal.Signals(number).name
        # Not print: the signal may have come inside one, whose buffer is locked.
        os.write(2, f"{name}: finishing this step and saving a checkpoint (a second one stops at once).\n".encode())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        received = [self._received]
        agreed = max(gather_object(received) if args.world_size > 1 else received)
        if agreed:
            self.signal = agreed
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class GamingCallback(TrainerCallback):
    """Stops training when the reward is gamed: soft tokens score what hard ones do not, or the judge falls.

    `reason` says why training was stopped; None if it was not. A run with a `save_strategy` saves a checkpoint first.

    Args:
        max_gap: stop when the logged `reward/gap`, soft less hard, is larger at `patience` logs in a row.
        max_judge_drop: stop when an evaluation's judge is that far below the best evaluation of the run.
        patience: logs in a row; a single batch may have a gap by chance.
    """

    def __init__(self, max_gap: float | None = None, max_judge_drop: float | None = None, patience: int = 3) -> None:
        self.max_gap = max_gap
        self.max_judge_drop = max_judge_drop
        self.patience = patience
        self.reason: str | None = None
        self._gaps_in_a_row = 0
        self._best_judge = -float("inf")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        gap = (logs or {}).get("reward/gap")
        if self.max_gap is not None and gap is not None:
            self._gaps_in_a_row = self._gaps_in_a_row + 1 if gap > self.max_gap else 0
            if self._gaps_in_a_row >= self.patience:
                self._stop(
                    f"the soft reward has been more than early_stop_on_gap={self.max_gap:g} above the hard one at "
                    f"{self.patience} logs in a row, at last by {gap:.3g}",
                    args, state, control,
                )  # fmt: skip
        return control

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        judge = (metrics or {}).get("eval_judge")
        if self.max_judge_drop is not None and judge is not None:
            self._best_judge = max(self._best_judge, judge)
            if self._best_judge - judge > self.max_judge_drop:
                self._stop(
                    f"the judge has fallen to {judge:.3g} from {self._best_judge:.3g}, by more than "
                    f"early_stop_on_judge_drop={self.max_judge_drop:g}",
                    args, state, control,
                )  # fmt: skip
        return control

    def _stop(self, reason: str, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if self.reason is None and state.is_world_process_zero:
            tqdm.write(f"Stopped at step {state.global_step}: {reason}.")
        self.reason = reason
        control.should_training_stop = True
        control.should_save = control.should_save or args.save_strategy != SaveStrategy.NO


class RewardProgressCallback(TrainerCallback):
    """One bar over steps with reward, judge, KL and gap; without a terminal, one line at every log."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", disable=None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = {label: f"{logs[key]:.3g}" for key, label in _SHOWN.items() if key in (logs or {})}
        if self.bar is None or not shown:
            return
        if self.bar.disable:
            numbers = "  ".join(f"{label} {value}" for label, value in shown.items())
            print(
                f"step {state.global_step:>4}/{state.max_steps}  {numbers}  {logs['step_time']:.1f} s/step", flush=True
            )
        else:
            self.bar.set_postfix(shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
