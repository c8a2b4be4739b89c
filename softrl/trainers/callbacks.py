"""Callbacks: stopping cleanly on Ctrl-C, and a progress bar that shows what matters in a soft rollout."""

import signal
from types import FrameType
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SHOWN = {"reward/hard": "reward", "judge": "judge", "kl": "kl", "reward/gap": "gap", "adjoint/sweeps": "sweeps"}


class InterruptCallback(TrainerCallback):
    """The first Ctrl-C finishes the step, saves a checkpoint and stops; a second one stops at once.

    `interrupted` tells afterwards whether that happened.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._previous)
        tqdm.write("Interrupted: finishing this step and saving a checkpoint (Ctrl-C again stops at once).")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)


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
