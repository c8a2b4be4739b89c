"""softAR windows: `[aggregate | segment sums | hard tokens | soft tokens]`, cut from a history of any length.

A history of embeddings x_0, x_1, ... is read in windows. Window c holds the U = num_hard + num_soft tokens from
x_{c·stride} on as they are, and in front of them memory slots: each of S segments is one vector for L tokens, the
newest of them just before the window's tokens, and the aggregate is one vector for everything older. Slots for which
there is no token yet are masked out, so the first window is an ordinary language model's input.

Token t is new in window max(0, ⌈(t − U + 1) / stride⌉), and what follows it is predicted there: the first window
predicts from all its tokens, later ones from their last `stride`. So reading a history of any length is one causal and
differentiable function of its embeddings, over one batch of windows. The slots come from prefix sums in float64: in
float32 the difference of two sums over ten thousand tokens has lost what a segment adds.

Positions count a row's own tokens: padding, on either side, changes nothing. Left out: the model that reads windows
(`soft_ar`), windows that grow a token at a time (`streaming`), and position numbers, which are the model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

Normalisation = Literal["mean", "sqrt", "decay", "learned", "none"]

AGGREGATE = 0  # kinds of places; segment s of S has kind 1 + s, hard tokens S + 1, soft tokens S + 2
_ORDERS = (("aggregate", "segments"), ("segments", "aggregate"))
_NEGLIGIBLE = 2.0**-70  # of a weight beside 1, in float64


@dataclass(frozen=True)
class WindowLayout:
    """How a window is divided, and what its memory slots are.

    Args:
        num_segments: S, 0 for none.
        segment_tokens: L, tokens that a segment sums up.
        num_hard: hard tokens, the older part of the U uncompressed ones.
        num_soft: soft tokens, the last places of the window.
        aggregate: whether one slot sums up what is older than the segments; without it that is forgotten.
        order: of the slots. Tokens come after both: a causal model would not see a slot behind them.
        normalisation: of a slot's sum over n tokens: "mean" divides by n, "sqrt" by √n (which keeps the norm of a sum
            of unrelated vectors), "decay" is the mean with weights `decay`^age, age 0 being the slot's newest token,
            "learned" is `LearnedNormalisation`, "none" leaves the sum.
        decay: of "decay", between 0 and 1.
        stride: tokens by which a window is ahead of the one before, from 1 to U; 0 stands for num_soft, or for half of
            the hard tokens where there are no soft ones.
    Raises:
        ValueError: a number out of range, or an unknown name.
    """

    num_segments: int
    segment_tokens: int
    num_hard: int
    num_soft: int
    aggregate: bool = True
    order: Sequence[str] = ("aggregate", "segments")
    normalisation: Normalisation = "mean"
    decay: float = 0.99
    stride: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", tuple(self.order))  # a list, where it comes from JSON
        self._check_names()
        for name, least in (("num_segments", 0), ("segment_tokens", 1), ("num_hard", 0), ("num_soft", 0)):
            _check_count(name, getattr(self, name), least)
        if self.uncompressed < 1:
            raise ValueError("num_hard + num_soft must be 1 or more: a window needs a token to predict from, got 0")
        object.__setattr__(self, "stride", self.stride or self.num_soft or (self.num_hard + 1) // 2)
        _check_count("stride", self.stride, 1, self.uncompressed)

    def _check_names(self) -> None:
        if not isinstance(self.aggregate, bool):  # it is added to a count
            raise ValueError(f"aggregate must be True or False, got {self.aggregate!r}; it is one slot or none")
        if self.order not in _ORDERS:
            raise ValueError(f"order must be one of {_ORDERS}, got {self.order!r}; both name all slots once")
        if self.normalisation not in get_args(Normalisation):
            raise ValueError(
                f"normalisation must be one of {get_args(Normalisation)}, got {self.normalisation!r}; choose one"
            )
        if not 0.0 < self.decay < 1.0:
            raise ValueError(f'decay must lie between 0 and 1, got {self.decay!r}; "mean" weighs all tokens equally')

    @classmethod
    def notes(cls, size: int = 128, segment_tokens: int = 97, **settings: Any) -> "WindowLayout":
        """The layout of the project's notes: 1 aggregate, 2 segments, 97 hard tokens, the rest of `size` soft.

        The notes do not say how long a segment is; by default it is as long as the hard part.

        Args:
            size: places of the window, above 100.
            segment_tokens: L.
            settings: further arguments of the layout.
        Raises:
            ValueError: no room for a soft token.
        """
        if size <= 100:
            raise ValueError(
                f"size must be above 100, got {size!r}: slots and hard tokens of the notes take 100 places"
            )
        return cls(2, segment_tokens, 97, size - 100, **settings)

    @property
    def uncompressed(self) -> int:
        """U."""
        return self.num_hard + self.num_soft

    @property
    def num_slots(self) -> int:
        """M."""
        return self.num_segments + self.aggregate

    @property
    def size(self) -> int:
        """W = M + U, the places of a window."""
        return self.num_slots + self.uncompressed

    @property
    def num_kinds(self) -> int:
        """Different numbers in `kinds`, used or not."""
        return self.num_segments + 3

    @property
    def kinds(self) -> Int[Tensor, "W"]:
        """The kind of every place: `AGGREGATE`, 1 + s for segment s, S + 1 for hard and S + 2 for soft tokens."""
        slots = self.ordered(torch.arange(0 if self.aggregate else 1, self.num_segments + 1)[:, None])[:, 0]
        tokens = torch.tensor([self.num_segments + 1] * self.num_hard + [self.num_segments + 2] * self.num_soft)
        return torch.cat([slots, tokens])

    @property
    def weight_decay(self) -> float:
        """What a token's weight in its slot loses with every token that is newer: 1 where all weigh the same."""
        return self.decay if self.normalisation == "decay" else 1.0

    def ordered(self, slots: Shaped[Tensor, "*batch M D"]) -> Shaped[Tensor, "*batch M D"]:
        """Slots from the oldest to the newest, in the order of the layout."""
        last = self.aggregate and self.order[0] == "segments"
        return slots.roll(-1, -2) if last else slots

    def num_windows(self, length_tokens: int) -> int:
        """C, the windows in which a history of that length is read; at least one."""
        return max(0, -(-(length_tokens - self.uncompressed) // self.stride)) + 1

    def window_of(self, positions: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """The window in which the token at a position is new."""
        return -((self.uncompressed - 1 - positions) // self.stride).clamp(max=0)

    def edges(self, before: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch E"]:
        """Slot i of M = E − 1, from the oldest, sums up the positions from edge i up to edge i + 1, exclusive."""
        back = torch.arange(self.num_segments, -1, -1, device=before.device) * self.segment_tokens
        edges = (before[..., None] - back).clamp(min=0)
        return torch.cat([torch.zeros_like(edges[..., :1]), edges], -1) if self.aggregate else edges


def _check_count(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        wanted = f"{least} or more" if most is None else f"from {least} to num_hard + num_soft = {most}"
        raise ValueError(f"{name} must be a whole number, {wanted}, got {value!r}; choose another {name}")


class LearnedNormalisation(nn.Module):
    """`g_k · (sum of n tokens) / n^a_k` with learned gain g_k and exponent a_k of each of M slots, from the oldest.

    It starts as the mean: g = 1, a = 1.

    Args:
        layout: says how many slots there are.
    """

    def __init__(self, layout: WindowLayout):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(layout.num_slots))
        self.exponent = nn.Parameter(torch.ones(layout.num_slots))

    def forward(self, counts: Int[Tensor, "*batch M"]) -> Float[Tensor, "*batch M"]:
        """The factors of sums over that many tokens, in float64; 0 tokens count as 1."""
        return self.gain.double() * counts.clamp(min=1).double() ** -self.exponent.double()


@dataclass(frozen=True)
class Windows:
    """A batch of histories in windows, N rows in C windows of W = M + U places.

    `mask` is False at slots without a token and past a row's end; a window past it has no True at all.
    """

    inputs: Float[Tensor, "N C W D"]
    mask: Bool[Tensor, "N C W"]
    kinds: Int[Tensor, "W"]
    source: Int[Tensor, "N C U"]  # the column of the given rows that a token comes from; 0 where there is none
    place: Int[Tensor, "N n"]  # of every given token: c·W + its place in window c, where it is new; 0 at padding
    given: Bool[Tensor, "N n"]

    def per_token(self, values: Float[Tensor, "N C W D"]) -> Float[Tensor, "N n D"]:
        """Of values at all places (a model's hidden states) the one to predict the next token from; 0 at padding."""
        index = self.place[..., None].expand(-1, -1, values.shape[-1])
        return values.flatten(1, 2).gather(1, index).masked_fill(~self.given[..., None], 0.0)

    def spread(self, values: Int[Tensor, "N n"]) -> Int[Tensor, "N C U"]:
        """Numbers of tokens (ids, whether a token is soft) at the windows' tokens; meaningless where mask is False."""
        return values.gather(1, self.source.flatten(1)).view_as(self.source)


def windows(
    embeds: Float[Tensor, "N n D"],
    mask: Bool[Tensor, "N n"],
    layout: WindowLayout,
    learned: LearnedNormalisation | None = None,
) -> Windows:
    """All windows of histories: from scratch, causal, differentiable in the embeddings and the normalisation.

    Args:
        embeds: x, any width, shape (N, n, D).
        mask: True on tokens, shape (N, n); False may stand anywhere.
        layout: with C windows for the longest row.
        learned: of layouts with normalisation "learned".
    Raises:
        ValueError: nothing to cut, or a learned normalisation is missing or not wanted.
    Source: ours, after the notes on softAR (softrl maths, section 9).
    """
    if 0 in mask.shape:
        raise ValueError(f"embeds must have one row and one token or more, got N, n = {tuple(mask.shape)}; pass some")
    rows, order, lengths = compacted(embeds, mask)
    count = layout.num_windows(int(lengths.max()))
    starts = torch.arange(count, device=embeds.device) * layout.stride
    slots, filled = slots_before(rows, lengths, starts.expand(len(rows), -1), layout, learned)
    positions = starts[:, None] + torch.arange(layout.uncompressed, device=embeds.device)
    present = positions < lengths[:, None, None]
    index = positions.clamp(max=rows.shape[1] - 1)
    tokens = rows.index_select(1, index.flatten()).unflatten(1, index.shape).masked_fill(~present[..., None], 0.0)
    source = order[:, index].masked_fill(~present, 0)
    # A window in which a row has no token predicts nothing: its memory is left out as well.
    seen = torch.cat([filled & present[..., :1], present], -1)
    return Windows(
        torch.cat([slots, tokens], -2), seen, layout.kinds.to(embeds.device), source, _places(mask, layout), mask
    )


def _places(mask: Bool[Tensor, "N n"], layout: WindowLayout) -> Int[Tensor, "N n"]:
    positions = mask.long().cumsum(-1) - 1
    window = layout.window_of(positions)
    places = window * layout.size + layout.num_slots + positions - window * layout.stride
    return places.masked_fill(~mask, 0)


def memory_slots(
    embeds: Float[Tensor, "N n D"],
    mask: Bool[Tensor, "N n"],
    before: Int[Tensor, "C"],
    layout: WindowLayout,
    learned: LearnedNormalisation | None = None,
) -> tuple[Float[Tensor, "N C M D"], Bool[Tensor, "N C M"]]:
    """The memory of windows whose first tokens are at the given positions, from scratch.

    A token of slot i is at a position p with e_i ≤ p < e_{i+1}, where e are the layout's `edges`.

    Args:
        embeds: x, shape (N, n, D).
        mask: True on tokens, shape (N, n); False may stand anywhere.
        before: positions, counted in a row's own tokens from 0, shape (C,); past its end there are no tokens.
        layout: of the slots.
        learned: of layouts with normalisation "learned".
    Returns:
        Slots in the embeddings' dtype, 0 where there is no token, and whether there is one.
    Raises:
        ValueError: a learned normalisation is missing or not wanted.
    Source: ours, after the notes on softAR (softrl maths, section 9).
    """
    rows, _, lengths = compacted(embeds, mask)
    return slots_before(rows, lengths, before.expand(len(rows), -1), layout, learned)


def slots_before(
    rows: Float[Tensor, "N n D"],
    lengths: Int[Tensor, "N"],
    before: Int[Tensor, "N C"],
    layout: WindowLayout,
    learned: LearnedNormalisation | None,
) -> tuple[Float[Tensor, "N C M D"], Bool[Tensor, "N C M"]]:
    """`memory_slots` of rows without padding on the left, at positions of their own."""
    sums, counts = slot_sums(rows, lengths, before, layout)
    return normalised(sums, counts, layout, learned).to(rows.dtype), layout.ordered(counts[..., None])[..., 0] > 0


def slot_sums(
    rows: Float[Tensor, "N n D"], lengths: Int[Tensor, "N"], before: Int[Tensor, "N C"], layout: WindowLayout
) -> tuple[Float[Tensor, "N C M D"], Int[Tensor, "N C M"]]:
    """Weighted sums over the tokens of each slot in float64, from the oldest slot, and how many tokens there are."""
    edges = layout.edges(before).minimum(lengths[:, None, None])
    counts = edges.diff(dim=-1)
    prefix = _prefix_sums(rows.double(), layout.weight_decay)
    index = edges.flatten(1)[..., None].expand(-1, -1, rows.shape[-1])
    at = prefix.gather(1, index).unflatten(1, edges.shape[1:])
    return at[..., 1:, :] - layout.weight_decay ** counts[..., None].double() * at[..., :-1, :], counts


def _prefix_sums(rows: Float[Tensor, "N n D"], decay: float) -> Float[Tensor, "N n+1 D"]:
    """`P_t = Σ_{j<t} decay^(t−1−j) x_j` for t = 0..n; where weights decay by doubling, since decay^(−j) overflows."""
    rows = nn.functional.pad(rows, (0, 0, 1, 0))
    if decay == 1.0:
        return rows.cumsum(1)
    reach = 1
    while reach < rows.shape[1] and decay**reach > _NEGLIGIBLE:
        rows = rows + decay**reach * nn.functional.pad(rows[:, :-reach], (0, 0, reach, 0))
        reach *= 2
    return rows


def normalised(
    sums: Float[Tensor, "*batch M D"],
    counts: Int[Tensor, "*batch M"],
    layout: WindowLayout,
    learned: LearnedNormalisation | None,
) -> Float[Tensor, "*batch M D"]:
    """Slots in the order of the layout from sums over that many tokens, oldest first, in float64.

    Raises:
        ValueError: a learned normalisation is missing or not wanted.
    """
    if (learned is not None) != (layout.normalisation == "learned"):
        raise ValueError(
            f"learned must be a LearnedNormalisation with normalisation='learned' and None otherwise, got {learned!r} "
            f"with {layout.normalisation!r}"
        )
    return layout.ordered(_factors(counts, layout, learned)[..., None] * sums)


def _factors(
    counts: Int[Tensor, "*batch M"], layout: WindowLayout, learned: LearnedNormalisation | None
) -> Float[Tensor, "*batch M"]:
    if learned is not None:
        return learned(counts)
    number = counts.clamp(min=1).double()
    if layout.normalisation == "decay":
        return (1.0 - layout.decay) / (1.0 - layout.decay**number)
    return number ** -{"mean": 1.0, "sqrt": 0.5, "none": 0.0}[layout.normalisation]


def compacted(
    embeds: Float[Tensor, "N n D"], mask: Bool[Tensor, "N n"]
) -> tuple[Float[Tensor, "N n D"], Int[Tensor, "N n"], Int[Tensor, "N"]]:
    """Rows with their tokens before what stands at padding, the column that each comes from, and the rows' lengths."""
    order = (~mask).long().argsort(dim=-1, stable=True)
    return embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1])), order, mask.sum(-1)
