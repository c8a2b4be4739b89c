"""What the solvers of the cotangents share: their settings and result, and the pieces of the linear system.

With `g_t = ∂J/∂q_t` at fixed embeddings, `λ_t` the derivative through the feedback of token t and
`a_t = g_t + γ (∂e_t/∂q_t)ᵀ λ_t`, the system is `λ_t = Σ_{j>t} [(∂p_j/∂e_t)ᵀ a_j + ∂F_j/∂e_t]`: linear and strictly
triangular. Only inputs are differentiated; parameters need no gradient here and the loop's graph is never kept.
Source: ours (softrl maths, section 2).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.models.policy import Policy, chunk_length
from softrl.tokens.relaxation import Relaxation
from softrl.types import Rollout

METHODS = ("auto", "blocked", "sequential", "parallel", "autograd")

_ROUNDING_FLOOR = 4.0  # measured: in bfloat16 the residual of SmolLM2 stays at 3 eps, however many sweeps there are

# J of every sequence from the fed weights q [N, T, K] and the policy's hidden states [N, T, D], both with a graph.
Objective = Callable[[Float[Tensor, "N T K"], Float[Tensor, "N T D"]], Float[Tensor, "N"]]


@dataclass(frozen=True)
class AdjointSettings:
    """How the cotangents are solved for.

    Args:
        method: "parallel", "blocked", "sequential" (blocks of one step), "autograd", or "auto", which chooses one of
            the first three, see `adjoint.chosen_method`.
        hops: with "parallel" (or "auto", which then means it): stop after this many sweeps, i.e. keep gradient paths
            through at most so many feedback edges; 0 is the detached estimator, None solves to `tol`.
        feedback_discount: γ in [0, 1], weighs a path by γ to the number of feedback edges on it; 1 is exact.
        adjoint_clip: upper bound of ‖λ_t‖ for every sequence and step; None for no bound.
        tol: with "parallel" and "blocked": stop when the relative residual of the sweeps falls below it, or below four
            times the machine epsilon of the model's dtype (0.03 in bfloat16), which is all that rounding allows.
            0 makes every sweep that there is: exact up to rounding.
        block_length: with "blocked": steps a block.
    Raises:
        ValueError: unknown method, or a number outside its range; hops together with another method.
    """

    method: str = "auto"
    hops: int | None = None
    feedback_discount: float = 1.0
    adjoint_clip: float | None = None
    tol: float = 1e-3
    block_length: int = 32

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")
        if self.hops is not None and (self.hops < 0 or self.method not in ("auto", "parallel")):
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
        if self.block_length < 1:
            raise ValueError(f"block_length must be at least 1, got {self.block_length}")

    @property
    def is_exact(self) -> bool:
        """Whether the solution is the derivative itself (up to `tol`)."""
        return self.hops is None and self.feedback_discount == 1.0 and self.adjoint_clip is None


@dataclass(frozen=True)
class Cotangents:
    """Total cotangents: `weights` of p (a_t), `embeds` of the fed embeddings (λ_t, truncated and clipped).

    `residual` is the relative change of λ in the last sweep: a stopping rule, not an error bound; 0 where the method
    is direct. `sweeps` is the work done, in backward passes over the whole horizon. `by_hidden` is ∂ΣF/∂h at fixed
    embeddings, from which phase 3 gets the direct terms' gradient without reading the vocabulary again.
    """

    weights: Float[Tensor, "N T K"]
    embeds: Float[Tensor, "N T D"]
    by_hidden: Float[Tensor, "N T D"]
    residual: float
    sweeps: float

    def norm_by_position(self) -> Float[Tensor, "T"]:
        """Root mean square over sequences of ‖λ_t‖."""
        return self.embeds.float().norm(dim=-1).square().mean(0).sqrt()


def recorded_embeds(policy: Policy, rollout: Rollout) -> Float[Tensor, "N T D"]:
    """E(q) of a recorded rollout, without a graph."""
    ids, fed = rollout.support.ids.flatten(0, 1), rollout.fed.flatten(0, 1)
    with torch.no_grad():
        return policy.embed_soft(ids, fed).unflatten(0, rollout.mask.shape)


@dataclass(frozen=True)
class ForwardPass:
    """One parallel forward pass over a rollout, from a leaf of fed embeddings, with its graph."""

    embeds: Float[Tensor, "N T D"]
    hidden: Float[Tensor, "N T D"]

    @classmethod
    def of(cls, policy: Policy, rollout: Rollout) -> "ForwardPass":
        """Run it."""
        with torch.enable_grad():
            embeds = recorded_embeds(policy, rollout).requires_grad_()
            return cls(embeds, policy.hidden(rollout.prompts, embeds))


@dataclass(frozen=True)
class System:
    """The linear system of one rollout: `hidden` are values, `direct` is g, `by_hidden` is ∂ΣF/∂h."""

    policy: Policy
    rollout: Rollout
    relaxation: Relaxation
    settings: AdjointSettings
    hidden: Float[Tensor, "N T D"]
    direct: Float[Tensor, "N T K"]
    by_hidden: Float[Tensor, "N T D"]

    @classmethod
    def linearised(
        cls,
        policy: Policy,
        rollout: Rollout,
        relaxation: Relaxation,
        settings: AdjointSettings,
        objective: Objective,
        hidden: Float[Tensor, "N T D"],
    ) -> "System":
        """Take the objective's direct derivatives at the rollout's weights and these hidden states."""
        with torch.enable_grad():
            fed, leaf = rollout.fed.detach().requires_grad_(), hidden.detach().requires_grad_()
            total = objective(fed, leaf).sum()
        grads = torch.autograd.grad(total, [fed, leaf], allow_unused=True)
        direct, by_hidden = (
            torch.zeros_like(value) if grad is None else grad for value, grad in zip((fed, leaf), grads, strict=True)
        )
        return cls(policy, rollout, relaxation, settings, hidden.detach(), direct, by_hidden)

    @property
    def tol(self) -> float:
        """The residual to stop at: the settings' one, or what the model's precision can reach; 0 stays 0."""
        if self.settings.tol == 0.0:
            return 0.0
        dtypes, device = [self.policy.dtype], self.hidden.device.type
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
        return max(self.settings.tol, _ROUNDING_FLOOR * max(torch.finfo(dtype).eps for dtype in dtypes))

    def pulled(self, cotangents: Float[Tensor, "N L K"], start: int = 0) -> Float[Tensor, "N L D"]:
        """`(∂p/∂h)ᵀ a` of the steps from `start` on, in chunks of positions."""
        steps = slice(start, start + cotangents.shape[1])
        support = self.rollout.support.at(slice(None), steps).flat()
        hidden, flat = self.hidden[:, steps].flatten(0, 1), cotangents.flatten(0, 1)
        pieces = []
        size = chunk_length(support.ids.shape[-1] * hidden.shape[-1])
        for begin in range(0, hidden.shape[0], size):
            piece = slice(begin, begin + size)
            with torch.enable_grad():
                leaf = hidden[piece].requires_grad_()
                weights = self.relaxation.weights(self.policy.kept_logits(leaf, support.ids[piece]), support.at(piece))
            (grad,) = torch.autograd.grad(weights, leaf, flat[piece].to(weights.dtype))
            pieces.append(grad)
        return torch.cat(pieces).unflatten(0, cotangents.shape[:2])

    def feedback(self, adjoint: Float[Tensor, "N L D"], start: int = 0) -> Float[Tensor, "N L K"]:
        """`γ (∂e/∂q)ᵀ λ` of the steps from `start` on."""
        steps = slice(start, start + adjoint.shape[1])
        ids, fed = self.rollout.support.ids[:, steps].flatten(0, 1), self.rollout.fed[:, steps].flatten(0, 1)
        pulled = self.policy.feedback(ids, fed, adjoint.flatten(0, 1)).unflatten(0, adjoint.shape[:2])
        return self.settings.feedback_discount * pulled


def relative_change(new: Tensor, old: Tensor) -> float:
    """`‖new − old‖ / ‖new‖`; 0 when nothing changed, zero vectors included."""
    change = (new - old).norm().item()
    return change / new.norm().item() if change > 0.0 else 0.0


def clipped(embeds: Float[Tensor, "*batch D"], bound: float | None) -> Float[Tensor, "*batch D"]:
    """Vectors whose norm is at most the bound."""
    if bound is None:
        return embeds
    norms = embeds.norm(dim=-1, keepdim=True)
    return embeds * (bound / norms.clamp(min=bound))
