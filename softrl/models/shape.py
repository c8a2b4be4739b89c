"""The numbers of an architecture that memory and communication depend on, from its configuration alone.

Parameters are counted on torch's meta device, adapters included: nothing is loaded and nothing is allocated.
Left out: what mixtures of experts, convolutions and state-space layers keep; they are counted as if their layers were
attention and a gated feed-forward network of the configuration's sizes.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class AdapterShape:
    """LoRA's trainable parameters, and what its layers read.

    Args:
        num_parameters: of all adapters.
        targets: last parts of the names of the adapted modules, e.g. "q_proj", with the width of their input.
        rank: r.
    """

    num_parameters: int
    targets: tuple[tuple[str, int], ...]
    rank: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder of attention layers and feed-forward networks between an embedding and a head.

    Args:
        vocab_size: V.
        hidden_size: D.
        mlp_size: width of the feed-forward network.
        num_layers: of them.
        num_heads, num_kv_heads, head_dim: of the attention.
        num_parameters: elements, tied ones once, adapters left out.
        num_embedding, num_head: elements of the input embedding, and of the head; 0 for a tied head.
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_parameters: int
    num_embedding: int
    num_head: int

    @property
    def attention_size(self) -> int:
        """Width of all queries of a token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all keys of a token, which is that of all values."""
        return self.num_kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Elements of one layer; what lies outside embedding, head and layers is spread over them."""
        return (self.num_parameters - self.num_embedding - self.num_head) // self.num_layers


def model_shape(config: Any) -> ModelShape:
    """The shape of a causal LM of transformers.

    Args:
        config: its configuration.
    Raises:
        ValueError: the configuration names no layers, heads or widths.
    """
    return _shape_of(_on_meta(config))


def adapter_shape(config: Any, peft_config: Any) -> AdapterShape:
    """The shape of an adapter on that model.

    Args:
        config: the model's configuration.
        peft_config: a LoRA configuration of PEFT.
    Raises:
        ValueError: its targets are not in the model, or it is no LoRA.
    """
    from peft import get_peft_model

    with torch.device("meta"):
        model: Any = get_peft_model(_on_meta(config), copy.deepcopy(peft_config))  # it writes to it
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adapted = dict(_adapted(model))
    if not adapted:
        raise ValueError(f"peft type {peft_config.peft_type} has no layers of LoRA, whose memory is estimated")
    return AdapterShape(trainable, tuple(sorted(adapted.items())), peft_config.r)


def num_parameters(config: Any, auto_class: Any) -> int:
    """How many parameters a model of transformers has, e.g. of `AutoModelForSequenceClassification`."""
    with torch.device("meta"):
        model = auto_class.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _adapted(model: nn.Module) -> Iterator[tuple[str, int]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "in_features"):
            yield name.rpartition(".")[2], int(module.in_features)


def _shape_of(model: Any) -> ModelShape:
    config = model.config.get_text_config()
    heads = _first(config, "num_attention_heads", "n_head", "num_heads")
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    return ModelShape(
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        mlp_size=_first(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
        num_layers=_first(config, "num_hidden_layers", "n_layer"),
        num_heads=heads,
        num_kv_heads=_first(config, "num_key_value_heads", default=heads),
        head_dim=_first(config, "head_dim", default=hidden // heads),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_embedding=embedding.numel(),
        num_head=0 if head is None or head.weight is embedding else head.weight.numel(),
    )


def _first(config: Any, *names: str, default: int | None = None) -> int:
    """The first of these that the configuration has a number for."""
    for name in names:
        if (value := getattr(config, name, None)) is not None:
            return int(value)
    if default is None:
        raise ValueError(f"{type(config).__name__} has none of {names}, so its memory cannot be estimated")
    return default
