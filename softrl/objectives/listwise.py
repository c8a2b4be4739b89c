"""Objectives on sets of completions or thoughts that are compared with each other, one loss a set.

A set has S items; `mask` says which exist, so that sets may be ragged. Scores are `s = β (log π − log π_ref)`, or
`log π` where there is no reference; only their differences within a set matter, but for `noise_contrastive`.
Left out: computing log-probabilities, and any weighting by how items were proposed.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Num
from torch import Tensor

Mask = Bool[Tensor, "N S"] | None


def target_weights(rewards: Float[Tensor, "N S"], beta: float, mask: Mask = None) -> Float[Tensor, "N S"]:
    """`w = softmax(r / β)` within each set; 0 for items that do not exist.

    Raises:
        ValueError: β is not positive, or a set has no item.
    """
    if not beta > 0.0:
        raise ValueError(f"beta is a temperature of rewards and must be positive, got {beta}")
    return _log_softmax(rewards / beta, _existing(rewards, mask)).exp()


def listwise_cross_entropy(
    scores: Float[Tensor, "N S"], weights: Float[Tensor, "N S"], mask: Mask = None
) -> Float[Tensor, "N"]:
    """`−Σ_i w_i log softmax(s)_i`: InfoNCA where scores have a reference.

    With `w = target_weights(r, β)` its minimum over all policies is `s = r/β + const` on any proposal that can propose
    everything; the weights stay what they are whatever the proposal was.

    Source: Chen et al. (2024), arXiv:2402.05369, equation 9 (InfoNCA); Cao et al. (2007), ListNet.
    """
    existing = _existing(scores, mask)
    return -(weights * _log_softmax(scores, existing).masked_fill(~existing, 0.0)).sum(-1)


def plackett_luce(scores: Float[Tensor, "N S"], ranks: Num[Tensor, "N S"], mask: Mask = None) -> Float[Tensor, "N"]:
    """`−Σ_k [s_(k) − log Σ_{j ranked no better than k} exp s_j]`: the negative log-likelihood of a ranking.

    Two items without a tie give DPO's loss. Items of equal rank share their denominator (Breslow's form): the loss
    does not say which of them comes first, and draws their scores together.

    Args:
        scores: s.
        ranks: smaller is better; equal ones are ties. Of items that do not exist they are not read.
        mask: see above.
    Source: Plackett (1975); Luce (1959); Rafailov et al. (2023), arXiv:2305.18290, appendix A.3; Breslow (1974) for
        ties.
    """
    existing = _existing(scores, mask)
    scores = scores.masked_fill(~existing, 0.0)
    behind = (ranks[:, None, :] >= ranks[:, :, None]) & existing[:, None, :]  # [N, k, j]: j is ranked no better than k
    behind = behind | ~existing[:, :, None]  # rows of items that do not exist are dropped below; nothing NaN meanwhile
    denominators = scores[:, None, :].masked_fill(~behind, -torch.inf).logsumexp(-1)
    return (denominators - scores).masked_fill(~existing, 0.0).sum(-1)


def one_winner(scores: Float[Tensor, "N S"], mask: Mask = None) -> Float[Tensor, "N"]:
    """S-DPO: `−log σ(−log Σ_{l > 0} exp(s_l − s_0))`, the first item against all others; with one other, DPO.

    Raises:
        ValueError: a set has fewer than two items, or lacks its first.
    Source: Chen et al. (2024), arXiv:2406.09215, equation 9.
    """
    existing = _existing(scores, mask)
    if not bool((existing[:, 0] & (existing.sum(-1) > 1)).all()):
        raise ValueError("every set needs its winner, as the first item, and a loser; drop the others")
    losers = scores[:, 1:].masked_fill(~existing[:, 1:], -torch.inf).logsumexp(-1)
    return -F.logsigmoid(scores[:, 0] - losers)


def noise_contrastive(
    scores: Float[Tensor, "N S"], weights: Float[Tensor, "N S"], mask: Mask = None
) -> Float[Tensor, "N"]:
    """NCA: `−Σ_i [w_i log σ(s_i) + log σ(−s_i) / S]`, which fixes the scores themselves and not differences alone.

    With items from π_ref its minimum nears `s = r/β − log Z` as sets grow; with few of them it is flatter, because an
    item is part of its own denominator.

    Source: Chen et al. (2024), arXiv:2402.05369, equation 12.
    """
    existing = _existing(scores, mask)
    scores = scores.masked_fill(~existing, 0.0)
    count = existing.sum(-1, keepdim=True)
    each = weights * F.logsigmoid(scores) + F.logsigmoid(-scores) / count
    return -each.masked_fill(~existing, 0.0).sum(-1)


def _existing(values: Float[Tensor, "N S"], mask: Mask) -> Bool[Tensor, "N S"]:
    existing = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    if not bool(existing.any(-1).all()):
        raise ValueError("a set has no item; drop it")
    return existing


def _log_softmax(values: Float[Tensor, "N S"], existing: Bool[Tensor, "N S"]) -> Float[Tensor, "N S"]:
    return values.masked_fill(~existing, -torch.inf).log_softmax(-1)
