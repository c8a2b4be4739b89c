"""What a position's hidden state gives: kept logits, entropy, KL, log π of a true token; and the direct terms F.

All full-vocabulary work of a training step is here, in chunks of positions, so that no [N, T, V] tensor exists at any
time: `token_values` differentiates each chunk at once, with respect to hidden states; `token_outputs` recomputes it in
the backward pass, which reaches the head's parameters too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softrl.masking import survival_sum
from softrl.models.policy import Policy, chunk_length, recomputed
from softrl.tokens.divergences import entropy, kl_divergence
from softrl.tokens.truncation import Truncation, nucleus


@dataclass(frozen=True)
class TokenOutputs:
    """Per position: logits of the kept ids, their log normaliser, entropy, KL to the reference (0 without), and log π
    of the target over the whole vocabulary (0 without).

    `log_normalizer` is that of the sampler: over V, or over its nucleus, outside of which kept logits are −inf.
    """

    kept_logits: Float[Tensor, "N T K"]
    log_normalizer: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]
    kl: Float[Tensor, "N T"]
    target_log_probs: Float[Tensor, "N T"]


@dataclass(frozen=True)
class DirectTerms:
    """`F_t = s_t (−β_KL KL(π‖π_ref)_t + β_H H(π)_t + β_Y log π(y_t))`, in nats, s_t the token's survival.

    Args:
        kl_weight: β_KL per token.
        entropy_weight: β_H per token; negative for a penalty, beside a likelihood.
        reference: π_ref; None when there is no reference model.
        target_weight: β_Y, the weight of the true tokens' log-likelihood: of π over the whole vocabulary, before any
            truncation.
    Raises:
        ValueError: a negative weight, or a KL weight without a reference.
    """

    kl_weight: float = 0.0
    entropy_weight: float = 0.0
    reference: Policy | None = None
    target_weight: float = 0.0

    def __post_init__(self) -> None:
        penalised = self.entropy_weight < 0.0 and self.target_weight == 0.0
        if self.kl_weight < 0.0 or self.target_weight < 0.0 or penalised:
            raise ValueError(
                f"kl_weight and entropy_weight must not be negative, got {self.kl_weight} and {self.entropy_weight}; "
                f"nor target_weight, got {self.target_weight}, beside which alone an entropy may be penalised"
            )
        if self.kl_weight > 0.0 and self.reference is None:
            raise ValueError(f"kl_weight={self.kl_weight} needs a reference model to measure the KL to")

    @property
    def are_zero(self) -> bool:
        """Whether F vanishes identically."""
        return self.kl_weight == 0.0 and self.entropy_weight == 0.0 and self.target_weight == 0.0

    def total(self, outputs: TokenOutputs, survival: Float[Tensor, "N T"]) -> Float[Tensor, "N"]:
        """`Σ_t F_t` of each sequence, survival included."""
        values = self.values(outputs)
        return survival_sum(values, survival.to(values.dtype))

    def values(self, outputs: TokenOutputs) -> Float[Tensor, "N T"]:
        """`F_t / s_t` of each position."""
        values = torch.zeros_like(outputs.kl)
        if self.kl_weight > 0.0:
            values = values - self.kl_weight * outputs.kl
        if self.entropy_weight != 0.0:
            values = values + self.entropy_weight * outputs.entropy
        if self.target_weight > 0.0:
            values = values + self.target_weight * outputs.target_log_probs
        return values


@dataclass(frozen=True)
class TokenValues:
    """`F_t / s_t`, differentiable in the hidden states that it was made from; the KL and log π(y) in it, without a
    graph (0 without one).
    """

    value: Float[Tensor, "N T"]
    kl: Float[Tensor, "N T"]
    target_log_probs: Float[Tensor, "N T"]


class _Known(torch.autograd.Function):
    """Per-position values whose gradients are known already."""

    @staticmethod
    def forward(ctx, value, hidden, by_hidden, reference_hidden, by_reference):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(by_hidden, by_reference)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        by_hidden, by_reference = ctx.saved_tensors
        scaled = [None if by is None else (grad[..., None] * by).to(by.dtype) for by in (by_hidden, by_reference)]
        return None, scaled[0], None, scaled[1], None


def token_values(
    terms: DirectTerms,
    policy: Policy,
    hidden: Float[Tensor, "N T D"],
    reference_hidden: Float[Tensor, "N T E"] | None,
    targets: Int[Tensor, "N T"] | None = None,
) -> TokenValues:
    """The direct terms of every position, before survival: each head is read once forwards and once backwards.

    With z, z' the logits of policy and reference, the gradients are `∂KL/∂z = π (log π − log π' − KL)`,
    `∂KL/∂z' = π' − π`, `∂H/∂z = −π (log π + H)` and `∂ log π(y)/∂z = 1_y − π`.

    Args:
        terms: weights of KL, entropy and likelihood.
        policy: whose head is applied; its parameters get no gradient from here.
        hidden, reference_hidden: hidden states at the same positions; the latter when terms has a KL.
        targets: the true tokens, when terms has a likelihood.
    """
    shape, size = hidden.shape[:2], chunk_length(policy.vocab_size)
    states = hidden.detach().flatten(0, 1).split(size)
    if terms.kl_weight == 0.0 or terms.reference is None:
        reference_hidden = None
    references = _pieces(reference_hidden if reference_hidden is None else reference_hidden.detach(), size, states)
    targeted = _pieces(targets if terms.target_weight > 0.0 else None, size, states)
    pieces = [_values_chunk(terms, policy, *each) for each in zip(states, references, targeted, strict=True)]
    values, kls, scores, grads, reference_grads = zip(*pieces, strict=True)
    value, kl, score, by_hidden = (torch.cat(parts).unflatten(0, shape) for parts in (values, kls, scores, grads))
    given = [grad for grad in reference_grads if grad is not None]
    by_reference = torch.cat(given).unflatten(0, shape) if given else None
    if not given:
        reference_hidden = None
    return TokenValues(_Known.apply(value, hidden, by_hidden, reference_hidden, by_reference), kl, score)


def _pieces(values: Tensor | None, size: int, like: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """A tensor of [N, T, ...] in pieces of so many positions; as many times None where there is none."""
    return [None] * len(like) if values is None else values.flatten(0, 1).split(size)


def _values_chunk(
    terms: DirectTerms,
    policy: Policy,
    hidden: Float[Tensor, "M D"],
    reference_hidden: Float[Tensor, "M E"] | None,
    targets: Int[Tensor, "M"] | None,
) -> tuple[
    Float[Tensor, "M"], Float[Tensor, "M"], Float[Tensor, "M"], Float[Tensor, "M D"], Float[Tensor, "M E"] | None
]:
    """Value, KL, log π of the targets, and the value's gradients by both hidden states."""
    leaf, logits = _headed(policy, hidden)
    log_probs = logits.detach().log_softmax(-1)
    probs = log_probs.exp()
    by_logits = torch.zeros_like(probs)
    value = kl = score = torch.zeros_like(probs[:, 0])
    by_reference = None
    if terms.entropy_weight != 0.0:
        spread = -(probs * log_probs).sum(-1)
        value = value + terms.entropy_weight * spread
        by_logits.sub_(probs * (log_probs + spread[:, None]), alpha=terms.entropy_weight)
    if targets is not None:
        score = log_probs.gather(-1, targets[:, None])[:, 0]
        value = value + terms.target_weight * score
        by_logits.sub_(probs, alpha=terms.target_weight)
        by_logits.scatter_add_(-1, targets[:, None], torch.full_like(score, terms.target_weight)[:, None])
    if reference_hidden is not None:
        assert terms.reference is not None
        reference_leaf, reference_logits = _headed(terms.reference, reference_hidden)
        reference_log_probs = reference_logits.detach().log_softmax(-1)
        excess = log_probs - reference_log_probs
        kl = (probs * excess).sum(-1)
        value = value - terms.kl_weight * kl
        by_logits.sub_(excess.sub_(kl[:, None]).mul_(probs), alpha=terms.kl_weight)
        by_reference_logits = (reference_log_probs.exp_() - probs).mul_(-terms.kl_weight)
        (by_reference,) = torch.autograd.grad(reference_logits, reference_leaf, by_reference_logits)
    (by_hidden,) = torch.autograd.grad(logits, leaf, by_logits)
    return value, kl, score, by_hidden, by_reference


def _headed(policy: Policy, hidden: Float[Tensor, "M D"]) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M V"]]:
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        return leaf, policy.head(leaf)


def _chunk(
    policy: Policy,
    hidden: Float[Tensor, "M D"],
    ids: Int[Tensor, "M K"],
    reference: Policy | None,
    reference_hidden: Float[Tensor, "M E"] | None,
    truncation: Truncation | None,
    targets: Int[Tensor, "M"] | None,
) -> tuple[Float[Tensor, "M K"], Float[Tensor, "M"], Float[Tensor, "M"], Float[Tensor, "M"], Float[Tensor, "M"]]:
    logits = policy.head(hidden)
    log_normalizer = logits.logsumexp(-1)
    log_probs = logits - log_normalizer[:, None]
    if reference is None or reference_hidden is None:
        kl = torch.zeros_like(log_probs[:, 0])
    else:
        kl = kl_divergence(log_probs, reference.head(reference_hidden).log_softmax(-1))
    score = torch.zeros_like(kl) if targets is None else log_probs.gather(-1, targets[:, None])[:, 0]
    if truncation is not None and truncation.has_nucleus:
        inside = nucleus(logits.detach(), truncation).scatter(-1, ids[:, :1], True)  # the sampled id, come what may
        logits = logits.masked_fill(~inside, -torch.inf)
        log_normalizer = logits.logsumexp(-1)
    return logits.gather(-1, ids), log_normalizer, entropy(log_probs), kl, score


def token_outputs(
    policy: Policy,
    hidden: Float[Tensor, "N T D"],
    ids: Int[Tensor, "N T K"],
    reference: Policy | None = None,
    reference_hidden: Float[Tensor, "N T E"] | None = None,
    truncation: Truncation | None = None,
    targets: Int[Tensor, "N T"] | None = None,
) -> TokenOutputs:
    """One pass of the head over all positions, in chunks.

    Args:
        policy: whose head is applied.
        hidden: hidden states that the tokens are predicted from.
        ids: kept ids.
        reference: π_ref, with its hidden states at the same positions; both or neither.
        truncation: the sampler's nucleus rules; its nucleus is a constant, as the support of a soft token is, and
            always holds the first of the ids. Entropy and KL stay those of the whole distribution.
        targets: true tokens, whose log π is asked for.
    Returns:
        Kept logits at the sampling temperature and the rest, differentiable in the hidden states and parameters.
    """
    num_sequences, num_steps, num_kept = ids.shape
    flat_hidden, flat_ids = hidden.flatten(0, 1), ids.flatten(0, 1)
    size = chunk_length(policy.vocab_size)
    hidden_pieces, id_pieces = flat_hidden.split(size), flat_ids.split(size)
    references, targeted = _pieces(reference_hidden, size, id_pieces), _pieces(targets, size, id_pieces)
    results = [
        recomputed(_chunk, policy, piece, ids_piece, reference, reference_piece, truncation, target_piece)
        for piece, ids_piece, reference_piece, target_piece in zip(
            hidden_pieces, id_pieces, references, targeted, strict=True
        )
    ]
    kept, *others = (torch.cat(parts) for parts in zip(*results, strict=True))
    shape = (num_sequences, num_steps)
    return TokenOutputs(kept.view(*shape, num_kept), *(values.view(shape) for values in others))
