"""Logistic regression by L-BFGS, along a path of penalties: what the sentiment reward and its judge are fitted with.

Loss: `Σ_i c_i · log(1 + exp(-(2y_i - 1)(x_i · w + b))) + λ ‖s ⊙ w‖²`, in float64, on products `X w` and `Xᵀ r` that
the caller gives, so that one-hot token counts are never written out as a matrix. Every sum runs in a fixed order:
the same data give the same weights.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

Vector = Float[Tensor, "_"]


@dataclass(frozen=True)
class Problem:
    """A classification problem with n examples and d features.

    `margins(w)` is X w, `pullback(r)` is Xᵀ r; `example_weights` are the c_i and sum to 1; `penalty_scale` is s.
    L-BFGS runs on `step_scale ⊙ w`, which changes how soon it arrives and not where.
    """

    margins: Callable[[Vector], Vector]
    pullback: Callable[[Vector], Vector]
    labels: Float[Tensor, "n"]
    example_weights: Float[Tensor, "n"]
    penalty_scale: Float[Tensor, "d"]
    step_scale: Float[Tensor, "d"]


@dataclass(frozen=True)
class Linear:
    """A fitted classifier: log-odds `x · weight + bias`."""

    weight: Float[Tensor, "d"]
    bias: Float[Tensor, ""]
    penalty: float
    validation_loss_nats: float


def fit_along_path(
    problem: Problem,
    penalties: Sequence[float],
    validation_loss: Callable[[Vector, Float[Tensor, ""]], float],
    max_iterations: int,
    title: str,
) -> Linear:
    """Fit for each penalty, starting from the one before, and return the fit with the least validation loss.

    Args:
        problem: the training data.
        penalties: the λ, from strong to weak; the path ends early once the validation loss rises.
        validation_loss: mean loss of (weight, bias) on other data, in nats.
        max_iterations: of L-BFGS, for each penalty.
        title: of the progress bar.
    Returns:
        The best classifier of the path.
    """
    best: Linear | None = None
    scaled, bias = torch.zeros_like(problem.step_scale), torch.zeros((), dtype=torch.float64)
    with _one_thread():
        for penalty in tqdm(penalties, desc=title, unit="penalty", leave=False, disable=None):
            scaled, bias = _minimise(problem, penalty, scaled, bias, max_iterations)
            weight = scaled / problem.step_scale
            loss = validation_loss(weight, bias)
            if best is not None and loss > best.validation_loss_nats:
                break
            best = Linear(weight, bias, penalty, loss)
    if best is None:
        raise ValueError("penalties is empty: give at least one")
    return best


def mean_loss_nats(margins: Float[Tensor, "n"], labels: Float[Tensor, "n"]) -> float:
    """Mean logistic loss of log-odds against labels 0 and 1."""
    return float(F.binary_cross_entropy_with_logits(margins, labels))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A second thread gains a third here on an idle machine; on a busy one, threads that wait for each other in
    thousands of short operations cost tenfold. It also makes the order of the sums the same everywhere."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _minimise(
    problem: Problem, penalty: float, scaled: Tensor, bias: Tensor, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """L-BFGS on (step_scale ⊙ w, b) from a starting point; the gradient is written by hand, there is no graph."""
    scaled, bias = scaled.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [scaled, bias],
        max_iter=max_iterations,
        history_size=10,
        tolerance_grad=1e-9,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def loss() -> Tensor:
        weight = scaled / problem.step_scale
        penalised = problem.penalty_scale * weight
        margins = problem.margins(weight) + bias
        residuals = problem.example_weights * (margins.sigmoid() - problem.labels)
        gradient = problem.pullback(residuals) + 2 * penalty * problem.penalty_scale * penalised
        scaled.grad = gradient / problem.step_scale
        bias.grad = residuals.sum()
        losses = F.binary_cross_entropy_with_logits(margins, problem.labels, reduction="none")
        return (problem.example_weights * losses).sum() + penalty * penalised.square().sum()

    optimizer.step(loss)
    return scaled.detach(), bias.detach()
