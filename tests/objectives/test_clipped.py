"""PPO's objectives token by token: where the gradient is A, and where it is cut off."""

import torch

from softrl.objectives.clipped import clipped_fraction, clipped_objective, clipped_value_loss

LOG_RATIO = torch.tensor([[0.0, 0.5, 0.5, -0.5, -0.5, 0.1]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[2.0, 3.0, -3.0, 3.0, -3.0, 1.0]], dtype=torch.float64)


def test_gradient_is_the_advantage_times_the_ratio_unless_it_has_moved_far_enough():
    leaf = LOG_RATIO.clone().requires_grad_()
    (grad,) = torch.autograd.grad(clipped_objective(leaf, ADVANTAGES, 0.2, 0.2).sum(), leaf)
    kept = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(grad, kept * ADVANTAGES * LOG_RATIO.exp())


def test_fractions_name_the_side():
    low, high = clipped_fraction(LOG_RATIO, ADVANTAGES, 0.2, 0.2)
    assert low.tolist() == [[0, 0, 0, 0, 1, 0]]
    assert high.tolist() == [[0, 1, 0, 0, 0, 0]]
    _, higher = clipped_fraction(LOG_RATIO, ADVANTAGES, 0.2, 0.7)
    assert higher.sum() == 0


def test_value_loss_takes_the_worse_of_both():
    values, old, returns = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 0.9]]), torch.tensor([[4.0, 0.0]])
    torch.testing.assert_close(clipped_value_loss(values, old, returns, None), torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 0.5), torch.tensor([[0.5 * 3.5**2, 0.5]]))
