"""Returns, baselines and scales: what multiplies ∇ log π in the score-function family. Pure functions of numbers.

The samples of a prompt are neighbours: N = B * G. A baseline may depend on anything but the token it is subtracted
for and what follows from it; which of these leave the estimate unbiased is said with each.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

STD_EPSILON = 1e-4  # of GRPO's division, as in TRL


def returns_to_go(
    rewards: Float[Tensor, "N"], direct: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """`R + Σ_{j>t} F_j`: all of J that the choice of token t can change by sampling.

    F_t itself is a function of the context before token t; its gradient is direct.

    Args:
        rewards: R of each sequence.
        direct: F_t, the KL and entropy terms at each context.
        mask: True on real tokens; F counts nowhere else.
    Source: ours (softrl maths, section 4).
    """
    counted = direct.masked_fill(~mask, 0.0)
    after = counted.flip(-1).cumsum(-1).flip(-1) - counted
    return rewards[:, None] + after


def leave_one_out(values: Float[Tensor, "N T"], num_samples: int) -> Float[Tensor, "N T"]:
    """`b_i = Σ_{j≠i} v_j / (G − 1)`: the mean over the other samples of the prompt. Unbiased.

    Source: Kool, van Hoof and Welling (2019); Ahmadian et al. (2024), arXiv:2402.14740.
    """
    grouped = values.unflatten(0, (-1, num_samples))
    return ((grouped.sum(1, keepdim=True) - grouped) / (num_samples - 1)).flatten(0, 1)


def group_mean(values: Float[Tensor, "N T"], num_samples: int) -> Float[Tensor, "N T"]:
    """The mean over all samples of the prompt, the sample itself included: scales the gradient by (G − 1)/G."""
    grouped = values.unflatten(0, (-1, num_samples))
    return grouped.mean(1, keepdim=True).expand_as(grouped).flatten(0, 1)


def group_std(values: Float[Tensor, "N"], num_samples: int) -> Float[Tensor, "N"]:
    """Standard deviation of the samples of a prompt, with Bessel's correction; dividing by it biases the gradient."""
    return values.unflatten(0, (-1, num_samples)).std(1).repeat_interleave(num_samples, 0)


def token_rewards(
    rewards: Float[Tensor, "N"], direct: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """What is earned after token t: F_{t+1}, and R after the last one. Their sums from t on are `returns_to_go`."""
    counted = direct.masked_fill(~mask, 0.0)
    earned = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], -1)
    last = mask.sum(-1, keepdim=True).clamp(min=1) - 1
    return earned.scatter_add(-1, last, rewards[:, None].to(earned.dtype))


def generalized_advantages(
    earned: Float[Tensor, "N T"],
    values: Float[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    discount: float = 1.0,
    gae_lambda: float = 0.95,
) -> Float[Tensor, "N T"]:
    """`A_t = Σ_l (γλ)^l δ_{t+l}`, `δ_t = r_t + γ V_{t+1} − V_t`, V = 0 after the end.

    At λ = γ = 1 it is the return less V_t, and unbiased whatever V; below, V's error enters.

    Args:
        earned: r_t, see `token_rewards`.
        values: V_t, the value of the context before token t.
        mask: True on real tokens.
        discount: γ of rewards, in [0, 1].
        gae_lambda: λ in [0, 1].
    Source: Schulman et al. (2016), arXiv:1506.02438, equation 16.
    """
    values = values.masked_fill(~mask, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], -1)
    deltas = (earned + discount * following - values).masked_fill(~mask, 0.0)
    advantages, running = torch.zeros_like(deltas), torch.zeros_like(deltas[:, 0])
    for step in reversed(range(deltas.shape[1])):
        running = deltas[:, step] + discount * gae_lambda * running
        advantages[:, step] = running
    return advantages


def whitened(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Mean 0 and variance 1 over the real tokens of the batch; biased, since every sample enters its own scale."""
    real = values[mask]
    if real.numel() < 2:
        return values
    return ((values - real.mean()) / (real.std() + 1e-8)).masked_fill(~mask, 0.0)
