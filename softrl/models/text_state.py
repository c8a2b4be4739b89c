"""What a policy has read of several texts, from which branches start: the interface, and one pass of the decoder."""

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.models.kv import KVCache
from softrl.models.policy import Policy
from softrl.models.state import positions


class Branches(ABC):
    """Continuations of N texts, L of each. `advance` feeds all of them."""

    @abstractmethod
    def advance(self, embeds: Float[Tensor, "N L S D"]) -> Float[Tensor, "N L S D"]:
        """Feed S further embeddings to every branch; hidden states at their positions, differentiable."""


class TextState(ABC):
    """What a policy has read of N texts: it reads on, and branches off.

    `hands_over` says whether it is a state that another model of the same shape can go on from, and not the texts.
    """

    hands_over: ClassVar[bool] = False

    def __init__(self, policy: Policy, mask: Bool[Tensor, "N 0"]):
        self.policy, self.mask = policy, mask

    @abstractmethod
    def extend(self, embeds: Float[Tensor, "N S D"], mask: Bool[Tensor, "N S"]) -> Float[Tensor, "N S D"]:
        """Read S further tokens of every text; hidden states at their positions."""

    @abstractmethod
    def branch(self, anchors: Int[Tensor, "N L"]) -> Branches:
        """Branches that follow the tokens at these slots."""

    def handed_to(self, policy: Policy) -> "TextState":
        """The same state, for branches of another model with as many layers of the same width.

        Raises:
            ValueError: the state is no state, but the texts, which the other model would read again.
        """
        if not self.hands_over:
            raise ValueError(
                f"{type(self).__name__} computes branches from the texts, so what one model has read cannot be handed "
                "to another; use attention='shared'"
            )
        other = copy.copy(self)
        other.policy = policy
        return other

    def _appended(self, mask: Bool[Tensor, "N S"]) -> None:
        self.mask = torch.cat([self.mask, mask], 1)

    def visible(self, anchors: Int[Tensor, "N L"]) -> Bool[Tensor, "N L T"]:
        """Which slots of its text a branch sees: the real ones through its anchor, which counts as real."""
        slots = torch.arange(self.mask.shape[1], device=anchors.device)
        through = slots <= anchors[..., None]
        return (through & self.mask[:, None]) | (slots == anchors[..., None])

    def branch_positions(self, anchors: Int[Tensor, "N L"], first: int, count: int) -> Int[Tensor, "N L S"]:
        """Position ids of a branch's tokens `first`, `first + 1`, ...: they go on where the anchor stands."""
        at_anchor = positions(self.mask).gather(1, anchors)
        return at_anchor[..., None] + 1 + first + torch.arange(count, device=anchors.device)


def check_window(policy: Policy, longest: int) -> None:
    """Raise ValueError where a sliding window, or a chunk, would hide what branches see."""
    config = policy.causal_lm.config.get_text_config()
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    windows = [each for each in (sliding, getattr(config, "attention_chunk_size", None)) if each is not None]
    if windows and (window := min(windows)) < longest:
        raise ValueError(
            f"the model attends through a window of {window} tokens, and text and branch have {longest}; shorten the "
            "texts, or pass attention='naive'"
        )


def decoded(
    policy: Policy,
    embeds: Float[Tensor, "N S D"],
    where: Int[Tensor, "N S"],
    mask: Tensor | None,
    cache: KVCache | None = None,
) -> Float[Tensor, "N S D"]:
    """One pass of the decoder."""
    arguments: dict[str, Any] = {
        "inputs_embeds": embeds, "position_ids": where, "attention_mask": mask, "use_cache": cache is not None,
    }  # fmt: skip
    if cache is not None:
        assert policy.cache_argument is not None
        arguments[policy.cache_argument] = cache
    with policy.context():
        return policy.decoder(**policy.accepted(arguments)).last_hidden_state
