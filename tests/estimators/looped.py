"""An independent derivative of J: transformers' own forward on the whole prefix at every step, all in the graph.

Shares with softrl only the recorded support and the relaxation's weights (which have tests of their own): no cache, no
cotangents, no chunks, no surrogate.
"""

import torch
from torch import Tensor, nn

from softrl.tokens.relaxation import Relaxation
from softrl.types import Rollout


def looped_objective(
    model: nn.Module,
    rollout: Rollout,
    relaxation: Relaxation,
    reward,
    temperature: float = 1.0,
    kl_weight: float = 0.0,
    entropy_weight: float = 0.0,
    reference: nn.Module | None = None,
) -> Tensor:
    """J summed over sequences, differentiable in every parameter of the model."""
    mask = rollout.prompts.mask
    policy_inputs, reference_inputs = _embedded(model, rollout.prompts.ids), None
    if reference is not None:
        reference_inputs = _embedded(reference, rollout.prompts.ids)
    fed, total = [], torch.zeros((), dtype=torch.float64)
    survival = torch.ones(rollout.mask.shape[0], dtype=torch.float64)
    for step in range(rollout.mask.shape[1]):
        support = rollout.support.at(slice(None), step)
        logits = _last_logits(model, policy_inputs, mask) / temperature
        log_probs = logits.log_softmax(-1)
        present = rollout.mask[:, step].double()
        if rollout.eos_ids:
            present = present * survival
        total = total + entropy_weight * (-(log_probs.exp() * log_probs).sum(-1) * present).sum()
        if reference is not None:
            other = (_last_logits(reference, reference_inputs, mask) / temperature).log_softmax(-1)
            total = total - kl_weight * ((log_probs.exp() * (log_probs - other)).sum(-1) * present).sum()
        p = relaxation.weights(logits.gather(-1, support.ids), support)
        q = p
        if relaxation.feeds_one_hot:
            q = torch.nn.functional.one_hot(support.choice, p.shape[-1]).double() + p - p.detach()
        fed.append(q)
        survival = survival * (1.0 - sum((q * (support.ids == eos)).sum(-1) for eos in rollout.eos_ids))
        policy_inputs = torch.cat([policy_inputs, _mixed(model, support.ids, q)], 1)
        if reference is not None:
            reference_inputs = torch.cat([reference_inputs, _mixed(reference, support.ids, q)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return total + reward.soft(rollout.soft_tokens.with_weights(torch.stack(fed, 1))).sum()


def _embedded(model: nn.Module, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids)


def _mixed(model: nn.Module, ids: Tensor, q: Tensor) -> Tensor:
    return (q[..., None] * _embedded(model, ids)).sum(-2)[:, None]


def _last_logits(model: nn.Module, inputs: Tensor, mask: Tensor) -> Tensor:
    arguments = {"inputs_embeds": inputs, "attention_mask": mask.long()}
    if model.config.model_type in ("llama", "gpt2", "gemma3_text"):
        arguments["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if model.config.model_type != "softrl_gru":
        arguments["use_cache"] = False
    return model(**arguments).logits[:, -1]
