"""Soft supervised fine-tuning: the likelihood of a text whose own soft tokens are fed in place of its true ones.

`J = Σ_t F_t`, `F_t = log π(y_t | fed) − β H(π)_t` on the tokens that count; guidance says how much of y_t is fed.
Through the feedback J is differentiated as any other objective, by `pathwise`; without it, or where only true tokens
are fed, by one ordinary pass (`plain_pass`).
Source: ours (softrl maths, section 8).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.data.supervised import guidance_amounts
from softrl.estimators.system import recorded_embeds
from softrl.models.policy import Policy, chunk_length, recomputed
from softrl.objectives.token_terms import DirectTerms, token_outputs
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.guidance import Guide, GuidedRelaxation
from softrl.tokens.noise import SequenceRandom
from softrl.types import Rollout, SupervisedTexts


def guided_rollout(
    policy: Policy,
    texts: SupervisedTexts,
    relaxation: GuidedRelaxation,
    amounts: Float[Tensor, "N T"],
    random: SequenceRandom,
) -> Rollout:
    """Phase 1: soft tokens along a text, one for every token of it, so that the text says where a sequence ends.

    Args:
        policy: at temperature 1, since the loss is on raw logits.
        texts: what is predicted.
        relaxation: the guided one.
        amounts: α of every token that counts; the others are fed as they are.
        random: one stream a sequence.
    Raises:
        ValueError: as `soft_rollout`.
    """
    guide = Guide(texts.targets, guidance_amounts(texts, amounts))
    rollout = soft_rollout(policy, texts.prompts, relaxation, random, texts.targets.shape[1], guide=guide)
    return replace(rollout, mask=texts.counted, targets=texts.targets)


@dataclass(frozen=True)
class PlainOutput:
    """J of every sequence, with its graph, and what it is made of, a number a token, without one."""

    value: Float[Tensor, "N"]
    log_probs: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]


def plain_pass(
    policy: Policy, texts: SupervisedTexts, terms: DirectTerms, rollout: Rollout | None = None
) -> PlainOutput:
    """One ordinary forward pass: the feedback is detached, the embedding's own gradient is not.

    With true tokens it is teacher forcing. Call it inside the wrapped model's forward.

    Args:
        policy: the model with gradients.
        texts: what is predicted.
        terms: weights of likelihood and entropy.
        rollout: the soft tokens that are fed; None feeds the true ones.
    Returns:
        J, to be maximised.
    """
    embeds = policy.embed(texts.targets) if rollout is None else _attached_embeds(policy, rollout)
    hidden = policy.hidden(texts.prompts, embeds)
    outputs = token_outputs(policy, hidden, texts.targets[..., None], targets=texts.targets)
    value = terms.total(outputs, texts.counted.float())
    return PlainOutput(value, outputs.target_log_probs.detach(), outputs.entropy.detach())


def _attached_embeds(policy: Policy, rollout: Rollout) -> Float[Tensor, "N T D"]:
    """E(sg q; W), in chunks that are recomputed in the backward pass."""
    if not policy.trains_embedding:
        return recorded_embeds(policy, rollout)
    ids, fed = rollout.support.ids.flatten(0, 1), rollout.fed.flatten(0, 1)
    size = chunk_length(ids.shape[-1] * policy.causal_lm.config.get_text_config().hidden_size)
    pieces = [recomputed(policy.embed_soft, *each) for each in zip(ids.split(size), fed.split(size), strict=True)]
    return torch.cat(pieces).unflatten(0, rollout.mask.shape)


def token_objective(
    terms: DirectTerms, log_probs: Float[Tensor, "N T"], entropy: Float[Tensor, "N T"]
) -> Float[Tensor, "N T"]:
    """`F_t` of given numbers: what a surrogate, whose own value means nothing, is the gradient of."""
    return terms.target_weight * log_probs + terms.entropy_weight * entropy


def fed_entropy(rollout: Rollout) -> Float[Tensor, "N T"]:
    """Entropy of the fed weights, nats: 0 of one token."""
    return torch.special.entr(rollout.fed).sum(-1)
