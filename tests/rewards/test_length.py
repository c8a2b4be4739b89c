"""The length reward in numbers, and its gradient: none with hard stopping."""

import pytest
import torch

from softrl.rewards.base import checked_soft
from softrl.rewards.length import LengthReward
from softrl.types import SoftTokens

EOS = 1


def soft_tokens(eos_ids, requires_grad=False):
    """Two texts of four steps; the first ends with probability 1/4 at its first step and with 1/2 at its second."""
    eos_weights = torch.tensor([[0.25, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    weights = torch.stack([eos_weights, 1.0 - eos_weights], -1).requires_grad_(requires_grad)
    mask = torch.tensor([[True, True, True, True], [True, True, True, False]])
    return SoftTokens(torch.tensor([EOS, 5]).expand(2, 4, 2), weights, mask, eos_ids)


def test_numbers():
    ids, mask = torch.zeros(2, 4, dtype=torch.long), soft_tokens(()).mask
    expected_length = 1.0 + 0.75 + 0.375 + 0.375
    assert LengthReward().soft(soft_tokens((EOS,))).tolist() == pytest.approx([expected_length, 3.0])
    assert LengthReward(scale=-2.0).hard(ids, mask).tolist() == [-2.0, -1.5]
    to_target = LengthReward(target=5.0, scale=2.0)
    assert to_target.hard(ids, mask).tolist() == [-0.25, -1.0]
    assert to_target.soft(soft_tokens((EOS,))).tolist() == pytest.approx([-((2.5 / 2.0) ** 2), -1.0])


def test_a_heavier_end_makes_the_text_shorter():
    tokens = soft_tokens((EOS,), requires_grad=True)
    (grad,) = torch.autograd.grad(checked_soft(LengthReward(), tokens).sum(), tokens.weights)
    assert grad[0, :, 0].tolist() == pytest.approx([-(1.0 + 0.5 + 0.5), -(0.75 + 0.75), -0.375, 0.0])
    assert grad[..., 1].abs().max() == 0.0


def test_hard_stopping_has_no_gradient():
    tokens = soft_tokens((), requires_grad=True)
    with pytest.raises(ValueError, match=r"'length' has no gradient with hard stopping.*soft_stopping=True"):
        LengthReward().soft(tokens)
    with torch.no_grad():
        assert LengthReward().soft(tokens).tolist() == [4.0, 3.0]


def test_scale_is_checked():
    with pytest.raises(ValueError, match="scale must not be zero"):
        LengthReward(scale=0.0)
