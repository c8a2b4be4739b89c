"""Step by step decoding of a softAR model: a cache inside the window, a new window where it is full.

Inside a window a step feeds one embedding to the language model's own decoding state, whatever that keeps. When a row
has no place for the next token its window moves on by the stride, and the windows are read anew; what is older is in
running sums, so a token costs the same after any history. Rows slide one by one, since prompts differ in length; the
others are read anew with them, which changes nothing for them. The hidden states are those of `SoftARModel.forward`
over the whole history.

Soft tokens stand in the soft region only; before the window moves, `leaving` says which ones go, and `replace` puts in
what they have collapsed to. A token that has been read can be enriched, wherever it is by now (`enrich`). Left out:
gradients; `SoftARModel.new_state` gives a growing state for those.
"""

import copy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.contexts.streaming import StreamingWindow
from softrl.models.state import DecodeState, decode_state


class WindowState(DecodeState):
    """What a softAR model carries from token to token.

    Args:
        model: a `SoftARModel`.
        mask: of the prompts, padding on either side.
    """

    def __init__(self, model: Any, mask: Bool[Tensor, "B P"]):
        super().__init__(model, mask)
        self.layout = model.layout
        self.window: StreamingWindow | None = None  # of the prompts, once they are there
        # Of the windows' places, the oldest first.
        self.is_soft = torch.zeros(len(mask), self.layout.uncompressed, dtype=torch.bool, device=mask.device)
        self.inside: DecodeState | None = None  # of the windows as they are; None where they have to be read

    def select(self, rows: Int[Tensor, "M"]) -> None:
        super().select(rows)
        self.window, self.is_soft = self._started.select(rows), self.is_soft[rows]
        if self.inside is not None:
            self.inside.select(rows)

    def _copied(self) -> "WindowState":
        other = copy.copy(self)
        if self.inside is not None:
            other.inside = self.inside._copied()
        return other

    @property
    def _started(self) -> StreamingWindow:
        if self.window is None:
            raise ValueError("nothing has been fed yet; advance with the prompts first")
        return self.window

    def advance(
        self, embeds: Float[Tensor, "N S D"], is_soft: Bool[Tensor, "N"] | None = None
    ) -> Float[Tensor, "N S D"]:
        """Feed S embeddings, the prompts at first; hidden states at their positions.

        Args:
            embeds: of the tokens.
            is_soft: whether a row's tokens are soft; only those with a place in the soft region can be, see `places`.
        Raises:
            ValueError: a soft token among the hard ones, or among the prompts.
        """
        if self.window is None:
            if is_soft is not None and is_soft.any():
                raise ValueError("is_soft must be None at the first call, which feeds prompts: they are hard")
            self.window = StreamingWindow.after(embeds, self.mask, self.layout, self.decoder.normalisation)
            return self.decoder(inputs_embeds=embeds, attention_mask=self.mask).last_hidden_state
        soft = torch.zeros_like(self.is_soft[:, 0]) if is_soft is None else is_soft
        return torch.stack([self._step(each, soft) for each in embeds.unbind(1)], 1)

    @property
    def filled(self) -> Int[Tensor, "N"]:
        """Uncompressed tokens in each row's window, from 1 to U."""
        return (self._started.lengths - self._started.starts).to(self.is_soft.device)

    @property
    def places(self) -> Int[Tensor, "N"]:
        """Where among a window's tokens the next one of each row will stand, from 0; soft from `num_hard` on."""
        filled = self.filled
        return filled - self.layout.stride * (filled == self.layout.uncompressed)

    def leaving(self) -> Bool[Tensor, "N U"]:
        """The soft tokens of the windows that the next token pushes out of the soft region."""
        place = torch.arange(self.layout.uncompressed, device=self.is_soft.device) - self.layout.stride
        is_full = self.filled == self.layout.uncompressed
        return self.is_soft & is_full[:, None] & (place < self.layout.num_hard)

    def replace(self, which: Bool[Tensor, "N U"], embeds: Float[Tensor, "M D"]) -> None:
        """Put embeddings in the place of so many of the windows' tokens, which are hard from now on."""
        window, (tokens, _) = self._started, self._started.tokens()
        tokens = tokens.masked_scatter(which[..., None], embeds.to(tokens.dtype))
        for place in which.any(0).nonzero()[:, 0].tolist():
            window.replace(torch.where(which[:, place].cpu(), window.starts + place, -1), tokens[:, place])
        self.is_soft = self.is_soft & ~which
        self.inside = None

    @torch.no_grad()
    def enrich(self, positions: Int[Tensor, "N"], delta: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Retroactive enrichment: add to a token that has been read, in the window or in what its slots sum up.

        What follows is as if the token had been so from the start: of the newest window nothing older is kept, and it
        is read anew, at the cost of one window. Tokens that a layout without aggregate has forgotten stay forgotten.

        Args:
            positions: one of each row, counted in its own tokens from 0, prompt included; −1 leaves a row alone.
            delta: what is added, such as `algebra.combine` of embeddings.
        Returns:
            The hidden states of the newest tokens, in the place of those that `advance` gave.
        Raises:
            ValueError: a position that no token has yet, other shapes, numbers that are not finite, or nothing has
                been fed.
        """
        self._started.enrich(positions, delta)
        return self._read()

    def _step(self, embeds: Float[Tensor, "N D"], is_soft: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        if (is_soft & (self.places < self.layout.num_hard)).any():
            raise ValueError(
                f"is_soft names rows whose next token stands among the {self.layout.num_hard} hard ones (places "
                f"{self.places.tolist()}); feed a hard token there"
            )
        moved = self._started.append(embeds).to(self.is_soft.device)
        ahead = torch.nn.functional.pad(self.is_soft[:, self.layout.stride :], (0, self.layout.stride))
        self.is_soft = torch.where(moved[:, None], ahead, self.is_soft)
        newest = (self.filled - 1)[:, None]
        self.is_soft = self.is_soft.scatter(1, newest, is_soft[:, None])
        if self.inside is None or moved.any():
            return self._read()
        typed = torch.where(is_soft[:, None], embeds + self._soft_type, embeds)
        return self.inside.advance(typed[:, None])[:, -1]

    @property
    def _soft_type(self) -> Float[Tensor, "D"]:
        return self.decoder.types(self.layout.num_segments + 2)

    def _read(self) -> Float[Tensor, "N D"]:
        """Read the windows as they are; the hidden states at their newest tokens.

        Rows with fewer tokens are padded before their slots: some models count how far back they look by places.
        """
        count, num_slots = int(self.filled.max()), self.layout.num_slots
        slots, seen = self.decoder.memory(*self._started.slots())
        tokens, present = (each[:, :count] for each in self._started.tokens())
        tokens = torch.where(self.is_soft[:, :count, None], tokens + self._soft_type, tokens)
        inputs, mask = torch.cat([slots, tokens], 1), torch.cat([seen, present], 1)
        source = torch.arange(num_slots + count, device=mask.device) - (count - self.filled)[:, None]
        mask = mask.gather(1, source.clamp(min=0)) & (source >= 0)
        inputs = inputs.gather(1, source.clamp(min=0)[..., None].expand_as(inputs))
        self.inside = decode_state(self.decoder.backbone, mask, self.layout.uncompressed - count)
        return self.decoder.checked(self.inside.advance(inputs), mask)[:, -1]
