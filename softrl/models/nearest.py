"""The token whose embedding is nearest to a vector, over the whole vocabulary."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softrl.models.policy import Policy, chunk_length

Metric = Literal["euclidean", "cosine"]


def nearest_tokens(
    policy: Policy, embeds: Float[Tensor, "M D"], metric: Metric = "euclidean"
) -> tuple[Int[Tensor, "M"], Float[Tensor, "M"]]:
    """The nearest token embedding to each of M vectors, and the distance to it: `nearest_vectors` of a policy's.

    Args:
        policy: its embedding module gives the token embeddings, scaled as the model scales them.
        embeds: what was fed, shape (M, D).
        metric: "euclidean" or "cosine".
    Returns:
        Ids and distances, shape (M,); distances in float32 at least.
    """
    return nearest_vectors(policy.embed, policy.vocab_size, embeds, metric)


@torch.no_grad()
def nearest_vectors(
    vectors_of: Callable[[Tensor], Tensor],
    count: int,
    embeds: Float[Tensor, "M D"],
    metric: Metric = "euclidean",
    excluded: Int[Tensor, "M X"] | None = None,
) -> tuple[Int[Tensor, "M"], Float[Tensor, "M"]]:
    """The nearest of numbered vectors to each of M others, and the distance to it.

    `‖e − w‖² = ‖e‖² − 2⟨e, w⟩ + ‖w‖²`, in chunks of the numbers and of the vectors; of equally near ones the first.
    The distance is computed anew for the nearest one, since that difference of squares rounds small ones away. The
    cosine distance is `1 − cos(e, w)`, half the square of the Euclidean one between vectors made as long as 1.

    Args:
        vectors_of: numbers (n,) to vectors (n, D).
        count: there are the numbers 0 to count − 1.
        embeds: shape (M, D).
        metric: "euclidean" or "cosine".
        excluded: numbers that are not an answer, for each of the M.
    Returns:
        Numbers and distances, shape (M,); distances in float32 at least.
    Raises:
        ValueError: an unknown metric.
    """
    if metric not in get_args(Metric):
        raise ValueError(f"metric must be one of {get_args(Metric)}, got {metric!r}; choose one of them")
    dtype = torch.promote_types(embeds.dtype, torch.float32)

    def scaled(vectors: Tensor) -> Tensor:
        vectors = vectors.to(dtype)
        return torch.nn.functional.normalize(vectors, dim=-1) if metric == "cosine" else vectors

    embeds = scaled(embeds)
    best = torch.full_like(embeds[:, 0], torch.inf)
    nearest = torch.zeros_like(best, dtype=torch.long)
    for ids in torch.arange(count, device=embeds.device).split(chunk_length(embeds.shape[-1])):
        vectors = scaled(vectors_of(ids))
        squares = vectors.square().sum(-1)
        rows = chunk_length(len(ids))
        for first in range(0, len(embeds), rows):
            part = slice(first, first + rows)
            distances = torch.addmm(squares, embeds[part], vectors.T, alpha=-2.0)
            if excluded is not None:
                _exclude(distances, excluded[part] - ids[0])
            values, index = distances.min(-1)
            nearer = values < best[part]
            best[part] = torch.where(nearer, values, best[part])
            nearest[part] = torch.where(nearer, ids[index], nearest[part])
    distance = (embeds - scaled(vectors_of(nearest))).norm(dim=-1)
    return nearest, distance.square() / 2.0 if metric == "cosine" else distance


def _exclude(distances: Float[Tensor, "M n"], columns: Int[Tensor, "M X"]) -> None:
    row, column = ((columns >= 0) & (columns < distances.shape[1])).nonzero(as_tuple=True)
    distances[row, columns[row, column]] = torch.inf


@torch.no_grad()
def mean_norm(policy: Policy, ids: Int[Tensor, "M K"], weights: Float[Tensor, "M K"]) -> Float[Tensor, "M"]:
    """`Σ_k q_k ‖W[id_k]‖`: the mean norm of the kept embeddings by their weights, in chunks."""
    pieces = [weights.new_zeros(0)]
    size = chunk_length(ids.shape[-1] * policy.causal_lm.config.get_text_config().hidden_size)
    for ids_piece, weights_piece in zip(ids.split(size), weights.split(size), strict=True):
        pieces.append((policy.embed(ids_piece).to(weights.dtype).norm(dim=-1) * weights_piece).sum(-1))
    return torch.cat(pieces)
