"""An independent check of basis-aware acceptances: numpy in float64, in O(VD), nothing shared with the solver.

A certificate is a vector y of D + 1 numbers over the columns of the whole output embedding and the row of ones. Which
directions the solver used, and how it found y, does not matter: any y proves what it proves.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def certified_threshold(
    weight: Array, probs: Array, token: int, tau: float, y: Array, orthogonal_to: Array | None = None
) -> float:
    """`Σ_j p̂_j (τ a_j⁺ + (1−τ) a_j⁻) / a_i` with `a = W y_1..D + y_D+1`: token i is certain if p̂_i is above it.

    Args:
        weight: W, the output embedding, or any matrix of directions, shape (V, D).
        probs: p̂, shape (V,).
        token: i.
        tau: τ in (0, 1).
        y: the certificate, shape (D + 1,).
        orthogonal_to: vectors, shape (j, D), that y may have no share of: for y over the columns of `W diag(w)`, the
            normalised state (and ones, for LayerNorm), in which the state before the norm cannot move.
    Returns:
        An upper bound of τ_i; infinite where `a_i <= 0`, or y has such a share, which proves nothing.
    Source: softrl maths, section 10.
    """
    a = _combined(weight, y)
    if not a[token] > 0.0:
        return math.inf
    if orthogonal_to is not None:
        products = np.abs(orthogonal_to @ y[:-1])
        if (products > 1e-9 * np.linalg.norm(orthogonal_to, axis=1) * np.linalg.norm(y[:-1])).any():
            return math.inf
    losses = np.where(a > 0.0, tau * a, (tau - 1.0) * a)
    return math.fsum(np.asarray(probs, np.float64) * losses) / float(a[token])


def proves(
    weight: Array,
    probs: Array,
    token: int,
    tau: float,
    y: Array,
    orthogonal_to: Array | None = None,
) -> bool:
    """Whether y proves that the token has true probability; arguments as of `certified_threshold`."""
    return bool(float(probs[token]) > certified_threshold(weight, probs, token, tau, y, orthogonal_to))


def proves_by_notes_bounds(weight: Array, probs: Array, token: int, y: Array, tolerance: float = 1e-9) -> bool:
    """The same for the notes' bounds, 0 <= p <= 1: `a_i > 0`, no other a above zero, and `Σ_j p̂_j a_j > 0`."""
    a = _combined(weight, y)
    others = np.delete(a, token)
    rounding = tolerance * float(np.abs(a).max())
    return bool(a[token] > 0.0 and others.max() <= rounding and math.fsum(probs * a) > rounding)


def _combined(weight: Array, y: Array) -> Array:
    return np.asarray(weight, np.float64) @ np.asarray(y[:-1], np.float64) + float(y[-1])
