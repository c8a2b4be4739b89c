"""The token whose embedding is nearest to what was fed, over the whole vocabulary."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softrl.models.policy import Policy, chunk_length


@torch.no_grad()
def nearest_tokens(policy: Policy, embeds: Float[Tensor, "M D"]) -> tuple[Int[Tensor, "M"], Float[Tensor, "M"]]:
    """The nearest token embedding to each of M vectors, and the Euclidean distance to it.

    `‖e − w‖² = ‖e‖² − 2⟨e, w⟩ + ‖w‖²`, in chunks of the vocabulary and of the vectors; of equally near ones the first.
    The distance is computed anew for the nearest one, since that difference of squares rounds small ones away.

    Args:
        policy: its embedding module gives the token embeddings, scaled as the model scales them.
        embeds: what was fed, shape (M, D).
    Returns:
        Ids and distances, shape (M,); distances in float32 at least.
    """
    dtype = torch.promote_types(embeds.dtype, torch.float32)
    embeds = embeds.to(dtype)
    best = torch.full_like(embeds[:, 0], torch.inf)
    nearest = torch.zeros_like(best, dtype=torch.long)
    for ids in torch.arange(policy.vocab_size, device=embeds.device).split(chunk_length(embeds.shape[-1])):
        vectors = policy.embed(ids).to(dtype)
        squares = vectors.square().sum(-1)
        rows = chunk_length(len(ids))
        for first in range(0, len(embeds), rows):
            part = slice(first, first + rows)
            values, index = torch.addmm(squares, embeds[part], vectors.T, alpha=-2.0).min(-1)
            nearer = values < best[part]
            best[part] = torch.where(nearer, values, best[part])
            nearest[part] = torch.where(nearer, ids[index], nearest[part])
    return nearest, (embeds - policy.embed(nearest).to(dtype)).norm(dim=-1)


@torch.no_grad()
def mean_norm(policy: Policy, ids: Int[Tensor, "M K"], weights: Float[Tensor, "M K"]) -> Float[Tensor, "M"]:
    """`Σ_k q_k ‖W[id_k]‖`: the mean norm of the kept embeddings by their weights, in chunks."""
    pieces = [weights.new_zeros(0)]
    size = chunk_length(ids.shape[-1] * policy.causal_lm.config.get_text_config().hidden_size)
    for ids_piece, weights_piece in zip(ids.split(size), weights.split(size), strict=True):
        pieces.append((policy.embed(ids_piece).to(weights.dtype).norm(dim=-1) * weights_piece).sum(-1))
    return torch.cat(pieces)
