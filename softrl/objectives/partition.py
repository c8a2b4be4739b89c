"""Partition objectives: a policy whose log-probabilities are rewards up to a constant, log Z, learned or eliminated.

The target is `π*(h) = π_ref(h) exp(r(h)/β) / Z`, or without π_ref for `log_ratio = log π`. All losses are zero there,
whatever proposal the items came from, so they learn from samples of others.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def partition_loss(
    log_ratio: Float[Tensor, "N S"],
    rewards: Float[Tensor, "N S"],
    beta: float,
    log_z: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, "N"]:
    """`mean_i (log π_i − log π_ref,i + log Z − r_i/β)²`, of every set.

    Args:
        log_ratio: log π − log π_ref, with the gradient, or log π.
        rewards: r, constant.
        beta: β > 0.
        log_z: of every set, to be learned with the policy; None eliminates it by `vargrad_log_z`, which makes the
            loss the variance of `r/β − log_ratio` within the set. Its gradient on the policy's own samples is −2/β
            times that of REINFORCE with the mean as baseline, of the reward `r − β log_ratio`.
    Raises:
        ValueError: β is not positive, or log Z is to be eliminated from sets of one item.
    Source: Richter et al. (2020), arXiv:2010.10436 (VarGrad); Malkin et al. (2022), arXiv:2201.13259 (trajectory
        balance).
    """
    _check_beta(beta)
    if log_z is None:
        if rewards.shape[-1] < 2:
            raise ValueError("log Z is the mean over a set's items, and a set has one; pass log_z, or more samples")
        log_z = vargrad_log_z(log_ratio, rewards, beta)
    return (log_ratio + log_z[:, None] - rewards / beta).square().mean(-1)


def vargrad_log_z(log_ratio: Float[Tensor, "N S"], rewards: Float[Tensor, "N S"], beta: float) -> Float[Tensor, "N"]:
    """`mean_i (r_i/β − log_ratio_i)`, where the squares above are least; held constant, it gives the same gradient."""
    _check_beta(beta)
    return (rewards / beta - log_ratio).mean(-1)


def importance_log_z(
    rewards: Float[Tensor, "N S"], beta: float, log_weights: Float[Tensor, "N S"] | None = None
) -> Float[Tensor, "N"]:
    """`log mean_i exp(r_i/β) π_ref,i/q_i`, consistent for log Z as S grows; biased downwards by Jensen's inequality.

    Args:
        rewards: of samples from q.
        beta: β > 0.
        log_weights: log π_ref − log q of every sample; None says that they are the reference's own. Without them,
            samples of another proposal give another number than Z.
    """
    _check_beta(beta)
    terms = rewards / beta if log_weights is None else rewards / beta + log_weights
    return terms.logsumexp(-1) - torch.tensor(terms.shape[-1], dtype=terms.dtype).log()


def _check_beta(beta: float) -> None:
    if not beta > 0.0:
        raise ValueError(f"beta is a temperature of rewards and must be positive, got {beta}")
