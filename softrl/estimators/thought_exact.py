"""What thoughts are worth in expectation, from log π and the reward of every thought that there is.

The truths that rules of learning from thoughts are held to, differentiable in both. Axes: M anchors, H thoughts.
"""

import itertools
import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Two objectives that rules declare, and log p(y | x), which "log_mean" nears as S grows.
ThoughtTruth = Literal["mean", "log_mean", "marginal"]
MAX_SETS = 50_000  # 8 thoughts of 9, or 3 of 36: about a second


def all_multisets(num_items: int, size: int) -> tuple[Int[Tensor, "Q S"], Float[Tensor, "Q"]]:
    """Every multiset of items once, and the log of how many sequences it stands for.

    Raises:
        ValueError: too many of them.
    """
    count = math.comb(num_items + size - 1, size)
    if count > MAX_SETS:
        raise ValueError(
            f"{size} thoughts of {num_items} form {count:,} sets, too many to enumerate for objective 'log_mean' (the "
            f"limit is {MAX_SETS:,}); lower num_samples, vocab_size or n_thought, or take 'mean' or 'marginal'"
        )
    sets = list(itertools.combinations_with_replacement(range(num_items), size))
    repeats = [sum(math.lgamma(1 + len(list(run))) for _, run in itertools.groupby(each)) for each in sets]
    return torch.tensor(sets), math.lgamma(1 + size) - torch.tensor(repeats, dtype=torch.float64)


def expected_value(
    log_probs: Float[Tensor, "M H"], rewards: Float[Tensor, "M H"], objective: ThoughtTruth, num_thoughts: int
) -> Float[Tensor, "M"]:
    """The objective of every anchor: `E r`, `E log (1/S) Σ_s exp r_s`, or `log E exp r`.

    Args:
        log_probs, rewards: of all thoughts; detach one of them for the gradient through the other.
        objective: which.
        num_thoughts: S, read by "log_mean" alone.
    Raises:
        ValueError: too many sets of S thoughts.
    """
    if objective == "mean":
        return (log_probs.exp() * rewards).sum(-1)
    if objective == "marginal":
        return (log_probs + rewards).logsumexp(-1)
    sets, log_counts = all_multisets(log_probs.shape[-1], num_thoughts)
    chances = (log_probs[:, sets].sum(-1) + log_counts.to(log_probs)).exp()
    return (chances * (rewards[:, sets].logsumexp(-1) - math.log(num_thoughts))).sum(-1)
