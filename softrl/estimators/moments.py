"""Bias and variance of gradient estimators at fixed parameters, per coordinate and then summed.

Everything is in units of ‖∇J‖². Bias² is corrected for the noise of the mean (`‖mean − g‖² − tr Cov / n`), so that it
is unbiased itself and may come out slightly negative. Intervals are by bootstrap over draws. The spread of gradient
norms over parameter tensors, which some reports call variance, is not computed anywhere: it is not a variance.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_RESAMPLES = 400
_BATCHES = 32  # of a truth's draws, kept for its error along itself


@dataclass(frozen=True)
class Truth:
    """∇J, or a sketch of it: exact, or a mean of draws.

    `noise` is then the variance of each of its entries, `batches` the means of parts of the draws.
    """

    gradient: Float[Tensor, "P"]
    noise: Float[Tensor, "P"] | None = None
    batches: Float[Tensor, "K P"] | None = None

    @classmethod
    def from_draws(cls, gradients: Float[Tensor, "D P"]) -> "Truth":
        """The mean of unbiased draws.

        Raises:
            ValueError: fewer than two draws.
        """
        if len(gradients) < 2:
            raise ValueError(f"a mean of draws has no error with {len(gradients)} draws; make at least two")
        parts = gradients.tensor_split(min(_BATCHES, len(gradients)))
        batches = torch.stack([part.mean(0) for part in parts])
        return cls(gradients.mean(0), gradients.var(0) / len(gradients), batches)

    def part(self, where: slice) -> "Truth":
        """That of some of the parameters."""
        noise = None if self.noise is None else self.noise[where]
        return Truth(self.gradient[where], noise, None if self.batches is None else self.batches[:, where])

    @property
    def variance(self) -> float:
        """How far the mean is from ∇J, squared, in expectation; 0 if exact."""
        return 0.0 if self.noise is None else self.noise.sum().item()

    @property
    def variance_along(self) -> float:
        """Variance of the mean's error along the mean, times its squared norm; 0 if exact."""
        if self.batches is not None:
            return ((self.batches @ self.gradient).var() / len(self.batches)).item()
        return 0.0 if self.noise is None else (self.noise * self.gradient.square()).sum().item()

    @property
    def squared_norm(self) -> float:
        """‖∇J‖², without what noise adds to it; at least a tenth of the measured one, so that ratios stay finite."""
        measured = self.gradient.square().sum().item()
        return max(measured - self.variance, 0.1 * measured)


@dataclass(frozen=True)
class Interval:
    """A number with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Moments:
    """What a table row shows of one estimator.

    `bias2`, `variance`, `mse`: of one draw, over ‖∇J‖². `scaled_mse`: the least mse that a fixed factor before the
    draw can reach, `1 − (E ĝ·∇J)² / (‖∇J‖² E‖ĝ‖²)`; a learning rate absorbs the factor. `snr`: ‖mean‖ over the root of
    the variance. `cosine`: of a single draw with ∇J, averaged. `mean_cosine`: of the mean of all draws, what remains
    when noise is averaged out. `bias_z`: the bias along ∇J in standard errors, the truth's own included; NaN for an
    estimate without noise.
    """

    draws: int
    bias2: Interval
    variance: Interval
    mse: Interval
    scaled_mse: Interval
    snr: Interval
    cosine: Interval
    mean_cosine: float
    bias_z: float


def moments(gradients: Float[Tensor, "D P"], truth: Truth, seed: int = 0) -> Moments:
    """Bias, variance, error, signal-to-noise and cosine of independent draws.

    Args:
        gradients: one estimate a row, float64; or their sketches, with the truth's sketch.
        truth: what they estimate.
        seed: of the bootstrap.
    Raises:
        ValueError: fewer than two draws, or a truth of another length.
    """
    count, length = gradients.shape
    if count < 2:
        raise ValueError(f"moments need at least two draws, got {count}")
    if truth.gradient.shape != (length,):
        raise ValueError(f"the truth has {tuple(truth.gradient.shape)} entries, the draws have {length}")
    # All statistics are functions of inner products, so a bootstrap of them costs D², not D · P.
    errors = gradients - truth.gradient
    gram = errors @ errors.T
    along = errors @ truth.gradient
    cosines = torch.nn.functional.cosine_similarity(gradients, truth.gradient[None], dim=1)
    everything = torch.full((1, count), 1.0 / count, dtype=gradients.dtype)
    point = _statistics(gram, along, cosines, everything, truth)[0]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, count, (_RESAMPLES, count), generator=generator)
    times = torch.zeros(_RESAMPLES, count, dtype=gram.dtype)
    weights = times.scatter_add_(1, rows, torch.ones_like(times)) / count
    resampled = _statistics(gram, along, cosines, weights, truth)
    # Basic bootstrap about the resamples' own mean: a resample repeats draws, which shifts bias² by the mean's noise.
    low = point - (resampled.quantile(0.975, 0) - resampled.mean(0))
    high = point - (resampled.quantile(0.025, 0) - resampled.mean(0))
    intervals = (Interval(*values) for values in torch.stack([point, low, high], 1).tolist())
    bias2, variance, mse, scaled_mse, snr, cosine = intervals
    # A noisy truth t is longer than ∇J by its variance: E[(ĝ − t)·t] = −tr Var(t) without any bias.
    spread = (along.var() / count + truth.variance_along).sqrt()
    has_noise = spread > 1e-9 * truth.gradient.square().sum()
    bias_z = ((along.mean() + truth.variance) / spread).item() if has_noise else float("nan")
    mean_cosine = torch.nn.functional.cosine_similarity(gradients.mean(0), truth.gradient, dim=0).item()
    return Moments(count, bias2, variance, mse, scaled_mse, snr, cosine, mean_cosine, bias_z)


def _statistics(
    gram: Float[Tensor, "D D"],
    along: Float[Tensor, "D"],
    cosines: Float[Tensor, "D"],
    weights: Float[Tensor, "R D"],
    truth: Truth,
) -> Float[Tensor, "R 6"]:
    """bias², variance, mse, scaled mse, snr, cosine of weighted draws, for every row of weights."""
    count, scale = weights.shape[1], truth.squared_norm
    of_mean = (weights @ gram * weights).sum(1)  # ‖mean − truth‖²
    second = weights @ gram.diagonal()
    variance = ((second - of_mean) * count / (count - 1)).clamp(min=0.0)  # rounding, where there is no noise
    bias2 = of_mean - variance / count - truth.variance
    along_mean = weights @ along
    mean_norm2 = (of_mean + 2 * along_mean + truth.gradient.square().sum() - variance / count).clamp(min=0.0)
    snr = (mean_norm2 / variance.clamp(min=torch.finfo(gram.dtype).tiny)).sqrt()
    # The truth's own noise is in every error once.
    mse = second - truth.variance
    # (E ĝ·∇J)² less the noise of that mean, over E‖ĝ‖²
    inner = (along_mean + truth.gradient.square().sum() - truth.variance).square() - along.var() / count
    of_draw = second + 2 * along_mean + truth.gradient.square().sum()
    scaled = (1.0 - inner / (scale * of_draw).clamp(min=torch.finfo(gram.dtype).tiny)).clamp(0.0, 1.0)
    return torch.stack([bias2 / scale, variance / scale, mse / scale, scaled, snr, weights @ cosines], 1)


def largest_z(gradients: Float[Tensor, "D P"], truth: Float[Tensor, "P"]) -> float:
    """The largest |z| of the mean's error: over coordinates, and along the truth.

    For an unbiased estimator and P + 1 tests, P(z > Φ⁻¹(1 − α / 2(P + 1))) <= α. Coordinates that never vary have to
    be right exactly, up to rounding.
    """
    errors = gradients - truth
    direction = (errors @ truth)[:, None] / truth.norm()
    tested = torch.cat([errors, direction], 1)
    spread = tested.std(0) / len(tested) ** 0.5
    rounding = 1e-12 * truth.norm()
    return (tested.mean(0).abs() / torch.maximum(spread, rounding)).max().item()


def bonferroni_bound(num_tests: int, false_alarm: float = 1e-3) -> float:
    """|z| that the largest of `num_tests` standard normals exceeds with a probability of at most `false_alarm`."""
    tail = torch.tensor(1.0 - false_alarm / (2 * num_tests), dtype=torch.float64)
    return torch.distributions.Normal(0.0, 1.0).icdf(tail).item()
