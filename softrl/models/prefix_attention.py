"""Softmax attention of many branches over a text that they share and over their own tokens, without copying the text.

Scores are not kept for the backward pass, which computes them again from the log-sum-exp, block by block: memory is
that of queries, keys and outputs, as in fused attention. Plain matrix products, so that it runs on any device.
Source: ours (softrl maths, section 6); merging by log-sum-exp as in Milakov and Gimelshein (2018), arXiv:1805.02867,
recomputation as in Dao et al. (2022), arXiv:2205.14135.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CPU_BLOCK_ELEMENTS = 2**20  # scores at a time: what fits the caches is fastest, measured from 2**18 to 2**23
BLOCK_ELEMENTS = 2**25  # elsewhere: fewer, larger products; not measured


def shared_prefix_attention(
    query: Float[Tensor, "N H M d"],
    prefix_keys: Float[Tensor, "N J T d"],
    prefix_values: Float[Tensor, "N J T e"],
    own_keys: Float[Tensor, "N J L R d"],
    own_values: Float[Tensor, "N J L R e"],
    visible: Bool[Tensor, "N L T"],
    reach: list[int],
    scaling: float,
) -> Float[Tensor, "N M H e"]:
    """Softmax attention of branches over their text's keys and their own, merged by log-sum-exp.

    `out = Σ_prefix exp(s − lse) v + Σ_own exp(s − lse) v`, `lse = logaddexp(lse_prefix, lse_own)`: no branch copies
    the prefix, and neither set of scores is joined with the other. Differentiable once.

    Args:
        query: of the newest S tokens of L branches, M = L * S; H heads on J ones of keys.
        prefix_keys, prefix_values: of the texts.
        own_keys, own_values: of the branches, R >= S tokens each, the newest last; attended causally.
        visible: what a branch sees of its text.
        reach: L numbers, see `reach_of`.
        scaling: of the scores.
    """
    groups, count, length = query.shape[1] // prefix_keys.shape[1], query.shape[2] // len(reach), own_keys.shape[3]
    order = torch.arange(length, device=query.device)
    causal = (order <= order[length - count :, None]).repeat(groups, 1)
    with torch.autocast(query.device.type, enabled=False):
        given = (each.to(query.dtype).contiguous() for each in (prefix_keys, prefix_values, own_keys, own_values))
        rows = _rows_of_branches(query * scaling, groups, count)
        out = _SharedPrefixAttention.apply(rows, *given, visible, causal, reach)
    return out.unflatten(3, (groups, count)).permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)


def reach_of(visible: Bool[Tensor, "N L T"]) -> list[int]:
    """For every branch how many slots, counted from the first, hold all that it sees in any text; at least 1."""
    slots = torch.arange(1, visible.shape[-1] + 1, device=visible.device)
    return (visible.any(0) * slots).amax(-1).clamp(min=1).tolist()


def _rows_of_branches(query: Float[Tensor, "N H M d"], groups: int, count: int) -> Float[Tensor, "N J L rows d"]:
    """Rows, G * S a branch, that read the same keys as neighbours: those of the branch, and those of the text."""
    apart = query.unflatten(1, (-1, groups)).unflatten(3, (-1, count))  # N J G L S d
    return apart.transpose(2, 3).flatten(3, 4)


class _SharedPrefixAttention(torch.autograd.Function):
    """Queries as `_rows_of_branches` orders them, scaled; keeps the output and the log-sum-exp of every row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, *others: Any) -> Tensor:
        prefix_keys, prefix_values, own_keys, own_values, visible, causal, reach = others
        out = query.new_empty(*query.shape[:-1], prefix_values.shape[-1])
        lse = query.new_empty(query.shape[:-1], dtype=_precise(query))
        for block in _blocks(query, reach):
            on_prefix, on_own = _scores(query, prefix_keys, own_keys, visible, causal, block)
            largest = torch.maximum(on_prefix.amax(-1), on_own.amax(-1))
            on_prefix.sub_(largest[..., None]).exp_()
            on_own.sub_(largest[..., None]).exp_()
            total = on_prefix.sum(-1) + on_own.sum(-1)
            branches, through = block
            found = _on_text(on_prefix.to(query.dtype), prefix_values[:, :, :through])
            found += on_own.to(query.dtype) @ own_values[:, :, branches]
            out[:, :, branches] = found / total[..., None]
            lse[:, :, branches] = total.log_().add_(largest)
        ctx.save_for_backward(query, *others[:-1], out, lse)
        ctx.reach = reach
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, prefix_keys, prefix_values, own_keys, own_values, visible, causal, out, lse = ctx.saved_tensors
        precise, dtype = _precise(query), query.dtype
        grads = [torch.zeros_like(each, dtype=precise) for each in (prefix_keys, prefix_values)]  # summed over blocks
        by_query, by_own_keys, by_own_values = (torch.empty_like(each) for each in (query, own_keys, own_values))
        centre = (grad * out).sum(-1, dtype=precise)
        for block in _blocks(query, ctx.reach):
            branches, through = block
            rows, cotangent = query[:, :, branches], grad[:, :, branches]
            of_prefix, of_own = _scores(query, prefix_keys, own_keys, visible, causal, block)
            for weights in (of_prefix, of_own):
                weights.sub_(lse[:, :, branches, :, None]).exp_()
            grads[1][:, :, :through] += _of_text(of_prefix.to(dtype), cotangent)
            by_own_values[:, :, branches] = of_own.to(dtype).mT @ cotangent
            by_prefix = _on_text(cotangent, prefix_values[:, :, :through].mT).to(precise)
            by_prefix = by_prefix.sub_(centre[:, :, branches, :, None]).mul_(of_prefix).to(dtype)
            by_own = (cotangent @ own_values[:, :, branches].mT).to(precise)
            by_own = by_own.sub_(centre[:, :, branches, :, None]).mul_(of_own).to(dtype)
            by_query[:, :, branches] = _on_text(by_prefix, prefix_keys[:, :, :through])
            by_query[:, :, branches] += by_own @ own_keys[:, :, branches]
            grads[0][:, :, :through] += _of_text(by_prefix, rows)
            by_own_keys[:, :, branches] = by_own.mT @ rows
        return by_query, grads[0].to(dtype), grads[1].to(dtype), by_own_keys, by_own_values, None, None, None


Block = tuple[slice, int]  # branches, and through which slot they see their texts


def _precise(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _blocks(query: Float[Tensor, "N J L rows d"], reach: list[int]) -> Iterator[Block]:
    """Branches at a time, so that their scores stay small; neighbours have similar reaches."""
    elements = CPU_BLOCK_ELEMENTS if query.device.type == "cpu" else BLOCK_ELEMENTS
    size = max(1, elements // (query[:, :, 0, :, 0].numel() * max(reach)))
    for start in range(0, len(reach), size):
        yield slice(start, start + size), max(reach[start : start + size])


def _scores(
    query: Float[Tensor, "N J L rows d"],
    prefix_keys: Float[Tensor, "N J T d"],
    own_keys: Float[Tensor, "N J L R d"],
    visible: Bool[Tensor, "N L T"],
    causal: Bool[Tensor, "rows R"],
    block: Block,
) -> tuple[Float[Tensor, "N J l rows t"], Float[Tensor, "N J l rows R"]]:
    """Scores of a block on its texts and on its own tokens, −inf on what it does not see, in float32 at least."""
    branches, through = block
    rows, own = query[:, :, branches], own_keys[:, :, branches]
    on_prefix = _on_text(rows, prefix_keys[:, :, :through].mT).to(_precise(query))
    on_prefix.masked_fill_(~visible[:, None, branches, None, :through], -torch.inf)
    return on_prefix, (rows @ own.mT).to(_precise(query)).masked_fill_(~causal, -torch.inf)


def _on_text(rows: Float[Tensor, "N J l rows a"], matrix: Float[Tensor, "N J a b"]) -> Float[Tensor, "N J l rows b"]:
    """Rows of all branches times a matrix of their text, as one product a head."""
    return (rows.flatten(2, 3) @ matrix).unflatten(2, rows.shape[2:4])


def _of_text(left: Float[Tensor, "N J l rows a"], right: Float[Tensor, "N J l rows b"]) -> Float[Tensor, "N J a b"]:
    """`leftᵀ right`, summed over the rows of all branches."""
    return left.flatten(2, 3).mT @ right.flatten(2, 3)
