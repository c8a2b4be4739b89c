"""Which models basis-aware truncation is about: linear heads without bias, cross-entropy, temperature 1."""

import warnings
from pathlib import Path

from huggingface_hub import ModelCard
from torch import nn

from softrl.models.policy import Policy

# Tags of model cards, TRL's and ours, of training that is not maximum likelihood of text.
_REWARD_TAGS = frozenset({
    "grpo", "rloo", "ppo", "dpo", "online-dpo", "nash-md", "xpo", "kto", "orpo", "cpo", "bco", "async-grpo",
    "soft-rollout", "reinforce", "text-gan", "reinforce-gan", "listwise-preference",
})  # fmt: skip


def check_basis_model(policy: Policy) -> None:
    """Refuse models that the theorem is not about.

    Raises:
        ValueError: a temperature other than 1, a head that is not one matrix, a bias, or capped logits.
    Warns:
        UserWarning: the model's card says that it was tuned by rewards or preferences.
    """
    name, head = type(policy.causal_lm).__name__, policy.causal_lm.get_output_embeddings()
    if policy.temperature != 1.0:
        raise ValueError(
            f"basis-aware truncation is about probabilities at temperature 1, got {policy.temperature}; leave the "
            "sampling temperature at 1, and cool the kept tokens instead (a relaxation's temperature)"
        )
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{name}: basis-aware truncation needs a linear head without an adapter, got "
            f"{type(head).__module__}.{type(head).__name__}; train other modules, or use top_p or min_p"
        )
    if head.bias is not None:
        raise ValueError(
            f"{name}: its head has a bias, for which basis-aware truncation is not derived; use top_p or min_p"
        )
    cap = getattr(policy.causal_lm.config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        raise ValueError(
            f"{name} caps its logits (final_logit_softcapping={cap}), so they are not linear in the state and W's "
            "constraints do not hold; use top_p or min_p, or a model without the cap"
        )
    if tags := reward_tags(policy.causal_lm.config.name_or_path):
        warnings.warn(
            f"{policy.causal_lm.config.name_or_path} was tuned by rewards or preferences (its card has the tags "
            f"{tags}); the theorem behind basis-aware truncation assumes cross-entropy, so acceptances prove nothing",
            stacklevel=3,
        )


def reward_tags(folder: str) -> list[str]:
    """Tags of a saved model's card that say it was tuned by something else than cross-entropy; none without a card."""
    card = Path(folder) / "README.md" if folder else None
    if card is None or not card.is_file():
        return []
    try:
        data = ModelCard.load(card).data.to_dict()
    except ValueError:  # a file of that name that is no model card
        return []
    return sorted(_REWARD_TAGS & {str(tag).lower() for tag in data.get("tags") or ()})
