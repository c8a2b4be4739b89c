"""The parallel solver: Jacobi sweeps on one forward pass over the whole rollout.

For any architecture with a parallel forward over input embeddings. Exact after T-1 sweeps.
"""

import torch

from softrl.estimators.system import Cotangents, ForwardPass, System, clipped, relative_change


def parallel(system: System, forward: ForwardPass) -> Cotangents:
    """Sweeps `a ← g + γ (∂e/∂q)ᵀ λ(a)` until λ changes by less than `tol`, or as many as `hops` allows."""
    settings, last = system.settings, system.hidden.shape[1] - 1
    limit = last if settings.hops is None else min(settings.hops, last)
    adjoint = torch.zeros_like(forward.embeds)
    weights, residual, sweeps = system.direct, 0.0, 0
    while sweeps < limit:
        cotangent = (system.by_hidden + system.pulled(weights)).to(forward.hidden.dtype)
        (new,) = torch.autograd.grad(forward.hidden, forward.embeds, cotangent, retain_graph=True)
        new = clipped(new, settings.adjoint_clip)
        residual = system.policy.largest(relative_change(new, adjoint))
        adjoint, sweeps = new, sweeps + 1
        weights = system.direct + system.feedback(adjoint)
        if residual <= system.tol:
            break
    return Cotangents(weights, adjoint, system.by_hidden, residual, float(sweeps))
