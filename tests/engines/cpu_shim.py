"""Lets DeepSpeed and FSDP2 run on two gloo ranks of a machine without GPUs, from the configurations written for GPUs.

For tests only: it tells Accelerate to take gloo where it would take NCCL, and transformers that bfloat16 is possible;
and it keeps DeepSpeed from building for a minute and a half an operator that training does not use. Call `install()`
before anything makes an Accelerator.
"""

import os

import torch


def install():
    if torch.cuda.is_available():
        return
    import accelerate.state
    from accelerate.utils import DistributedType

    under_deepspeed, under_fsdp = (
        os.environ.get(f"ACCELERATE_USE_{name}", "false") == "true" for name in ("DEEPSPEED", "FSDP")
    )
    original = accelerate.state.PartialState._prepare_backend

    def prepared(self, cpu=False, sagemaker_dp=False, backend=None):
        backend, kind = original(self, cpu, sagemaker_dp, backend)
        if "LOCAL_RANK" not in os.environ or backend not in (None, "gloo"):
            return backend, kind
        if under_deepspeed:
            return "gloo", DistributedType.NO  # it asks the process group for its size then
        return "gloo", DistributedType.MULTI_GPU if under_fsdp else DistributedType.MULTI_CPU

    accelerate.state.PartialState._prepare_backend = prepared
    if under_deepspeed or under_fsdp:
        import transformers.training_args

        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    if under_fsdp:
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    if under_deepspeed:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = {**deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm": False}
