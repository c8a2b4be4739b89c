"""What was generated with soft tokens: every step's kept tokens and weights, and the numbers beside them."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.types import HardRollout


@dataclass(frozen=True)
class SoftText(HardRollout):
    """N texts of T generated tokens, some of them fed back as mixtures.

    `tokens` are what is shown of a step: the token that was fed where it was hard, the heaviest one where it was soft.
    Kept ids stand in falling order of the weight that was fed; K is the same for all steps, and those that were not
    kept have weight zero. Entropies are in nats.
    """

    is_soft: Bool[Tensor, "N T"]
    ids: Int[Tensor, "N T K"]
    weights: Float[Tensor, "N T K"]  # q, what was fed
    probs: Float[Tensor, "N T K"]  # the policy's probabilities of these ids, at its temperature, before truncation
    likeliest: Int[Tensor, "N T"]  # what a hard, greedy decoder would have said next
    entropy: Float[Tensor, "N T"]  # of the policy's whole distribution
    fed_entropy: Float[Tensor, "N T"]  # of what was fed
    nearest: Int[Tensor, "N T"]  # the token whose embedding is nearest to what was fed
    distance: Float[Tensor, "N T"]  # to that embedding, Euclidean, over the kept embeddings' mean norm by weight
