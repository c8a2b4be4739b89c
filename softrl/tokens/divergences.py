"""Divergences and entropies of next-token distributions, over the whole vocabulary. One position a row."""

from jaxtyping import Float
from torch import Tensor


def entropy(log_probs: Float[Tensor, "M V"]) -> Float[Tensor, "M"]:
    """`H(π) = −Σ_v π_v log π_v`, nats."""
    return -(log_probs.exp() * log_probs).sum(-1)


def kl_divergence(log_probs: Float[Tensor, "M V"], reference_log_probs: Float[Tensor, "M V"]) -> Float[Tensor, "M"]:
    """`KL(π‖π_ref) = Σ_v π_v (log π_v − log π_ref,v)`, nats: reverse KL, the penalty of RLHF.

    The exact sum, not a sampled estimate (k1, k2, k3), so its gradient needs no correction.
    """
    return (log_probs.exp() * (log_probs - reference_log_probs)).sum(-1)
