"""How soft tokens become hard ones: by the nearest embedding, by a learned head, all of them or some.

The notes call it the collapse of the wave function: a soft token means several tokens at once, and to say it, or to
stand on firm ground again, the model has to settle on one. The nearest embedding keeps least of what was meant.
`LearnedCollapse` asks the hidden state in which the whole context has been mixed instead. `selective` lets those go
on that are near a token, or that the model was sure of.

Left out: when to collapse, which is the generator's, and training the head, which is a regression
(`objectives.embedding_regression`).
"""

from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from softrl.models.nearest import Metric, nearest_tokens
from softrl.models.policy import Policy

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


def collapsed(
    policy: Policy,
    embeds: Float[Tensor, "M D"],
    which: Bool[Tensor, "M"] | None = None,
    mapped: Float[Tensor, "M D"] | None = None,
    metric: Metric = "euclidean",
) -> tuple[Float[Tensor, "M D"], Int[Tensor, "M"]]:
    """Soft tokens with some of them replaced by token embeddings. No gradients: a choice has none.

    Args:
        policy: whose tokens they become.
        embeds: what was fed.
        which: soft tokens to replace; None for all.
        mapped: vectors whose nearest tokens are taken, of a `LearnedCollapse`; None: the soft tokens themselves.
        metric: of "nearest".
    Returns:
        What is fed afterwards, and the token of each, also where it is not replaced.
    """
    ids, _ = nearest_tokens(policy, embeds if mapped is None else mapped, metric)
    hard = policy.embed(ids).detach().to(embeds.dtype)
    return hard if which is None else torch.where(which[:, None], hard, embeds.detach()), ids


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
