"""Branches of texts: short continuations that start after many tokens of a text at once, as thoughts do.

A branch sees its text through its anchor, the slot of the token that it follows, and itself. Three ways to compute
that, which agree in values and gradients:

- "shared": the text's keys are computed once and shared; attention to them and to the branch's own keys is merged by
  log-sum-exp. `O(m T² d + T m² d)` time and `O(T (1 + m))` keys for a branch of m tokens after each of T;
- "dense": text and branches as one sequence of `T (1 + m)` tokens under a mask, `O(T² m² d)`: what transformers'
  ordinary attention can do. For comparison;
- "naive": text through the anchor and branch as one sequence, a pass for each branch: `O(T³ m d)`; any architecture.

A model with a recurrent state carries that instead of keys ("shared" only copies it).
Source: ours (softrl maths, section 6).
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.models.kv import num_key_value_layers
from softrl.models.policy import Policy
from softrl.models.shared_prefix import SharedTexts
from softrl.models.state import positions
from softrl.models.text_state import Branches, TextState, check_window, decoded

BranchAttention = Literal["shared", "dense", "naive"]


def read_texts(policy: Policy, attention: BranchAttention, num_texts: int, device: torch.device) -> TextState:
    """A state that has read nothing yet.

    Args:
        policy: the model; gradients flow through everything that is fed.
        attention: see the top of this file.
        num_texts: N.
        device: of the texts.
    Raises:
        ValueError: unknown attention; gradient checkpointing, which drops the keys; virtual tokens; or an
            architecture that the attention asked for cannot do.
    """
    if attention not in get_args(BranchAttention):
        raise ValueError(f"attention must be one of {get_args(BranchAttention)}, got {attention!r}")
    policy.virtual.refuse("a text with branches")
    mask = torch.zeros(num_texts, 0, dtype=torch.bool, device=device)
    if attention == "naive":
        return _NaiveTexts(policy, mask)
    if hasattr(policy.decoder, "initial_state") and attention == "shared":
        return _RecurrentTexts(policy, mask)
    name = type(policy.causal_lm).__name__
    if policy.cache_argument is None or num_key_value_layers(policy.decoder) is None:
        raise ValueError(
            f"attention={attention!r} needs a model whose state is keys and values, and {name} has another one; pass "
            "attention='naive'"
        )
    if not policy.accepted({"position_ids": None}):
        raise ValueError(
            f"{name} takes its positions from slots, which are not those of branches; pass attention='naive'"
        )
    if attention == "dense":
        return _DenseTexts(policy, mask)
    policy.refuse_checkpointing()
    return SharedTexts(policy, mask)


class _DenseTexts(TextState):
    """Texts whose branches are computed together with them, in one sequence under one mask."""

    def __init__(self, policy: Policy, mask: Bool[Tensor, "N 0"]):
        super().__init__(policy, mask)
        self.embeds: Tensor | None = None

    def extend(self, embeds: Float[Tensor, "N S D"], mask: Bool[Tensor, "N S"]) -> Float[Tensor, "N S D"]:
        self._appended(mask)
        check_window(self.policy, self.mask.shape[1])
        self.embeds = embeds if self.embeds is None else torch.cat([self.embeds, embeds], 1)
        return decoded(self.policy, self.embeds, positions(self.mask), self.mask.long())[:, -embeds.shape[1] :]

    def branch(self, anchors: Int[Tensor, "N L"]) -> Branches:
        return _DenseBranches(self, anchors)


class _DenseBranches(Branches):
    """Everything again at every call: text and all branches as one sequence."""

    def __init__(self, texts: _DenseTexts, anchors: Int[Tensor, "N L"]):
        self.texts, self.anchors = texts, anchors
        self.embeds: Tensor | None = None

    def advance(self, embeds: Float[Tensor, "N L S D"]) -> Float[Tensor, "N L S D"]:
        texts, count = self.texts, embeds.shape[2]
        assert texts.embeds is not None
        self.embeds = embeds if self.embeds is None else torch.cat([self.embeds, embeds], 2)
        length = self.embeds.shape[2]
        where = texts.branch_positions(self.anchors, 0, length).flatten(1)
        check_window(texts.policy, texts.mask.shape[1] + length)
        fed = torch.cat([texts.embeds, self.embeds.flatten(1, 2)], 1)
        sees = dense_mask(texts.mask, texts.visible(self.anchors), length)
        mask = torch.zeros(sees.shape, dtype=fed.dtype, device=fed.device).masked_fill(
            ~sees, torch.finfo(fed.dtype).min
        )
        hidden = decoded(texts.policy, fed, torch.cat([positions(texts.mask), where], 1), mask[:, None])
        return hidden[:, texts.mask.shape[1] :].unflatten(1, (-1, length))[:, :, -count:]


def dense_mask(mask: Bool[Tensor, "N T"], visible: Bool[Tensor, "N L T"], length: int) -> Bool[Tensor, "N keys keys"]:
    """Who sees whom among T tokens of a text and L branches of `length` tokens, one after the other."""
    num_texts, num_slots = mask.shape
    slots = torch.arange(num_slots, device=mask.device)
    own = torch.arange(visible.shape[1] * length, device=mask.device)
    text = (slots <= slots[:, None]) & mask[:, None] | (slots == slots[:, None])
    same = (own // length == own[:, None] // length) & (own <= own[:, None])
    above = torch.cat([text, text.new_zeros(num_texts, num_slots, len(own))], 2)
    below = torch.cat([visible.repeat_interleave(length, 1), same.expand(num_texts, -1, -1)], 2)
    return torch.cat([above, below], 1)


class _NaiveTexts(TextState):
    """Texts as embeddings: every branch runs its own through again."""

    def __init__(self, policy: Policy, mask: Bool[Tensor, "N 0"]):
        super().__init__(policy, mask)
        self.embeds: Tensor | None = None

    def extend(self, embeds: Float[Tensor, "N S D"], mask: Bool[Tensor, "N S"]) -> Float[Tensor, "N S D"]:
        self._appended(mask)
        if (self.mask[:, 1:] & ~self.mask[:, :-1]).any() and not self.policy.honours_padding:
            name = type(self.policy.causal_lm).__name__
            raise ValueError(f"padding comes before a text, which {name} does not mask; pad on the right")
        self.embeds = embeds if self.embeds is None else torch.cat([self.embeds, embeds], 1)
        return decoded(self.policy, self.embeds, positions(self.mask), self.mask.long())[:, -embeds.shape[1] :]

    def branch(self, anchors: Int[Tensor, "N L"]) -> Branches:
        return _NaiveBranches(self, anchors)


class _NaiveBranches(Branches):
    """One pass for each branch of each text, over nothing but what it sees."""

    def __init__(self, texts: _NaiveTexts, anchors: Int[Tensor, "N L"]):
        self.texts, self.anchors = texts, anchors
        self.visible = texts.visible(anchors)
        self.embeds: Tensor | None = None

    def advance(self, embeds: Float[Tensor, "N L S D"]) -> Float[Tensor, "N L S D"]:
        texts, count = self.texts, embeds.shape[2]
        self.embeds = embeds if self.embeds is None else torch.cat([self.embeds, embeds], 2)
        assert texts.embeds is not None
        rows = []
        for row, branches in enumerate(self.embeds):
            for index, branch in enumerate(branches):
                alone = torch.cat([texts.embeds[row, self.visible[row, index]], branch])[None]
                where = torch.arange(alone.shape[1], device=alone.device)[None]
                rows.append(decoded(texts.policy, alone, where, torch.ones_like(where))[0, -count:])
        return torch.stack(rows).unflatten(0, embeds.shape[:2])


class _RecurrentTexts(TextState):
    """The recurrent state after every token of the texts."""

    hands_over = True

    def __init__(self, policy: Policy, mask: Bool[Tensor, "N 0"]):
        super().__init__(policy, mask)
        self.states: Tensor | None = None  # N T layers D

    def extend(self, embeds: Float[Tensor, "N S D"], mask: Bool[Tensor, "N S"]) -> Float[Tensor, "N S D"]:
        self._appended(mask)
        decoder, before = self.policy.decoder, self.states
        state = decoder.initial_state(embeds[:, 0]) if before is None else before[:, -1]
        with self.policy.context():
            new = decoder.states(embeds, state, mask)
        self.states = new if before is None else torch.cat([before, new], 1)
        return new[:, :, -1]

    def branch(self, anchors: Int[Tensor, "N L"]) -> Branches:
        assert self.states is not None
        at_anchor = anchors[..., None, None].expand(-1, -1, *self.states.shape[2:])
        return _RecurrentBranches(self.policy, self.states.gather(1, at_anchor))


class _RecurrentBranches(Branches):
    """A state of its own for every branch."""

    def __init__(self, policy: Policy, states: Float[Tensor, "N L layers D"]):
        self.policy, self.shape, self.state = policy, states.shape[:2], states.flatten(0, 1)

    def advance(self, embeds: Float[Tensor, "N L S D"]) -> Float[Tensor, "N L S D"]:
        hidden = []
        for embed in embeds.flatten(0, 1).unbind(1):
            with self.policy.context():
                self.state = self.policy.decoder.step(embed, self.state)
            hidden.append(self.state[:, -1])
        return torch.stack(hidden, 1).unflatten(0, self.shape)
