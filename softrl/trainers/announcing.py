"""What tells a model that soft tokens follow: learned vectors before the prompt, or tokens around them.

Left out: conversations with think tokens, whose chat template would have to put them where they belong.
"""

from copy import copy
from dataclasses import replace
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig
from transformers import PreTrainedTokenizerBase

from softrl.data.texts import INDEX_COLUMN
from softrl.generation.soft_settings import SoftDecoding
from softrl.models.think_tokens import ThinkTokens, add_think_tokens, trainable_rows
from softrl.trainers.loading import load_model


def with_soft_prefix(args: Any, model: Any, peft_config: PeftConfig | None) -> PeftConfig | None:
    """The adapter that is trained: `soft_prefix_tokens` vectors before the prompt, or the caller's own.

    They start as embeddings of tokens that PEFT draws from the vocabulary, by the run's seed.

    Raises:
        ValueError: another adapter beside them.
    """
    if args.soft_prefix_tokens == 0:
        return peft_config
    if peft_config is not None or isinstance(model, PeftModel):
        kind = type(peft_config if peft_config is not None else model).__name__
        raise ValueError(
            f"soft_prefix_tokens={args.soft_prefix_tokens} is an adapter of its own (prompt tuning) and does not go "
            f"beside another one, here a {kind}; leave out one of the two (on the command line: use_peft)"
        )
    return PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=args.soft_prefix_tokens, prompt_tuning_init="SAMPLE_VOCAB"
    )


def with_think_tokens(
    args: Any,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None,
    quantization_config: Any = None,
) -> tuple[Any, PeftConfig | None, ThinkTokens]:
    """Model with both tokens, loaded if it is a name; the adapter, which trains their rows too; and the tokens.

    Raises:
        ValueError: an adapter that leaves the rows as they are: one that is there already, or another than LoRA.
    """
    if isinstance(model, str):
        model = load_model(model, args, quantization_config)
        args.model_init_kwargs = None  # they are used now, and the host would warn that it cannot
    tokens = add_think_tokens(model, tokenizer)
    if peft_config is None:
        return model, None, tokens
    if not isinstance(peft_config, LoraConfig) or peft_config.trainable_token_indices is not None:
        raise ValueError(
            "think_tokens trains the rows of its tokens, by trainable_token_indices of LoRA: pass a LoraConfig "
            f"without them or no peft_config, got {type(peft_config).__name__}"
        )
    peft_config = copy(peft_config)
    peft_config.trainable_token_indices = trainable_rows(model, tokens)
    return model, peft_config, tokens


def with_thoughts(dataset: Any, tokens: ThinkTokens | None, name: str) -> Any:
    """The data set, or each of several, its prompts opening the thinking and its completions closing it.

    A prompt that ends by the opening token, or a completion that has the closing one already, say before an answer,
    stays as it is. Rows that this trainer has indexed before are not touched again.

    Raises:
        ValueError: rows that are not text with `prompt` and `completion`.
    """
    if tokens is None or dataset is None:
        return dataset
    if isinstance(dataset, dict):
        return {key: with_thoughts(each, tokens, f"{name}[{key!r}]") for key, each in dataset.items()}
    if not isinstance(dataset, Dataset) or INDEX_COLUMN in dataset.column_names:
        return dataset
    columns = ("prompt", "completion")
    if any(each not in dataset.column_names or not isinstance(dataset[0][each], str) for each in columns):
        raise ValueError(
            f"think_tokens puts tokens around completions: {name} needs columns `prompt` and `completion` of text, "
            f"and has {dataset.column_names}; for conversations or other formats put {tokens.start} and {tokens.end} "
            "into the texts, and add them to model and tokenizer by softrl.models.think_tokens.add_think_tokens"
        )
    start, end = tokens.start, tokens.end

    def around(row: dict[str, str]) -> dict[str, str]:
        prompt, completion = row["prompt"], row["completion"]
        return {
            "prompt": prompt if prompt.endswith(start) else prompt + start,
            "completion": completion if end in completion else completion + end,
        }

    return dataset.map(around)


def between_think_tokens(decoding: SoftDecoding, tokens: ThinkTokens | None) -> SoftDecoding:
    """Decoding that thinks between the tokens from the beginning, if there are any."""
    if tokens is None:
        return decoding
    return replace(decoding, think_start=(tokens.start_id,), think_end=(tokens.end_id,), force_thinking=True)
