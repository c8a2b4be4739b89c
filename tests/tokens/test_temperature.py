"""The entropy bound: the solution against bisection, its gradient against finite differences, and ties."""

import math

import pytest
import torch

from softrl.tokens.temperature import bounded_softmax, entropy_bound_temperature, softmax_entropy


def logits_of(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def bisected(logits, bound):
    low, high = 1e-9, 1.0
    if softmax_entropy(logits) <= bound:
        return 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if softmax_entropy(logits / middle) > bound else (middle, high)
    return low


@pytest.mark.parametrize("bound", [0.05, 0.7, 1.5, 2.5])
def test_temperature_solves_the_bound(bound):
    logits = logits_of(20, 16)
    temperatures = entropy_bound_temperature(logits, bound)
    expected = torch.tensor([bisected(row, bound) for row in logits], dtype=torch.float64)
    torch.testing.assert_close(temperatures, expected, rtol=1e-9, atol=0)
    entropies = softmax_entropy(logits / temperatures[:, None])
    assert (entropies <= bound + 1e-9).all()


def test_bound_is_inactive_where_the_entropy_is_low_already():
    peaked = torch.tensor([[10.0, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    temperature = entropy_bound_temperature(peaked, 0.5)
    assert temperature.item() == 1.0
    (grad,) = torch.autograd.grad(temperature.sum(), peaked)
    assert grad.abs().max() == 0.0


@pytest.mark.parametrize("detach", [True, False])
def test_gradient_of_bounded_weights(detach):
    logits = logits_of(6, 9).requires_grad_()
    direction = logits_of(6, 9, seed=1)
    (grad,) = torch.autograd.grad((bounded_softmax(logits, 0.6, detach) * direction).sum(), logits)
    temperature = entropy_bound_temperature(logits, 0.6).detach()

    def weights(z):
        return (z / temperature[:, None]).softmax(-1) if detach else bounded_softmax(z, 0.6)

    step = 1e-6
    numerical = torch.zeros_like(grad)
    for index in range(9):
        shift = torch.zeros(9, dtype=torch.float64)
        shift[index] = step
        change = (weights(logits.detach() + shift) - weights(logits.detach() - shift)) / (2 * step)
        numerical[:, index] = (change * direction).sum(-1)
    torch.testing.assert_close(grad, numerical, rtol=1e-6, atol=1e-8)


def test_gradient_at_unkept_entries_is_zero_and_finite():
    logits = logits_of(4, 8)
    logits[:, 5:] = -torch.inf
    logits.requires_grad_()
    weights = bounded_softmax(logits, 0.5)
    (grad,) = torch.autograd.grad((weights * logits_of(4, 8, seed=2)).sum(), logits)
    assert torch.isfinite(grad).all()
    assert grad[:, 5:].abs().max() == 0.0
    assert weights[:, 5:].abs().max() == 0.0
    torch.testing.assert_close(weights, torch.nn.functional.pad(bounded_softmax(logits.detach()[:, :5], 0.5), (0, 3)))


def test_ties_that_no_temperature_can_break_give_their_uniform_with_zero_gradient():
    logits = torch.tensor([[2.0, 2.0, 2.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    weights = bounded_softmax(logits, 0.9)  # log 3 = 1.0986 > 0.9
    torch.testing.assert_close(weights.detach(), torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0, 0]], dtype=torch.float64))
    (grad,) = torch.autograd.grad((weights * torch.arange(5.0, dtype=torch.float64)).sum(), logits)
    assert grad.abs().max() == 0.0
    breakable = bounded_softmax(logits.detach(), 1.2)
    assert softmax_entropy(breakable.log()).item() == pytest.approx(1.2, abs=1e-9)


def test_nearly_tied_logits_in_float32():
    logits = torch.tensor([[1.0, 1.0 + 1e-6, 0.0], [50.0, 49.999, -50.0]])
    weights = bounded_softmax(logits, 0.3)
    assert torch.isfinite(weights).all()
    assert (softmax_entropy(weights.log()) <= 0.3 + 1e-3).all()


@pytest.mark.parametrize("bound", [0.0, -1.0, math.log(8), 3.0])
def test_bound_outside_its_range_is_refused(bound):
    with pytest.raises(ValueError, match=r"max_entropy_nats must lie in \(0, log K\).*K=8.*got"):
        entropy_bound_temperature(logits_of(2, 8), bound)
