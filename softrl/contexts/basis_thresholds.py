"""Basis-aware verdicts over a whole vocabulary: which tokens of which contexts provably have true probability.

Every acceptance comes with a y whose bound has been evaluated over all V tokens in O(Vk); every other end is a
rejection: a primal solution that contains the token, or a solver that gave up, which is counted. The program is first
solved with the likeliest tokens as variables, the others in groups that share one, and then, for what that leaves
undecided, with the tokens whose sign is in doubt as variables, the others grouped by sign. Either way its primal value
is a lower bound for the whole vocabulary, and y is a proof or is not.

Left out: what the directions are (`basis_directions.py`), and how τ is chosen (`basis_aware.py`).
Source: Finlayson et al. (2024), arXiv:2310.01693; groups by sign: after the "globs" of
Portnoy and Koenker (1997); the rest ours.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.contexts.basis_dual import DualProblem, pinball, solve_dual

_FIRST_SIZE = 512  # tokens that are variables at first; they double from round to round, up to all of them
_MARGIN = 0.9  # of a level: how far below it a bound on some tokens should be before the others are added
_GROUP_BITS = 6  # the other tokens share one w in each of 2^6 groups
_SWEEP_NUMBERS = 1 << 20  # numbers that a sweep over the vocabulary holds at once
_ROUNDING = 1e-12  # relative error of a float64 bound, generously


@dataclass(frozen=True)
class Programs:
    """The constraints of N contexts.

    Args:
        directions: k columns of W, or of a Jacobian of the logits; one matrix for all contexts or one for each.
        probs: p̂, the model's own probabilities at temperature 1, shape (N, V).
        tau: τ in (0, 1), shape (N,).
        excluded: combinations y of the directions are to be orthogonal to these j vectors a context, shape (N, k, j):
            directions in which a normalised state cannot move.
    """

    directions: Float[Tensor, "V k"] | Float[Tensor, "N V k"]
    probs: Float[Tensor, "N V"]
    tau: Float[Tensor, "N"]
    excluded: Float[Tensor, "N k j"] | None = None

    def of_tokens(self, tokens: Int[Tensor, "N C"]) -> Float[Tensor, "N C k"]:
        """Rows of the directions."""
        if self.directions.ndim == 2:
            return self.directions[tokens]
        return self.directions.gather(1, tokens[..., None].expand(-1, -1, self.directions.shape[-1]))

    def of_contexts(self, contexts: Int[Tensor, "q"]) -> "Programs":
        """One program a context, repeats allowed."""
        directions = self.directions if self.directions.ndim == 2 else self.directions[contexts]
        excluded = None if self.excluded is None else self.excluded[contexts]
        return Programs(directions, self.probs[contexts], self.tau[contexts], excluded)

    def values(self, y: Float[Tensor, "N C d"]) -> Float[Tensor, "N C V"]:
        """a = Cᵀy of all tokens; y has k + 1 entries, the last one for the row of ones."""
        return y[..., :-1] @ self.directions.mT + y[..., -1:]


@dataclass(frozen=True)
class Verdicts:
    """One a candidate.

    Args:
        accepted: p̂_i > upper.
        lower, upper: bounds on τ_i, as tight as the verdict needed; infinite where there is none.
        certificate: y with `b_iᵀy = 1`, k + 1 numbers; it proves `upper`.
        undecided: neither bound decides, because the solver failed; rejected.
        solved: a program had to be solved.
    """

    accepted: Bool[Tensor, "N C"]
    lower: Float[Tensor, "N C"]
    upper: Float[Tensor, "N C"]
    certificate: Float[Tensor, "N C d"]
    undecided: Bool[Tensor, "N C"]
    solved: Bool[Tensor, "N C"]


@dataclass(frozen=True)
class _Scaling:
    """b_j in coordinates with mean 0 and covariance 1 under p̂: `((directions_j − shift) map, 1)`."""

    shift: Float[Tensor, "N 1 k"]
    map: Float[Tensor, "N k r"]

    def columns(self, rows: Float[Tensor, "N C k"]) -> Float[Tensor, "N C n"]:
        scaled = (rows - self.shift) @ self.map
        return torch.cat([scaled, torch.ones_like(scaled[..., :1])], -1)

    def unscaled(self, y: Float[Tensor, "N C n"]) -> Float[Tensor, "N C d"]:
        """y in the coordinates of the directions."""
        inner = y[..., :-1] @ self.map.mT
        return torch.cat([inner, y[..., -1:] - (inner * self.shift).sum(-1, keepdim=True)], -1)

    def of_contexts(self, contexts: Int[Tensor, "q"]) -> "_Scaling":
        return _Scaling(self.shift[contexts], self.map[contexts])


def verdicts(
    programs: Programs,
    tokens: Int[Tensor, "N C"],
    is_asked: Bool[Tensor, "N C"] | None = None,
    first_size: int = _FIRST_SIZE,
    exact: bool = False,
) -> Verdicts:
    """Accept candidates by proof.

    Args:
        programs: contexts and their constraints, float64 where the device has it.
        tokens: ids of the candidates.
        is_asked: False where `tokens` is filled up; those are rejected and not solved.
        first_size: number of tokens that are variables at first.
        exact: solve until both bounds meet, instead of until they decide.
    Returns:
        One verdict a candidate. Tokens with p̂_i > τ are proved by y = (0, 1), without a program.
    """
    asked = torch.ones_like(tokens, dtype=torch.bool) if is_asked is None else is_asked
    levels = programs.probs.gather(1, tokens)
    plain = torch.zeros(*tokens.shape, programs.directions.shape[-1] + 1, dtype=levels.dtype, device=levels.device)
    plain[..., -1] = 1.0
    upper = programs.tau[:, None] * programs.probs.sum(-1, keepdim=True) * torch.ones_like(levels)
    found = Verdicts(
        (levels > upper) & asked, torch.zeros_like(levels), upper, plain, torch.zeros_like(asked), ~asked & asked
    )
    open_ones = asked & (exact | (levels <= upper))
    if not open_ones.any():
        return found
    first = _likeliest(programs.probs, first_size)
    scaling = _scaling(programs, first)
    if not exact:
        open_ones &= ~_inside_ellipsoid(programs, scaling, first, tokens, levels)
    if not open_ones.any():
        return found
    wanted = torch.full_like(levels, torch.nan) if exact else levels
    found = _first_round(programs, scaling, first, tokens, wanted, open_ones, found)
    open_ones &= _is_open(found, wanted, programs.tau)
    size = first_size
    while open_ones.any() and size < programs.probs.shape[1]:
        size *= 2
        found = _next_round(programs, scaling, size, tokens, wanted, open_ones, found)
        open_ones &= _is_open(found, wanted, programs.tau)
    return replace(found, accepted=(levels > found.upper) & asked, undecided=open_ones)


def _likeliest(probs: Float[Tensor, "N V"], size: int) -> Int[Tensor, "N S"]:
    return probs.float().topk(min(size, probs.shape[-1]), dim=-1, sorted=False).indices


def _is_open(found: Verdicts, levels: Float[Tensor, "N C"], tau: Float[Tensor, "N"]) -> Bool[Tensor, "N C"]:
    decided = (found.upper < levels) | (found.lower >= levels)
    return ~decided & ~(found.upper - found.lower <= 1e-8 * tau[:, None])


def _scaling(programs: Programs, first: Int[Tensor, "N S"]) -> _Scaling:
    rows, probs = programs.of_tokens(first), programs.probs.gather(1, first)
    probs = probs / probs.sum(-1, keepdim=True)
    shift = probs[:, None] @ rows
    centred = rows - shift
    covariance = centred.mT @ (centred * probs[..., None])
    basis = _complement(programs.excluded, covariance)
    within = basis.mT @ covariance @ basis
    deviations = within.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(within.dtype).tiny).sqrt()
    correlations = within / (deviations[..., None] * deviations[:, None])
    factor, failed = torch.linalg.cholesky_ex(correlations)
    factor = torch.where(failed[:, None, None] > 0, torch.eye(factor.shape[-1]).to(factor), factor)
    inverse = torch.linalg.solve_triangular(factor, (basis / deviations[:, None]).mT, upper=False)
    return _Scaling(shift, inverse.mT)


def _complement(excluded: Float[Tensor, "N k j"] | None, like: Float[Tensor, "N k k"]) -> Float[Tensor, "N k r"]:
    """Orthonormal basis of what is orthogonal to the excluded vectors."""
    if excluded is None or excluded.shape[-1] == 0:
        return torch.eye(like.shape[-1]).to(like).expand_as(like)
    full, _ = torch.linalg.qr(excluded, mode="complete")
    return full[..., excluded.shape[-1] :]


def _inside_ellipsoid(
    programs: Programs,
    scaling: _Scaling,
    first: Int[Tensor, "N S"],
    tokens: Int[Tensor, "N C"],
    levels: Float[Tensor, "N C"],
) -> Bool[Tensor, "N C"]:
    """Whether `w_j = c_j b_jᵀ M⁻¹ (p̂_i b_i)`, `M = Σ_j c_j p̂_j b_j b_jᵀ`, is a primal solution that rejects token i.

    c_j <= 1 keeps outliers from making the largest |w_j| large. It rejects most tokens with p̂_i far below τ.
    """
    columns, probs = scaling.columns(programs.of_tokens(first)), programs.probs.gather(1, first)
    radius = 1.3 * columns.shape[-1] ** 0.5
    weights = (radius / columns.norm(dim=-1)).clamp(max=1.0)
    factor, failed = torch.linalg.cholesky_ex(columns.mT @ (columns * (probs * weights)[..., None]))

    def norms(rows: Float[Tensor, "N c n"]) -> Float[Tensor, "N c"]:
        return torch.linalg.solve_triangular(factor, rows.mT, upper=False).norm(dim=1)

    largest = (weights * norms(columns)).amax(-1, keepdim=True)
    sizes = levels * largest
    is_inside = sizes * norms(scaling.columns(programs.of_tokens(tokens))) <= programs.tau[:, None].clamp(max=0.5)
    return is_inside & (failed == 0)[:, None]


def _first_round(
    programs: Programs,
    scaling: _Scaling,
    first: Int[Tensor, "N S"],
    tokens: Int[Tensor, "N C"],
    levels: Float[Tensor, "N C"],
    open_ones: Bool[Tensor, "N C"],
    found: Verdicts,
) -> Verdicts:
    """All open candidates of a context at once, with its likeliest tokens as variables."""
    most = int(open_ones.sum(-1).max())
    where = open_ones.int().sort(dim=-1, descending=True, stable=True).indices[:, :most]
    targets = scaling.columns(programs.of_tokens(tokens.gather(1, where)))
    # What only fills up a context is finished at once.
    asked = torch.where(open_ones.gather(1, where), levels.gather(1, where), torch.inf)
    groups = _orthants(programs.directions).expand(programs.probs.shape)
    columns, probs = _grouped(programs, scaling, first, groups, 1 << _GROUP_BITS)
    solution = solve_dual(DualProblem(columns, probs, targets, asked, programs.tau), _MARGIN)
    contexts, positions = torch.nonzero(open_ones.gather(1, where), as_tuple=True)
    places = where[contexts, positions]
    at = (contexts, positions)
    return _improved(
        programs, scaling, tokens, found, contexts, places,
        solution.lower[at], solution.upper[at], solution.y[at], levels,
    )  # fmt: skip


def _next_round(
    programs: Programs,
    scaling: _Scaling,
    size: int,
    tokens: Int[Tensor, "N C"],
    levels: Float[Tensor, "N C"],
    open_ones: Bool[Tensor, "N C"],
    found: Verdicts,
) -> Verdicts:
    """Each open candidate by itself, with the tokens whose sign is in doubt as variables."""
    chunk = max(1, _SWEEP_NUMBERS // programs.probs.shape[1])
    for context in torch.nonzero(open_ones.any(-1))[:, 0]:
        places = torch.nonzero(open_ones[context])[:, 0]
        steepness = _steepness(programs, scaling, context)
        for columns in places.split(chunk):
            rows = context.expand(len(columns))
            own, own_scaling = programs.of_contexts(rows), scaling.of_contexts(rows)
            y = found.certificate[rows, columns]
            problem = _refined_problem(
                own, own_scaling, steepness, size, tokens[rows, columns], levels[rows, columns], y
            )
            solution = solve_dual(problem, _MARGIN)
            found = _improved(
                programs, scaling, tokens, found, rows, columns,
                solution.lower[:, 0], solution.upper[:, 0], solution.y[:, 0], levels,
            )  # fmt: skip
    return found


def _grouped(
    programs: Programs,
    scaling: _Scaling,
    variables: Int[Tensor, "N S"],
    groups: Int[Tensor, "N V"],
    num_groups: int,
) -> tuple[Float[Tensor, "N G n"], Float[Tensor, "N G"]]:
    """Columns and p̂ of the variables, and of groups of the other tokens, whose members share one w.

    Sharing restricts the primal program, so that its value stays a lower bound, and is exact at every y that has the
    same sign on all of a group.
    """
    probs, variable_probs = programs.probs, programs.probs.gather(1, variables)
    columns = scaling.columns(programs.of_tokens(variables))
    if variables.shape[1] == probs.shape[1]:
        return columns, variable_probs
    others = probs.scatter(1, variables, 0.0)
    mass = others.new_zeros(len(others), num_groups).scatter_add_(1, groups, others)
    moments = torch.stack(
        [_moments(programs, row, groups[row], others[row], num_groups) for row in range(len(others))]
    )
    present = mass > 1e-300
    means = torch.where(present[..., None], moments / mass.clamp(min=1e-300)[..., None], scaling.shift)
    return torch.cat([columns, scaling.columns(means)], 1), torch.cat([variable_probs, mass.clamp(min=1e-300)], 1)


def _moments(
    programs: Programs, row: int, groups: Int[Tensor, "V"], probs: Float[Tensor, "V"], num_groups: int
) -> Float[Tensor, "G k"]:
    directions = programs.directions if programs.directions.ndim == 2 else programs.directions[row]
    zeros = directions.new_zeros(num_groups, directions.shape[-1])
    return zeros.index_add_(0, groups, directions * probs[:, None])


def _orthants(directions: Float[Tensor, "*N V k"]) -> Int[Tensor, "*N V"]:
    """Groups of tokens that lie on the same sides of the means of the leading directions."""
    leading = directions[..., :_GROUP_BITS]
    bits = (leading > leading.mean(-2, keepdim=True)).long()
    return (bits << torch.arange(leading.shape[-1], device=bits.device)).sum(-1)


def _refined_problem(
    programs: Programs,
    scaling: _Scaling,
    steepness: Float[Tensor, "V"],
    size: int,
    tokens: Int[Tensor, "q"],
    levels: Float[Tensor, "q"],
    y: Float[Tensor, "q d"],
) -> DualProblem:
    """One candidate a context: heavy tokens whose sign under y is in doubt are variables, the others go by sign."""
    values = programs.values(y[:, None])[:, 0]
    nearness = values.abs() / steepness
    count = min(size, values.shape[-1])
    scale = nearness.float().topk(count, largest=False).values.amax(-1, keepdim=True)
    worth = programs.probs * torch.exp(-nearness / scale)
    variables = worth.float().topk(count, sorted=False).indices
    groups = 2 * _orthants(programs.directions).expand(values.shape) + (values > 0).long()
    columns, probs = _grouped(programs, scaling, variables, groups, 2 << _GROUP_BITS)
    targets = scaling.columns(programs.of_tokens(tokens[:, None]))
    return DualProblem(columns, probs, targets, levels[:, None], programs.tau)


def _steepness(programs: Programs, scaling: _Scaling, context: Int[Tensor, ""]) -> Float[Tensor, "V"]:
    """‖b_j‖ in the scaled coordinates, by which a_j moves when y does."""
    directions = programs.directions if programs.directions.ndim == 2 else programs.directions[context]
    scaled = (directions - scaling.shift[context]) @ scaling.map[context]
    return (scaled.square().sum(-1) + 1.0).sqrt()


def _improved(
    programs: Programs,
    scaling: _Scaling,
    tokens: Int[Tensor, "N C"],
    found: Verdicts,
    contexts: Int[Tensor, "q"],
    places: Int[Tensor, "q"],
    lower: Float[Tensor, "q"],
    restricted: Float[Tensor, "q"],
    y: Float[Tensor, "q n"],
    levels: Float[Tensor, "N C"],
) -> Verdicts:
    """The better bounds; a y whose restricted value is below the level is evaluated over the whole vocabulary."""
    best_lower, best_upper, best_y = found.lower.clone(), found.upper.clone(), found.certificate.clone()
    best_lower[contexts, places] = torch.maximum(best_lower[contexts, places], lower.nan_to_num(nan=-torch.inf))
    promising = torch.isfinite(restricted) & ~(best_lower[contexts, places] >= levels[contexts, places])
    solved = found.solved.clone()
    solved[contexts, places] = True
    for rows, columns, scaled in _chunks(programs, contexts[promising], places[promising], y[promising]):
        unscaled = scaling.of_contexts(rows).unscaled(scaled[:, None])[:, 0]
        upper, unscaled = certified_bound(programs.of_contexts(rows), tokens[rows, columns], unscaled)
        better = upper < best_upper[rows, columns]
        best_upper[rows[better], columns[better]] = upper[better]
        best_y[rows[better], columns[better]] = unscaled[better]
    return replace(found, lower=best_lower, upper=best_upper, certificate=best_y, solved=solved)


def _chunks(programs: Programs, *values: Tensor) -> list[tuple[Tensor, ...]]:
    size = max(1, _SWEEP_NUMBERS // programs.probs.shape[1])
    return list(zip(*(each.split(size) for each in values), strict=True)) if len(values[0]) else []


def certified_bound(
    programs: Programs, tokens: Int[Tensor, "q"], y: Float[Tensor, "q d"]
) -> tuple[Float[Tensor, "q"], Float[Tensor, "q d"]]:
    """What y proves about its token of its context: `Σ_j p̂_j (τ a_j⁺ + (1−τ) a_j⁻)` at `a_i = 1`, over all tokens.

    Args:
        programs: q contexts.
        tokens: i.
        y: any vector, k + 1 numbers; it is scaled to `a_i = 1`.
    Returns:
        An upper bound of τ_i, rounding included, infinite where `a_i <= 0`; and y so scaled.
    """
    values = programs.values(y[:, None])[:, 0]
    own = values.gather(1, tokens[:, None])
    bound = (programs.probs * pinball(values, programs.tau[:, None])).sum(-1) / own[:, 0]
    size = (programs.probs * values.abs()).sum(-1) / own[:, 0].abs()
    bound = bound + _ROUNDING * size
    is_proof = (own[:, 0] > 0) & torch.isfinite(bound)
    return torch.where(is_proof, bound, torch.inf), y / torch.where(own > 0, own, 1.0)
