"""transformers' `generate` of a model that has no cache: every step reads the whole history anew.

transformers keeps a cache where it is asked to (`use_cache=True`, a `GenerationConfig` that says so), feeds the newest
token alone, and drops embeddings that a text began with after the first step. A model that reads histories would go on
from one token, without a word. Here each step gets all of it, and what cannot be right is refused.

Left out: a cache that holds something already, chunks of a prompt, and assisted decoding, which need a real one.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_PASSED_ON = ("memory_of", "logits_to_keep")


class WholeHistoryGeneration:
    """What a model without a cache does in `generate`; stands before `GenerationMixin` among a model's bases."""

    get_input_embeddings: Any

    def prepare_inputs_for_generation(
        self,
        input_ids: Int[Tensor, "N n"],
        attention_mask: Int[Tensor, "N m"] | None = None,
        inputs_embeds: Float[Tensor, "N p D"] | None = None,
        is_first_iteration: bool | None = False,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """A step's arguments: all ids, or the embeddings that the text began with and those of what followed.

        Args:
            input_ids: prompt and text; with `inputs_embeds` the text alone.
            attention_mask: of the whole history; None for all ones.
            inputs_embeds: of the prompt.
            is_first_iteration: of a call of `generate`.
            cache, past_key_values: empty ones are ignored.
            kwargs: others of `generate`; of these only `_PASSED_ON` are.
        Raises:
            ValueError: a cache that holds something, or a prompt as ids and as embeddings.
        """
        refuse_cache(cache, past_key_values)
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if inputs_embeds is not None:
            if is_first_iteration and input_ids.shape[1]:
                raise ValueError("pass either input_ids or inputs_embeds to generate, exactly one of the two")
            written = self.get_input_embeddings()(input_ids).to(inputs_embeds.dtype)
            inputs = {"inputs_embeds": torch.cat([inputs_embeds, written], 1)}
        inputs |= {name: kwargs[name] for name in _PASSED_ON if name in kwargs}
        return {**inputs, "attention_mask": attention_mask, "use_cache": False}

    def _prefill(self, input_ids: Tensor, generation_config: Any, *others: Any, **settings: Any) -> Any:
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} needs a cache of the chunks before, which "
                "softAR models do not keep; leave it out"
            )
        return super()._prefill(input_ids, generation_config, *others, **settings)  # type: ignore[misc]


def refuse_cache(*caches: Any) -> None:
    """Raise ValueError on a cache that holds something: the history would begin behind it."""
    for cache in caches:
        count = getattr(cache, "get_seq_length", lambda cache=cache: len(cache or ()))()
        if count:
            raise ValueError(
                f"past_key_values (cache) holds {count} tokens or layers, and softAR models read whole histories; "
                "pass all ids or embeddings and no cache, or decode with softrl.generation.soft_ar.soft_ar_generate"
            )
