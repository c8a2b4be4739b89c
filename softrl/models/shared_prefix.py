"""Branches that share the keys and values of their text, through transformers' attention interface.

Left out: attention with sinks, soft caps or a window shorter than the text; those models take "naive" branches.
The attention itself is in `prefix_attention`. Source: ours (softrl maths, section 6).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface

from softrl.models.kv import GrowingLayer, KVCache, num_key_value_layers
from softrl.models.policy import Policy
from softrl.models.prefix_attention import reach_of, shared_prefix_attention
from softrl.models.state import positions
from softrl.models.text_state import Branches, TextState, check_window, decoded

_ATTENTION_NAME = "softrl_shared_prefix"


class SharedTexts(TextState):
    """Keys and values of the texts, read by all their branches."""

    hands_over = True

    def __init__(self, policy: Policy, mask: Bool[Tensor, "N 0"]):
        super().__init__(policy, mask)
        num_layers = num_key_value_layers(policy.decoder)
        assert num_layers is not None
        self.cache = KVCache(num_layers, capacity=0, growing=True)

    def extend(self, embeds: Float[Tensor, "N S D"], mask: Bool[Tensor, "N S"]) -> Float[Tensor, "N S D"]:
        self._appended(mask)
        check_window(self.policy, self.mask.shape[1])
        return decoded(self.policy, embeds, positions(self.mask)[:, -embeds.shape[1] :], self.mask.long(), self.cache)

    def branch(self, anchors: Int[Tensor, "N L"]) -> Branches:
        return _SharedBranches(self, anchors)


class _BranchLayer(GrowingLayer):
    """One layer's own keys of all branches, [N, H, L, S, d], beside those of the texts."""

    def __init__(self, texts: GrowingLayer, num_branches: int):
        super().__init__()
        self.texts, self.num_branches = texts, num_branches

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        apart = [states.unflatten(2, (self.num_branches, -1)) for states in (key_states, value_states)]
        self.keys = apart[0] if self.keys is None else torch.cat([self.keys, apart[0]], 3)
        self.values = apart[1] if self.values is None else torch.cat([self.values, apart[1]], 3)
        return key_states, value_states  # the attention below reads ours

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2] * self.keys.shape[3]


class _SharedBranches(Branches):
    """Own keys of every branch, and the texts' keys for all."""

    def __init__(self, texts: SharedTexts, anchors: Int[Tensor, "N L"]):
        self.texts, self.anchors = texts, anchors
        self.cache = KVCache(0, capacity=0)
        self.layers = [_BranchLayer(layer, anchors.shape[1]) for layer in texts.cache.ours]
        self.cache.layers = list(self.layers)
        self.visible = texts.visible(anchors)
        self.reach = reach_of(self.visible)
        self.length = 0
        self.calls = 0

    def advance(self, embeds: Float[Tensor, "N L S D"]) -> Float[Tensor, "N L S D"]:
        policy, count = self.texts.policy, embeds.shape[2]
        where = self.texts.branch_positions(self.anchors, self.length, count).flatten(1)
        self.length += count
        check_window(policy, self.texts.mask.shape[1] + self.length)
        no_mask = self.visible.new_zeros(1, 1, 1, 1)  # four axes: transformers takes it as it is, and we ignore it
        self.calls = 0
        with _attending(policy.decoder, self):
            hidden = decoded(policy, embeds.flatten(1, 2), where, no_mask, self.cache)
        if self.calls != len(self.layers):
            raise ValueError(
                f"{type(policy.causal_lm).__name__} does not call transformers' attention interface, through which "
                "branches share their text's keys; pass attention='naive'"
            )
        return hidden.unflatten(1, (-1, count))

    def attend(self, index: int, query: Float[Tensor, "N H M d"], scaling: float) -> Float[Tensor, "N M H d"]:
        """Attention of layer `index`: queries of all branches, M = L * S, on the texts' keys and on their own."""
        self.calls += 1
        if index >= len(self.layers):
            raise ValueError(f"layer {index} attends to keys of another layer; pass attention='naive'")
        layer = self.layers[index]
        texts = layer.texts
        assert layer.keys is not None
        assert layer.values is not None
        assert texts.keys is not None
        assert texts.values is not None
        return shared_prefix_attention(
            query, texts.keys, texts.values, layer.keys, layer.values, self.visible, self.reach, scaling
        )


_ACTIVE: ContextVar[_SharedBranches] = ContextVar("branches whose attention is computed")


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """What transformers' layers call while branches are active."""
    if unknown := [name for name in ("softcap", "s_aux", "sinks") if settings.get(name) is not None]:
        raise ValueError(f"attention='shared' does not know this model's {', '.join(unknown)}; pass attention='naive'")
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _ACTIVE.get().attend(module.layer_idx, query, factor), None


AttentionInterface.register(_ATTENTION_NAME, _attention)


@contextmanager
def _attending(decoder: Any, branches: _SharedBranches) -> Iterator[None]:
    """Have the decoder's layers attend through these branches."""
    config, before = decoder.config, decoder.config._attn_implementation
    token = _ACTIVE.set(branches)
    config._attn_implementation = _ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _ACTIVE.reset(token)
