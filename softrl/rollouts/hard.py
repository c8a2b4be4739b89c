"""Hard rollouts: ordinary sampling or greedy decoding, from the same policy object and the same random streams.

Used for evaluation, for score-function methods, and as the forward pass of straight-through estimators.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from softrl.masking import is_any_of, mask_through_eos
from softrl.models.policy import Policy, evaluating
from softrl.rollouts.soft import check_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.truncation import Truncation, chosen
from softrl.types import HardRollout, Prompts


@torch.no_grad()
def hard_rollout(
    policy: Policy,
    prompts: Prompts,
    truncation: Truncation,
    random: SequenceRandom,
    num_steps: int,
    num_samples: int = 1,
    eos_ids: tuple[int, ...] = (),
    greedy: bool = False,
) -> HardRollout:
    """Sample (by the Gumbel-max trick) or decode greedily.

    Args:
        policy: the model and its sampling temperature.
        prompts: B left-padded prompts.
        truncation: its nucleus rules (top_p, min_p, support) define the sampler; `top_k` is a soft token's own number
            of ids and is not applied here.
        random: one stream a sequence, N = B * G.
        num_steps: T, in tokens.
        num_samples: G.
        eos_ids: a sequence ends at the first of these.
        greedy: take the argmax instead of a sample.
    Returns:
        N rows of T tokens at most; T is cut to the longest.
    Raises:
        ValueError: as `soft_rollout`.
    """
    check_rollout(policy, prompts, num_steps, num_samples, random)
    truncation.check_temperature(policy.temperature)
    tokens: list[Int[Tensor, "N"]] = []
    with evaluating(policy.model):
        hidden, state = policy.begin(prompts, num_samples, capacity=num_steps)
        ended = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        for step in range(num_steps):
            logits = policy.head(hidden)
            scores = logits if greedy else logits + random.gumbel(logits.shape[-1], logits.dtype)
            tokens.append(chosen(logits, truncation, scores))
            ended |= is_any_of(tokens[-1], eos_ids)
            if step == num_steps - 1 or not policy.largest(float(not ended.all())):
                break
            hidden = policy.advance(state, policy.embed(tokens[-1])[:, None])[:, 0]
    stacked = torch.stack(tokens, 1)
    return HardRollout(prompts.repeated(num_samples), stacked, mask_through_eos(stacked, eos_ids))
