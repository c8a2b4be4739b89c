"""Algebra of embeddings, by hand and against all distances; and analogies that hold and that do not."""

import pytest
import torch
from scipy.spatial.distance import cdist

from softrl.contexts.algebra import accuracy, analogies, combine, nearest_ids, ranks
from softrl.models import policy as policy_module


def table_of(count=40, width=6, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def test_combine_is_a_signed_sum_with_gradients():
    plus, minus = torch.tensor([[1.0, 2.0], [10.0, 20.0]]), torch.tensor([[0.5, 0.25]])
    plus.requires_grad_(), minus.requires_grad_()
    assert combine(plus).tolist() == [11.0, 22.0]
    made = combine(plus, minus)
    assert made.tolist() == [10.5, 21.75]
    made.sum().backward()
    assert plus.grad.tolist() == [[1.0, 1.0]] * 2
    assert minus.grad.tolist() == [[-1.0, -1.0]]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("elements", [50, 2**23])
def test_nearest_and_ranks_as_all_distances_say(monkeypatch, metric, elements):
    monkeypatch.setattr(policy_module, "CHUNK_ELEMENTS", elements)
    table, vectors = table_of(), table_of(9, seed=1)
    excluded = torch.stack([torch.arange(9), torch.arange(9) + 9], 1)
    answers = torch.arange(9) + 20
    distances = torch.tensor(cdist(vectors, table, metric)).scatter(1, excluded, torch.inf)
    order = distances.argsort(-1)
    assert torch.equal(nearest_ids(table, vectors, 4, excluded, metric), order[:, :4])
    assert torch.equal(ranks(table, vectors, answers, excluded, metric), (order == answers[:, None]).int().argmax(-1))
    free = torch.tensor(cdist(vectors, table, metric)).argsort(-1)
    assert torch.equal(nearest_ids(table, vectors, 2, metric=metric), free[:, :2])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_analogies_that_hold_are_found_and_operands_are_no_answers(metric):
    """Pairs (i, i + 8) differ by one vector; asked for another pair's partner, it is never the nearest."""
    table = table_of(16, 8, seed=3)
    table[8:] = table[:8] + 0.2 * table_of(1, 8, seed=4)
    items = torch.tensor([[i, i + 8, j, j + 8] for i in range(8) for j in range(8) if i != j])
    assert accuracy(analogies(table, items, metric), 1) == 1.0
    other = torch.tensor([[i, i + 8, j, (j + 1) % 8 + 8] for i in range(8) for j in range(8) if (j + 1) % 8 != i != j])
    assert accuracy(analogies(table, other, metric), 1) == 0.0
    # a and a* the same word: the vector is b, which is nearest to itself and left out.
    same = torch.tensor([[0, 0, 1, 9]])
    assert analogies(table, same, metric).tolist() == [0]


def test_a_hand_made_analogy():
    """king − man + woman in two dimensions, royalty and sex; "throne" is nearer to it than "queen" is; a maid
    is far off."""
    words = {
        "man": [0.0, 1.0], "king": [5.0, 1.0], "woman": [0.0, -1.0], "queen": [5.0, -1.4],
        "throne": [5.0, -1.1],
        "maid": [-5.0, -1.0],
    }  # fmt: skip
    table, index = torch.tensor(list(words.values())), {word: number for number, word in enumerate(words)}
    items = torch.tensor([[index[word] for word in ("man", "king", "woman", "queen")]])
    assert analogies(table, items, "euclidean").tolist() == [1]
    assert analogies(table[[0, 1, 2, 3, 5]], items, "euclidean").tolist() == [0]
    assert (accuracy(torch.tensor([1, 0, 7]), 1), accuracy(torch.tensor([1, 0, 7]), 5)) == pytest.approx(
        (1 / 3, 2 / 3)
    )


def test_an_answer_among_the_operands_is_refused():
    with pytest.raises(ValueError, match=r"answers\[1\]=3 is among the operands, excluded\[1\]=\[5, 6, 3\]"):
        analogies(table_of(), torch.tensor([[0, 1, 2, 3], [5, 6, 3, 3]]))


@pytest.mark.parametrize("k", [0, -1, 39])
def test_more_tokens_than_there_are_and_none_are_refused(k):
    excluded = torch.tensor([[3, 7]])
    with pytest.raises(ValueError, match=f"k must be from 1 to 38, the tokens that are not excluded, got {k}"):
        nearest_ids(table_of(), table_of(1), k, excluded)
    assert sorted(nearest_ids(table_of(), table_of(1), 38, excluded)[0].tolist()) == sorted({*range(40)} - {3, 7})


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_ties_count_against_the_answer_and_nan_is_refused(metric):
    table = table_of()
    table[10:14] = torch.tensor([0.0, 0.0, 4.0, 0.0, 0.0, 0.0])  # products without rounding
    found = ranks(table, table[[10]], torch.tensor([10]), torch.tensor([[13, 14]]), metric)
    assert found.tolist() == [2]  # 11 and 12; 13 is left out
    bad = table.clone()
    bad[20, 1] = torch.nan
    for pair, name in (((bad, table[:1]), "table"), ((table, bad[[20]]), "vectors")):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            ranks(*pair, torch.tensor([5]), torch.tensor([[6, 7]]), metric)
