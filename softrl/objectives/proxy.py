"""What a next-token distribution is worth under a proxy of the data, a frozen language model D; exact sums over y."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from softrl.tokens.divergences import entropy

ProxyDivergence = Literal["reverse", "forward"]


def proxy_value(
    log_probs: Float[Tensor, "M V"], proxy_log_probs: Float[Tensor, "M V"], beta: float
) -> Float[Tensor, "M"]:
    """`E_{y~π}[log D(y | x)] + β H[π(y | h)]`, nats; differentiable in log π.

    Its optimum is `π ∝ D^{1/β}`. β = 1 makes it −KL(π‖D), whose optimum is D itself; β = 0 leaves the expectation,
    whose optimum is the mode of D.

    Args:
        log_probs: log π(y | h) over the whole vocabulary.
        proxy_log_probs: log D(y | x), finite, constant.
        beta: β >= 0.
    Raises:
        ValueError: β is negative.
    Source: softrl's notes on latent reasoning.
    """
    if beta < 0.0:
        raise ValueError(f"beta is the weight of an entropy and must not be negative, got {beta}; 1 is reverse KL")
    # Detached: D is given, and what would make it agree with the policy is no part of the objective.
    return (log_probs.exp() * proxy_log_probs.detach()).sum(-1) + beta * entropy(log_probs)


def forward_proxy_value(
    log_probs: Float[Tensor, "M V"], proxy_log_probs: Float[Tensor, "M V"], beta: float = 0.0
) -> Float[Tensor, "M"]:
    """`E_{y~D}[log π(y | h) − log D(y | x)] + β H[π(y | h)]`, nats; differentiable in log π.

    With β = 0 it is −KL(D‖π), whose optimum is D and whose gradient is that of maximum likelihood on samples of D.

    Args:
        log_probs, proxy_log_probs, beta: as above.
    Raises:
        ValueError: β is negative.
    Source: softrl's notes on latent reasoning (the surrogate's reward r̃).
    """
    if beta < 0.0:
        raise ValueError(f"beta is the weight of an entropy and must not be negative, got {beta}")
    proxy = proxy_log_probs.detach()
    value = (proxy.exp() * (log_probs - proxy)).sum(-1)
    return value if beta == 0.0 else value + beta * entropy(log_probs)
