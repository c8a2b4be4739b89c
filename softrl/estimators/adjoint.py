"""Phase 2: the total cotangents of a soft rollout's weights and fed embeddings.

With `g_t = ∂J/∂q_t` at fixed embeddings, `λ_t` the derivative through the feedback of token t and
`a_t = g_t + γ (∂e_t/∂q_t)ᵀ λ_t`, the system is `λ_t = Σ_{j>t} [(∂p_j/∂e_t)ᵀ a_j + ∂F_j/∂e_t]`: linear and strictly
triangular. Only inputs are differentiated; parameters need no gradient here and the loop's graph is never kept.

Solvers: `sequential` (exact, one step's activations at a time), `parallel` (Jacobi sweeps on one forward pass, exact
after T-1 of them), `autograd` (plain backpropagation through the loop; the reference). Source: ours (softrl maths,
section 2); the sequential form is the adjoint method of optimal control.
Left out: the blocked form of `parallel`, and acceleration of its sweeps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.models.policy import Policy, chunk_length, evaluating, frozen
from softrl.models.state import DecodeState, ReplayableState
from softrl.tokens.relaxation import Relaxation
from softrl.types import Rollout, Support

METHODS = ("sequential", "parallel", "autograd")

# J of every sequence from the fed weights q [N, T, K] and the policy's hidden states [N, T, D], both with a graph.
Objective = Callable[[Float[Tensor, "N T K"], Float[Tensor, "N T D"]], Float[Tensor, "N"]]


@dataclass(frozen=True)
class AdjointSettings:
    """How the cotangents are solved for.

    Args:
        method: "sequential", "parallel" or "autograd".
        hops: with "parallel": stop after this many sweeps, i.e. keep gradient paths through at most so many feedback
            edges; 0 is the detached estimator, None solves to `tol`.
        feedback_discount: γ in [0, 1], weighs a path by γ to the number of feedback edges on it; 1 is exact.
        adjoint_clip: upper bound of ‖λ_t‖ for every sequence and step; None for no bound.
        tol: with "parallel": stop when the relative residual of the sweeps falls below it.
    Raises:
        ValueError: unknown method, or a number outside its range; hops together with another method.
    """

    method: str = "parallel"
    hops: int | None = None
    feedback_discount: float = 1.0
    adjoint_clip: float | None = None
    tol: float = 1e-3

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")
        if self.hops is not None and (self.hops < 0 or self.method != "parallel"):
            raise ValueError(
                f"hops={self.hops} with method={self.method!r}: hops must be at least 0 and is the number of sweeps "
                "of method='parallel'; leave it out for the exact methods"
            )
        if not 0.0 <= self.feedback_discount <= 1.0:
            raise ValueError(f"feedback_discount must lie in [0, 1], got {self.feedback_discount}")
        if self.adjoint_clip is not None and not self.adjoint_clip > 0.0:
            raise ValueError(f"adjoint_clip must be positive, got {self.adjoint_clip}; leave it out for no bound")
        if not self.tol >= 0.0:
            raise ValueError(f"tol must not be negative, got {self.tol}")

    @property
    def is_exact(self) -> bool:
        """Whether the solution is the derivative itself (up to `tol`)."""
        return self.hops is None and self.feedback_discount == 1.0 and self.adjoint_clip is None


@dataclass(frozen=True)
class Cotangents:
    """Total cotangents: `weights` of p (a_t), `embeds` of the fed embeddings (λ_t, truncated and clipped).

    `residual` is the relative change of λ in the last sweep: a stopping rule, not an error bound; 0 where the method
    is direct. `sweeps` counts backward passes over the whole horizon.
    """

    weights: Float[Tensor, "N T K"]
    embeds: Float[Tensor, "N T D"]
    residual: float
    sweeps: int

    def norm_by_position(self) -> Float[Tensor, "T"]:
        """Root mean square over sequences of ‖λ_t‖."""
        return self.embeds.float().norm(dim=-1).square().mean(0).sqrt()


def solve_cotangents(
    policy: Policy,
    rollout: Rollout,
    relaxation: Relaxation,
    objective: Objective,
    settings: AdjointSettings,
) -> Cotangents:
    """Total cotangents of a recorded rollout.

    Args:
        policy: the model that made the rollout, at the same parameters.
        rollout: phase 1's record.
        relaxation: the one that made it.
        objective: J [N] of the fed weights and the hidden states; everything that J depends on.
        settings: method and its numbers.
    Raises:
        ValueError: method "sequential" on an architecture whose state can be neither recorded nor replayed.
    """
    solver = {"sequential": _sequential, "parallel": _parallel, "autograd": _autograd}[settings.method]
    with evaluating(policy.model), frozen(policy.model):
        return solver(policy, rollout, relaxation, objective, settings)


def recorded_embeds(policy: Policy, rollout: Rollout) -> Float[Tensor, "N T D"]:
    """E(q) of a recorded rollout, without a graph."""
    ids, fed = rollout.support.ids.flatten(0, 1), rollout.fed.flatten(0, 1)
    with torch.no_grad():
        return policy.embed_soft(ids, fed).unflatten(0, rollout.mask.shape)


def _clipped(embeds: Float[Tensor, "*batch D"], bound: float | None) -> Float[Tensor, "*batch D"]:
    if bound is None:
        return embeds
    norms = embeds.norm(dim=-1, keepdim=True)
    return embeds * (bound / norms.clamp(min=bound))


def _linearised(
    objective: Objective, rollout: Rollout, hidden: Float[Tensor, "N T D"]
) -> tuple[Float[Tensor, "N T K"], Float[Tensor, "N T D"]]:
    """Direct derivatives of ΣJ: g with respect to q, and ∂ΣF/∂h with respect to the hidden states."""
    with torch.enable_grad():
        fed, leaf = rollout.fed.detach().requires_grad_(), hidden.detach().requires_grad_()
        total = objective(fed, leaf).sum()
    by_fed, by_hidden = torch.autograd.grad(total, [fed, leaf], allow_unused=True)
    return (
        torch.zeros_like(fed) if by_fed is None else by_fed,
        torch.zeros_like(leaf) if by_hidden is None else by_hidden,
    )


def _pulled_to_hidden(
    policy: Policy,
    relaxation: Relaxation,
    support: Support,
    hidden: Float[Tensor, "M D"],
    cotangents: Float[Tensor, "M K"],
) -> Float[Tensor, "M D"]:
    """`(∂p/∂h)ᵀ a` of M positions, in chunks."""
    pieces = []
    size = chunk_length(support.ids.shape[-1] * hidden.shape[-1])
    for start in range(0, hidden.shape[0], size):
        piece = slice(start, start + size)
        with torch.enable_grad():
            leaf = hidden[piece].detach().requires_grad_()
            weights = relaxation.weights(policy.kept_logits(leaf, support.ids[piece]), support.at(piece))
        (grad,) = torch.autograd.grad(weights, leaf, cotangents[piece].to(weights.dtype))
        pieces.append(grad)
    return torch.cat(pieces)


def _flat(support: Support) -> Support:
    return Support(
        support.ids.flatten(0, 1),
        support.noise.flatten(0, 1),
        support.kept.flatten(0, 1),
        support.choice.flatten(0, 1),
    )


def _parallel(
    policy: Policy, rollout: Rollout, relaxation: Relaxation, objective: Objective, settings: AdjointSettings
) -> Cotangents:
    """Jacobi sweeps `a ← g + γ (∂e/∂q)ᵀ λ(a)` on one forward pass."""
    with torch.enable_grad():
        embeds = recorded_embeds(policy, rollout).requires_grad_()
        hidden = policy.hidden(rollout.prompts, embeds)
    direct, by_hidden = _linearised(objective, rollout, hidden)
    support, fed, values = _flat(rollout.support), rollout.fed.flatten(0, 1), hidden.detach().flatten(0, 1)
    shape = rollout.mask.shape
    adjoint = torch.zeros_like(embeds)
    weights, residual, sweeps = direct, 0.0, 0
    limit = shape[1] - 1 if settings.hops is None else min(settings.hops, shape[1] - 1)
    while sweeps < limit:
        pulled = _pulled_to_hidden(policy, relaxation, support, values, weights.flatten(0, 1))
        cotangent = by_hidden + pulled.unflatten(0, shape)
        (new,) = torch.autograd.grad(hidden, embeds, cotangent, retain_graph=True)
        new = _clipped(new, settings.adjoint_clip)
        residual = _relative_change(new, adjoint)
        adjoint, sweeps = new, sweeps + 1
        feedback = policy.feedback(support.ids, fed, adjoint.flatten(0, 1)).unflatten(0, shape)
        weights = direct + settings.feedback_discount * feedback
        if residual <= settings.tol:
            break
    return Cotangents(weights, adjoint, residual, sweeps)


def _relative_change(new: Tensor, old: Tensor) -> float:
    """`‖new − old‖ / ‖new‖`; 0 when nothing changed, zero vectors included."""
    change = (new - old).norm().item()
    return change / new.norm().item() if change > 0.0 else 0.0


_RECORD_BLOCK = 16  # steps recorded at a time: keeps the recording pass's activations flat in T


def _sequential(
    policy: Policy, rollout: Rollout, relaxation: Relaxation, objective: Objective, settings: AdjointSettings
) -> Cotangents:
    """From the last step to the first, each recomputed from the recorded state of the steps before it."""
    embeds = recorded_embeds(policy, rollout)
    num_steps = rollout.mask.shape[1]
    with torch.no_grad():
        first, state = policy.begin(rollout.prompts, 1, capacity=num_steps)
        if not isinstance(state, ReplayableState):
            raise ValueError(
                f"method='sequential' needs a state that can be replayed (keys and values, or a recurrent step); "
                f"{type(policy.causal_lm).__name__} keeps neither. Use method='parallel'"
            )
        hidden = [first[:, None]]
        for block in embeds[:, :-1].split(_RECORD_BLOCK, dim=1):
            if block.shape[1]:
                hidden.append(policy.advance(state, block))
    recorded = torch.cat(hidden, 1)
    direct, by_hidden = _linearised(objective, rollout, recorded)
    state.start_replay()
    adjoint, weights = torch.zeros_like(embeds), direct.clone()
    for step in reversed(range(num_steps)):
        support = rollout.support.at(slice(None), step)
        feedback = policy.feedback(support.ids, rollout.fed[:, step], adjoint[:, step])
        weights[:, step] += settings.feedback_discount * feedback
        if step == 0:
            break
        pulled = _pulled_to_hidden(policy, relaxation, support, recorded[:, step], weights[:, step])
        with torch.enable_grad():
            embed = embeds[:, step - 1].detach().requires_grad_()
            replayed = policy.replay(state, step - 1, embed)
        grad = state.pull(replayed, embed, (by_hidden[:, step] + pulled).to(replayed.dtype))
        adjoint[:, step - 1] = _clipped(grad, settings.adjoint_clip)
    return Cotangents(weights, adjoint, 0.0, 1)


class _ClippedEdge(torch.autograd.Function):
    """Identity whose backward pass bounds the cotangent's norm."""

    @staticmethod
    def forward(ctx, embeds, bound):  # type: ignore[no-untyped-def]
        ctx.bound = bound
        return embeds.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _clipped(grad, ctx.bound), None


def _looped_hidden(policy: Policy, rollout: Rollout, state: DecodeState, embeds: list[Tensor]) -> Float[Tensor, "N D"]:
    """The newest hidden state inside the loop's graph; from the whole prefix where the state is not differentiable."""
    if isinstance(state, ReplayableState):
        return policy.advance(state, embeds[-1][:, None])[:, -1]
    not_fed = embeds[-1]  # `Policy.hidden` never feeds the last embedding it is given
    return policy.hidden(rollout.prompts, torch.stack([*embeds, not_fed], 1))[:, -1]


def _autograd(
    policy: Policy, rollout: Rollout, relaxation: Relaxation, objective: Objective, settings: AdjointSettings
) -> Cotangents:
    """Plain backpropagation through the loop, with the recorded support replayed; memory grows with T."""
    num_steps, gamma = rollout.mask.shape[1], settings.feedback_discount
    weights: list[Tensor] = []
    fed: list[Tensor] = []
    embeds: list[Tensor] = []
    clipped: list[Tensor] = []  # what is really fed: the same values, their cotangents bounded
    first, state = policy.begin(rollout.prompts, 1, capacity=num_steps, growing=True)
    hidden: list[Tensor] = [first]
    with torch.enable_grad():
        for step in range(num_steps):
            if step > 0:
                hidden.append(_looped_hidden(policy, rollout, state, clipped))
            support = rollout.support.at(slice(None), step)
            weights.append(relaxation.weights(policy.kept_logits(hidden[-1], support.ids).requires_grad_(), support))
            # dq := dp: the value is q's, the derivative p's
            fed.append(relaxation.fed(weights[-1], support).detach() + weights[-1] - weights[-1].detach())
            embed = policy.embed_soft(support.ids, fed[-1])
            embeds.append(embed.detach() + gamma * (embed - embed.detach()))
            clipped.append(_ClippedEdge.apply(embeds[-1], settings.adjoint_clip))
        total = objective(torch.stack(fed, 1), torch.stack(hidden, 1)).sum()
    grads = torch.autograd.grad(total, weights + embeds, allow_unused=True)
    filled = [
        torch.zeros_like(value) if grad is None else grad for value, grad in zip(weights + embeds, grads, strict=True)
    ]
    return Cotangents(torch.stack(filled[:num_steps], 1), torch.stack(filled[num_steps:], 1), 0.0, 1)
