"""A head that puts out one vector y instead of logits: `logit_v = −‖y − e_v‖² / τ` over the token embeddings e.

So that a model whose output is an embedding can be sampled from, and trained by cross-entropy, as any other.
"""

import copy
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class DistanceHead(nn.Module):
    """`y = A h + b` from hidden states, and logits by the distance to every token embedding.

    Args:
        decoder: the model whose input embedding is asked for at every use, since adapters and a grown vocabulary
            replace it; it is neither a submodule nor saved here.
        width: D.
        temperature: τ at the start, positive; learned by its logarithm.
    Source: softrl maths, section 9.
    """

    def __init__(self, decoder: nn.Module, width: int, temperature: float):
        super().__init__()
        self.projection = nn.Linear(width, width)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self._decoder: tuple[Any] = (decoder,)  # in a tuple, which torch does not look into for submodules

    def __deepcopy__(self, memo: dict[int, Any]) -> "DistanceHead":
        """Of a whole model's copy the head measures to the copy's embedding; a head alone keeps its decoder."""
        memo.setdefault(id(self._decoder[0]), self._decoder[0])
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    @property
    def embeddings(self) -> Float[Tensor, "V D"]:
        """e of all tokens, as the model's own module returns them: some scale inside it, adapters change it."""
        module = self._decoder[0].get_input_embeddings()
        if type(module) is nn.Embedding:
            return module.weight
        return module(torch.arange(len(module.weight), device=module.weight.device))

    def outputs(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """y."""
        return self.projection(hidden)

    def logits(self, outputs: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Logits of y."""
        return distance_logits(outputs, self.embeddings, self.log_temperature.exp())

    def forward(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Logits of the next token."""
        return self.logits(self.outputs(hidden))


def distance_logits(
    outputs: Float[Tensor, "*batch D"], embeddings: Float[Tensor, "V D"], temperature: Float[Tensor, ""] | float
) -> Float[Tensor, "*batch V"]:
    """`−‖y − e_v‖² / τ`, from `‖y‖² − 2⟨y, e⟩ + ‖e‖²`; differentiable in all three.

    In float32 at least, whatever the inputs are and autocast says: of a small difference of large squares bfloat16
    leaves nothing.

    Source: softrl maths, section 9.
    """
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    with torch.autocast(outputs.device.type, enabled=False):
        y, e = outputs.to(dtype), embeddings.to(dtype)
        squares = y.square().sum(-1, keepdim=True) + e.square().sum(-1)
        return (2.0 * y @ e.T - squares) / torch.as_tensor(temperature, dtype=dtype, device=y.device)
