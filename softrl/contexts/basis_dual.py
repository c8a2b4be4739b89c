"""The dual of basis-aware truncation, solved in batches by a primal-dual interior-point method.

With columns `b_j` (projected rows of W and a 1, so n numbers a token) token i's threshold is

    τ_i = min_y { Σ_j p̂_j (τ a_j⁺ + (1−τ) a_j⁻) : a_j = b_jᵀy, b_iᵀy = 1 }
        = max_t { t : t b_i = Σ_j p̂_j w_j b_j, −(1−τ) <= w_j <= τ },

a quantile regression. The S columns are tokens, or groups of tokens that share one w. One iteration of Mehrotra's
predictor-corrector costs O(S n²) a candidate; its two bounds hold at every iteration, so most candidates are decided
long before convergence. Complementarity is measured in units of a, with barrier weights `max(p̂_j, 3/S)`: weights of p̂
alone let tokens of negligible probability block the steps.

Left out: which tokens are variables, and the whole vocabulary's bound; see `basis_thresholds.py`.
Source: Portnoy and Koenker (1997), The Gaussian hare and the Laplacian tortoise; Mehrotra (1992).
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_TO_THE_BOUNDARY = 0.9995  # share of the largest step that keeps the iterate inside


@dataclass(frozen=True)
class DualProblem:
    """Candidates of N contexts, C a context, each context with its own S tokens.

    Args:
        columns: b_j, the last entry of which is 1 (or the same everywhere), well scaled, shape (N, S, n).
        probs: p̂_j, shape (N, S).
        targets: b_i of the candidates, shape (N, C, n).
        levels: p̂_i: a candidate is finished once a bound is on one side of it; NaN asks for the threshold itself.
        tau: τ, shape (N,).
    """

    columns: Float[Tensor, "N S n"]
    probs: Float[Tensor, "N S"]
    targets: Float[Tensor, "N C n"]
    levels: Float[Tensor, "N C"]
    tau: Float[Tensor, "N"]


@dataclass(frozen=True)
class DualSolution:
    """Bounds on the thresholds of the S tokens' programs.

    Args:
        lower: primal value, less what its residual may amount to.
        upper: dual value at y.
        y: with b_iᵀy = 1.
        finished: a bound has passed the level, or both have met; the others have run out of iterations, or failed.
    """

    lower: Float[Tensor, "N C"]
    upper: Float[Tensor, "N C"]
    y: Float[Tensor, "N C n"]
    finished: Bool[Tensor, "N C"]


@dataclass(frozen=True)
class _Iterate:
    """x = w + 1 − τ in (0, 1), u = 1 − x; multipliers v of x >= 0 and z of x <= 1, with z − v = a = b_jᵀy."""

    x: Float[Tensor, "N C S"]
    v: Float[Tensor, "N C S"]
    z: Float[Tensor, "N C S"]
    t: Float[Tensor, "N C"]
    y: Float[Tensor, "N C n"]

    def moved(self, primal: Float[Tensor, "N C"], dual: Float[Tensor, "N C"], step: "_Iterate") -> "_Iterate":
        far, near = primal[..., None], dual[..., None]
        return _Iterate(
            self.x + far * step.x, self.v + near * step.v, self.z + near * step.z, self.t + primal * step.t,
            self.y + near * step.y,
        )  # fmt: skip

    def step_lengths(self, step: "_Iterate", share: float) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
        """Largest primal and dual steps, at most 1, that stay inside."""
        primal = torch.maximum(-step.x / self.x, step.x / (1 - self.x)).amax(-1)
        dual = torch.maximum(-step.v / self.v, -step.z / self.z).amax(-1)
        return (share / primal.clamp(min=1e-12)).clamp(max=1.0), (share / dual.clamp(min=1e-12)).clamp(max=1.0)

    def gap(self, probs: Float[Tensor, "N 1 S"]) -> Float[Tensor, "N C"]:
        return (probs * (self.x * self.v + (1 - self.x) * self.z)).sum(-1)

    def of(self, rows: Int[Tensor, "N c"]) -> "_Iterate":
        return _Iterate(*(_rows(getattr(self, each.name), rows) for each in fields(self)))


def pinball(a: Float[Tensor, "*batch"], tau: Float[Tensor, "*tau"]) -> Float[Tensor, "*batch"]:
    """`τ a⁺ + (1−τ) a⁻`, with a⁻ >= 0 the negative part."""
    return tau * a + (-a).clamp(min=0.0)


def solve_dual(
    problem: DualProblem, margin: float = 1.0, max_iterations: int = 60, tolerance: float = 1e-10
) -> DualSolution:
    """Bounds on every candidate's threshold, as tight as its level needs.

    Args:
        problem: floating point of 64 bits, unless the device has none.
        margin: the upper bound has passed a level once it is below this share of it; what the columns leave out may
            use up the rest.
        max_iterations: of the interior-point method; each is one factorisation of (n, n) a candidate.
        tolerance: both bounds have met once their distance is below this share of τ.
    """
    num_contexts, num_candidates = problem.levels.shape
    features = _outer(problem.columns)
    solution = _start_solution(problem)
    rows = torch.arange(num_candidates, device=problem.levels.device).expand(num_contexts, -1)
    iterate = _start(problem)
    for _ in range(max_iterations):
        part = _part(problem, rows)
        residual = _residual(part, iterate)
        solution, going_on = _recorded(solution, part, iterate, residual, rows, margin, tolerance)
        if not going_on.any():
            break
        rows, iterate, residual = _compressed(going_on, rows, iterate, residual)
        iterate = _advanced(_part(problem, rows), features, iterate, residual)
    return solution


def _part(problem: DualProblem, rows: Int[Tensor, "N c"]) -> DualProblem:
    chosen = {name: _rows(getattr(problem, name), rows) for name in ("targets", "levels")}
    return DualProblem(problem.columns, problem.probs, **chosen, tau=problem.tau)


def _rows(values: Tensor, rows: Int[Tensor, "N c"]) -> Tensor:
    """Candidates `rows` of every context."""
    if values.shape[1] == rows.shape[1] and values.shape[1] > 0 and bool((rows[:, :-1] < rows[:, 1:]).all()):
        return values  # all of them, in order
    index = rows.reshape(*rows.shape, *(1,) * (values.ndim - 2)).expand(*rows.shape, *values.shape[2:])
    return values.gather(1, index)


def _outer(columns: Float[Tensor, "N S n"]) -> Float[Tensor, "N S m"]:
    """Upper triangles of b bᵀ, so that normal matrices are one product with the weights."""
    first, second = torch.triu_indices(columns.shape[-1], columns.shape[-1], device=columns.device)
    return columns[..., first] * columns[..., second]


def _start_solution(problem: DualProblem) -> DualSolution:
    nothing = torch.full_like(problem.levels, -torch.inf)
    y = torch.zeros_like(problem.targets)
    return DualSolution(nothing, -nothing, y, torch.zeros_like(problem.levels, dtype=torch.bool))


def _barrier_weights(probs: Float[Tensor, "N S"]) -> Float[Tensor, "N 1 S"]:
    return probs.clamp(min=3.0 / probs.shape[-1])[:, None]


def _start(problem: DualProblem) -> _Iterate:
    """a = 1 everywhere and x on its central path: exactly centred, and primal feasible but for the smallest p̂."""
    tau = problem.tau[:, None, None]
    probs = problem.probs[:, None]
    mu = tau * (1 - tau) / (1 - 2 * tau).clamp(min=0.1) * _barrier_weights(problem.probs) / probs
    # μ/(1−x) − μ/x = 1, written so that large μ does not cancel
    x = 0.5 + 0.5 / (2 * mu + torch.sqrt(4 * mu * mu + 1))
    shape = (*problem.levels.shape, problem.probs.shape[-1])
    y = torch.zeros_like(problem.targets)
    y[..., -1] = 1.0 / problem.targets[..., -1]
    t = torch.zeros_like(problem.levels)
    return _Iterate(x.expand(shape), (mu / x).expand(shape), (mu / (1 - x)).expand(shape), t, y)


def _residual(problem: DualProblem, iterate: _Iterate) -> Float[Tensor, "N C n"]:
    """`t b_i − Σ_j p̂_j w_j b_j`, zero where the iterate is primal feasible."""
    weights = (iterate.x - (1 - problem.tau[:, None, None])) * problem.probs[:, None]
    return iterate.t[..., None] * problem.targets - weights @ problem.columns


def _recorded(
    solution: DualSolution,
    problem: DualProblem,
    iterate: _Iterate,
    residual: Float[Tensor, "N c n"],
    rows: Int[Tensor, "N c"],
    margin: float,
    tolerance: float,
) -> tuple[DualSolution, Bool[Tensor, "N c"]]:
    """The bounds of this iterate where they are new, and which candidates go on."""
    scale = (problem.targets * iterate.y).sum(-1)
    y = iterate.y / scale[..., None]
    a = y @ problem.columns.mT
    upper = (problem.probs[:, None] * pinball(a, problem.tau[:, None, None])).sum(-1)
    lower = iterate.t - (residual * y).sum(-1).abs()
    has_failed = ~(torch.isfinite(upper) & torch.isfinite(lower))
    met = upper - lower <= tolerance * problem.tau[:, None]
    finished = ((upper < margin * problem.levels) | (lower >= problem.levels) | met) & ~has_failed
    is_open = ~_rows(solution.finished, rows) & ~has_failed

    def updated(old: Tensor, new: Tensor) -> Tensor:
        mask = is_open.reshape(*is_open.shape, *(1,) * (new.ndim - 2)).expand_as(new)
        index = rows.reshape(*rows.shape, *(1,) * (new.ndim - 2)).expand_as(new)
        return old.scatter(1, index, torch.where(mask, new, _rows(old, rows)))

    values = (lower, upper, y, finished)
    old = (solution.lower, solution.upper, solution.y, solution.finished)
    return DualSolution(*map(updated, old, values)), is_open & ~finished


def _compressed(
    going_on: Bool[Tensor, "N c"], rows: Int[Tensor, "N c"], iterate: _Iterate, residual: Float[Tensor, "N c n"]
) -> tuple[Int[Tensor, "N d"], _Iterate, Float[Tensor, "N d n"]]:
    """Only the candidates that go on, and in contexts with fewer of them some finished ones too."""
    most = int(going_on.sum(-1).max())
    if most > 0.8 * rows.shape[1]:
        return rows, iterate, residual
    kept = going_on.int().sort(dim=-1, descending=True, stable=True).indices[:, :most]
    return rows.gather(1, kept), iterate.of(kept), _rows(residual, kept)


def _advanced(
    problem: DualProblem, features: Float[Tensor, "N S m"], iterate: _Iterate, residual: Float[Tensor, "N C n"]
) -> _Iterate:
    """One predictor-corrector step."""
    probs, weights = problem.probs[:, None], _barrier_weights(problem.probs)
    system = _NewtonSystem(problem, features, iterate, residual)
    gap = iterate.gap(probs)
    predictor = system.step(torch.zeros_like(weights), 0.0, 0.0)
    predicted = iterate.moved(*iterate.step_lengths(predictor, 1.0), predictor)
    centring = (predicted.gap(probs) / gap).clamp(1e-8, 1.0) ** 3
    target = (centring * gap / (2 * weights.sum(-1)))[..., None] * (weights / probs)
    corrector = system.step(target, predictor.x * predictor.v, -predictor.x * predictor.z)
    return iterate.moved(*iterate.step_lengths(corrector, _TO_THE_BOUNDARY), corrector)


class _NewtonSystem:
    """The Newton equations at an iterate, factorised once for both of its steps."""

    def __init__(
        self,
        problem: DualProblem,
        features: Float[Tensor, "N S m"],
        iterate: _Iterate,
        residual: Float[Tensor, "N C n"],
    ):
        self.problem, self.iterate, self.residual = problem, iterate, residual
        self.curvature = 1 / (iterate.z / (1 - iterate.x) + iterate.v / iterate.x)
        self.weights = self.curvature * problem.probs[:, None]
        normal = _symmetric(self.weights @ features, problem.columns.shape[-1])
        # ρ b_i b_iᵀ leaves the solution alone, since b_iᵀΔy = 0, and keeps the matrix regular at a vertex, where it is
        # the sum of n − 1 outer products.
        target = problem.targets
        rho = normal.diagonal(dim1=-2, dim2=-1).sum(-1) / (target * target).sum(-1)
        normal = normal + rho[..., None, None] * (target[..., None] * target[..., None, :])
        self.factor, failed = torch.linalg.cholesky_ex(normal)
        self.factor = torch.where(failed[..., None, None] > 0, torch.nan, self.factor)  # ends as not finished
        self.toward_target = self._solved(target)

    def _solved(self, right: Float[Tensor, "N C n"]) -> Float[Tensor, "N C n"]:
        return torch.cholesky_solve(right[..., None], self.factor)[..., 0]

    def step(self, target: Tensor, second_lower: Tensor | float, second_upper: Tensor | float) -> _Iterate:
        """Toward complementarity products of `target`, less the second-order terms of a predictor."""
        at, target_column = self.iterate, self.problem.targets
        for_lower = target - at.x * at.v - second_lower
        for_upper = target - (1 - at.x) * at.z - second_upper
        shift = for_lower / at.x - for_upper / (1 - at.x)
        free = self._solved(self.residual - (self.weights * shift) @ self.problem.columns)
        t = -(target_column * free).sum(-1) / (target_column * self.toward_target).sum(-1)
        y = free + t[..., None] * self.toward_target
        x = self.curvature * (y @ self.problem.columns.mT + shift)
        v = (for_lower - at.v * x) / at.x
        z = (for_upper + at.z * x) / (1 - at.x)
        return _Iterate(x, v, z, t, y)


def _symmetric(triangle: Float[Tensor, "*batch m"], size: int) -> Float[Tensor, "*batch n n"]:
    first, second = torch.triu_indices(size, size, device=triangle.device)
    matrix = triangle.new_zeros(*triangle.shape[:-1], size, size)
    matrix[..., first, second] = triangle
    matrix[..., second, first] = triangle
    return matrix
