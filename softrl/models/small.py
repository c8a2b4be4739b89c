"""Small transformers that train from scratch on a CPU in minutes: a Llama built from a configuration.

In float32. Weights are normal with standard deviation 1 / sqrt(width), as keeps the size of what passes through a
matrix, where transformers' own 0.02 is meant for widths in the thousands: with it one layer of width 64 had not begun
to learn a hop of pointer chasing after 750 steps; with this one it needs 250.

Left out: the laboratory's tiny models in float64, which are not for training: `softrl/studies/problems.py`.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

_MLP_RATIO = 8 / 3  # Llama's: three matrices then have as many weights as two of ratio 4


def small_llama(
    tokenizer: PreTrainedTokenizerBase,
    width: int = 128,
    layers: int = 5,
    heads: int = 4,
    context_length: int = 128,
    seed: int = 0,
    initializer_range: float | None = None,
) -> LlamaForCausalLM:
    """A Llama with tied embeddings and random weights; the defaults have about 1M parameters with 84 characters.

    Args:
        tokenizer: whose vocabulary and special tokens it gets.
        width: D; a multiple of twice `heads`, for rotary positions.
        layers: from 1.
        heads: attention heads, from 1, each with its own keys and values.
        context_length: `max_position_embeddings`, which generation goes by; thoughts count.
        seed: of the weights; the global random state is left as it was.
        initializer_range: standard deviation of the weights; None for 1 / sqrt(width).
    Raises:
        ValueError: a number out of range, or a width that the heads do not divide.
    """
    numbers = {"width": width, "layers": layers, "heads": heads, "context_length": context_length}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, got {number!r}; choose another {name}")
    if width % (2 * heads):
        raise ValueError(
            f"width must be a multiple of 2 * heads = {2 * heads}, got {width}; choose {_next(width, 2 * heads)}, or "
            "other heads"
        )
    deviation = width**-0.5 if initializer_range is None else initializer_range
    if not deviation > 0.0:
        raise ValueError(f"initializer_range is a standard deviation and must be positive, got {initializer_range}")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=_next(int(width * _MLP_RATIO), 8),
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=context_length, tie_word_embeddings=True, initializer_range=deviation,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _next(number: int, step: int) -> int:
    """The least multiple of `step` that is not below the number."""
    return -(-number // step) * step
