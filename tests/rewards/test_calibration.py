"""Calibration measures: on probabilities whose calibration is known."""

import math

import pytest
import torch

from softrl.rewards.calibration import fitted_temperature, measure, reliability


def drawn(count, temperature, seed=0):
    """Log-odds and labels that come true as `log-odds / temperature` says."""
    generator = torch.Generator().manual_seed(seed)
    log_odds = 2 * torch.randn(count, generator=generator).double()
    labels = (torch.rand(count, generator=generator).double() < (log_odds / temperature).sigmoid()).double()
    return log_odds, labels


def test_measures_by_hand():
    log_odds = torch.tensor([math.log(3.0), -math.log(3.0), math.log(3.0), -math.log(3.0)]).double()
    found = measure(log_odds, torch.tensor([1.0, 0.0, 0.0, 0.0]).double())
    assert found.accuracy == 0.75
    # bins of 0.75 (one of two is so: off by 0.25) and of 0.25 (none of two: off by 0.25)
    assert found.expected_calibration_error == pytest.approx(0.25)
    assert found.brier_score == pytest.approx((3 * 0.0625 + 0.5625) / 4)
    assert found.nll_nats == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4)
    assert found.num_texts == 4


def test_a_calibrated_classifier_has_no_error_and_temperature_one():
    log_odds, labels = drawn(200_000, 1.0)
    assert measure(log_odds, labels).expected_calibration_error < 0.01  # 15 bins of 13,000: about 0.003
    assert fitted_temperature(log_odds, labels) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_temperature_is_found_and_mends_the_calibration(temperature):
    log_odds, labels = drawn(200_000, temperature)
    found = fitted_temperature(log_odds, labels)
    assert found == pytest.approx(temperature, rel=0.03)
    assert measure(log_odds, labels).expected_calibration_error > 0.03
    assert measure(log_odds / found, labels).expected_calibration_error < 0.01
    # and it is where the slope of the loss is zero
    slopes = [measure(log_odds / (found * factor), labels).nll_nats for factor in (0.9, 1.0, 1.1)]
    assert slopes[1] == min(slopes)


def test_labels_without_error_give_a_finite_temperature():
    log_odds = torch.tensor([1.0, -1.0, 2.0]).double()
    assert fitted_temperature(log_odds, (log_odds > 0).double()) == pytest.approx(0.05, rel=1e-3)
    assert fitted_temperature(log_odds, (log_odds < 0).double()) == pytest.approx(20.0, rel=1e-3)


def test_reliability_counts_everything_once():
    log_odds, labels = drawn(1000, 1.0)
    bins = reliability(log_odds, labels)
    assert sum(each.count for each in bins) == 1000
    assert all(
        number / 15 <= each.mean_probability <= (number + 1) / 15 for number, each in enumerate(bins) if each.count
    )
