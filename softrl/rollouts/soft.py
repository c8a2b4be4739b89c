"""Soft rollouts: generate soft tokens step by step, without gradients, and record what replaying them needs.

K numbers a step are kept, never a [N, T, V] tensor. A sequence ends hard, when its hard token is an end-of-sequence
id, or softly, when the weight of such ids has left less than `NEGLIGIBLE_SURVIVAL` of it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.masking import is_any_of, mask_through_eos
from softrl.models.policy import Policy, evaluating
from softrl.tokens.divergences import entropy
from softrl.tokens.guidance import Guide
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import Relaxation
from softrl.types import Prompts, Rollout, SoftTokens, Support

NEGLIGIBLE_SURVIVAL = 1e-6  # tokens that count less are not generated; they and their gradient are left out


def check_rollout(policy: Policy, prompts: Prompts, num_steps: int, num_samples: int, random: SequenceRandom) -> None:
    """Raise ValueError for prompts and lengths that no rollout can be made of."""
    num_prompts, prompt_length = prompts.ids.shape
    if num_prompts == 0 or prompt_length == 0:
        raise ValueError(
            f"prompts: expected at least one prompt of at least one token, got shape {num_prompts, prompt_length}"
        )
    if not prompts.mask[:, -1].all():
        raise ValueError(
            "prompts: the last position is padding in some row; pad on the left, and leave no prompt empty"
        )
    if not prompts.mask.all() and not policy.honours_padding:
        raise ValueError(
            f"prompts of different lengths need padding, which {type(policy.causal_lm).__name__} does not mask; give "
            "it prompts of one length"
        )
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if len(random) != num_prompts * num_samples:
        raise ValueError(f"random has {len(random)} streams for {num_prompts} prompts x {num_samples} samples")
    limit = policy.max_length
    if limit is not None and prompt_length + num_steps > limit:
        raise ValueError(
            f"a prompt of {prompt_length} tokens and {num_steps} generated ones exceed the model's context of "
            f"{limit}; shorten the prompts (max_prompt_length) or generate fewer tokens (max_completion_length or "
            "max_new_tokens)"
        )


@torch.no_grad()
def soft_rollout(
    policy: Policy,
    prompts: Prompts,
    relaxation: Relaxation,
    random: SequenceRandom,
    num_steps: int,
    num_samples: int = 1,
    eos_ids: tuple[int, ...] = (),
    soft_stopping: bool = False,
    on_step: Callable[[int], None] | None = None,
    guide: Guide | None = None,
) -> Rollout:
    """Generate `num_steps` soft tokens for every sample of every prompt.

    Args:
        policy: the model and its sampling temperature.
        prompts: B left-padded prompts.
        relaxation: how logits and noise become weights.
        random: one stream a sequence, N = B * G.
        num_steps: T, in tokens.
        num_samples: G samples a prompt; the prompt is prefilled once.
        eos_ids: a sequence ends at the first of these; generation stops early when all have, those of other processes
            included where these shard the model.
        soft_stopping: weigh every token by its survival instead, the probability under the fed weights that no such
            id came before it, and differentiate through it. For one-hot tokens both are the same in value.
        on_step: called after every step with its index.
        guide: true tokens for a `GuidedRelaxation`, one a step.
    Returns:
        The rollout, T axis cut to the longest sequence.
    Raises:
        ValueError: K larger than V, empty prompts, padding on the right, or a total length beyond the context.
    """
    relaxation.truncation.check_vocabulary(policy.vocab_size)
    relaxation.truncation.check_temperature(policy.temperature)
    check_rollout(policy, prompts, num_steps, num_samples, random)
    stopping_ids = eos_ids if soft_stopping else ()
    supports: list[Support] = []
    weights: list[Float[Tensor, "N K"]] = []
    entropies: list[Float[Tensor, "N"]] = []
    with evaluating(policy.model):
        hidden, state = policy.begin(prompts, num_samples, capacity=num_steps)
        going_on = torch.ones(hidden.shape[0], device=hidden.device)
        for step in range(num_steps):
            logits = policy.head(hidden)
            support = relaxation.draw(logits, random)
            if guide is not None:
                support = guide.joined(support, step)
            p = relaxation.weights(logits.gather(-1, support.ids), support)
            q = relaxation.fed(p, support)
            supports.append(support)
            weights.append(p)
            entropies.append(entropy(logits.log_softmax(-1)))
            if on_step is not None:
                on_step(step)
            ends = (
                (q * is_any_of(support.ids, eos_ids)).sum(-1)
                if soft_stopping
                else is_any_of(support.tokens(), eos_ids)
            )
            going_on = going_on * (1.0 - ends.to(going_on.dtype))
            if step == num_steps - 1 or policy.largest(going_on.max().item()) < NEGLIGIBLE_SURVIVAL:
                break
            hidden = policy.advance(state, policy.embed_soft(support.ids, q)[:, None])[:, 0]
    support = Support.stacked(supports)
    recorded = torch.stack(weights, 1)
    fed = relaxation.fed(recorded, support)
    if soft_stopping:
        everything = torch.ones_like(support.choice, dtype=torch.bool)
        mask = SoftTokens(support.ids, fed, everything, eos_ids).survival >= NEGLIGIBLE_SURVIVAL
    else:
        mask = mask_through_eos(support.tokens(), eos_ids)
    return Rollout(
        prompts.repeated(num_samples), support, recorded, fed, mask, torch.stack(entropies, 1), stopping_ids
    )
