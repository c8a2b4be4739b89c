"""Two ways to the same gradient that anyone would try first: backpropagation through the generation loop as it is.

They keep the whole loop's graph, parameters included. The reward is the only term of J; nothing is shared with our
solvers but the relaxation.
"""

import time

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from softrl.models.policy import Policy, evaluating
from softrl.models.state import positions
from softrl.rewards.base import Reward
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import Relaxation
from softrl.types import Prompts, SoftTokens, Support


def transformers_cache_step(
    policy: Policy, prompts: Prompts, relaxation: Relaxation, random: SequenceRandom, num_steps: int, reward: Reward
) -> dict[str, float]:
    """One gradient step through transformers' own growing cache; seconds by phase."""
    mask = prompts.mask
    cache = DynamicCache(config=policy.decoder.config)
    inputs = policy.embed(prompts.ids)

    def next_hidden(newest: Tensor) -> Tensor:
        output = policy.decoder(
            inputs_embeds=newest,
            attention_mask=mask.long(),
            position_ids=positions(mask)[:, -newest.shape[1] :],
            use_cache=True,
            **{policy.cache_argument: cache},
        )
        return output.last_hidden_state[:, -1]

    started = time.perf_counter()
    tokens = []
    with evaluating(policy.model):
        for _ in range(num_steps):
            token, inputs = _soft_token(policy, relaxation, random, next_hidden(inputs))
            tokens.append(token)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return _backward(tokens, reward, started)


def full_prefix_step(
    policy: Policy, prompts: Prompts, relaxation: Relaxation, random: SequenceRandom, num_steps: int, reward: Reward
) -> dict[str, float]:
    """One gradient step without any cache: the whole prefix again for every token, checkpointed."""
    mask = prompts.mask
    inputs = policy.embed(prompts.ids)

    def last_hidden(embeds: Tensor, mask: Tensor) -> Tensor:
        output = policy.decoder(
            inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions(mask), use_cache=False
        )
        return output.last_hidden_state[:, -1]

    started = time.perf_counter()
    tokens = []
    with evaluating(policy.model):
        for _ in range(num_steps):
            hidden = checkpoint(last_hidden, inputs, mask, use_reentrant=False)
            token, newest = _soft_token(policy, relaxation, random, hidden)
            tokens.append(token)
            inputs = torch.cat([inputs, newest], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return _backward(tokens, reward, started)


def _soft_token(
    policy: Policy, relaxation: Relaxation, random: SequenceRandom, hidden: Tensor
) -> tuple[tuple[Support, Tensor], Tensor]:
    """A token's support and fed weights, and the embedding that is fed next."""
    logits = policy.head(hidden)
    support = relaxation.draw(logits.detach(), random)
    p = relaxation.weights(logits.gather(-1, support.ids), support)
    q = relaxation.fed(p, support).detach() + p - p.detach()
    return (support, q), policy.embed_soft(support.ids, q)[:, None]


def _backward(tokens: list[tuple[Support, Tensor]], reward: Reward, started: float) -> dict[str, float]:
    ids = torch.stack([support.ids for support, _ in tokens], 1)
    weights = torch.stack([q for _, q in tokens], 1)
    generated = time.perf_counter()
    mask = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
    (-reward.soft(SoftTokens(ids, weights, mask)).mean()).backward()
    return {"generation": generated - started, "gradient": time.perf_counter() - generated}
