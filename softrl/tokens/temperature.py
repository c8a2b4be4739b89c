"""Relaxation temperature: fixed, or the largest one that keeps a soft token's entropy under a bound. Either may be a
tensor that is learned.

The temperature acts on the kept support, after truncation, so the bound is a bound on the weights themselves.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_MAX_DOUBLINGS = 120  # brackets any gap between float64 logits
_MAX_NEWTON_STEPS = 60

Setting = float | Tensor  # a number, or a scalar tensor that gets its gradient: a learned one


def softmax_entropy(logits: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch"]:
    """Entropy of softmax(logits) in nats; entries at −inf count as absent."""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)


def _moments(
    logits: Float[Tensor, "*batch K"], inverse: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Entropy of softmax(logits * inverse), and the variance of the logits under it."""
    scaled = logits * inverse[..., None]
    log_probs = scaled.log_softmax(-1)
    probs = log_probs.exp()
    finite = logits.masked_fill(probs == 0.0, 0.0)
    entropy = -(probs * log_probs.masked_fill(probs == 0.0, 0.0)).sum(-1)
    centred = finite - (probs * finite).sum(-1, keepdim=True)
    return entropy, (probs * centred.square()).sum(-1)


def _solve_inverse_temperature(logits: Float[Tensor, "*batch K"], max_entropy_nats: float) -> Float[Tensor, "*batch"]:
    """Smallest β >= 1 with H(softmax(β z)) <= H_max; rows whose bound cannot be met keep growing β and stop there.

    Safeguarded Newton: `dH/dβ = −β Var_p(z)`, and a bisection step whenever Newton leaves the bracket.
    """
    low = torch.ones_like(logits[..., 0])
    active = _moments(logits, low)[0] > max_entropy_nats
    high = low.clone()
    for _ in range(_MAX_DOUBLINGS):
        too_high = active & (_moments(logits, high)[0] > max_entropy_nats)
        if not too_high.any():
            break
        low = torch.where(too_high, high, low)
        high = torch.where(too_high, high * 2, high)
    inverse = high.clone()
    for _ in range(_MAX_NEWTON_STEPS):
        entropy, variance = _moments(logits, inverse)
        excess = entropy - max_entropy_nats
        low = torch.where(active & (excess > 0), inverse, low)
        high = torch.where(active & (excess <= 0), inverse, high)
        newton = inverse + excess / (inverse * variance).clamp(min=torch.finfo(logits.dtype).tiny)
        inside = (newton > low) & (newton < high)
        proposal = torch.where(inside, newton, (low + high) / 2)
        moved = torch.where(active, (proposal - inverse).abs() / inverse, 0.0)
        inverse = torch.where(active, proposal, inverse)
        if moved.max() <= 4 * torch.finfo(logits.dtype).eps:
            break
    return inverse


class _EntropyBoundTemperature(torch.autograd.Function):
    """Largest temperature under the bound, differentiated by the implicit function theorem."""

    @staticmethod
    def forward(ctx, logits: Tensor, max_entropy_nats: Setting) -> Tensor:  # type: ignore[no-untyped-def]
        logits = logits - logits.amax(-1, keepdim=True)
        inverse = _solve_inverse_temperature(logits, number_of(max_entropy_nats))
        ctx.save_for_backward(logits, inverse)
        ctx.bound_like = None
        if isinstance(max_entropy_nats, Tensor):
            ctx.bound_like = (max_entropy_nats.device, max_entropy_nats.dtype)
        return 1.0 / inverse

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[no-untyped-def]
        logits, inverse = ctx.saved_tensors
        entropy, variance = _moments(logits, inverse)
        log_probs = (logits * inverse[..., None]).log_softmax(-1)
        probs = log_probs.exp()
        surprise = log_probs.masked_fill(probs == 0.0, 0.0) + entropy[..., None]
        active = (inverse > 1.0) & (variance > 0.0)
        scale = torch.where(active, grad / (inverse.square() * torch.where(active, variance, 1.0)), 0.0)
        by_bound = None if ctx.bound_like is None else (scale / inverse).sum().to(*ctx.bound_like)
        return scale[..., None] * probs * surprise, by_bound


def number_of(value: Setting) -> float:
    """The setting as a plain number; one that is a number already stays the same object."""
    return value.detach().item() if isinstance(value, Tensor) else value


def check_setting(name: str, value: Setting) -> None:
    """Raise ValueError for a learned setting that is not one number."""
    if isinstance(value, Tensor) and (value.ndim != 0 or not value.is_floating_point()):
        raise ValueError(
            f"{name}, where it is a tensor, must be one real number, shape (), got shape {tuple(value.shape)} of "
            f"{value.dtype}; pass a scalar such as `parameter.squeeze()`"
        )


def check_entropy_bound(max_entropy_nats: Setting, top_k: int) -> None:
    """Raise ValueError unless 0 < H_max < log K."""
    check_setting("max_entropy_nats", max_entropy_nats)
    bound = number_of(max_entropy_nats)
    if not 0.0 < bound < math.log(top_k):
        raise ValueError(
            f"max_entropy_nats must lie in (0, log K) = (0, {math.log(top_k):.4f}) for K={top_k} kept tokens, got "
            f"{bound}; leave it out for a fixed temperature"
        )


def entropy_bound_temperature(logits: Float[Tensor, "*batch K"], max_entropy_nats: Setting) -> Float[Tensor, "*batch"]:
    """Largest temperature <= 1 whose softmax entropy is at most `max_entropy_nats`.

    Solves `T = max{t in (0, 1] : H(softmax(z / t)) <= H_max}`.
    Gradient: implicit function theorem where the bound is active, `dT/dz_i = T² p_i (log p_i + H) / Var_p(z)` and, of
    a bound that is a tensor, `dT/dH_max = T³ / Var_p(z)`; zero elsewhere.

    Args:
        logits: unnormalised log-probabilities, nats, kept ones (−inf marks a token that is not kept), shape
            (*batch, K). Rows whose largest entry is tied n-fold need H_max > log n; `bounded_softmax` handles them.
        max_entropy_nats: 0 < H_max < log K; a scalar tensor gets its gradient.
    Returns:
        Temperature, dimensionless, shape (*batch,).
    Raises:
        ValueError: max_entropy_nats outside (0, log K); the message gives both.
    Source: ours.
    """
    check_entropy_bound(max_entropy_nats, logits.shape[-1])
    return _EntropyBoundTemperature.apply(logits, max_entropy_nats)


def bounded_softmax(
    logits: Float[Tensor, "*batch K"], max_entropy_nats: Setting, detach_temperature: bool = False
) -> Float[Tensor, "*batch K"]:
    """softmax(z / T) at the largest T <= 1 with entropy at most `max_entropy_nats`.

    Where the n largest logits are equal and log n >= H_max no temperature meets the bound: the result is then the
    uniform distribution over the tie, with zero gradient, the bound's own included.

    Args:
        logits: kept logits, nats, −inf where not kept, shape (*batch, K).
        max_entropy_nats: 0 < H_max < log K; a scalar tensor gets its gradient, through T alone.
        detach_temperature: treat T as a constant in the backward pass.
    Returns:
        Weights, shape (*batch, K).
    Raises:
        ValueError: max_entropy_nats outside (0, log K).
    Source: ours.
    """
    is_largest: Bool[Tensor, "*batch K"] = logits == logits.amax(-1, keepdim=True)
    num_largest = is_largest.sum(-1, keepdim=True)
    hopeless = num_largest.to(logits.dtype).log() >= number_of(max_entropy_nats)
    # A hopeless row would send T to zero; it gets harmless logits instead and its weights are replaced.
    ladder = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device).neg()
    # Differences from the largest logit are exact; multiplied by a large 1/T the logits themselves would round.
    safe = torch.where(hopeless, ladder, logits - logits.amax(-1, keepdim=True).detach())
    temperature = entropy_bound_temperature(safe, max_entropy_nats)
    if detach_temperature:
        temperature = temperature.detach()  # on request: the weights' own derivative only
    kept = torch.isfinite(safe)
    # −inf / T would give the temperature a NaN gradient (inf * 0), so it is put back after the division.
    scaled = safe.masked_fill(~kept, 0.0) / temperature[..., None]
    weights = scaled.masked_fill(~kept, -torch.inf).softmax(-1)
    return torch.where(hopeless, is_largest.to(logits.dtype) / num_largest, weights)
