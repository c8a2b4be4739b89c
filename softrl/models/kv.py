"""Our own functional key-value cache: preallocated, replayable, and differentiable one step at a time.

transformers' caches are for inference. In the gradient path we need to know that nothing detaches, that a step can be
recomputed from the keys and values of the steps before it, and that the cotangents of those keys and values end up in
one buffer instead of in T copies of the cache.

Left out: sliding-window layers keep all their keys (the mask hides the old ones), so they cost more memory than they
need to.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


class _Splice(torch.autograd.Function):
    """Puts recomputed keys (or values) into the recorded ones, for one attention layer of one block of slots.

    Forward returns the recorded tensors up to and including the block: a view, no copy. Backward books the cotangents
    of the slots before it in the buffer, in place, and passes on what the block's own slots are asked for: by the
    block itself and, when `replay.with_later` says so, by the blocks after it, which have been booked before.
    """

    @staticmethod
    def forward(ctx, new, recorded, cotangents, replay, slot, first_slot):  # type: ignore[no-untyped-def]
        ctx.cotangents, ctx.replay, ctx.length = cotangents, replay, new.shape[2]
        ctx.slot, ctx.first_slot = slot, first_slot
        return recorded.detach()[:, :, : slot + new.shape[2]]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        index = ctx.slot - ctx.first_slot
        ctx.cotangents[:, :, :index] += grad[:, :, ctx.first_slot : ctx.slot]
        own = grad[:, :, ctx.slot :]
        if ctx.replay.with_later:
            own = own + ctx.cotangents[:, :, index : index + ctx.length].to(grad.dtype)
        return own, None, None, None, None, None


class Replay:
    """What all layers share while recorded slots are recomputed."""

    def __init__(self) -> None:
        self.with_later = True  # whether a backward pass adds what later blocks have booked for this one


class _Layer(CacheLayerMixin):
    """What our layers share: all slots are kept; `reorder_cache` of the base class copies the rows that go on."""

    is_sliding = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class RecordedLayer(_Layer):
    """Keys and values of one layer for `capacity` slots, written once and then replayed."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self.first_slot: int | None = None  # set while replaying: cotangents are kept from here on
        self.replay: Replay | None = None
        self.key_cotangents: Tensor | None = None
        self.value_cotangents: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_zeros(*key_states.shape[:2], self.capacity, key_states.shape[-1])
        self.values = value_states.new_zeros(*value_states.shape[:2], self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.first_slot is not None:
            place = (self.replay, self.length, self.first_slot)
            keys = _Splice.apply(key_states, self.keys, self.key_cotangents, *place)
            values = _Splice.apply(value_states, self.values, self.value_cotangents, *place)
            return keys, values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def start_replay(self, first_slot: int, replay: Replay) -> None:
        """From now on recompute recorded slots from `first_slot` on, last ones first, and collect cotangents."""
        assert self.keys is not None
        assert self.values is not None
        self.first_slot = first_slot
        self.replay = replay
        self.key_cotangents = _zero_cotangents(self.keys, first_slot)
        self.value_cotangents = _zero_cotangents(self.values, first_slot)

    def get_seq_length(self) -> int:
        return self.length


def _zero_cotangents(recorded: Float[Tensor, "N H S d"], first_slot: int) -> Float[Tensor, "N H steps d"]:
    """Zeros for the slots from `first_slot` on; at least float32, since thousands of terms are added up in it."""
    dtype = torch.promote_types(recorded.dtype, torch.float32)
    shape = (*recorded.shape[:2], recorded.shape[2] - first_slot, recorded.shape[3])
    return torch.zeros(shape, dtype=dtype, device=recorded.device)


class GrowingLayer(_Layer):
    """Keys and values by concatenation, inside the graph: plain autograd through the loop."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]


class KVCache(Cache):
    """A transformers cache made of our layers, one for every layer of the model."""

    def __init__(self, num_layers: int, capacity: int, growing: bool = False):
        layers: list[Any] = [GrowingLayer() if growing else RecordedLayer(capacity) for _ in range(num_layers)]
        super().__init__(layers=layers)
        self.replay = Replay()
        self.ours = layers  # the same objects: the base class types them more widely

    def copied(self) -> "KVCache":
        """Another cache of the same tensors; `reorder_cache` has to give it its own before either is written to."""
        other = copy.copy(self)
        other.layers = other.ours = [copy.copy(layer) for layer in self.ours]
        return other

    def fill(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Put keys and values that no embedding was fed for into the next slots, a pair a layer."""
        for layer, (keys, values) in zip(self.ours, pairs, strict=True):
            layer.update(keys, values)

    def start_replay(self, first_slot: int) -> None:
        """See `RecordedLayer.start_replay`."""
        for layer in self.ours:
            layer.start_replay(first_slot, self.replay)

    def seek(self, slot: int) -> None:
        """The next update recomputes the slots from this one on."""
        for layer in self.ours:
            layer.length = slot


def num_key_value_layers(decoder: Any) -> int | None:
    """How many layers a key-value cache of this decoder has; None when its state is not only keys and values.

    transformers' own cache factory is asked, so that a hybrid or a state-space model is recognised whatever its name.
    """
    layers = DynamicCache(config=decoder.config).layers
    if not layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    return len(layers)
