"""Fitting a head that says which token the mixed context becomes; the language model stays as it is.

On hard text: the state before every token, and that token's embedding as the target of a squared error. Left out:
checkpoints, evaluation and several processes; it is minutes of training, and the head is a plain module.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.contexts.collapse import LearnedCollapse
from softrl.models.policy import Policy, evaluating
from softrl.objectives.embedding_regression import squared_error
from softrl.types import Prompts, Texts


def collapse_errors(policy: Policy, head: LearnedCollapse, texts: Texts) -> Float[Tensor, "N S"]:
    """`‖head(h_t) − sg e(x_{t+1})‖²` of tokens 2..T, S = T − 1, differentiable in the head; 0 where none counts.

    Args:
        policy: read without gradients, as it is evaluated.
        head: from its hidden states to its embeddings.
        texts: padded on the right.
    Raises:
        ValueError: padding on the left.
    """
    if not texts.mask[:, 0].all():
        raise ValueError("texts must be padded on the right, and a row's first place is padding; see `padded_texts`")
    with torch.no_grad(), evaluating(policy.model):
        embeds = policy.embed(texts.ids[:, 1:])
        hidden = policy.hidden(Prompts(texts.ids[:, :1], texts.mask[:, :1]), embeds)
    counted = texts.mask if texts.counted is None else texts.mask & texts.counted
    return squared_error(head(hidden), embeds).masked_fill(~counted[:, 1:], 0.0)


def fit_collapse(
    policy: Policy, head: LearnedCollapse, batches: Sequence[Texts], learning_rate: float = 1e-3
) -> list[float]:
    """One Adam step on each batch; the mean squared error a token before each.

    Args:
        policy: stays as it is.
        head: is changed in place; a softAR model's own (`add_collapse_head`) is saved with it.
        batches: texts, padded on the right.
        learning_rate: of Adam; it falls linearly to 0.
    Raises:
        ValueError: padding on the left.
    """
    optimizer = torch.optim.Adam(head.parameters(), lr=learning_rate)
    means = []
    for number, texts in enumerate(batches):
        counted = texts.mask if texts.counted is None else texts.mask & texts.counted
        loss = collapse_errors(policy, head, texts).sum() / counted[:, 1:].sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1.0 - number / len(batches))
        optimizer.step()
        means.append(loss.item())
    return means
