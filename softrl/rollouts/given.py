"""Soft records of tokens that any sampler drew: what a relaxation would have recorded on the same forward pass.

Straight-through relaxations feed an ordinary sample, so the sampler can be anybody's (a generation engine, another
method's rollout): noise is drawn afterwards, from its posterior given the tokens. Every method that feeds one-hot
tokens can thus be compared on the same samples.
"""

import torch

from softrl.models.policy import Policy, chunk_length, evaluating
from softrl.tokens.divergences import entropy
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import Relaxation
from softrl.types import HardRollout, Rollout, Support


@torch.no_grad()
def rollout_of(
    policy: Policy,
    sampled: HardRollout,
    relaxation: Relaxation,
    random: SequenceRandom,
    eos_ids: tuple[int, ...] = (),
) -> Rollout:
    """The rollout that a one-hot relaxation makes of given tokens, from one parallel forward pass.

    Args:
        policy: the model that the tokens were sampled from, at the same parameters and temperature.
        sampled: N completions drawn from `sampler_log_probs(logits, relaxation.truncation)`; what stands where their
            mask is False does not matter.
        relaxation: a straight-through one.
        random: one stream a sequence, for the posterior noise.
        eos_ids: not empty for soft stopping, see `Rollout`.
    Raises:
        ValueError: the relaxation feeds mixtures, which no sampled token determines.
    """
    if not relaxation.feeds_one_hot:
        raise ValueError(
            f"relaxation {relaxation.name!r} feeds mixtures, which sampled tokens do not determine; roll it out with "
            "soft_rollout, or use a straight-through relaxation"
        )
    with evaluating(policy.model):
        hidden = policy.hidden(sampled.prompts, policy.embed(sampled.tokens))
    steps, weights, entropies = [], [], []
    size = chunk_length(policy.vocab_size)
    for step in range(sampled.tokens.shape[1]):
        logits = torch.cat([policy.head(piece) for piece in hidden[:, step].split(size)])
        support = relaxation.draw(logits, random, sampled.tokens[:, step])
        steps.append(support)
        weights.append(relaxation.weights(logits.gather(-1, support.ids), support))
        entropies.append(entropy(logits.log_softmax(-1)))
    support, p = Support.stacked(steps), torch.stack(weights, 1)
    fed = relaxation.fed(p, support)
    return Rollout(sampled.prompts, support, p, fed, sampled.mask, torch.stack(entropies, 1), eos_ids)
