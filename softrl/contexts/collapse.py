"""How soft tokens become hard ones: by the nearest embedding, by a learned head, all of them or some.

The notes call it the collapse of the wave function: a soft token means several tokens at once, and to say it, or to
stand on firm ground again, the model has to settle on one. The nearest embedding keeps least of what was meant.
`LearnedCollapse` asks the hidden state in which the whole context has been mixed instead. `selective` lets those go
on that are near a token, or that the model was sure of.

Left out: when and how to collapse, which is the generator's (`generation.soft_ar`), and training the head, which is a
regression: beside the model by `SoftARTrainer`'s `collapse_head_weight`, or after it by `objectives.learned_collapse`.
"""

from collections.abc import Callable
from typing import Literal, Protocol, get_args

from jaxtyping import Bool, Float
from torch import Tensor, nn

By = Literal["distance", "entropy"]


class SoftTokenMeasures(Protocol):
    """What is known of M soft tokens."""

    @property
    def distance(self) -> Float[Tensor, "M"]:
        """Euclidean, to the nearest token embedding."""

    @property
    def entropy(self) -> Float[Tensor, "M"]:
        """Of the distribution that the soft token stands for, nats."""


def selective(by: By, threshold: float) -> Callable[[SoftTokenMeasures], Bool[Tensor, "M"]]:
    """Which soft tokens are replaced: those whose distance or entropy is above the threshold.

    Soft tokens far from every embedding are unlike all that the model was trained on; those of high entropy stand for
    many tokens.

    Args:
        by: "distance", Euclidean, in the units of the embeddings (compare with their norms); or "entropy", in nats.
        threshold: not negative. 0 replaces all but exact tokens, infinity none.
    Raises:
        ValueError: an unknown measure, or a negative threshold.
    """
    if by not in get_args(By):
        raise ValueError(f"by must be one of {get_args(By)}, got {by!r}; choose one of them")
    if not threshold >= 0.0:
        raise ValueError(f"threshold must be 0 or more, got {threshold!r}; 0 replaces all that are not exact tokens")
    return lambda tokens: getattr(tokens, by) > threshold


class LearnedCollapse(nn.Module):
    """A head from a hidden state, the mixed context, to the embedding of the token that it is followed by.

    It is fitted on hard text: its target is the true next token's embedding, behind a stop-gradient, its loss the
    squared error, whose optimum is the conditional mean `Σ_v p(v | h) e_v`. A linear head comes as near to that as a
    linear function can. Its nearest token need not be the likeliest.

    Args:
        width: D, of hidden states and embeddings.
        hidden_size: of a layer with GELU between; 0 for a linear head.
    Source: the project's notes on softAR; softrl maths, section 9.
    """

    def __init__(self, width: int, hidden_size: int = 0):
        super().__init__()
        if hidden_size:
            self.layers: nn.Module = nn.Sequential(
                nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, width)
            )
        else:
            self.layers = nn.Linear(width, width)

    def forward(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """What the context becomes, in the embeddings' space."""
        return self.layers(hidden)
