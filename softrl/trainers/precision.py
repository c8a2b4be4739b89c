"""What arguments default to by the machine, or by what our passes need: bfloat16, checkpointing.

TRL's configurations compute in bfloat16 on a CPU too.
"""

from typing import Any

import torch


def bf16_by_default(args: Any) -> bool:
    """Mixed precision where a GPU supports it; on a processor without its instructions it would be far slower."""
    return not (args.fp16 or args.use_cpu) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def checkpoint_without_reentry(args: Any) -> None:
    """Choose checkpoints that are not reentrant where nobody chose: those refuse gradients of inputs alone."""
    if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
        args.gradient_checkpointing_kwargs = {"use_reentrant": False}
