"""Leaving parts of a model as they are: its embedding and its first layers."""

from typing import Any

from torch import nn

from softrl.models.policy import unwrap


def freeze(model: nn.Module, embeddings: bool = False, layers: int = 0) -> None:
    """Have the input embedding and the first layers of a causal LM keep their parameters, adapters in them included.

    Args:
        model: transformers causal LM, or a PEFT model around one.
        embeddings: the input embedding; where the head is tied to it, the head as well.
        layers: how many, counted from the input.
    Raises:
        ValueError: more layers than there are; a model whose layers are not a list.
    """
    if not embeddings and not layers:
        return
    causal_lm: Any = unwrap(model)
    if embeddings:
        causal_lm.get_input_embeddings().requires_grad_(False)
    if layers:
        for layer in _layers(causal_lm, layers)[:layers]:
            layer.requires_grad_(False)


def _layers(causal_lm: Any, wanted: int) -> nn.ModuleList:
    count = causal_lm.config.get_text_config().num_hidden_layers
    decoder = getattr(causal_lm.base_model, "backbone", causal_lm.base_model)  # a softAR model's language model
    lists = [each for each in decoder.children() if isinstance(each, nn.ModuleList) and len(each) == count]
    if len(lists) != 1:
        raise ValueError(f"freeze_layers={wanted}: {type(causal_lm).__name__} has no one list of {count} layers")
    if not 0 < wanted <= count:
        raise ValueError(f"freeze_layers must lie between 0 and {count}, the number of layers, got {wanted}")
    return lists[0]
