"""PPO's clipped objectives, one value a token. The reduction is the caller's."""

import torch
from jaxtyping import Float
from torch import Tensor


def clipped_objective(
    log_ratio: Float[Tensor, "N T"], advantages: Float[Tensor, "N T"], clip_low: float, clip_high: float
) -> Float[Tensor, "N T"]:
    """`min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A)`, to be maximised.

    At ρ = 1 its gradient is `A ∇ log π`; once a token has moved past the clip in the direction that A wants, it is 0.

    Args:
        log_ratio: log ρ = log π − log π_old, nats.
        advantages: A, constant.
        clip_low, clip_high: ε below and above one, positive.
    Source: Schulman et al. (2017), arXiv:1707.06347, equation 7; two bounds as in DAPO, arXiv:2503.14476.
    """
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)


def clipped_fraction(
    log_ratio: Float[Tensor, "N T"], advantages: Float[Tensor, "N T"], clip_low: float, clip_high: float
) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
    """1 where a token's gradient is cut off below, and above."""
    ratio = log_ratio.exp()
    low = (ratio < 1.0 - clip_low) & (advantages < 0.0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0.0)
    return low.to(ratio.dtype), high.to(ratio.dtype)


def clipped_value_loss(
    values: Float[Tensor, "N T"],
    old_values: Float[Tensor, "N T"],
    returns: Float[Tensor, "N T"],
    clip_range: float | None,
) -> Float[Tensor, "N T"]:
    """`½ max((V − G)², (V_clip − G)²)`, V_clip within `clip_range` of the old value; no clip if None.

    Source: the PPO of OpenAI's baselines, as in Huang et al. (2022), "The 37 implementation details of PPO".
    """
    loss = (values - returns).square()
    if clip_range is not None:
        near = old_values + (values - old_values).clamp(-clip_range, clip_range)
        loss = torch.maximum(loss, (near - returns).square())
    return 0.5 * loss
