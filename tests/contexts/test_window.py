"""softAR windows against a loop over positions in float64, and what a causal and differentiable function promises."""

import itertools
import json
from dataclasses import asdict
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softrl.contexts.window import LearnedNormalisation, Normalisation, WindowLayout, memory_slots, windows

NORMALISATIONS = get_args(Normalisation)
SMALL = {
    "notes in small": WindowLayout(2, 3, 4, 2),
    "aggregate last": WindowLayout(2, 3, 2, 3, order=("segments", "aggregate")),
    "no segments": WindowLayout(0, 1, 3, 2, stride=1),
    "no aggregate": WindowLayout(3, 2, 1, 4, aggregate=False, stride=3),
    "only truncation": WindowLayout(0, 1, 4, 0, aggregate=False),
    "stride beyond a segment": WindowLayout(2, 2, 0, 5),
}


LENGTHS = (26, 1, 5, 11)


def learned_of(layout, seed=0):
    """A learned normalisation away from its start, where the layout asks for one."""
    if layout.normalisation != "learned":
        return None
    learned = LearnedNormalisation(layout).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.uniform_(0.3, 1.2, generator=generator)
    return learned


def with_normalisation(layout, normalisation, decay=0.7):
    return WindowLayout(**(asdict(layout) | {"normalisation": normalisation, "decay": decay}))


def histories(lengths, width=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, width, generator=generator, dtype=dtype) for length in lengths]


def padded(rows, left=True, fill=float("nan")):
    """Rows as one batch; what stands at padding must not matter, so it is not a number."""
    longest = max(map(len, rows)) + 1
    embeds = torch.full((len(rows), longest, rows[0].shape[1]), fill, dtype=rows[0].dtype)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        at = slice(longest - len(row), None) if left else slice(0, len(row))
        embeds[index, at], mask[index, at] = row, True
    return embeds, mask


def slot_by_hand(tokens, layout, learned, number):
    """One slot from its tokens, by the definition of each normalisation; `number` from the oldest."""
    n = len(tokens)
    if n == 0:
        return torch.zeros(tokens.shape[1], dtype=torch.float64)
    tokens = tokens.double()
    if layout.normalisation == "decay":
        weights = torch.tensor([layout.decay ** (n - 1 - age) for age in range(n)], dtype=torch.float64)
        return (weights[:, None] * tokens).sum(0) / weights.sum()
    if layout.normalisation == "learned":
        return learned.gain[number].double() * tokens.sum(0) / n ** learned.exponent[number].double()
    return tokens.sum(0) / {"mean": n, "sqrt": n**0.5, "none": 1}[layout.normalisation]


def memory_by_hand(row, before, layout, learned):
    """Slots in the layout's order and whether each has a token, by slices of one unpadded row."""
    spans = [
        (before - (layout.num_segments - s) * layout.segment_tokens, layout.segment_tokens)
        for s in range(layout.num_segments)
    ]
    spans = [(max(first, 0), max(first + length, 0)) for first, length in spans]
    if layout.aggregate:
        spans.insert(0, (0, max(before - layout.num_segments * layout.segment_tokens, 0)))
    parts = [row[first:last] for first, last in spans]
    slots = [slot_by_hand(part, layout, learned, number) for number, part in enumerate(parts)]
    filled = [len(part) > 0 for part in parts]
    if layout.aggregate and layout.order[0] == "segments":
        slots, filled = slots[1:] + slots[:1], filled[1:] + filled[:1]
    return slots, filled


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("left", [True, False])
def test_windows_are_what_slices_of_each_row_say(name, normalisation, left):
    layout = with_normalisation(SMALL[name], normalisation)
    learned = learned_of(layout)
    rows = histories(LENGTHS)
    found = windows(*padded(rows, left), layout, learned)
    count = layout.num_windows(max(LENGTHS))
    assert found.inputs.shape == (4, count, layout.size, 3)
    assert found.inputs.isfinite().all()
    for row, c in itertools.product(range(4), range(count)):
        start = c * layout.stride
        tokens = rows[row][start : start + layout.uncompressed]
        absent = layout.uncompressed - len(tokens)
        slots, filled = memory_by_hand(rows[row], start, layout, learned)
        seen = [each and len(tokens) > 0 for each in filled] + [True] * len(tokens) + [False] * absent
        assert found.mask[row, c].tolist() == seen
        expected = torch.stack([*slots, *tokens, *tokens.new_zeros(absent, 3)])
        torch.testing.assert_close(found.inputs[row, c][seen], expected[seen], rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("left", [True, False])
def test_every_token_is_new_in_one_window_and_found_there(name, left):
    layout = SMALL[name]
    embeds, mask = padded(histories(LENGTHS), left, fill=0.0)
    found = windows(embeds, mask, layout)
    assert torch.equal(found.per_token(found.inputs), embeds)  # the place of a token holds that token
    for row, length in enumerate(LENGTHS):
        places = found.place[row][mask[row]].tolist()
        expected = [layout.num_slots + u for u in range(min(length, layout.uncompressed))]
        for number in range(length - layout.uncompressed):  # later windows predict from their last `stride` places
            c, new = divmod(number, layout.stride)
            expected.append((c + 2) * layout.size - layout.stride + new)
        assert places == expected
    columns = torch.arange(mask.shape[1]).expand(mask.shape)
    tokens, seen = found.inputs[..., layout.num_slots :, :], found.mask[..., layout.num_slots :]
    rows = torch.arange(4)[:, None, None].expand(seen.shape)
    assert torch.equal(embeds[rows[seen], found.spread(columns)[seen]], tokens[seen])


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_memory_slots_at_any_positions(normalisation):
    layout = with_normalisation(SMALL["notes in small"], normalisation)
    learned = learned_of(layout)
    rows = histories(LENGTHS)
    before = [0, 1, 2, 3, 7, 25, 26]
    slots, filled = memory_slots(*padded(rows), torch.tensor(before), layout, learned)
    for (index, row), (c, position) in itertools.product(enumerate(rows), enumerate(before)):
        if position <= len(row):
            expected, has = memory_by_hand(row, position, layout, learned)
            assert filled[index, c].tolist() == has
            torch.testing.assert_close(slots[index, c], torch.stack(expected), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_float32_keeps_its_digits_over_a_long_history(normalisation):
    """Sums grow with the history (the tokens have a mean of 1): a difference of float32 sums would be off by 1e-5."""
    layout = WindowLayout(2, 16, 20, 12, normalisation=normalisation)
    learned = learned_of(layout)
    row = histories([12_345], width=8, dtype=torch.float32)[0] + 1.0
    before = torch.tensor([57, 4_000, 12_300])
    slots, _ = memory_slots(row[None], torch.ones(1, len(row), dtype=torch.bool), before, layout, learned)
    assert slots.dtype == torch.float32
    for c, position in enumerate(before.tolist()):
        expected = torch.stack(memory_by_hand(row, position, layout, learned)[0])
        torch.testing.assert_close(slots[0, c].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.999])
def test_decaying_weights_neither_overflow_nor_vanish(decay):
    layout = with_normalisation(WindowLayout(1, 40, 4, 4), "decay", decay)
    row = histories([3_000])[0]
    slots, _ = memory_slots(row[None], torch.ones(1, 3_000, dtype=torch.bool), torch.tensor([2_900]), layout)
    expected = torch.stack(memory_by_hand(row, 2_900, layout, None)[0])
    torch.testing.assert_close(slots[0, 0], expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_gradients_of_embeddings_and_normalisation(normalisation):
    layout = with_normalisation(WindowLayout(1, 2, 1, 1), normalisation)
    learned = learned_of(layout)
    embeds, mask = padded(histories([6, 3], width=1), fill=0.5)
    parameters = list(learned.parameters()) if learned else []

    def seen(embeds, *parameters):
        return windows(embeds, mask, layout, learned).inputs

    leaf = embeds.clone().requires_grad_()
    assert torch.autograd.gradcheck(seen, (leaf, *parameters))
    seen(leaf).square().sum().backward()
    assert (leaf.grad[~mask] == 0.0).all()
    assert (leaf.grad[mask] != 0.0).all()


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_a_token_changes_nothing_that_earlier_ones_are_predicted_from(name, normalisation):
    """By derivatives: window c's memory depends on nothing from its start on, and its tokens on themselves alone."""
    layout = with_normalisation(SMALL[name], normalisation)
    row = histories([20], width=1)[0]
    mask = torch.ones(1, 20, dtype=torch.bool)
    learned = learned_of(layout)

    def inputs(embeds):
        return windows(embeds[None], mask, layout, learned).inputs[0, ..., 0]

    depends = torch.autograd.functional.jacobian(inputs, row)[..., 0] != 0.0  # [C, W, n]
    for c in range(depends.shape[0]):
        start = c * layout.stride
        assert not depends[c, : layout.num_slots, start:].any()
        held = torch.arange(start, start + layout.uncompressed)
        assert torch.equal(depends[c, layout.num_slots :], held[:, None] == torch.arange(20))
        if layout.aggregate:  # and on all of the past, however old
            assert depends[c, : layout.num_slots, :start].any(0).all()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that operations make."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage().nbytes() // value.element_size()
                self.elements = max(self.elements, storage)
        return made


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_nothing_is_larger_than_history_and_windows(normalisation):
    """With 250 windows of 12 places over 2,000 tokens: not C·n·D, which is 160 times as much."""
    layout = WindowLayout(2, 16, 2, 8, normalisation=normalisation)
    embeds = histories([2_000], width=4)[0][None].requires_grad_()
    with Largest() as largest:
        found = windows(embeds, torch.ones(1, 2_000, dtype=torch.bool), layout, learned_of(layout))
        found.inputs.sum().backward()
    assert found.inputs.shape == (1, 250, 13, 4)
    assert largest.elements == found.inputs.numel()


def test_the_layout_of_the_notes():
    layout = WindowLayout.notes()
    assert (layout.size, layout.num_slots, layout.num_hard, layout.num_soft, layout.stride) == (128, 3, 97, 28, 28)
    assert layout.kinds.tolist() == [0, 1, 2] + [3] * 97 + [4] * 28
    assert layout.num_kinds == 5
    last = WindowLayout.notes(size=101, order=("segments", "aggregate"), stride=2)
    assert last.kinds.tolist() == [1, 2, 0] + [3] * 97 + [4]
    assert last.stride == 2
    assert WindowLayout(1, 3, 5, 0, aggregate=False).kinds.tolist() == [1] + [2] * 5
    assert WindowLayout(1, 3, 5, 0).stride == 3
    with pytest.raises(ValueError, match="size must be above 100, got 100"):
        WindowLayout.notes(size=100)


def test_a_layout_survives_json():
    layout = WindowLayout.notes(normalisation="decay", order=("segments", "aggregate"))
    assert WindowLayout(**json.loads(json.dumps(asdict(layout)))) == layout


def test_what_cannot_be_a_layout_is_refused():
    good = asdict(SMALL["notes in small"])
    bad = {
        "num_segments": -1, "segment_tokens": 0, "num_hard": -2, "num_soft": True, "order": ["aggregate", "aggregate"],
        "decay": 1.0, "stride": 7,
    }  # fmt: skip
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            WindowLayout(**(good | {name: value}))
    for value in (2, "no"):  # not by the constructor, whose types are checked here
        with pytest.raises(ValueError, match=f"aggregate must be True or False, got {value!r}"):
            WindowLayout._check_names(SimpleNamespace(**{**good, "aggregate": value}))
    with pytest.raises(ValueError, match=r"num_hard \+ num_soft must be 1 or more"):
        WindowLayout(1, 1, 0, 0)


def test_arguments_that_do_not_fit_are_refused():
    layout = SMALL["notes in small"]
    embeds, mask = padded(histories([4]))
    with pytest.raises(ValueError, match="learned must be a LearnedNormalisation"):
        windows(embeds, mask, with_normalisation(layout, "learned"))
    with pytest.raises(ValueError, match="learned must be a LearnedNormalisation"):
        windows(embeds, mask, layout, LearnedNormalisation(layout))
    with pytest.raises(ValueError, match="one row and one token or more"):
        windows(embeds[:, :0], mask[:, :0], layout)


def test_a_learned_normalisation_starts_as_the_mean():
    layout = SMALL["notes in small"]
    embeds, mask = padded(histories(LENGTHS))
    learned = with_normalisation(layout, "learned")
    start = windows(embeds, mask, learned, LearnedNormalisation(learned))
    torch.testing.assert_close(start.inputs, windows(embeds, mask, layout).inputs, rtol=0.0, atol=1e-12)
