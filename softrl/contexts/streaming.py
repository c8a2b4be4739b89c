"""A softAR window that grows a token at a time: the slots of `window.memory_slots`, at a cost that does not grow.

Kept are the last S·L + U embeddings, which are what has not gone into the aggregate, and one running sum a slot in
float64. When a token no longer fits, the window slides: at every edge between slots `stride` tokens leave one sum and
enter the next, so a token costs at most M + 1 additions of a vector, whether it is the thousandth or the millionth.
What rounding leaves behind in a sum that vectors enter and leave grows by 1e-16 of a vector each time.

No gradients: this is for generation. Training reads whole histories by `window.windows`.
"""

import copy

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.contexts.window import LearnedNormalisation, WindowLayout, compacted, normalised, slot_sums


class StreamingWindow:
    """The newest window of N histories, which may have different lengths and slide at different times.

    Args:
        layout: of the window.
        width: D.
        num_rows: N.
        learned: of layouts with normalisation "learned"; read anew at every use.
        dtype: of the embeddings.
        device: of the embeddings.
    """

    def __init__(
        self,
        layout: WindowLayout,
        width: int,
        num_rows: int = 1,
        learned: LearnedNormalisation | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.layout, self.learned = layout, learned
        capacity = layout.num_segments * layout.segment_tokens + layout.uncompressed
        self._held = torch.zeros(num_rows, capacity, width, dtype=dtype, device=device)  # position p at p % capacity
        self._sums = torch.zeros(num_rows, layout.num_slots, width, dtype=torch.float64, device=device)
        # On the host, so that nothing waits for the device in order to know whether a row slides.
        self._lengths = torch.zeros(num_rows, dtype=torch.long)
        self._starts = torch.zeros(num_rows, dtype=torch.long)

    @classmethod
    @torch.no_grad()
    def after(
        cls,
        embeds: Float[Tensor, "N n D"],
        mask: Bool[Tensor, "N n"],
        layout: WindowLayout,
        learned: LearnedNormalisation | None = None,
    ) -> "StreamingWindow":
        """The window after histories that are known already, as if they had been appended token by token.

        Args:
            embeds: shape (N, n, D).
            mask: True on tokens, shape (N, n); False may stand anywhere.
            layout: of the window.
            learned: of layouts with normalisation "learned".
        """
        made = cls(layout, embeds.shape[-1], len(embeds), learned, embeds.dtype, embeds.device)
        rows, _, lengths = compacted(embeds, mask)
        starts = layout.window_of(lengths - 1) * layout.stride
        made._sums = slot_sums(rows, lengths, starts[:, None], layout)[0][:, 0]
        made._lengths, made._starts = lengths.cpu(), starts.cpu()
        capacity = made._held.shape[1]
        row, place = torch.arange(len(rows))[:, None], torch.arange(capacity)
        position = made._lengths[:, None] - 1 - (made._lengths[:, None] - 1 - place) % capacity
        row, place = (index.expand_as(position)[position >= 0] for index in (row, place))
        made._held[row, place] = rows[row, position[position >= 0]]
        return made

    def select(self, rows: Int[Tensor, "M"]) -> "StreamingWindow":
        """The windows of these rows, in this order, each with its own sums from now on."""
        other, here = copy.copy(self), rows.cpu()
        other._held, other._sums = self._held[rows], self._sums[rows]
        other._lengths, other._starts = self._lengths[here], self._starts[here]
        return other

    @property
    def lengths(self) -> Int[Tensor, "N"]:
        """Tokens of each history so far."""
        return self._lengths.clone()

    @property
    def starts(self) -> Int[Tensor, "N"]:
        """The position of each window's first token."""
        return self._starts.clone()

    @torch.no_grad()
    def append(self, embeds: Float[Tensor, "N D"], present: Bool[Tensor, "N"] | None = None) -> Bool[Tensor, "N"]:
        """The next token of every row.

        Args:
            embeds: of the tokens, shape (N, D).
            present: False for rows that stay as they are; None for all True.
        Returns:
            Whether a row's window has moved, so that what a model has read of it does not hold any more.
        """
        grows = torch.ones_like(self._lengths, dtype=torch.bool) if present is None else present.cpu()
        full = grows & (self._lengths - self._starts == self.layout.uncompressed)
        if full.any():
            self._slide(full.nonzero()[:, 0])
        rows = grows.nonzero()[:, 0]
        self._held[rows, self._lengths[rows] % self._held.shape[1]] = embeds[rows].to(self._held.dtype)
        self._lengths[rows] += 1
        return full

    def _slide(self, rows: Int[Tensor, "R"]) -> None:
        """`W'_i = γ^Δ_{i+1} W_i + m_{i+1} − γ^n'_i m_i`: m_b is the weighted sum of what crosses edge b, Δ_b how much.

        γ is the layout's `weight_decay`, n' how many tokens a slot has afterwards.
        """
        gamma = self.layout.weight_decay
        after = self._starts[rows] + self.layout.stride
        old, new = self.layout.edges(self._starts[rows]), self.layout.edges(after)
        positions = old[..., None] + torch.arange(self.layout.stride)
        ages = new[..., None] - 1 - positions
        weights = (gamma ** ages.clamp(min=0).double()).masked_fill(ages < 0, 0.0).to(self._sums.device)
        tokens = self._held[rows[:, None, None], positions % self._held.shape[1]].double()
        crossing = torch.einsum("res,resd->red", weights, tokens)
        fading = (gamma ** (new - old)[:, 1:, None].double()).to(self._sums.device)
        leaving = (gamma ** new.diff(dim=-1)[..., None].double()).to(self._sums.device)
        self._sums[rows] = fading * self._sums[rows] + crossing[:, 1:] - leaving * crossing[:, :-1]
        self._starts[rows] = after

    @torch.no_grad()
    def slots(self) -> tuple[Float[Tensor, "N M D"], Bool[Tensor, "N M"]]:
        """Memory slots in the layout's order, and whether each has a token."""
        counts = self.layout.edges(self._starts).diff(dim=-1).to(self._sums.device)
        slots = normalised(self._sums, counts, self.layout, self.learned)
        return slots.to(self._held.dtype), self.layout.ordered(counts[..., None])[..., 0] > 0

    @torch.no_grad()
    def tokens(self) -> tuple[Float[Tensor, "N U D"], Bool[Tensor, "N U"]]:
        """The window's tokens, oldest first, and which of its places are taken: the last may be free."""
        positions = self._starts[:, None] + torch.arange(self.layout.uncompressed)
        present = (positions < self._lengths[:, None]).to(self._held.device)
        tokens = self._held[torch.arange(len(positions))[:, None], positions % self._held.shape[1]]
        return tokens.masked_fill(~present[..., None], 0.0), present

    def inputs(self) -> tuple[Float[Tensor, "N W D"], Bool[Tensor, "N W"]]:
        """The whole window: slots, then tokens, and its mask."""
        parts = zip(self.slots(), self.tokens(), strict=True)
        inputs, mask = (torch.cat(pair, 1) for pair in parts)
        return inputs, mask

    @torch.no_grad()
    def enrich(self, positions: Int[Tensor, "N"], delta: Float[Tensor, "N D"]) -> None:
        """Retroactive enrichment: add to a token of each row, wherever it is now; its cost is that of the M slots.

        Of tokens that a layout without aggregate has forgotten nothing is changed.

        Args:
            positions: one of each row, counted in its own tokens from 0; −1 leaves a row alone.
            delta: what is added, shape (N, D).
        Raises:
            ValueError: a position that no token has yet, other shapes, or numbers that are not finite.
        """
        positions, rows = self._checked(positions, -1, "delta", delta)
        place = positions[rows] % self._held.shape[1]
        old, added = self._held[rows, place], delta[rows].double()
        new = (old.double() + added).to(old.dtype)
        held = (positions[rows] >= self._oldest_held()[rows]).to(old.device)[:, None]
        self._held[rows, place] = torch.where(held, new, old)
        # What is added to sums is what was added to the held token after rounding: the same leaves them again.
        self._add_to_sums(rows, positions[rows], torch.where(held, new.double() - old.double(), added))

    @torch.no_grad()
    def replace(self, positions: Int[Tensor, "N"], embeds: Float[Tensor, "N D"]) -> None:
        """Put another embedding in the place of a token that is not in the aggregate: a soft token that collapses.

        Args:
            positions: counted in a row's own tokens from 0; −1 leaves a row alone.
            embeds: shape (N, D).
        Raises:
            ValueError: a position that no token has yet, or that is part of the aggregate, or forgotten; other shapes,
                or numbers that are not finite.
        """
        positions, rows = self._checked(positions, self._oldest_held(), "embeds", embeds)
        place = positions[rows] % self._held.shape[1]
        old, new = self._held[rows, place], embeds[rows].to(self._held.dtype)
        self._held[rows, place] = new
        self._add_to_sums(rows, positions[rows], new.double() - old.double())

    def _oldest_held(self) -> Int[Tensor, "N"]:
        return (self._starts - self.layout.num_segments * self.layout.segment_tokens).clamp(min=0)

    def _add_to_sums(self, rows: Int[Tensor, "R"], positions: Int[Tensor, "R"], added: Float[Tensor, "R D"]) -> None:
        edges = self.layout.edges(self._starts[rows])
        inside = (edges[:, :-1] <= positions[:, None]) & (positions[:, None] < edges[:, 1:])
        ages = (edges[:, 1:] - 1 - positions[:, None]).clamp(min=0).double()
        weights = (self.layout.weight_decay**ages).masked_fill(~inside, 0.0).to(added.device)
        self._sums[rows] += weights[..., None] * added[:, None]

    def _checked(
        self, positions: Tensor, oldest: Tensor | int, name: str, vectors: Tensor
    ) -> tuple[Int[Tensor, "N"], Int[Tensor, "R"]]:
        """Positions on the host, and the rows that are meant; their vectors, of that name, are checked too."""
        num_rows, _, width = self._held.shape
        if positions.shape != (num_rows,) or positions.is_floating_point():
            raise ValueError(
                f"positions must be whole numbers, one of each of the {num_rows} rows, got {positions.dtype} of shape "
                f"{tuple(positions.shape)}; -1 leaves a row alone"
            )
        if vectors.shape != (num_rows, width):
            raise ValueError(
                f"{name} must be one vector a row, of shape {(num_rows, width)}, got {tuple(vectors.shape)}"
            )
        positions = positions.cpu()
        wrong = (positions != -1) & ((positions < oldest) | (positions >= self._lengths))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            least = max(int(torch.as_tensor(oldest).expand_as(positions)[row]), 0)
            raise ValueError(
                f"positions[{row}] must be from {least} to {int(self._lengths[row]) - 1}, tokens that row {row} has "
                f"and holds, or -1 for none; got {int(positions[row])}"
            )
        rows = (positions != -1).nonzero()[:, 0]
        if not vectors[rows].isfinite().all():
            row = int(rows[~vectors[rows].isfinite().all(-1).cpu()][0])
            raise ValueError(f"{name}[{row}] must be finite, since sums keep what is added to them; got inf or nan")
        return positions, rows
