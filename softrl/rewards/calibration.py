"""How far a binary classifier's probabilities can be trusted: calibration error, scores, and its temperature."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_NUM_BINS = 15
_TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True)
class Calibration:
    """Measures of probabilities on labelled texts; all but `accuracy` are better when smaller.

    Args:
        accuracy: share of texts on the right side of one half.
        expected_calibration_error: Guo et al. 2017 (arXiv 1706.04599, eq. 3), over 15 equal bins of the probability.
        brier_score: mean squared difference of probability and label.
        nll_nats: mean negative log-likelihood of the labels.
        num_texts: how many were measured.
    """

    accuracy: float
    expected_calibration_error: float
    brier_score: float
    nll_nats: float
    num_texts: int


@dataclass(frozen=True)
class ReliabilityBin:
    """The texts whose probability falls into one bin; the means are NaN where there is none."""

    count: int
    mean_probability: float
    share_positive: float


def measure(log_odds: Float[Tensor, "n"], labels: Float[Tensor, "n"]) -> Calibration:
    """Accuracy and calibration of log-odds against labels 0 and 1."""
    log_odds, labels = log_odds.double(), labels.double()
    bins = reliability(log_odds, labels)
    error = sum(each.count * abs(each.share_positive - each.mean_probability) for each in bins if each.count)
    return Calibration(
        accuracy=float(((log_odds > 0) == (labels > 0.5)).double().mean()),
        expected_calibration_error=error / len(labels),
        brier_score=float((log_odds.sigmoid() - labels).square().mean()),
        nll_nats=float(F.binary_cross_entropy_with_logits(log_odds, labels)),
        num_texts=len(labels),
    )


def reliability(
    log_odds: Float[Tensor, "n"], labels: Float[Tensor, "n"], num_bins: int = _NUM_BINS
) -> list[ReliabilityBin]:
    """Probabilities and what came true of them, by equal bins of the probability: the reliability diagram."""
    probabilities = log_odds.double().sigmoid()
    bin_of = (probabilities * num_bins).long().clamp(max=num_bins - 1)
    found = []
    for number in range(num_bins):
        inside = bin_of == number
        means = [float(values[inside].double().mean()) for values in (probabilities, labels)]
        found.append(ReliabilityBin(int(inside.sum()), *means))
    return found


def fitted_temperature(log_odds: Float[Tensor, "n"], labels: Float[Tensor, "n"]) -> float:
    """The T > 0 for which `log_odds / T` has the least negative log-likelihood on the labels.

    Temperature scaling, Guo et al. 2017, section 4.2. The loss is convex in 1/T, which is bisected by its slope; T is
    held within 0.05 and 20, so that labels which are told apart without error give a finite one.
    """
    log_odds, labels = log_odds.double(), labels.double()
    low, high = 1 / _TEMPERATURES[1], 1 / _TEMPERATURES[0]
    for _ in range(60):
        middle = (low + high) / 2
        slope = ((middle * log_odds).sigmoid() - labels).mul(log_odds).mean()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 2 / (low + high)
