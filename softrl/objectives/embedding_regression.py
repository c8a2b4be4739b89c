"""Regression to token embeddings: what a model learns whose output is a vector and not a distribution.

The target is the true token's embedding behind a stop-gradient. Then nothing pulls the embeddings to the outputs, but
nothing holds them apart either: as inputs they are still trained, and moving them together makes every target easier
(with weight decay they shrink to one point, at a loss of zero). So a squared error needs another source of gradient
for the embeddings: here the cross-entropy over `−‖y − e_v‖² / τ` beside it, which is not stopped at e and pushes all
but the true one away. `embedding_spread` says how far apart they are. Left out: frozen embeddings, which need none of
this and know nothing of the language.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def squared_error(outputs: Float[Tensor, "*batch D"], targets: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
    """`‖y − sg e‖²`, summed over the width, in float32 at least.

    Its optimum is the mean of the targets, `Σ_v p_v e_v`: a soft token.

    Args:
        outputs: y.
        targets: e of the true tokens; no gradient reaches them, or they would come to the outputs.
    Source: softrl maths, section 9.
    """
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    return (outputs.to(dtype) - targets.detach().to(dtype)).square().sum(-1)  # see the head of this file


@torch.no_grad()
def embedding_spread(embeddings: Float[Tensor, "V D"]) -> Float[Tensor, ""]:
    """Mean squared distance of the token embeddings from their mean; near 0 they have collapsed.

    A squared error says nothing without it: an output that is always the mean has this error at uniform tokens.
    """
    return (embeddings - embeddings.mean(0)).square().sum(-1).mean()
