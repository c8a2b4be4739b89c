"""Batches cut where their loss begins: every token is where it was, and nothing is counted twice or lost."""

import pytest
import torch

from softrl.data.supervised import guidance_amounts, supervised_texts


def batch(*rows):
    """Rows of (token ids, which of them count), padded on the right with an id that is also a token."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [5] * (length - len(ids)) for ids, _ in rows])
    labels = torch.tensor(
        [
            [token if counts else -100 for token, counts in zip(ids, mask, strict=True)] + [-100] * (length - len(ids))
            for ids, mask in rows
        ]
    )
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows])
    return ids, labels, mask


def test_prompts_stand_on_the_left_and_targets_on_the_right():
    texts = supervised_texts(*batch(([3, 4, 5, 6], [0, 0, 1, 1]), ([7, 8, 9, 10, 11], [0, 1, 1, 0, 1])))
    assert texts.prompts.mask.tolist() == [[True, True], [False, True]]
    assert texts.prompts.ids[0].tolist() == [3, 4]
    assert texts.prompts.ids[1, 1].item() == 7
    assert texts.targets[0, :2].tolist() == [5, 6]
    assert texts.targets[1].tolist() == [8, 9, 10, 11]
    assert texts.present.tolist() == [[True, True, False, False], [True, True, True, True]]
    assert texts.counted.tolist() == [[True, True, False, False], [True, True, False, True]]


def test_the_first_token_of_plain_text_is_its_prompt():
    texts = supervised_texts(*batch(([3, 4, 5], [1, 1, 1]), ([6, 7], [1, 1])))
    assert texts.prompts.ids.tolist() == [[3], [6]]
    assert texts.targets[:, 0].tolist() == [4, 7]
    assert texts.counted.tolist() == [[True, True], [True, False]]


def test_rows_without_anything_to_predict_and_a_least_length():
    texts = supervised_texts(*batch(([3, 4, 5], [0, 0, 0]), ([6], [1])), least_steps=4)
    assert texts.targets.shape == (2, 4)
    assert not texts.counted.any()
    assert texts.present.tolist() == [[True, True, False, False], [False] * 4]


def test_what_does_not_count_is_fed_as_it_is():
    texts = supervised_texts(*batch(([3, 4, 5, 6], [0, 1, 0, 1]), ([7, 8], [0, 1])))
    amounts = guidance_amounts(texts, torch.full((2, 3), 0.25))
    assert amounts.tolist() == [[0.25, 1.0, 0.25], [0.25, 1.0, 1.0]]


def test_labels_of_other_tokens_and_padding_on_the_left_are_refused():
    ids, labels, mask = batch(([3, 4, 5], [1, 1, 1]))
    with pytest.raises(ValueError, match="labels name other tokens than input_ids"):
        supervised_texts(ids, labels.clone().fill_(9), mask)
    with pytest.raises(ValueError, match="padded on the right"):
        supervised_texts(ids, labels, torch.tensor([[0, 1, 1]]))
