"""Windows that grow a token at a time against windows from scratch, and that their cost and memory do not grow."""

import pytest
import torch
from contexts.test_window import LENGTHS, NORMALISATIONS, SMALL, histories, learned_of, padded, with_normalisation
from torch.utils._python_dispatch import TorchDispatchMode

from softrl.contexts.streaming import StreamingWindow
from softrl.contexts.window import WindowLayout, memory_slots, windows


def assert_same_window(stream, embeds, mask, layout, learned, tolerance=1e-6):
    """The stream's window is the one in which the newest token of each row is new."""
    found = windows(embeds, mask, layout, learned)
    window = layout.window_of(mask.sum(-1) - 1)
    rows = torch.arange(len(embeds))
    inputs, seen = stream.inputs()
    assert torch.equal(stream.starts, window * layout.stride)
    assert torch.equal(seen, found.mask[rows, window])
    torch.testing.assert_close(inputs, found.inputs[rows, window], rtol=tolerance, atol=tolerance)


def appended(rows, layout, learned, check=None):
    """Rows of different lengths, token by token, all beginning together."""
    stream = StreamingWindow(layout, rows[0].shape[1], len(rows), learned, rows[0].dtype)
    for t in range(max(map(len, rows))):
        present = torch.tensor([t < len(row) for row in rows])
        stream.append(torch.stack([row[min(t, len(row) - 1)] for row in rows]), present)
        if check:
            check(stream, [row[: t + 1] for row in rows])
    return stream


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_after_every_token_it_is_the_window_from_scratch(name, normalisation):
    layout = with_normalisation(SMALL[name], normalisation)
    learned = learned_of(layout)

    def check(stream, rows):
        if len(rows[0]) % 3 == 0 or len(rows[0]) == layout.uncompressed + 1:
            assert_same_window(stream, *padded(rows, fill=0.0), layout, learned, 1e-12)

    appended(histories(LENGTHS), layout, learned, check)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_a_long_history_in_float32_with_enrichment(normalisation):
    """To 1e-6 after 10,000 tokens of two rows, of which the streamed window has seen 800 one by one; tokens of the
    aggregate, of segments and of the window are enriched on the way."""
    layout = WindowLayout(2, 24, 20, 12, normalisation=normalisation)
    learned = learned_of(layout)
    rows = [row + 1.0 for row in histories([10_400, 10_003], width=8, dtype=torch.float32)]
    stream = StreamingWindow.after(*padded([row[:-400] for row in rows]), layout, learned)
    generator = torch.Generator().manual_seed(5)
    for t in range(-400, 0):
        stream.append(torch.stack([row[t] for row in rows]))
        if t % 20 == 0:
            positions = stream.lengths - 1 - torch.randint(110, (2,), generator=generator)
            if t % 40 == 0:
                positions = (torch.rand(2, generator=generator) * stream.lengths).long()
            delta = torch.randn(2, 8, generator=generator)
            stream.enrich(positions, delta)
            for row, position, change in zip(rows, positions.tolist(), delta, strict=True):
                row[position] += change
    assert_same_window(stream, *padded(rows), layout, learned)


def test_sums_stay_exact_over_many_slides():
    layout = WindowLayout(2, 24, 20, 12)
    row = histories([20_000], width=2, dtype=torch.float32)[0] + 1.0
    stream = StreamingWindow(layout, 2)
    for token in row[:, None]:
        stream.append(token)
    assert_same_window(stream, row[None], torch.ones(1, len(row), dtype=torch.bool), layout, None)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_beginning_after_a_history_is_appending_it(name, normalisation):
    layout = with_normalisation(SMALL[name], normalisation)
    learned = learned_of(layout)
    rows = histories(LENGTHS)
    begun = StreamingWindow.after(*padded(rows), layout, learned)
    grown = appended(rows, layout, learned)
    for token in histories([7], width=3, seed=1)[0]:
        for stream in (begun, grown):
            stream.append(token.expand(len(rows), -1))
        for one, other in zip(begun.inputs(), grown.inputs(), strict=True):
            torch.testing.assert_close(one, other, rtol=0.0, atol=1e-12)
    assert torch.equal(begun.lengths, torch.tensor(LENGTHS) + 7)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_enriching_any_token_is_enriching_it_in_the_history(name, normalisation):
    """And what is appended afterwards sees the enriched token leave its places as it entered them."""
    layout = with_normalisation(SMALL[name], normalisation)
    learned = learned_of(layout)
    (row,) = histories([26])
    delta = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    mask = torch.ones(1, 26, dtype=torch.bool)
    for position in range(0, 20, 2):
        stream = StreamingWindow.after(row[None, :20], mask[:, :20], layout, learned)
        stream.enrich(torch.tensor([position]), delta)
        changed = row.clone()
        changed[position] += delta[0]
        oldest = int(stream.starts[0]) - layout.num_segments * layout.segment_tokens
        if layout.aggregate or position >= oldest:
            assert_same_window(stream, changed[None, :20], mask[:, :20], layout, learned, 1e-12)
        for token in row[20:, None]:
            stream.append(token)
        assert_same_window(stream, changed[None], mask, layout, learned, 1e-12)


def test_replacing_a_soft_token_puts_exactly_that_embedding_there():
    layout = SMALL["notes in small"]
    rows = histories([20, 20], dtype=torch.float32)
    stream = StreamingWindow.after(*padded(rows), layout)
    other = histories([2], seed=3, dtype=torch.float32)[0]
    stream.replace(torch.tensor([19, -1]), other)
    rows[0][19] = other[0]
    assert torch.equal(stream.tokens()[0][0], rows[0][14:])
    stream.replace(torch.tensor([9, 13]), other)  # in the segments
    rows[0][9], rows[1][13] = other
    assert_same_window(stream, *padded(rows), layout, None)


def test_what_enriched_a_token_leaves_the_sums_with_it():
    """In float32 the token holds a rounded sum of what was added; a running sum must not hold another one."""
    layout = WindowLayout(1, 4, 3, 1, aggregate=False, normalisation="none")
    stream = StreamingWindow.after(torch.full((1, 8, 1), 1e3), torch.ones(1, 8, dtype=torch.bool), layout)
    for _ in range(50):
        stream.enrich(torch.tensor([2]), torch.tensor([[1e-5]]))
    for _ in range(8):
        stream.append(torch.zeros(1, 1))
    slots, filled = stream.slots()
    assert filled.all()
    assert slots.abs().max() < 1e-9


def test_rows_that_do_not_grow_stay_and_moves_are_told():
    layout = SMALL["notes in small"]  # U = 6, stride 2
    stream = StreamingWindow(layout, 3, num_rows=2)
    moved = []
    for t in range(9):
        moved.append(stream.append(torch.full((2, 3), float(t)), torch.tensor([True, t < 2])).tolist())
    assert [row[0] for row in moved] == [False] * 6 + [True, False, True]
    assert not any(row[1] for row in moved)
    tokens, present = stream.tokens()
    assert present.tolist() == [[True] * 5 + [False], [True] * 2 + [False] * 4]
    assert tokens[:, :, 0].tolist() == [[4.0, 5.0, 6.0, 7.0, 8.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]


def test_positions_without_a_token_are_refused():
    layout = SMALL["notes in small"]
    stream = StreamingWindow.after(*padded(histories([20, 5])), layout)
    delta = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"positions\[1\] must be from 0 to 4.*got 5"):
        stream.enrich(torch.tensor([5, 5]), delta)
    with pytest.raises(ValueError, match=r"positions\[0\] must be from 8 to 19.*got 7"):
        stream.replace(torch.tensor([7, -1]), delta)
    with pytest.raises(ValueError, match=r"positions\[0\] must be from 0 to 19.*got -2"):
        stream.enrich(torch.tensor([-2, -1]), delta)


@pytest.mark.parametrize(
    ("positions", "delta", "message"),
    [
        (torch.tensor([5]), torch.zeros(1, 3), r"one of each of the 2 rows, got torch.int64 of shape \(1,\)"),
        (torch.tensor([5, 4, 3]), torch.zeros(3, 3), r"2 rows, got torch.int64 of shape \(3,\)"),
        (torch.tensor([5, 4]), torch.zeros(2, 1), r"one vector a row, of shape \(2, 3\), got \(2, 1\)"),
        (torch.tensor([-1, 4]), torch.tensor([[0.0] * 3, [0.0, torch.nan, 0.0]]), r"\[1\] must be finite"),
        (torch.tensor([5, 4]), torch.tensor([[torch.inf] * 3, [0.0] * 3]), r"\[0\] must be finite"),
    ],
)
def test_vectors_that_are_not_one_a_row_are_refused(positions, delta, message):
    """Some would reach the first row alone or spread, and a sum never forgets what is not a number."""
    layout = SMALL["notes in small"]
    stream = StreamingWindow.after(*padded(histories([20, 20])), layout)
    before = [each.clone() for each in stream.inputs()]
    with pytest.raises(ValueError, match=message):
        stream.enrich(positions, delta.double())
    with pytest.raises(ValueError, match=message):
        stream.replace(positions + 10 * (positions >= 0), delta.double())
    assert all(torch.equal(*pair) for pair in zip(stream.inputs(), before, strict=True))
    rows_left_alone = torch.tensor([[torch.nan] * 3, [1.0] * 3], dtype=torch.float64)
    stream.enrich(torch.tensor([-1, 4]), rows_left_alone)
    assert stream.inputs()[0].isfinite().all()


def test_what_annotations_say_holds_without_a_type_checker():
    stream = StreamingWindow.after(*padded(histories([20, 20])), SMALL["notes in small"])
    positions, delta = torch.tensor([5, 4]), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"positions must be whole numbers.*got torch.float32"):
        stream._checked(positions.float(), -1, "delta", delta)
    with pytest.raises(ValueError, match=r"delta must be one vector a row, of shape \(2, 3\), got \(3,\)"):
        stream._checked(positions, -1, "delta", delta[0])


class Elements(TorchDispatchMode):
    """Counts the elements of everything that tensor operations read and write."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in [*torch.utils._pytree.tree_leaves((args, kwargs, made))]:
            if isinstance(value, torch.Tensor):
                self.count += value.numel()
        return made


def test_a_token_costs_the_same_whatever_the_history():
    layout = WindowLayout(2, 24, 20, 12)
    counts, memory = [], []
    for length in (1_000, 100_000):
        length += 7 * layout.stride - (length - layout.uncompressed) % layout.stride  # the same place in a window
        history = torch.ones(1, length, 4)
        stream = StreamingWindow.after(history, torch.ones(1, length, dtype=torch.bool), layout)
        token, positions = history[:, 0].clone(), torch.tensor([3])
        with Elements() as elements:
            for _ in range(3 * layout.stride):
                stream.append(token)
                stream.slots()
                stream.enrich(positions, token)
        counts.append(elements.count)
        held = [value for value in vars(stream).values() if isinstance(value, torch.Tensor)]
        memory.append(sum(value.untyped_storage().nbytes() for value in held))
    assert counts[0] == counts[1]
    assert memory[0] == memory[1]
    assert memory[0] < 8 * 4 * (layout.num_slots + 2 * 24 + layout.uncompressed) + 100


def test_slots_agree_with_memory_slots():
    layout = SMALL["notes in small"]
    embeds, mask = padded(histories([26]))
    slots, filled = StreamingWindow.after(embeds, mask, layout).slots()
    expected, has = memory_slots(embeds, mask, torch.tensor([20]), layout)
    assert torch.equal(filled, has[:, 0])
    torch.testing.assert_close(slots, expected[:, 0], rtol=0.0, atol=1e-12)
