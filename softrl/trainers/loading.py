"""The models of a trainer: the policy by name or as an object, its adapter, its reference, its tokenizer."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import softrl.contexts.soft_ar  # noqa: F401 - which the Auto classes then know
from softrl.assets import resolve_model
from softrl.models.policy import Policy
from softrl.models.processor import computes_bfloat16
from softrl.trainers.rollout_config import RolloutConfig

logger = logging.get_logger(__name__)


def model_name(model: "str | PreTrainedModel | PeftModel") -> str:
    """The last part of a model's name or folder; empty for a model that was built in memory."""
    return Path(model if isinstance(model, str) else model.config._name_or_path).name


def load_tokenizer(model: "str | PreTrainedModel | PeftModel", args: RolloutConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model, at the model's revision.

    Raises:
        ValueError: the model was built in memory.
    """
    name = resolve_model(model) if isinstance(model, str) else model.config._name_or_path
    if not name:
        raise ValueError(
            "processing_class is None, and the model has no name to load a tokenizer by; pass processing_class"
        )
    revision = (args.model_init_kwargs or {}).get("revision")
    return AutoTokenizer.from_pretrained(name, padding_side="left", revision=revision)


def load_model(
    model: "str | PreTrainedModel | PeftModel", args: RolloutConfig, quantization_config: Any = None
) -> nn.Module:
    """The policy's model: loaded with `args.model_init_kwargs` if it is a name, else as it is.

    Raises:
        ValueError: a quantization for a model that is already there, or two of them.
    """
    settings = {"dtype": "float32", **(args.model_init_kwargs or {})}
    if not isinstance(model, str):
        if quantization_config is not None:
            raise ValueError(
                f"quantization_config is applied while a model is loaded, but model is a {type(model).__name__} that "
                "already is; pass model as a string, or load it with the quantization_config yourself"
            )
        if args.model_init_kwargs is not None:
            logger.warning("model_init_kwargs is ignored: model is not a string, so it is already loaded.")
        return model
    if quantization_config is not None:
        if "quantization_config" in settings:
            raise ValueError(
                "quantization_config is given to the trainer and in args.model_init_kwargs; keep one of them"
            )
        settings["quantization_config"] = quantization_config
    settings["dtype"] = supported_dtype(settings["dtype"], args.device)
    return AutoModelForCausalLM.from_pretrained(resolve_model(model), **settings)


def supported_dtype(dtype: Any, device: torch.device) -> Any:
    """The dtype, or "float32" for bfloat16 on a processor that has no instructions for it, with a warning."""
    if device.type != "cpu" or not str(dtype).endswith("bfloat16") or computes_bfloat16():
        return dtype
    logger.warning("dtype=bfloat16: this processor multiplies it sixty times slower than float32, which is used.")
    return "float32"


def with_adapter(model: nn.Module, peft_config: PeftConfig | None) -> nn.Module:
    """The model wrapped in a new adapter; as it is if `peft_config` is None.

    On a quantized base the adapter is bfloat16 (Dettmers et al. 2023, section 3), except DoRA's magnitudes, whose
    updates bfloat16 would round away. TRL does the same.

    Raises:
        TypeError: not a PEFT configuration.
        ValueError: the model already has an adapter.
    """
    if peft_config is None:
        return model
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config must be a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}")
    if isinstance(model, PeftModel):
        raise ValueError(
            "peft_config is given, but model is a PeftModel already; leave peft_config out, or merge the adapter "
            "first: model.merge_and_unload()"
        )
    model = get_peft_model(model, peft_config)
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def reference_policy(model: nn.Module, args: RolloutConfig) -> Policy | None:
    """The model with its adapters off, or a frozen copy; no copy when nothing needs it."""
    if isinstance(model, PeftModel):
        return args.make_policy(model, partial(without_adapters, model))
    if not args.needs_reference:
        return None
    return args.make_policy(copy.deepcopy(model).eval().requires_grad_(False), nullcontext)


@contextmanager
def without_adapters(model: PeftModel) -> Iterator[None]:
    """The base model, for a while.

    PEFT makes all active adapters trainable when it switches them on again; here they stay as they were.
    """
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with model.disable_adapter():
        yield
    for parameter, requires_grad in before.items():
        parameter.requires_grad_(requires_grad)


def eos_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's, and those the model declares, such as an end of turn."""
    configured = getattr(model, "generation_config", None)
    declared = configured.eos_token_id if configured is not None else None
    declared = declared if isinstance(declared, list) else [declared]
    return tuple(dict.fromkeys(eos for eos in (tokenizer.eos_token_id, *declared) if eos is not None))


def check_output_dir(folder: str | Path, mark: str, what: str) -> None:
    """Raise a ValueError where a result would replace a folder that holds something else.

    Args:
        folder: where the result goes; it may not exist yet.
        mark: the file that every earlier result has; a folder of checkpoints may be replaced too.
        what: the result, in words.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir={str(folder)!r} is a file; name a folder")
    inside = [each.name for each in path.iterdir()] if path.is_dir() else []
    if inside and mark not in inside and not any(name.startswith("checkpoint-") for name in inside):
        raise ValueError(
            f"output_dir={str(folder)!r} holds something else than {what} ({sorted(inside)[0]}, ...) and would be "
            "replaced; name another folder"
        )
