"""What a trainer needs to know of the engine that Accelerate runs it under: DDP, FSDP2, DeepSpeed ZeRO.

A step calls parts of the unwrapped model (embedding, decoder, head) many times without gradients, then the wrapped one
once. The hooks of engines gather sharded parameters in both; they need equally many calls on every process.
Left out: tensor and pipeline parallelism.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

ASKED_FOR = "SOFTRL_NUM_PROCESSES"  # set by `--accelerate_config`
_ENGINES = {"ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED, "ACCELERATE_USE_FSDP": DistributedType.FSDP}


def check_engine(accelerator: Accelerator) -> None:
    """Compare what a launch asked for with what it got; Accelerate starts one process in some cases, and says nothing.

    Raises:
        ValueError: fewer processes than asked for, or another engine.
    """
    wanted, found = processes_asked_for(), accelerator.num_processes
    if wanted is not None and found < wanted:
        raise ValueError(
            f"{wanted} processes were asked for and this run has {found}: Accelerate did not start the others. On a "
            "machine without GPUs use --accelerate_config ddp_cpu (it sets ACCELERATE_USE_CPU=true, which `accelerate "
            "launch` needs with distributed_type MULTI_GPU and use_cpu: true); on one with GPUs check num_processes "
            "and distributed_type of the configuration"
        )
    for variable, engine in _ENGINES.items():
        if os.environ.get(variable, "false").lower() == "true" and accelerator.distributed_type is not engine:
            raise ValueError(
                f"the launch asked for {engine.value} and got {accelerator.distributed_type.value} "
                f"({variable}=true is in the environment); leave ACCELERATE_USE_CPU and use_cpu out of it, or choose "
                "a configuration for the CPU, ddp_cpu"
            )


def check_wrapped(accelerator: Accelerator, model: nn.Module) -> None:
    """See that an engine has wrapped the model, or ranks would train apart from each other.

    Raises:
        RuntimeError: it has not.
    """
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    if accelerator.num_processes > 1 and not sharded and accelerator.unwrap_model(model) is model:
        raise RuntimeError(
            f"{accelerator.num_processes} processes train a {type(model).__name__} that no engine has wrapped, so "
            "they would not share gradients; pass the model to the trainer as it is, and let it prepare it"
        )


def processes_asked_for() -> int | None:
    """What `--accelerate_config` or an `accelerate launch` above this process asked for; None for neither."""
    if ASKED_FOR in os.environ:
        return int(os.environ[ASKED_FOR])
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # no parent, or not ours to look at
        return None
    if "launch" not in words[:4] or not any("accelerate" in word for word in words[:3]):
        return None
    given = dict(pairwise(words)) | dict(word.split("=", 1) for word in words if "=" in word)
    if "--num_processes" in given:
        return int(given["--num_processes"])
    path = Path(given.get("--config_file", ""))
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return settings.get("num_processes") if isinstance(settings, dict) else None


def load_whole_models() -> None:
    """Keep transformers from loading models in parts under ZeRO-3, whatever `zero3_init_flag` says.

    Parts cannot be called before the engine has wrapped them, and what reads texts beside the policy (reference,
    rewards, judge) is never wrapped: it is whole on every process. The engine shards the policy when it prepares it.
    """
    if is_deepspeed_zero3_enabled():
        unset_hf_deepspeed_config()


def release_at_once(accelerator: Accelerator) -> None:
    """Have ZeRO-3 free a layer's parameters when it was called, unless the configuration says otherwise.

    By default it looks up, after every call of a module, whether the same parameters are used again within the next
    10⁹ numbers (`stage3_max_reuse_distance`). A step of ours is a long sequence of calls, one pass for every token: on
    a model of 135M parameters that search took 450 s of a step that takes 9 s without. On larger ones 10⁹ numbers are
    less than a pass, and nothing is kept anyway.
    """
    if shards_parameters(accelerator) and accelerator.distributed_type is DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        settings.setdefault("stage3_max_reuse_distance", 0)


def shards_parameters(accelerator: Accelerator) -> bool:
    """Whether a process holds a part of each parameter only: FSDP, ZeRO-3."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type is DistributedType.FSDP


def may_differentiate_twice(accelerator: Accelerator, gradient_checkpointing: bool) -> bool:
    """Whether two phases may differentiate the same forward pass of the wrapped model.

    Not under engines whose hooks expect one backward pass for a forward pass, nor with gradient checkpointing, which
    would recompute the layers in every sweep.
    """
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return not sharded and not gradient_checkpointing


def largest_over_processes(accelerator: Accelerator, value: float) -> float:
    """The maximum of the processes' numbers."""
    here = torch.tensor([value], dtype=torch.float64 if accelerator.device.type != "mps" else torch.float32)
    return accelerator.gather(here.to(accelerator.device)).max().item()


def backward_but_last(
    accelerator: Accelerator, model: nn.Module, losses: Sequence[Callable[[], Tensor]], divisor: float
) -> Tensor:
    """The sum of several losses, of which all but the last have been differentiated already.

    Their gradients are only collected, on every engine, as those of accumulated micro-batches are: they are averaged
    over processes, and the optimizer steps, with the backward pass that the caller still runs. Every process needs
    equally many losses.

    Args:
        accelerator, model: the trainer's; the model is the wrapped one.
        losses: functions that run a forward pass through the model.
        divisor: what the caller divides the sum by before its backward pass.
    """
    state, is_deepspeed = accelerator.gradient_state, accelerator.distributed_type is DistributedType.DEEPSPEED
    is_last_micro_batch, total = state.sync_gradients, 0.0
    state._set_sync_gradients(False)  # under DeepSpeed a backward pass with it on is a step
    try:
        for loss in losses[:-1]:
            with nullcontext() if is_deepspeed else accelerator.no_sync(model):
                value = loss()
                accelerator.backward(value / divisor, **({"scale_wrt_gas": False} if is_deepspeed else {}))
            total = total + value.detach()
    finally:
        state._set_sync_gradients(is_last_micro_batch)
    return losses[-1]() + total


@torch.no_grad()
def make_ready(accelerator: Accelerator, model: nn.Module) -> None:
    """Call the wrapped model once, as it stands, before parts of it are called.

    FSDP2 finds out which module is the root at the first call, and would take an embedding for one.
    """
    if accelerator.distributed_type is DistributedType.FSDP:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=accelerator.device))
        for module in _outside_layers(model):
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)


@contextmanager
def parts_callable(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Keep gathered, for a while, what FSDP2 gathers for a call of the whole model only.

    Embedding, last norm and head belong to the root or to a group that is freed when all of it was called, on the
    assumption that a backward pass starts at the logits. Ours start at hidden states too. Layers are gathered and
    freed as ever. At the end the shards are back in place, where clipping and the optimizer look for gradients.
    """
    modules = _outside_layers(model) if accelerator.distributed_type is DistributedType.FSDP else []
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


def _outside_layers(model: nn.Module) -> list[FSDPModule]:
    layers = {id(layer) for child in model.modules() if isinstance(child, nn.ModuleList) for layer in child}
    return [module for module in model.modules() if isinstance(module, FSDPModule) and id(module) not in layers]
