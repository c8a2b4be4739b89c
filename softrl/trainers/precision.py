"""Which arguments compute in bfloat16 when nobody says so: TRL's configurations do so on a CPU too."""

from typing import Any

import torch


def bf16_by_default(args: Any) -> bool:
    """Mixed precision where a GPU supports it; on a processor without its instructions it would be far slower."""
    return not (args.fp16 or args.use_cpu) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
