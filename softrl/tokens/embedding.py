"""From a soft token to the embedding that is fed back: a weighted mean of token embeddings."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

NormCorrection = Literal["none", "inverse_l2", "match"]


def check_norm_correction(norm_correction: str) -> None:
    """Raise ValueError for a name that is not a norm correction."""
    if norm_correction not in get_args(NormCorrection):
        raise ValueError(f"norm_correction must be one of {get_args(NormCorrection)}, got {norm_correction!r}")


def mixture_embedding(
    weights: Float[Tensor, "*batch K"],
    vectors: Float[Tensor, "*batch K D"],
    norm_correction: NormCorrection = "none",
) -> Float[Tensor, "*batch D"]:
    """`e = Σ_k q_k W[id_k]`, optionally with its norm put right: a mean of vectors is shorter than they are.

    Args:
        weights: q, shape (*batch, K).
        vectors: embeddings of the kept ids as the model's own embedding module returns them, shape (*batch, K, D).
        norm_correction: "none"; "inverse_l2" divides by ‖q‖₂ (the norm that a mean of orthogonal vectors of equal
            length loses); "match" rescales to `Σ_k q_k ‖W[id_k]‖`. A one-hot q gives W[id] under all three.
    Returns:
        Embeddings in the vectors' dtype, shape (*batch, D).
    Source: ours.
    """
    weights = weights.to(vectors.dtype)
    with torch.autocast(vectors.device.type, enabled=False):  # a one-hot q has to give W[id], in its own precision
        mixed = torch.einsum("...k,...kd->...d", weights, vectors)
    if norm_correction == "none":
        return mixed
    if norm_correction == "inverse_l2":
        return mixed / weights.norm(dim=-1, keepdim=True)
    target = (weights * vectors.norm(dim=-1)).sum(-1, keepdim=True)
    return mixed * target / mixed.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
