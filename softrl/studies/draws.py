"""What a problem of the variance laboratory returns: independent draws of one estimator's whole gradient estimate."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """D draws at fixed parameters, float64, with what a draw costs.

    `reward_calls` counts rewards evaluated in a draw, all of its samples together; `seconds` is a draw's mean wall
    time, without what is fitted once before the first.
    """

    gradients: Float[Tensor, "D P"]
    reward_calls: float
    seconds: float
