"""Directions of basis-aware truncation: which combinations of W's columns a program knows, and what they leave out.

W's rows are centred over the vocabulary first: the program's row of ones makes up for it, the leading directions are
then not spent on a constant, and logits can be read up to a constant. Any choice of directions is sound.

The state h before a final norm cannot move freely behind it, so W's own constraints do not hold there. With
`J = W diag(w) (I − 11ᵀ/D − ĥĥᵀ/D)/s` they do: combinations of the columns of `W diag(w)` that are orthogonal to ĥ
(and, for LayerNorm, to 1). ĥ's coordinates in the directions follow from the logits, as these are linear in it;
nothing but logits is needed. (With ε > 0 in the norm ĥ moves by a share ε/s²; that gradient is too small to rely on.)
Source: Finlayson et al. (2024), arXiv:2310.01693, and softrl maths, section 10; the rest ours.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.contexts.final_norm import FinalNorm


@dataclass(frozen=True)
class Directions:
    """k directions of a model, the same in every context.

    Args:
        columns: `(W' − mean of its rows) map`, W' = W, or `W diag(w)` before a norm, float64.
        map: orthonormal combinations of W's columns.
        mean: mean row of W'.
        strengths: squared singular values.
        bias_logits: what the norm's own bias adds to the logits, centred; None where it has none.
        before_norm: combinations have to be orthogonal to the normalised state.
    """

    columns: Float[Tensor, "V k"]
    map: Float[Tensor, "D k"]
    mean: Float[Tensor, "D"]
    strengths: Float[Tensor, "k"]
    bias_logits: Float[Tensor, "V"] | None = None
    before_norm: bool = False

    def excluded(self, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N k 1"] | None:
        """ĥ in the directions, from logits at temperature 1 up to a constant; None without a norm."""
        if not self.before_norm:
            return None
        logits = logits.to(self.columns.dtype)
        own = logits if self.bias_logits is None else logits - self.bias_logits
        return ((own @ self.columns) / self.strengths)[..., None]

    def lifted(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch D1"]:
        """A certificate over the directions as one over the columns of W' and the row of ones."""
        inner = y[..., :-1] @ self.map.mT
        return torch.cat([inner, y[..., -1:] - (inner @ self.mean)[..., None]], -1)

    def to(self, device: torch.device) -> "Directions":
        """The same on another device."""
        bias = None if self.bias_logits is None else self.bias_logits.to(device)
        return Directions(
            self.columns.to(device), self.map.to(device), self.mean.to(device), self.strengths.to(device), bias,
            self.before_norm,
        )  # fmt: skip


def svd_directions(
    weight: Float[Tensor, "V D"], num_directions: int = 20, norm: FinalNorm | None = None
) -> Directions:
    """The leading right singular vectors of the output embedding.

    Args:
        weight: W.
        num_directions: k; 20 is the published setting.
        norm: the final norm, for the constraints of the state before it; None for those of the state that W is
            multiplied with.
    Raises:
        ValueError: k outside [1, D], or more than the state has freedom for.
    """
    width = weight.shape[1]
    freedom = width - (0 if norm is None or not norm.centres else 1)
    if not 1 <= num_directions <= freedom:
        raise ValueError(
            f"num_directions must lie between 1 and the width of the output embedding, {freedom} here, "
            f"got {num_directions}"
        )
    scaled = weight.detach().double()
    bias = None
    if norm is not None:
        bias = None if norm.bias is None else scaled @ norm.bias.to(scaled)
        scaled = scaled * norm.weight.to(scaled)
        if norm.centres:
            scaled = scaled - scaled.mean(-1, keepdim=True)  # W diag(w) (I − 11ᵀ/D)
    mean = scaled.mean(0)
    centred = scaled - mean
    strengths, vectors = torch.linalg.eigh(centred.mT @ centred)
    leading = vectors.flip(-1)[:, :num_directions].contiguous()
    return Directions(
        (centred @ leading).contiguous(), leading, mean, strengths.flip(-1)[:num_directions],
        None if bias is None else bias - bias.mean(), norm is not None,
    )  # fmt: skip


def weighted_directions(
    weight: Float[Tensor, "V D"], probs: Float[Tensor, "N V"], num_directions: int = 20
) -> tuple[Float[Tensor, "N V k"], Float[Tensor, "N D k"]]:
    """The leading directions of W's rows' covariance under p̂, each context its own.

    Costs O(V D²) a context, against nothing for `svd_directions`.

    Returns:
        The columns `(W − its mean under p̂) map`, and the map.
    Raises:
        ValueError: k outside [1, D].
    """
    width = weight.shape[1]
    if not 1 <= num_directions <= width:
        raise ValueError(
            f"num_directions must lie between 1 and the width of the output embedding, {width} here, "
            f"got {num_directions}"
        )
    rows, columns, maps = weight.detach().double(), [], []
    for own in probs.double():
        centred = rows - own @ rows / own.sum()
        _, vectors = torch.linalg.eigh(centred.mT @ (centred * own[:, None]))
        leading = vectors.flip(-1)[:, :num_directions].contiguous()
        columns.append(centred @ leading)
        maps.append(leading)
    return torch.stack(columns), torch.stack(maps)
