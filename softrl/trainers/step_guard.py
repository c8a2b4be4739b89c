"""Steps that are not taken: gradients that are not finite, rewards that jump. Many in a row end the run.

A reward that jumps makes the loss NaN, so that one mechanism leaves a step out: DeepSpeed passes over a step whose
gradient norm is not finite by itself, for all others the gradients are dropped before the optimizer looks at them.
The norm is that of all processes, so they agree. A learning-rate schedule goes on at such a step, but for DeepSpeed's.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.trainer_utils import SaveStrategy

_STATE = "step_guard"  # its key in the trainer's state
_MEMORY = 0.95  # of the running mean and variance, a micro-batch: they remember about twenty
_FIRST = 10  # micro-batches that are never called jumps


@dataclass
class RewardHistory:
    """Exponentially weighted mean and variance of the micro-batches' mean rewards, without those that jumped."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    @property
    def spread(self) -> float:
        """The standard deviation, at least a thousandth of the mean: a reward that never varied may begin to."""
        return max(math.sqrt(self.variance), 1e-3 * abs(self.mean))

    def jumps(self, reward: float, threshold: float) -> bool:
        """Whether a reward is more than `threshold` standard deviations from the mean; if not, it is remembered."""
        distance = reward - self.mean
        if self.count >= _FIRST and abs(distance) > threshold * self.spread:
            return True
        step = max(1.0 - _MEMORY, 1.0 / (self.count + 1))  # a plain mean while there are few
        self.mean += step * distance
        self.variance = (1.0 - step) * (self.variance + step * distance * distance)
        self.count += 1
        return False


class StepGuardMixin:
    """
    What makes a trainer leave out steps that would harm.

    Overrides of [`~transformers.Trainer`]: `_get_grad_norm`, `train` (raises when too many steps in a row were left
    out), `log`. A subclass asks `reward_jumps` for every micro-batch and makes the loss NaN where it does.
    """

    _gave_up: str | None = None

    def reward_jumps(self, mean_reward: float) -> bool:
        """Whether `args.max_reward_jump` is set and a micro-batch's mean reward, of all processes, exceeds it."""
        threshold = self.args.max_reward_jump
        if threshold is None:
            return False
        saved = self._guarded()
        history = RewardHistory(**saved["history"])
        jumped = history.jumps(mean_reward, threshold)
        saved["history"] = asdict(history)
        if jumped and self.is_world_process_zero():
            tqdm.write(
                f"Step {self.state.global_step + 1}: the mean reward jumped to {mean_reward:.4g} from "
                f"{history.mean:.4g} ± {history.spread:.2g}, by more than max_reward_jump={threshold:g} deviations."
            )
        return jumped

    def _guarded(self) -> dict[str, Any]:
        """What is saved with every checkpoint: counts, and the rewards' history."""
        empty = {"skipped": 0, "in_a_row": 0, "history": asdict(RewardHistory())}
        return self.state.stateful_callbacks.setdefault(_STATE, empty)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is None:
            return None
        saved, value = self._guarded(), float(norm.item() if isinstance(norm, Tensor) else norm)
        if math.isfinite(value):
            saved["in_a_row"] = 0
            return norm
        if not self.is_deepspeed_enabled:
            model.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient
        saved["skipped"] += 1
        saved["in_a_row"] += 1
        step, limit = self.state.global_step + 1, self.args.max_skipped_steps
        if self.is_world_process_zero():
            tqdm.write(f"Step {step} is not taken: its gradient norm is {value} ({saved['in_a_row']} in a row).")
        if saved["in_a_row"] >= limit:
            self._gave_up = (
                f"{saved['in_a_row']} steps in a row had gradients that are not finite or rewards that jumped, the "
                f"last one step {step} (max_skipped_steps={limit}). The parameters are those before them. Look at "
                "reward and grad_norm in the logs; a smaller learning_rate, hops, feedback_discount or "
                "adjoint_clip tame gradients, and float32 instead of bfloat16"
            )
            self.control.should_training_stop = True
            self.control.should_save = self.control.should_save or self.args.save_strategy != SaveStrategy.NO
        return norm

    def train(self, *arguments: Any, **settings: Any) -> Any:
        """As the host's.

        Raises:
            FloatingPointError: `args.max_skipped_steps` steps in a row were left out. A run with a `save_strategy` has
                saved a checkpoint before.
        """
        self._gave_up = None
        output = super().train(*arguments, **settings)
        if self._gave_up is not None:
            raise FloatingPointError(self._gave_up)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        skipped = self._guarded()["skipped"]
        if "loss" in logs and skipped:
            logs = {**logs, "skipped_steps": float(skipped)}
        super().log(logs, start_time)
