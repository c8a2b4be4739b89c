"""Where thoughts are had: slots against plain loops, padding on both sides, and mistakes."""

import pytest
import torch
from helpers import V, gpt2, llama

from softrl.models.policy import Policy
from softrl.rollouts.anchors import by_entropy, can_follow, every_kth, given
from softrl.types import Texts

RIGHT = Texts(
    torch.randint(2, V, (3, 7), generator=torch.Generator().manual_seed(0)),
    torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool),
)
LEFT = Texts(RIGHT.ids, RIGHT.mask.flip(1))


def slots(anchors):
    """The anchors of each row as a list, the filled-up ones left out."""
    where, is_anchor = anchors
    return [row[keep].tolist() for row, keep in zip(where, is_anchor, strict=True)]


@pytest.mark.parametrize("texts", [RIGHT, LEFT])
def test_a_token_can_be_thought_after_if_another_one_follows(texts):
    for row, mask in enumerate(texts.mask.tolist()):
        expected = [mask[slot] and slot + 1 < 7 and mask[slot + 1] for slot in range(7)]
        assert can_follow(texts)[row].tolist() == expected


@pytest.mark.parametrize("texts", [RIGHT, LEFT])
@pytest.mark.parametrize(("interval", "offset"), [(1, 0), (2, 0), (2, 1), (3, 5)])
def test_every_kth_counts_real_tokens(texts, interval, offset):
    expected = []
    for mask in texts.mask.tolist():
        real = [slot for slot, is_real in enumerate(mask) if is_real]
        expected.append([slot for index, slot in enumerate(real[:-1]) if index % interval == offset % interval])
    assert slots(every_kth(texts, interval, offset)) == expected


@pytest.mark.parametrize("model", [llama, gpt2])
def test_by_entropy_takes_what_the_model_is_least_sure_of(model):
    lm = model()
    policy = Policy(lm)
    found = slots(by_entropy(policy, RIGHT, 2))
    for row in range(2):
        length = int(RIGHT.mask[row].sum())
        with torch.no_grad():
            log_probs = lm(input_ids=RIGHT.ids[row : row + 1, :length]).logits[0].log_softmax(-1)
        unsure = -(log_probs.exp() * log_probs).sum(-1)[:-1]
        assert sorted(found[row]) == sorted(unsure.topk(2).indices.tolist())
    assert found[2] == []


def test_by_entropy_of_more_than_there_are_takes_all():
    assert [sorted(row) for row in slots(by_entropy(Policy(llama()), RIGHT, 99))] == [list(range(6)), [0, 1, 2], []]


@pytest.mark.parametrize("texts", [RIGHT, LEFT])
def test_given_slots_are_counted_without_padding(texts):
    found = slots(given(texts, [[0, 5, 6], [2], []]))
    firsts = [mask.index(True) for mask in texts.mask.tolist()]
    assert found == [[firsts[0], firsts[0] + 5], [firsts[1] + 2], []]  # nothing follows the last token


def test_rows_with_fewer_anchors_are_filled_with_real_slots():
    where, is_anchor = given(RIGHT, [[1, 3, 4], [2], []])
    assert where.shape == (3, 3)
    assert is_anchor.sum(-1).tolist() == [3, 1, 0]
    assert RIGHT.mask.gather(1, where).all()


@pytest.mark.parametrize(
    "anchors",
    [given(RIGHT, [[], [], [0]]), every_kth(RIGHT, 9, 8), every_kth(Texts(RIGHT.ids[:, :1], RIGHT.mask[:, :1]), 1)],
)
def test_a_batch_without_anchors_has_a_column_that_counts_for_nothing(anchors):
    where, is_anchor = anchors
    assert where.shape == (3, 1)
    assert not is_anchor.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: every_kth(RIGHT, 0), "interval must be at least 1, got 0"),
        (lambda: by_entropy(Policy(llama()), RIGHT, 0), "count must be at least 1, got 0"),
        (lambda: given(RIGHT, [[0]]), "expected a list for each of 3 texts, got 1"),
        (lambda: given(RIGHT, [[7], [], []]), "text 0 has 7 tokens, and .7. are none of them"),
        (lambda: given(RIGHT, [[-1], [], []]), "text 0 has 7 tokens, and .-1. are none of them"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
