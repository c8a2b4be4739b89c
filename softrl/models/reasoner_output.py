"""What a latent reasoner's forward pass gives, and what is scored by labels."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.utils import ModelOutput

from softrl.models.reasoner_parts import log_mean_exp

IGNORED = -100  # a label that is no target, as everywhere in transformers


@dataclass
class ReasonerOutput(ModelOutput):
    """What a forward pass gives; log-probabilities in nats, of the next token at every position.

    Attributes:
        loss: mean of −log p(label), p the mean over thoughts; None without labels.
        logits: [N, T, V] log p of the mixture, averaged over S thoughts in probability; None where not asked for.
        talk_log_probs: [N, T, S, V] log p_mixed(y | h, x) after each thought.
        base_log_probs: [N, T, V] of the base LM; None without one.
        interpreter_log_probs: [N, T, S, V].
        mixing: [N, T, S] the weight w of the interpreter; None without a base LM.
        rewards: [N, T, S] log p_mixed of the label after each thought, with its graph; 0 where there is none.
        targets, is_target: [N, T] the next token, and where there is one that counts.
        thought_log_probs: [N, T, S] log π(h | x), summed over latents; zeros without latents.
        thought_entropy: [N, T, S] sum of the latents' conditional entropies.
        thought_values, thought_embeds: see `LatentThoughts`; None where the model has no reasoner.
        context: [N, T, D] state of the base reasoner that thoughts start from.
        log_z: [N, T] learned log Z of the thoughts.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    talk_log_probs: Tensor | None = None
    base_log_probs: Tensor | None = None
    interpreter_log_probs: Tensor | None = None
    mixing: Tensor | None = None
    rewards: Tensor | None = None
    targets: Tensor | None = None
    is_target: Tensor | None = None
    thought_log_probs: Tensor | None = None
    thought_entropy: Tensor | None = None
    thought_values: Tensor | None = None
    thought_embeds: Tensor | None = None
    context: Tensor | None = None
    log_z: Tensor | None = None


def scored(
    talk: Float[Tensor, "N T S V"], labels: Int[Tensor, "N T"], attention_mask: Tensor | None
) -> dict[str, Tensor]:
    """Rewards of thoughts and the loss, of labels that are shifted here: parts of a `ReasonerOutput`."""
    following = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], 1)
    is_target = following != IGNORED
    if attention_mask is not None:
        real = attention_mask.bool()
        is_target[:, :-1] &= real[:, 1:] & real[:, :-1]
    targets = following.masked_fill(~is_target, 0)
    at_label = targets[:, :, None, None].expand(-1, -1, talk.shape[2], 1)
    rewards = talk.gather(-1, at_label).squeeze(-1).masked_fill(~is_target[..., None], 0.0)
    loss = -log_mean_exp(rewards, 2)[is_target].sum() / is_target.sum().clamp(min=1)
    return {"loss": loss, "rewards": rewards, "targets": targets, "is_target": is_target}
