"""Masked reductions against loops."""

import pytest
import torch

from softrl.masking import mask_through_eos, per_sequence_mean, per_sequence_sum, token_mean


def test_reductions_weigh_what_their_names_say():
    values = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), 9.0], [5.0, 6.0, 7.0]])
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    assert per_sequence_sum(values, mask).tolist() == [3.0, 0.0, 18.0]
    assert per_sequence_mean(values, mask).tolist() == [1.5, 0.0, 6.0]
    assert token_mean(values, mask).item() == pytest.approx(21.0 / 5)


def test_mask_keeps_the_first_end_and_drops_what_follows():
    tokens = torch.tensor([[5, 1, 5, 1], [7, 7, 7, 7], [2, 5, 1, 7], [7, 7, 7, 1]])
    expected = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert mask_through_eos(tokens, (1, 2)).int().tolist() == expected
    assert mask_through_eos(tokens, ()).all()
