"""Bias, variance and their intervals on draws whose moments are known."""

import pytest
import torch

from softrl.estimators.moments import Truth, bonferroni_bound, largest_z, moments

P = 20
TRUTH = torch.linspace(-1.0, 2.0, P, dtype=torch.float64)
BIAS = 0.3 * torch.cos(torch.arange(P, dtype=torch.float64))
NORM2 = TRUTH.square().sum().item()


def draws(count, seed, bias=BIAS, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, P, generator=generator, dtype=torch.float64)
    return TRUTH + bias + spread * noise * torch.linspace(0.5, 1.5, P, dtype=torch.float64)


VARIANCE = torch.linspace(0.5, 1.5, P, dtype=torch.float64).square().sum().item()


def test_moments_are_right_on_average():
    """Over 100 repetitions, within four standard errors of their mean: false with P < 1e-3 for all together."""
    measured = [moments(draws(30, seed), Truth(TRUTH)) for seed in range(100)]
    mean = TRUTH + BIAS
    exact = {
        "bias2": BIAS.square().sum().item() / NORM2,
        "variance": VARIANCE / NORM2,
        "mse": (BIAS.square().sum().item() + VARIANCE) / NORM2,
        "scaled_mse": 1.0 - (mean @ TRUTH).item() ** 2 / (NORM2 * (mean.square().sum().item() + VARIANCE)),
    }
    for name, value in exact.items():
        values = torch.tensor([getattr(each, name).value for each in measured], dtype=torch.float64)
        slack = 0.01 if name == "scaled_mse" else 0.0  # a ratio of two means
        assert abs(values.mean().item() - value) < 4.0 * values.std().item() / 100**0.5 + slack, name
    uncorrected = exact["bias2"] + VARIANCE / 30 / NORM2  # a bias² that is not corrected would be seen
    values = torch.tensor([each.bias2.value for each in measured])
    assert abs(values.mean().item() - uncorrected) > 4.0 * values.std().item() / 100**0.5


def test_intervals_cover_about_what_they_say():
    """Of 150 nominal 95% intervals from 60 draws: binomial noise is 1.8%, and a bootstrap of few draws is short."""
    exact = {"bias2": BIAS.square().sum().item() / NORM2, "variance": VARIANCE / NORM2}
    exact["mse"] = exact["bias2"] + exact["variance"]
    exact["cosine"] = torch.nn.functional.cosine_similarity(draws(40_000, 10**6), TRUTH[None], dim=1).mean().item()
    measured = [moments(draws(60, 1000 + seed), Truth(TRUTH)) for seed in range(150)]
    for name, value in exact.items():
        intervals = [getattr(each, name) for each in measured]
        covered = sum(each.low <= value <= each.high for each in intervals) / len(intervals)
        assert 0.86 < covered < 0.999, (name, covered)


def test_z_scores_are_standard_with_an_exact_and_with_a_noisy_truth():
    """150 z-scores of unbiased draws: mean within 4 / 12 of 0, spread 1 within 4 · 0.06. Without the truth's own
    error the spread would be 2 with as many draws there as here, and the mean far below zero."""
    for noisy in (False, True):
        scores = []
        for seed in range(150):
            truth = Truth.from_draws(draws(50, 5000 + seed, 0.0, 3.0)) if noisy else Truth(TRUTH)
            scores.append(moments(draws(50, seed, 0.0, 3.0), truth).bias_z)
        scores = torch.tensor(scores)
        assert abs(scores.mean()) < 0.33
        assert 0.77 < scores.std() < 1.25


def test_without_noise_there_is_no_z_and_no_variance():
    known = moments(TRUTH.expand(5, P).clone(), Truth(TRUTH))
    assert known.bias_z != known.bias_z
    assert (known.variance.value, known.bias2.value, known.cosine.value) == pytest.approx((0.0, 0.0, 1.0), abs=1e-12)
    assert known.scaled_mse.value == pytest.approx(0.0, abs=1e-12)


def test_parts_of_a_truth_are_those_of_its_draws():
    gradients, where = draws(40, 3), slice(4, 9)
    part, direct = Truth.from_draws(gradients).part(where), Truth.from_draws(gradients[:, where])
    torch.testing.assert_close(part.gradient, direct.gradient)
    assert part.variance == pytest.approx(direct.variance)
    assert part.variance_along == pytest.approx(direct.variance_along)


def test_refusals_name_the_numbers():
    with pytest.raises(ValueError, match="at least two draws, got 1"):
        moments(draws(1, 0), Truth(TRUTH))
    with pytest.raises(ValueError, match=r"\(19,\) entries, the draws have 20"):
        moments(draws(3, 0), Truth(TRUTH[1:]))
    with pytest.raises(ValueError, match="with 1 draws; make at least two"):
        Truth.from_draws(draws(1, 0))


def test_the_largest_z_finds_a_bias_in_one_coordinate():
    bias = torch.zeros(P, dtype=torch.float64)
    assert largest_z(draws(500, 0, bias), TRUTH) < bonferroni_bound(P + 1)
    bias[7] = 0.4
    assert largest_z(draws(500, 0, bias), TRUTH) > bonferroni_bound(P + 1)
