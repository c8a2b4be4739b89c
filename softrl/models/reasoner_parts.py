"""Parts of the latent reasoner: cores that read, and heads that predict."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedConfig

from softrl.models.gru import GRUConfig, GRUModel
from softrl.models.reasoner_config import ReasonerConfig


class ReaderCore(nn.Module):
    """A decoder with its token embeddings and no head, in the shape of a causal LM, as `Policy` reads one.

    Args:
        config: of the whole model.
        width: D of this core.
    """

    def __init__(self, config: ReasonerConfig, width: int):
        super().__init__()
        self.decoder = gru(config, width) if config.core == "gru" else llama(config, width)

    @property
    def base_model(self) -> nn.Module:
        """What `Policy` calls the decoder."""
        return self.decoder

    @property
    def config(self) -> PreTrainedConfig:
        """The decoder's."""
        return self.decoder.config

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings."""
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """What `Policy` asks for and nobody calls: heads belong to the whole model."""
        return self.decoder


def gru(config: ReasonerConfig, width: int) -> GRUModel:
    """Stacked GRU cells; embeddings of unit variance, which cells of any width take as torch initialises them."""
    return GRUModel(
        GRUConfig(
            vocab_size=config.vocab_size, hidden_size=width, num_hidden_layers=config.num_hidden_layers,
            initializer_range=1.0,
        )
    )  # fmt: skip


def llama(config: ReasonerConfig, width: int) -> LlamaModel:
    """A small Llama with weights of `models.small`: standard deviation 1 / sqrt(width)."""
    heads = config.num_attention_heads
    return LlamaModel(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=width, intermediate_size=-(-8 * width // 24) * 8,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=config.max_position_embeddings, initializer_range=width**-0.5,
        )
    )  # fmt: skip


def lm_head(config: ReasonerConfig, width: int) -> nn.Module:
    """From states of that width to logits: linear, or two layers with or without something between them."""
    last = nn.Linear(width, config.vocab_size)
    if config.simple_lm_head:
        return last
    between = nn.GELU() if config.head_activation == "gelu" else nn.Identity()
    return nn.Sequential(nn.Linear(width, width), between, last)


def projection(width: int, other: int) -> nn.Module:
    """A linear map where widths differ, and nothing where they do not."""
    return nn.Identity() if width == other else nn.Linear(width, other, bias=False)


def log_mean_exp(values: Float[Tensor, "*batch"], dim: int) -> Tensor:
    """`log (1/S) Σ_s exp v_s` along an axis."""
    return values.logsumexp(dim) - torch.tensor(values.shape[dim], dtype=values.dtype).log().item()
