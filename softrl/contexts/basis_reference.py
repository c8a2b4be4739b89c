"""Basis-aware truncation by HiGHS, through scipy: the reference that our own solver is compared with.

One token and one linear program at a time, in float64 on the CPU. Probabilities are stated in units of τ, and the
directions centred and scaled, because HiGHS's tolerances are absolute: columns in units of p̂_j instead made it up to
twenty times slower on a real vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

Array = npt.NDArray[np.float64]


def _options(tolerance: float, time_limit_seconds: float | None) -> dict[str, float]:
    limit = {} if time_limit_seconds is None else {"time_limit": time_limit_seconds}
    return {"primal_feasibility_tolerance": tolerance, "dual_feasibility_tolerance": tolerance, **limit}


@dataclass(frozen=True)
class ReferenceThreshold:
    """τ_i, and a y that proves it.

    Args:
        threshold: the optimum; NaN where HiGHS has failed.
        y: dual solution with `b_iᵀy = 1`, k + 1 numbers, the last of which belongs to the row of ones.
    """

    threshold: float
    y: Array


def reference_threshold(
    directions: Array,
    probs: Array,
    token: int,
    tau: float,
    tolerance: float = 1e-10,
    time_limit_seconds: float | None = None,
) -> ReferenceThreshold:
    """`max_t { t : t b_i = Σ_j p̂_j w_j b_j, −(1−τ) <= w_j <= τ }` with `b_j = (directions_j, 1)`.

    Args:
        directions: k columns of W, or of a Jacobian of the logits, shape (V, k).
        probs: p̂, shape (V,).
        token: i.
        tau: τ in (0, 1).
        tolerance: HiGHS's, absolute, of quantities in units of τ.
        time_limit_seconds: after which it counts as failed.
    """
    columns, shift, scale = _scaled(directions, probs)
    # q_j = p̂_j (w_j + 1 − τ) / τ, and t in units of τ
    equations = np.concatenate([columns, -columns[token][None]]).T
    right = (1 - tau) / tau * (probs @ columns)
    objective = np.zeros(len(probs) + 1)
    objective[-1] = -1.0
    upper = np.append(probs / tau, 1.0)
    bounds = np.stack([np.zeros_like(upper), upper], 1)
    found = linprog(
        objective,
        A_eq=equations,
        b_eq=right,
        bounds=bounds,
        method="highs",
        options=_options(tolerance, time_limit_seconds),
    )
    if found.status != 0:
        return ReferenceThreshold(float("nan"), np.zeros(columns.shape[1]))
    y = found.eqlin.marginals
    y = y / (y @ columns[token])
    unscaled = np.append(y[:-1] / scale, y[-1] - (y[:-1] / scale) @ shift)
    return ReferenceThreshold(tau * float(found.x[-1]), unscaled)


def _scaled(directions: Array, probs: Array) -> tuple[Array, Array, Array]:
    """Columns b_j with the directions centred at their mean under p̂ and divided by their deviation."""
    shift = probs @ directions / probs.sum()
    centred = directions - shift
    scale = np.sqrt(probs @ centred**2)
    scale[scale == 0.0] = 1.0
    return np.concatenate([centred / scale, np.ones((len(probs), 1))], 1), shift, scale


def accepts_by_feasibility(
    directions: Array, probs: Array, token: int, tau: float | None, bounds: Literal["published", "notes"] = "published"
) -> bool | None:
    """Whether no p has `directionsᵀp = directionsᵀp̂, Σp = 1, p_i = 0` within the bounds; None where HiGHS failed.

    Args:
        tau: τ of the published bounds `0 <= p <= p̂ / (1−τ)`; the notes' bounds, `0 <= p <= 1`, have none.
    Source: Finlayson et al. (2024), arXiv:2310.01693, section 5; the notes' program: softrl seeds/002.
    """
    columns, _, _ = _scaled(directions, probs)
    unit = 1.0 if tau is None else tau
    upper = np.full(len(probs), 1.0) if bounds == "notes" or tau is None else probs / (1 - tau)
    upper, right = upper / unit, probs @ columns / unit
    upper[token] = 0.0
    limits = np.stack([np.zeros_like(upper), upper], 1)
    found = linprog(
        np.zeros(len(probs)), A_eq=columns.T, b_eq=right, bounds=limits, method="highs", options=_options(1e-10, None)
    )
    return {0: False, 2: True}.get(found.status)
