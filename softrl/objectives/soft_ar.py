"""Pre-training of softAR models: the loss of a text read through windows, hard or with soft tokens in them.

Soft tokens are fed in parallel, in two passes: the first reads the true tokens, and its outputs, moved on by one, are
what the second finds in the soft region of every window. In later windows, and in memory, the tokens have collapsed
into the true ones. That is the state of a generator which collapses correctly, at the cost of two passes instead of T.
Source: ours (softrl maths, section 9); two passes after Duckworth et al. (2019), arXiv:1906.04331.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.contexts.distance_head import DistanceHead
from softrl.contexts.soft_ar import SoftARForCausalLM
from softrl.models.policy import chunk_length, recomputed
from softrl.objectives.embedding_regression import squared_error
from softrl.types import Texts


@dataclass(frozen=True)
class SoftARObjective:
    """What is minimised a token: `w_ce · (−log p(x)) + w_mse · ‖y − sg e_x‖² + w_c · ‖c(sg h) − sg e_x‖²`.

    Args:
        cross_entropy: w_ce; of logits, which a model with output "embedding" has by distance.
        regression: w_mse, for output "embedding" only.
        detached: whether soft tokens are fed without the graph of the pass that made them.
        collapse: w_c, of a model's head c that says what soft tokens become; it changes nothing but that head.
    Raises:
        ValueError: a negative weight or one that is no finite number, or the first two are 0.
    """

    cross_entropy: float = 1.0
    regression: float = 0.0
    detached: bool = True
    collapse: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.cross_entropy, self.regression)
        if not 0.0 <= self.collapse < math.inf:
            raise ValueError(f"collapse must not be negative, and a finite number, got {self.collapse}")
        if not all(0.0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(
                f"cross_entropy and regression must not be negative, and one of them positive, got {weights}; both "
                "are finite numbers"
            )


@dataclass(frozen=True)
class TokenScores:
    """Of tokens 2..T of every text: the loss, with its graph; NLL in nats, squared errors (0 without) and hits."""

    loss: Float[Tensor, "N T"]
    nll: Float[Tensor, "N T"]
    squared_error: Float[Tensor, "N T"]
    collapse_error: Float[Tensor, "N T"]
    hits: Bool[Tensor, "N T"]


def text_hidden(
    model: SoftARForCausalLM,
    texts: Texts,
    is_soft: Bool[Tensor, "N T"] | None = None,
    memory_of: Int[Tensor, "N"] | None = None,
    detached: bool = True,
) -> Float[Tensor, "N T D"]:
    """Hidden states of texts, in two passes where tokens are soft.

    Args:
        model: with gradients, where they are wanted.
        texts: what is read.
        is_soft: tokens that are fed as the model's own output wherever they stand in a soft region; the first token of
            a text has none and stays. None: hard tokens only, in one pass.
        memory_of: see `SoftARModel.forward`.
        detached: the first pass has no graph.
    """
    embeds = model.get_input_embeddings()(texts.ids)
    given = {"inputs_embeds": embeds, "attention_mask": texts.mask, "memory_of": memory_of}
    if is_soft is None:
        return model.model(**given).last_hidden_state
    with torch.no_grad() if detached else nullcontext():
        first = model.model(**given).last_hidden_state[:, :-1]
        outputs = _soft_outputs(model, first)
    soft_embeds = torch.cat([embeds[:, :1], outputs.to(embeds.dtype)], 1)
    # The row before a text's first token is padding, whose output is nothing.
    has_output = torch.cat([torch.zeros_like(texts.mask[:, :1]), texts.mask[:, :-1]], 1)
    return model.model(**given, soft_mask=is_soft & has_output, soft_embeds=soft_embeds).last_hidden_state


def _soft_outputs(model: SoftARForCausalLM, hidden: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
    """The outputs in chunks, recomputed in a backward pass: no [N, T, V] tensor is kept."""
    pieces = hidden.flatten(0, 1).split(chunk_length(model.config.vocab_size))
    return torch.cat([recomputed(model.soft_outputs, piece) for piece in pieces]).unflatten(0, hidden.shape[:2])


def token_scores(
    model: SoftARForCausalLM, hidden: Float[Tensor, "N T D"], ids: Int[Tensor, "N T"], objective: SoftARObjective
) -> TokenScores:
    """Loss of every token but the first, from the hidden state before it; in chunks, as above."""
    states, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    size = chunk_length(model.config.vocab_size)
    pieces = [
        recomputed(_chunk, model, objective, *each)
        for each in zip(states.split(size), targets.split(size), strict=True)
    ]
    shape = (len(ids), ids.shape[1] - 1)
    return TokenScores(*(torch.cat(parts).view(shape) for parts in zip(*pieces, strict=True)))


def _chunk(
    model: SoftARForCausalLM, objective: SoftARObjective, hidden: Float[Tensor, "M D"], targets: Int[Tensor, "M"]
) -> tuple[Float[Tensor, "M"], Float[Tensor, "M"], Float[Tensor, "M"], Float[Tensor, "M"], Bool[Tensor, "M"]]:
    embeds = model.get_input_embeddings()(targets)
    if isinstance(model.lm_head, DistanceHead):
        outputs = model.head.outputs(hidden)
        logits, error = model.head.logits(outputs), squared_error(outputs, embeds)
    else:
        logits = model.logits(hidden)
        error = torch.zeros_like(logits[:, 0])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = -logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    loss = objective.cross_entropy * nll + objective.regression * error
    collapse_error = torch.zeros_like(nll)
    if model.collapse_head is not None:  # which reads the model and does not change it
        collapse_error = squared_error(model.collapse_head(hidden.detach()), embeds)
        loss = loss + objective.collapse * collapse_error
    return loss, nll.detach(), error.detach(), collapse_error.detach(), logits.argmax(-1) == targets
