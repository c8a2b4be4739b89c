"""The logistic regression against Newton's method, and the choice of the penalty."""

import pytest
import torch

from softrl.rewards.logistic import Problem, fit_along_path, mean_loss_nats

torch.manual_seed(0)
X = torch.randn(200, 4, dtype=torch.float64)
TRUE = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
Y = (torch.rand(200, dtype=torch.float64) < (X @ TRUE + 0.7).sigmoid()).double()
C = torch.rand(200, dtype=torch.float64).softmax(0)
SCALE = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)


def problem():
    return Problem(X.mv, X.T.mv, Y, C, penalty_scale=SCALE, step_scale=torch.tensor([2.0, 1.0, 0.7, 3.0]).double())


def newton(penalty):
    """Weight and bias by Newton's method on the written-out Hessian."""
    design = torch.cat([X, torch.ones(200, 1, dtype=torch.float64)], 1)
    ridge = torch.diag(torch.cat([2 * penalty * SCALE.square(), torch.zeros(1, dtype=torch.float64)]))
    theta = torch.zeros(5, dtype=torch.float64)
    for _ in range(50):
        p = (design @ theta).sigmoid()
        gradient = design.T @ (C * (p - Y)) + ridge @ theta
        theta = theta - torch.linalg.solve(design.T @ (design * (C * p * (1 - p))[:, None]) + ridge, gradient)
    return theta[:4], theta[4]


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_it_finds_the_minimum(penalty):
    fitted = fit_along_path(problem(), [penalty], lambda weight, bias: 0.0, 200, "")
    weight, bias = newton(penalty)
    torch.testing.assert_close(fitted.weight, weight, rtol=0, atol=2e-5)
    torch.testing.assert_close(fitted.bias, bias, rtol=0, atol=2e-5)
    assert fitted.penalty == penalty


@pytest.mark.parametrize(
    ("losses", "chosen", "num_fits"),
    [([3.0, 2.0, 1.0], 1e-3, 3), ([2.0, 1.0, 1.5], 1e-2, 3), ([1.0, 2.0, 0.5], 1e-1, 2)],
)
def test_the_path_ends_once_the_validation_loss_rises(losses, chosen, num_fits):
    asked = []

    def validation_loss(weight, bias):
        asked.append((weight, bias))
        return losses[len(asked) - 1]

    fitted = fit_along_path(problem(), [1e-1, 1e-2, 1e-3], validation_loss, 200, "")
    assert fitted.penalty == chosen
    assert len(asked) == num_fits
    assert fitted.validation_loss_nats == min(losses[:num_fits])
    torch.testing.assert_close(fitted.weight, newton(chosen)[0], rtol=0, atol=2e-5)


def test_no_penalty_at_all():
    with pytest.raises(ValueError, match="penalties is empty"):
        fit_along_path(problem(), [], lambda weight, bias: 0.0, 10, "")


def test_mean_loss():
    margins = torch.tensor([0.0, 2.0], dtype=torch.float64)
    labels = torch.tensor([1.0, 0.0], dtype=torch.float64)
    expected = (torch.log(torch.tensor(2.0)) + torch.log1p(torch.tensor(2.0).exp())) / 2
    assert mean_loss_nats(margins, labels) == pytest.approx(float(expected), abs=1e-6)
