"""Decoding states: what a policy carries from step to step, and how one step of it is recomputed and differentiated.

Keys and values (`KeyValueState`) and a recurrent state (`RecurrentState`) can be replayed; transformers' own cache
(`HostState`), for architectures that keep something else in one, and the whole prefix again (`PrefixState`), for those
that keep no cache at all, only decode.
Slots count positions of the padded input: the prompt fills slots 0..P-1, the embedding of token t (from 1) slot P+t-1.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import LongTensor, Tensor
from transformers import DynamicCache

from softrl.models.kv import KVCache, num_key_value_layers


def positions(mask: Bool[Tensor, "N S"]) -> Tensor:
    """Position ids of left-padded sequences: real tokens count from 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def cache_argument(decoder: Any) -> str | None:
    """What a decoder calls its cache: transformers 5.24 renamed it for all models. None if it takes none."""
    accepted = inspect.signature(decoder.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in accepted), None)


def decode_state(decoder: Any, mask: Bool[Tensor, "B P"], capacity: int, growing: bool = False) -> "DecodeState":
    """The state of its kind that a decoder starts from.

    Args:
        decoder: of a causal LM; one that decodes in a way of its own has a method `new_state` of the other arguments.
        mask: of the first slots.
        capacity: how many embeddings are fed after them at most.
        growing: keep the state inside the autograd graph.
    """
    if hasattr(decoder, "new_state"):
        return decoder.new_state(mask, capacity, growing)
    if hasattr(decoder, "initial_state"):
        return RecurrentState(decoder, mask)
    name = cache_argument(decoder)
    if name is None:
        return PrefixState(decoder, mask)
    if num_key_value_layers(decoder) is None:
        return HostState(decoder, mask, name)
    return KeyValueState(decoder, mask, name, capacity, growing)


class DecodeState(ABC):
    """What a policy carries while it decodes. `advance` moves on, recording."""

    def __init__(self, decoder: Any, mask: Bool[Tensor, "B P"]):
        self.decoder = decoder
        self.mask = mask  # of all slots so far: at first the prompt's, virtual tokens included
        self.prompt_length = mask.shape[1]

    def repeat(self, num_samples: int) -> None:
        """Turn the state of B prompts into that of N = B * G sequences."""
        rows = torch.arange(self.mask.shape[0], device=self.mask.device)
        self.select(rows.repeat_interleave(num_samples))

    def select(self, rows: Int[Tensor, "M"]) -> None:
        """Keep these sequences in this order; a search's hypothesis may go on several times, or not at all."""
        self.mask = self.mask[rows]

    def branched(self, rows: Int[Tensor, "M"]) -> "DecodeState":
        """A state of its own with the past of these sequences; this one stays as it is, and can go on or branch again.

        It decodes; what one of the two records is not replayed with the other.
        """
        branch = self._copied()
        branch.select(rows)
        return branch

    def _copied(self) -> "DecodeState":
        """A copy to `select` rows of: it may share what that replaces, not what else is changed in place."""
        return copy.copy(self)

    @abstractmethod
    def advance(self, embeds: Float[Tensor, "N S D"]) -> Float[Tensor, "N S D"]:
        """Feed S embeddings; returns the hidden states at their positions."""

    def _extend_mask(self, num_slots: int) -> None:
        ones = self.mask.new_ones(self.mask.shape[0], num_slots)
        self.mask = torch.cat([self.mask, ones], 1)


class ReplayableState(DecodeState):
    """A state that autograd can flow through: step by step inside a graph, or one recorded step at a time."""

    @abstractmethod
    def start_replay(self) -> None:
        """Stop recording; `replay` is then called for blocks of recorded steps, the last block first."""

    @abstractmethod
    def replay(self, index: int, embeds: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        """Recompute, with a graph from `embeds`, the hidden states after generated tokens index, index+1, ...

        Each block ends where the one replayed before it began.
        """

    @abstractmethod
    def pull(
        self,
        hidden: Float[Tensor, "N L D"],
        embeds: Float[Tensor, "N L D"],
        cotangents: Float[Tensor, "N L D"],
        with_later: bool = True,
        is_last: bool = False,
    ) -> Float[Tensor, "N L D"]:
        """Cotangents of a replayed block's `embeds`; may be called again for the same block.

        What they ask of the state before the block is booked for the blocks still to come, and adds up over calls: a
        first call with cotangents and further ones with their increments book the same as one with the total.

        Args:
            hidden, embeds: what `replay` returned and was given.
            cotangents: of the block's hidden states.
            with_later: add what all later blocks ask of this block's state; True exactly once a block.
            is_last: free the block's graph.
        """


class KeyValueState(ReplayableState):
    """Attention keys and values, in our own cache."""

    def __init__(
        self, decoder: Any, mask: Bool[Tensor, "B P"], cache_argument: str, capacity: int, growing: bool = False
    ):
        super().__init__(decoder, mask)
        self.cache_argument = cache_argument
        num_layers = num_key_value_layers(decoder)
        assert num_layers is not None
        self.cache = KVCache(num_layers, self.prompt_length + capacity, growing)
        self.mask = mask[:, :0]
        self.all_prompt = mask

    def advance(self, embeds: Float[Tensor, "N S D"]) -> Float[Tensor, "N S D"]:
        if self.mask.shape[1] == 0:
            self.mask = self.all_prompt
        else:
            self._extend_mask(embeds.shape[1])
        return self._forward(embeds, self.mask)

    def _forward(self, embeds: Float[Tensor, "N S D"], mask: Bool[Tensor, "N slots"]) -> Float[Tensor, "N S D"]:
        output = self.decoder(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            position_ids=positions(mask)[:, -embeds.shape[1] :],
            use_cache=True,
            **{self.cache_argument: self.cache},
        )
        return output.last_hidden_state

    def select(self, rows: Int[Tensor, "M"]) -> None:
        super().select(rows)
        self.cache.reorder_cache(cast(LongTensor, rows))

    def _copied(self) -> "KeyValueState":
        other = copy.copy(self)
        other.cache = self.cache.copied()
        return other

    def start_replay(self) -> None:
        self.cache.start_replay(self.prompt_length)

    def replay(self, index: int, embeds: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        slot = self.prompt_length + index
        self.cache.seek(slot)
        return self._forward(embeds, self.mask[:, : slot + embeds.shape[1]])

    def pull(
        self,
        hidden: Float[Tensor, "N L D"],
        embeds: Float[Tensor, "N L D"],
        cotangents: Float[Tensor, "N L D"],
        with_later: bool = True,
        is_last: bool = False,
    ) -> Float[Tensor, "N L D"]:
        # The cache's splices add what later blocks asked of these slots, and book what these ask of earlier ones.
        self.cache.replay.with_later = with_later
        (grad,) = torch.autograd.grad(hidden, embeds, cotangents, retain_graph=not is_last)
        return grad


class RecurrentState(ReplayableState):
    """A recurrent state that the decoder's `step` maps forward as a pure function."""

    def __init__(self, decoder: Any, mask: Bool[Tensor, "B P"]):
        super().__init__(decoder, mask)
        self.recorded: list[Tensor] = []  # the state after the prompt, then after every fed token
        self.leaf: Tensor | None = None

    def select(self, rows: Int[Tensor, "M"]) -> None:
        super().select(rows)
        self.recorded = [state[rows] for state in self.recorded]

    def advance(self, embeds: Float[Tensor, "N S D"]) -> Float[Tensor, "N S D"]:
        if not self.recorded:
            output = self.decoder(inputs_embeds=embeds, attention_mask=self.mask)
            self.recorded.append(output.state)
            return output.last_hidden_state
        hidden = []
        for position in range(embeds.shape[1]):
            self.recorded.append(self.decoder.step(embeds[:, position], self.recorded[-1]))
            hidden.append(self.recorded[-1][:, -1])
        return torch.stack(hidden, 1)

    def start_replay(self) -> None:
        self.cotangent = torch.zeros_like(self.recorded[-1])  # of the state after the block

    def replay(self, index: int, embeds: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        self.leaf = self.recorded[index].detach().requires_grad_()
        self.booked = torch.zeros_like(self.leaf)
        self.later, self.cotangent = self.cotangent, self.booked
        state, hidden = self.leaf, []
        for embed in embeds.unbind(1):
            state = self.decoder.step(embed, state)
            hidden.append(state[:, -1])
        self.after = state
        return torch.stack(hidden, 1)

    def pull(
        self,
        hidden: Float[Tensor, "N L D"],
        embeds: Float[Tensor, "N L D"],
        cotangents: Float[Tensor, "N L D"],
        with_later: bool = True,
        is_last: bool = False,
    ) -> Float[Tensor, "N L D"]:
        assert self.leaf is not None
        later = self.later if with_later else torch.zeros_like(self.later)
        grad, asked = torch.autograd.grad(
            [hidden, self.after], [embeds, self.leaf], [cotangents, later], retain_graph=not is_last
        )
        self.booked += asked
        return grad


class HostState(DecodeState):
    """transformers' own cache (state-space and hybrid models): decodes without gradients, cannot be replayed."""

    def __init__(self, decoder: Any, mask: Bool[Tensor, "B P"], cache_argument: str):
        super().__init__(decoder, mask)
        self.cache = DynamicCache(config=decoder.config)
        self.cache_argument = cache_argument
        self.started = False

    def select(self, rows: Int[Tensor, "M"]) -> None:
        super().select(rows)
        self.cache.reorder_cache(cast(LongTensor, rows))

    def _copied(self) -> "HostState":
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other

    def advance(self, embeds: Float[Tensor, "N S D"]) -> Float[Tensor, "N S D"]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self.decoder).__name__} keeps its state in transformers' own cache, whose updates are not "
                "differentiable; run the rollout under torch.no_grad() and take cotangents with method='parallel'"
            )
        if self.started:
            self._extend_mask(embeds.shape[1])
        hidden = []
        # Past the prompt these models take one position at a time: their fast path carries no state across several.
        for piece in embeds.split(1 if self.started else embeds.shape[1], dim=1):
            output = self.decoder(
                inputs_embeds=piece,
                attention_mask=None if self.started else self.mask.long(),
                use_cache=True,
                **{self.cache_argument: self.cache},
            )
            hidden.append(output.last_hidden_state)
        self.started = True
        return torch.cat(hidden, 1)


class PrefixState(DecodeState):
    """No state but the inputs themselves: every step runs the whole prefix again, at a cost quadratic in T."""

    def __init__(self, decoder: Any, mask: Bool[Tensor, "B P"]):
        super().__init__(decoder, mask)
        self.fed: Tensor | None = None

    def select(self, rows: Int[Tensor, "M"]) -> None:
        super().select(rows)
        assert self.fed is not None
        self.fed = self.fed[rows]

    def advance(self, embeds: Float[Tensor, "N S D"]) -> Float[Tensor, "N S D"]:
        if self.fed is None:
            self.fed = embeds
        else:
            self.fed = torch.cat([self.fed, embeds], 1)
            self._extend_mask(embeds.shape[1])
        output = self.decoder(inputs_embeds=self.fed, attention_mask=self.mask.long(), use_cache=False)
        return output.last_hidden_state[:, -embeds.shape[1] :]
