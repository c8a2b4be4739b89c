"""One-step problems: exact truths, resumable draws, and training on ReinMax's polynomial programming."""

import pytest
import torch

from softrl.studies.one_step import (
    KINDS,
    ONE_STEP_PROBLEMS,
    POWERS,
    categorical,
    exact_objective,
    optimal_loss,
    optimisation_table,
    optimise,
    polynomial_programming,
    polynomial_reward,
)


@pytest.mark.parametrize("name", ONE_STEP_PROBLEMS)
def test_truth_is_the_derivative_of_the_objective(name):
    """Against central differences along three directions; and every latent's gradient sums to zero."""
    problem = ONE_STEP_PROBLEMS[name]()
    truth = problem.truth()
    assert truth.dtype == torch.float64
    assert problem.groups == {"logits": slice(0, len(truth))}
    assert (truth.reshape(problem.logits.shape).sum(-1).abs() < 1e-14).all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(problem.logits.shape, generator=generator, dtype=torch.float64)
        step = 1e-5 * direction
        difference = (problem.objective(problem.logits + step) - problem.objective(problem.logits - step)) / 2e-5
        torch.testing.assert_close(difference, (truth * direction.flatten()).sum(), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("power", POWERS)
def test_separable_objective_is_the_enumerated_one(power):
    small = polynomial_programming(power, num_latents=5)
    torch.testing.assert_close(small.objective(small.logits), exact_objective(small.logits, small.reward))


@pytest.mark.parametrize(("kind", "degree"), zip(KINDS, (1, 2, 3), strict=True))
def test_rewards_are_polynomials_of_their_degree(kind, degree):
    """Along a line of relaxed vectors the differences of order degree + 1 vanish and those of order degree do not."""
    generator = torch.Generator().manual_seed(1)
    start, direction = torch.randn(2, 1, 6, generator=generator, dtype=torch.float64)
    values = polynomial_reward(kind, 6)(start + torch.arange(6.0)[:, None, None] * direction)
    assert torch.diff(values, degree + 1).abs().max() < 1e-10
    assert torch.diff(values, degree).abs().min() > 0.1


@pytest.mark.parametrize(
    ("estimator_name", "settings"),
    [
        ("rloo", {"num_samples": 4}),
        ("gumbel_rao", {"num_draws": 3, "temperature": 0.5}),
        ("relax", {"scale": 0.5, "fit_steps": 20}),
    ],
)
def test_draw_k_has_the_same_numbers_however_it_is_asked_for(estimator_name, settings, monkeypatch):
    problem = categorical("cubic")
    whole = problem.draw(estimator_name, settings, 0, 30)
    assert whole.gradients.shape == (30, 6)
    assert whole.gradients.dtype == torch.float64
    assert whole.seconds > 0
    assert whole.reward_calls == {"rloo": 4, "gumbel_rao": 1, "relax": 2}[estimator_name]
    again = categorical("cubic")  # as after a restart: whatever was fitted is fitted anew
    resumed = [again.draw(estimator_name, settings, first, count).gradients for first, count in ((25, 5), (3, 22))]
    torch.testing.assert_close(torch.cat([resumed[1], resumed[0]]), whole.gradients[3:], rtol=1e-9, atol=1e-12)
    monkeypatch.setattr("softrl.studies.one_step.NUMBERS_AT_ONCE", 100)
    torch.testing.assert_close(
        problem.draw(estimator_name, settings, 0, 30).gradients, whole.gradients, rtol=1e-12, atol=1e-14
    )


def test_optimal_losses_are_those_of_the_paper():
    for power, loss in zip(POWERS, (0.3019, 0.2025, 0.0911), strict=True):
        assert abs(optimal_loss(power) - loss) < 5e-5
        problem = polynomial_programming(power, num_latents=4)
        certain = torch.tensor([40.0, -40.0], dtype=torch.float64).expand(4, 2)
        assert abs(-problem.objective(certain).item() - optimal_loss(power)) < 1e-12


@pytest.mark.parametrize("power", POWERS)
def test_reinmax_reaches_the_optimum_and_straight_through_does_not(power):
    """From 0.05 away (p = 2) to under 0.004 in 250 steps; both runs are deterministic."""
    reinmax, straight = (
        optimise(name, power, steps, {"num_samples": 16}) - optimal_loss(power)
        for name, steps in (("reinmax", 250), ("straight_through", 100))
    )
    assert len(reinmax) == 251
    assert reinmax[0] == straight[0]
    assert 0 < reinmax[-1] < 0.004
    assert straight[-1] > 10 * reinmax[-1]
    assert straight[-1] > 0.4 * straight[0]


def test_table_has_a_row_an_estimator():
    rows = optimisation_table(["reinforce", "reinmax"], 2, num_latents=8)
    assert [row["estimator"] for row in rows] == ["reinforce", "reinmax"]
    assert set(rows[0]) == {"estimator", "p=1.5", "p=2", "p=3"}
    assert all(0 < row["p=2"] < 0.1 for row in rows)


def test_what_is_refused():
    with pytest.raises(ValueError, match="kind must be one of"):
        categorical("quartic")
    with pytest.raises(ValueError, match="power must be above 1"):
        polynomial_programming(0.5)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        categorical("linear").draw("reinforce", {}, 0, 0)
    with pytest.raises(ValueError, match=r"\['num_samples'\], got \['temperature'\]"):
        categorical("linear").draw("local_expectation", {"temperature": 1.0}, 0, 1)
