"""How noisy a run's gradients are, from the micro-batches that a step accumulates. For our trainers and TRL's.

Left out: engines that shard gradients (DeepSpeed, FSDP), and steps of one micro-batch, whose spread cannot be seen.
"""

from functools import partial
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from jaxtyping import Float
from torch import Tensor, distributed, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from softrl.estimators.sketch import CountSketch

logger = logging.get_logger(__name__)


def gradient_statistics(parts: Float[Tensor, "n size"]) -> dict[str, float]:
    """`grad/norm2` and `grad/variance`, unbiased, from the n parts whose sum is a step's gradient.

    With `g_k = n · part_k` the gradients of n independent micro-batches and ḡ their mean:
    `variance = Σ_k ‖g_k − ḡ‖² / (n − 1)`, that of one micro-batch's gradient, summed over coordinates, and
    `norm2 = ‖ḡ‖² − variance / n`, an estimate of ‖E g‖², which may be negative where noise is all there is.

    Args:
        parts: sketches of what each micro-batch added to the gradient, at least 2.
    """
    count = len(parts)
    gradients = count * parts
    mean = gradients.mean(0)
    variance = (gradients - mean).square().sum() / (count - 1)
    return {"grad/norm2": (mean.square().sum() - variance / count).item(), "grad/variance": variance.item()}


class GradientStatisticsCallback(TrainerCallback):
    """
    Logs `grad/norm2` and `grad/variance` of [`gradient_statistics`], averaged over the steps of a log, and `grad/snr`,
    their ratio: the signal-to-noise ratio of one micro-batch's gradient.

    Gradients are read in hooks as they are accumulated, before clipping, and kept as count sketches: norms are right
    within 1.6 / sqrt(size), one standard deviation. Parameters that take no gradient in a micro-batch count as zero; a
    value head's are left out, so that the policy's gradients are compared.
    With several processes under DDP every process's micro-batches count. Under fp16 both are those of the scaled loss.
    Use `add_to(trainer)` rather than `callbacks=[...]`: trackers are told what earlier callbacks put into a log.

    Args:
        size (`int`, *optional*, defaults to `4096`):
            Numbers a sketch.
        seed (`int`, *optional*, defaults to `0`):
            Of the sketch's signs and buckets.
    """

    def __init__(self, size: int = 4096, seed: int = 0):
        self.sketch = CountSketch(size, seed)
        self._handles: list[Any] = []
        self._warned = False
        self._steps: list[dict[str, float]] = []
        self._begin()

    def add_to(self, trainer: Any) -> None:
        """Make this the first callback of a trainer."""
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())

    def _begin(self) -> None:
        self._accumulated: dict[str, Tensor] = {}  # sketches of each parameter's gradient so far
        self._part = torch.zeros(self.sketch.size, dtype=torch.float64)  # what this micro-batch has added
        self._parts: list[Tensor] = []

    def _on_gradient(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        now = self.sketch.of({name: parameter.grad})
        before = self._accumulated.get(name)
        self._part += now if before is None else now - before
        self._accumulated[name] = now

    def _end_micro_batch(self) -> None:
        self._parts.append(self._part)
        self._part = torch.zeros_like(self._part)

    # Hooks of the trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if AcceleratorState().distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            raise ValueError(
                "gradient statistics read whole gradients, which DeepSpeed and FSDP shard; run them under DDP or on "
                "one device"
            )
        self._remove()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "value_head" not in name.split("."):
                hook = partial(self._on_gradient, name)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_micro_batch()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end_micro_batch()
        parts = _of_all_processes(torch.stack(self._parts), args.device)
        if len(parts) > 1:
            self._steps.append(gradient_statistics(parts))
        elif not self._warned:
            self._warned = True
            logger.warning(
                "gradient statistics need at least two micro-batches a step; set gradient_accumulation_steps to 2 or "
                "more (and per_device_train_batch_size accordingly). Nothing is logged."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._steps or logs is None or "loss" not in logs:
            return
        means = {name: sum(step[name] for step in self._steps) / len(self._steps) for name in self._steps[0]}
        self._steps = []
        if means["grad/variance"] > 0.0:
            means["grad/snr"] = means["grad/norm2"] / means["grad/variance"]
        logs.update(means)
        state.log_history[-1].update(means)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _of_all_processes(parts: Float[Tensor, "n size"], device: torch.device) -> Float[Tensor, "m size"]:
    """The parts of every process, so scaled that their sum is the mean over processes, as DDP's gradient is."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return parts
    local = parts.to(device)
    gathered = [torch.empty_like(local) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, local)
    return torch.cat(gathered).cpu() / len(gathered)
