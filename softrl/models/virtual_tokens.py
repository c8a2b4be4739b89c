"""Virtual tokens: what PEFT's prompt learning puts before every prompt, as a policy feeds it.

Prompt tuning and P-tuning learn embeddings, prefix tuning keys and values of every layer. Both stand before the
prompt, all of them seen by every token. Positions count the virtual tokens and then the real ones. That is what PEFT's
own forward does with a row that has no padding; with padding on the left it counts the padding as well (prompt tuning
and P-tuning; it discards `position_ids`), so that a row's logits there depend on how long the others are. Here a row
gives the same numbers in every batch: those of PEFT alone.

Left out: prefix tuning of a model with a sliding window on padded prompts (the window counts the padding, as
`Policy.honours_padding` finds out); CPT, multitask prompt tuning and cartridges, whose forwards need more than a
prompt; virtual tokens around a model that has another adapter. ZeRO-3 and FSDP2 are untested.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from peft import PeftType
from torch import Tensor

_EMBEDDINGS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)
_KEYS_AND_VALUES = (PeftType.PREFIX_TUNING,)


def unwrap(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper (its adapters stay active); other models as they are.

    Raises:
        ValueError: the adapter prepends virtual tokens (prefix or prompt tuning), which our forwards would leave out.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"peft type {model.active_peft_config.peft_type} prepends virtual tokens to the prompt, which would be "
            "left out here; use LoRA or another adapter that changes the layers"
        )
    return model.get_base_model()


class VirtualTokens:
    """Those of a model, none for most models.

    Args:
        model: any model; those of PEFT may have virtual tokens.
    Raises:
        ValueError: a kind that softrl does not feed, or another adapter inside.
    """

    def __init__(self, model: Any):
        self.model = model
        self.peft_type: PeftType | None = None
        if not hasattr(model, "get_base_model") or not model.active_peft_config.is_prompt_learning:
            return
        self.peft_type = model.active_peft_config.peft_type
        if self.peft_type not in (*_EMBEDDINGS, *_KEYS_AND_VALUES):
            raise ValueError(
                f"peft type {self.peft_type} prepends virtual tokens to the prompt in a way that softrl's rollouts do "
                "not; use PromptTuningConfig, PromptEncoderConfig (P-tuning), PrefixTuningConfig, or LoRA"
            )
        if hasattr(self.model.get_base_model(), "get_base_model"):
            raise ValueError(
                "the model has virtual tokens around another adapter, which PEFT freezes; merge that one first: "
                "model.merge_and_unload()"
            )

    def refuse(self, where: str) -> None:
        """Raise ValueError if there are any, where prompts are fed without going through `Policy.hidden`."""
        if self.exist:
            raise ValueError(
                f"peft type {self.peft_type} prepends virtual tokens to the prompt, which {where} leaves out; use "
                "LoRA or another adapter that changes the layers"
            )

    def check_state(self, is_keys_and_values: bool, model_name: str) -> None:
        """Raise ValueError for prefix tuning of a model whose state is not keys and values."""
        if self.are_keys_and_values and not is_keys_and_values:
            raise ValueError(
                f"prefix tuning learns keys and values, but the state of {model_name} is another one; use "
                "PromptTuningConfig or PromptEncoderConfig"
            )

    @property
    def exist(self) -> bool:
        """Whether the model has any, switched off or not."""
        return self.peft_type is not None

    @property
    def are_keys_and_values(self) -> bool:
        """Prefix tuning: they are in every layer's cache and have no embeddings."""
        return self.peft_type in _KEYS_AND_VALUES

    @property
    def count(self) -> int:
        """How many there are before a prompt now: 0 inside `model.disable_adapter()`."""
        if not self.exist or not self.model.has_active_enabled_adapter:
            return 0
        return self.model.active_peft_config.num_virtual_tokens

    def prepended(
        self, embeds: Float[Tensor, "N P D"], mask: Bool[Tensor, "N P"]
    ) -> tuple[Float[Tensor, "N fed D"], Bool[Tensor, "N slots"]]:
        """What is fed for the prompts, and the mask of all slots up to there; differentiable in the virtual tokens.

        Embeddings go between the padding and the prompt, so that no padding lies between them: a sliding window or a
        recurrent state would see it. Keys and values have slots, the first ones, and are not fed.
        """
        if self.count == 0:
            return embeds, mask
        mask = torch.cat([mask.new_ones(mask.shape[0], self.count), mask], 1)
        if self.are_keys_and_values:
            return embeds, mask
        virtual = self.model.get_prompt(batch_size=embeds.shape[0])
        embeds = torch.cat([virtual.to(embeds.dtype), embeds], 1)
        mask, order = mask.long().sort(dim=1, stable=True)
        return embeds.gather(1, order[..., None].expand_as(embeds)), mask.bool()

    def past(self, num_rows: int) -> list[tuple[Float[Tensor, "N H n d"], Float[Tensor, "N H n d"]]] | None:
        """Keys and values of every layer, differentiable; None where there are none.

        Raises:
            ValueError: layers that keep fewer keys than there are virtual tokens (a short sliding window).
        """
        if not self.are_keys_and_values or self.count == 0:
            return None
        pairs = [(layer.keys, layer.values) for layer in self.model.get_prompt(batch_size=num_rows).layers]
        lengths = {keys.shape[2] for keys, _ in pairs}
        if lengths != {self.count}:
            raise ValueError(
                f"{self.count} virtual tokens do not fit into every layer, which keep {sorted(lengths)}; use fewer "
                "than the model's sliding window, or PromptTuningConfig"
            )
        return pairs
