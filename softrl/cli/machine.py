"""What this machine has: packages, devices, memory, the asset cache, and which engines would run on it.

Everything is looked up, nothing is launched.
"""

import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

REQUIRED = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")
# Optional ones, what for, and what brings them where softrl has no extra of its own for it.
OPTIONAL = {
    "deepspeed": ("ZeRO", "softrl[deepspeed]"),
    "bitsandbytes": ("quantized models, 8-bit optimisers", "trl[quantization]"),
    "vllm": ("use_vllm", "softrl[vllm]"),
    "tensorboard": ("report_to: tensorboard", "tensorboard"),
    "trackio": ("report_to: trackio", "trackio"),
    "wandb": ("report_to: wandb", "wandb"),
}


@dataclass(frozen=True)
class Package:
    """An installed package's version, or None and what to install."""

    name: str
    version: str | None
    required: bool
    purpose: str = ""
    brought_by: str = ""


@dataclass(frozen=True)
class Machine:
    """Devices and memory; bytes."""

    python: str
    gpus: tuple[str, ...]
    cores: int
    memory: int
    free_memory: int
    device_memory: int  # of the smallest GPU; 0 without one
    bf16: bool

    @property
    def free(self) -> int:
        """What a process could take now: of the GPU where there is one."""
        return self.device_memory or self.free_memory


@dataclass(frozen=True)
class EngineCheck:
    """Whether a shipped configuration of Accelerate runs here, and what stands in its way, or how to call it."""

    name: str
    runs: bool
    reason: str


def packages() -> list[Package]:
    """Versions of what softrl builds on; those that softrl requires and that are missing count as required."""
    found = [Package(name, _version(name), True) for name in REQUIRED]
    wanted = {_name(text) for text in _requirements() if "extra ==" not in text}
    missing = sorted(name for name in wanted - set(REQUIRED) if _version(name) is None)
    found += [Package(name, None, True, "softrl", f"pip install {name}") for name in missing]
    for name, (purpose, extra) in OPTIONAL.items():
        found.append(Package(name, _version(name), False, purpose, f"pip install '{_own_extra(name) or extra}'"))
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[str]:
    try:
        return metadata.requires("softrl") or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return []


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def _own_extra(name: str) -> str | None:
    """softrl's extra that brings a package; those for its developers are no answer."""
    extras = [re.search(r"extra == ['\"]([\w-]+)", text) for text in _requirements() if _name(text) == name]
    own = [match.group(1) for match in extras if match and match.group(1) not in ("test", "dev")]
    return f"softrl[{own[0]}]" if own else None


def machine() -> Machine:
    """Look at the devices."""
    import psutil
    import torch

    from softrl.models.processor import computes_bfloat16

    memory, count = psutil.virtual_memory(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(count))
    return Machine(
        python=platform.python_version(),
        gpus=gpus,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=memory.total,
        free_memory=memory.available,
        device_memory=min((torch.cuda.mem_get_info(index)[0] for index in range(count)), default=0),
        bf16=torch.cuda.is_bf16_supported() if gpus else computes_bfloat16(),
    )


def engine_checks(here: Machine) -> list[EngineCheck]:
    """One verdict for every configuration that softrl ships."""
    from softrl.cli.arguments import find_shipped

    folder = find_shipped("accelerate_configs", "cpu", "Accelerate configuration").parent
    return [_check(path, here) for path in sorted(folder.glob("*.yaml"))]


def _check(path: Path, here: Machine) -> EngineCheck:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    reasons = _obstacles(settings, here)
    if reasons:
        return EngineCheck(path.stem, False, "; ".join(reasons))
    wanted = settings["num_processes"]
    if not settings.get("use_cpu") and wanted > len(here.gpus):
        return EngineCheck(path.stem, True, f"with --num_processes {len(here.gpus)}: the file says {wanted}")
    return EngineCheck(path.stem, True, f"{wanted} {'processes' if wanted > 1 else 'process'}")


def _obstacles(settings: dict[str, Any], here: Machine) -> list[str]:
    import torch.distributed

    reasons = []
    kind, on_cpu = settings["distributed_type"], bool(settings.get("use_cpu"))
    if not on_cpu and not here.gpus:
        reasons.append("no GPU (on a CPU: ddp_cpu)")
    if kind == "DEEPSPEED" and _version("deepspeed") is None:
        reasons.append(f"deepspeed is not installed: pip install '{OPTIONAL['deepspeed'][1]}'")
    if kind != "NO" and not torch.distributed.is_available():
        reasons.append("this torch is built without torch.distributed")
    elif kind != "NO" and on_cpu and not torch.distributed.is_gloo_available():
        reasons.append("this torch is built without gloo")
    elif kind != "NO" and here.gpus and not on_cpu and not torch.distributed.is_nccl_available():
        reasons.append("this torch is built without NCCL")
    if here.gpus and settings.get("mixed_precision") == "bf16" and not here.bf16:
        reasons.append("the GPU has no bfloat16: add --mixed_precision no to accelerate launch")
    return reasons
