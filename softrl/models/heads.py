"""Small heads on a policy's hidden states."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ValueHead(nn.Module):
    """V of the context before a token: a layer norm and a linear map, zero at the start, in float32.

    Hidden states of different models differ in scale by orders of magnitude; the norm makes one learning rate do.

    Args:
        width: D of the hidden states.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
        """Values, one a position, shape (*batch,)."""
        weight = self.linear.weight
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(self.norm(hidden.to(weight.dtype))).squeeze(-1)
