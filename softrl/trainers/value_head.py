"""A trainer's learned value: where its head lives, how it is optimised, saved and restored.

The head is a submodule `value_head` of the model that the engine wraps, so that its gradients are synchronised and
sharded as all others are. It stays out of the model's files, which load in plain transformers and PEFT, and lies
beside them in a file of its own.
"""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from softrl.assets import write_atomically
from softrl.models.heads import ValueHead
from softrl.models.policy import Policy

FILE_NAME = "value_head.safetensors"
NAME = "value_head"  # of the submodule, and of its parameter group


def attached_value_head(policy: Policy) -> ValueHead:
    """A value head as a submodule of the policy's model; the one that an earlier trainer left there stays.

    Raises:
        ValueError: the model has something else under that name.
    """
    model: Any = policy.model
    if not isinstance(getattr(model, NAME, None), ValueHead):
        if hasattr(model, NAME):
            raise ValueError(
                f"{type(model).__name__} has a {NAME!r} of its own ({type(getattr(model, NAME)).__name__}), where "
                "the trainer's value head would go; load the model as a plain causal LM"
            )
        head = ValueHead(policy.causal_lm.config.get_text_config().hidden_size)
        setattr(model, NAME, head.to(policy.causal_lm.get_input_embeddings().weight.device))
    head = getattr(model, NAME)
    if isinstance(model, PreTrainedModel):  # PEFT saves adapters alone
        names = {f"{NAME}.{name}" for name in head.state_dict()}
        model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *names}
    return head


class ValueHeadMixin:
    """
    What a trainer with a value head adds to [`~transformers.Trainer`]; without one it changes nothing.

    Overrides `create_optimizer` (a parameter group with `args.value_learning_rate`), `_clip_grad_norm` (the head's
    gradient is clipped apart, so that it does not scale the policy's; DeepSpeed clips inside its own step, by the norm
    of all gradients together), `_save` and `_load_from_checkpoint` (a file `value_head.safetensors` in every
    checkpoint).
    """

    value_head: ValueHead | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.value_head is None or any(group.get("name") == NAME for group in optimizer.param_groups):
            return optimizer
        wrapped = self.model if model is None else model
        own = {id(p): p for name, p in wrapped.named_parameters() if f".{NAME}." in f".{name}"}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        optimizer.add_param_group(
            {"params": list(own.values()), "lr": self.args.value_learning_rate, "weight_decay": 0.0, "name": NAME}
        )
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if self.value_head is None or self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        own = {id(parameter) for parameter in self.value_head.parameters()}
        of_policy = [parameter for parameter in model.parameters() if id(parameter) not in own]
        norm = self.accelerator.clip_grad_norm_(of_policy, self.args.max_grad_norm)
        of_head = nn.utils.clip_grad_norm_(self.value_head.parameters(), self.args.max_grad_norm)
        of_head = of_head.full_tensor() if isinstance(of_head, DTensor) else of_head
        return norm if math.isfinite(of_head.item()) else of_head  # a step is not taken where either is not finite

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        gathered = {
            name.rpartition(f"{NAME}.")[2]: value
            for name, value in (state_dict or {}).items()
            if f".{NAME}." in f".{name}"
        }  # before the host takes them out
        super()._save(output_dir, state_dict)
        if self.value_head is None or not self.args.should_save:
            return
        tensors = gathered or self.value_head.state_dict()
        path = Path(self.args.output_dir if output_dir is None else output_dir) / FILE_NAME
        with write_atomically(path) as temporary:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.value_head is None or self.is_fsdp_enabled:  # FSDP has restored it with the rest
            return
        path = Path(resume_from_checkpoint) / FILE_NAME
        if not path.is_file():
            raise ValueError(
                f"{resume_from_checkpoint} has no {FILE_NAME}: it is a checkpoint of a trainer without a value head; "
                "start a new run from its model instead of resuming it"
            )
        self.value_head.load_state_dict(load_file(path))
