"""A discriminator of real and generated completions as a reward: the adversary of `trainers.gan_trainer`.

It reads embeddings, so soft tokens and real ones alike. Left out: its training data, optimiser and checkpoints.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from softrl.data.prompts import prompt_ids
from softrl.models.virtual_tokens import unwrap
from softrl.rewards.base import one_hot_tokens
from softrl.rewards.sequences import mixtures, packed
from softrl.types import SoftTokens


class Discriminator(nn.Module):
    """Log-odds that a completion is real: a mean over its tokens of a small network on a language model's states.

    As a reward: with the best discriminator the log-odds are `log p_data − log π` of a completion, so their mean under
    the policy is minus the reverse KL to the data. The hidden states are of a frozen copy of the policy's first
    layers, without which a few hundred completions teach it nothing that holds on others. They are causal, so what
    stands behind a token has no say in its state, and a token counts by its survival in the mean alone.

    Args:
        model: the policy's causal LM, or a PEFT model around one; its first layers are copied as they are now.
        tokenizer: the policy's, for the prompts, which are read in front of the completions; None to leave them out.
        width: hidden units of the small network.
        num_layers: of the model, whose output is read; 0 reads embeddings, None three fifths of all.
        name: what logs call it.
    Raises:
        ValueError: width or num_layers out of range.
        TypeError: the model keeps its layers where they are not found.
    Source: of frozen features as those of a discriminator: A. Sauer et al. (2021), arXiv 2111.01007; of texts: L. Yu
        et al. (2017), SeqGAN, arXiv 1609.05473.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        width: int = 64,
        num_layers: int | None = None,
        name: str = "discriminator",
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be 1 or more, got {width}")
        self.layers, self.num_layers = _first_layers(unwrap(model).base_model, num_layers)
        config = self.layers.config.get_text_config()
        self.head = nn.Sequential(nn.Linear(config.hidden_size, width), nn.ReLU(), nn.Linear(width, 1))
        self.head.to(torch.promote_types(self.layers.dtype, torch.float32))
        self.tokenizer = tokenizer
        self.name = name
        self.vocab_size: int | None = config.vocab_size

    def train(self, mode: bool = True) -> "Discriminator":
        """The copied layers stay in evaluation mode: dropout would make another reward of it at every call."""
        super().train(mode)
        self.layers.eval()
        return self

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Log-odds of soft completions.

        Raises:
            ValueError: no `prompt` column where prompts are read.
        """
        return self.log_odds(*self.states(tokens, columns))

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Log-odds of token ids."""
        return self.soft(one_hot_tokens(ids, mask), **columns)

    def states(
        self, tokens: SoftTokens, columns: Mapping[str, Any]
    ) -> tuple[Float[Tensor, "N S D"], Float[Tensor, "N S"]]:
        """Hidden states, of unit variance, of prompts with completions behind them, and what each token counts.

        Of a prompt the last token counts, too: its state is what the completion starts from.
        """
        prompts = self._prompts(tokens.ids, columns)
        embedding = self.layers.get_input_embeddings()
        mixed = mixtures(embedding, tokens.ids.masked_fill(~tokens.mask[..., None], 0), tokens.weights)
        embeds = packed([embedding(prompt) for prompt in prompts], mixed, 0.0)
        hidden = self.layers(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)
        states = hidden.hidden_states[self.num_layers].to(self.head[0].weight.dtype)
        counts = [(torch.arange(len(prompt)) == len(prompt) - 1).to(tokens.survival) for prompt in prompts]
        return F.layer_norm(states, states.shape[-1:]), packed(counts, tokens.survival, 0.0).to(states.dtype)

    def log_odds(self, states: Float[Tensor, "N S D"], presence: Float[Tensor, "N S"]) -> Float[Tensor, "N"]:
        """Log-odds of texts whose tokens are present to a degree, in [0, 1]; 0 where nothing is."""
        return (self.head(states).squeeze(-1) * presence).sum(-1) / presence.sum(-1).clamp(min=1.0)

    def _prompts(self, ids: Int[Tensor, "N T K"], columns: Mapping[str, Any]) -> list[Int[Tensor, "_"]]:
        if self.tokenizer is None:
            return [ids.new_zeros(0)] * len(ids)
        if "prompt" not in columns:
            raise ValueError(
                f"reward {self.name!r} reads the prompts, and there is no column 'prompt' among {sorted(columns)}; "
                "pass prompt=[...], or make it without a tokenizer"
            )
        return [ids.new_tensor(prompt_ids(prompt, self.tokenizer)) for prompt in columns["prompt"]]


def _first_layers(decoder: nn.Module, num_layers: int | None) -> tuple[Any, int]:
    """A frozen copy of a decoder up to the layer whose output is read, and the number of that layer."""
    source: Any = decoder
    depth = source.config.get_text_config().num_hidden_layers
    number = round(depth * 3 / 5) if num_layers is None else num_layers
    if not 0 <= number <= depth:
        raise ValueError(f"num_layers must be from 0 to the model's {depth} layers, got {number}")
    lists = [
        name for name, child in source.named_children() if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(lists) != 1:
        raise TypeError(f"{type(decoder).__name__} has no one list of {depth} layers that a discriminator could copy")
    kept = min(number + 1, depth)  # of the last layer of a model transformers gives the normalised output only
    memo = {id(layer): None for layer in getattr(source, lists[0])[kept:]}  # not worth copying
    layers = copy.deepcopy(source, memo)
    setattr(layers, lists[0], getattr(layers, lists[0])[:kept])
    layers.config.get_text_config().num_hidden_layers = kept
    return layers.requires_grad_(False).eval(), number


def discriminator_loss(
    real: Float[Tensor, "N"], generated: Float[Tensor, "N"], label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Mean cross-entropy of log-odds, in nats, real completions towards `1 − label_smoothing`, generated ones to 0.

    Source: one-sided label smoothing, T. Salimans et al. (2016), arXiv 1606.03498, section 3.4.
    """
    of_real = F.binary_cross_entropy_with_logits(real, torch.full_like(real, 1.0 - label_smoothing))
    return (of_real + F.binary_cross_entropy_with_logits(generated, torch.zeros_like(generated))) / 2


def gradient_penalty(
    discriminator: Discriminator,
    real: tuple[Float[Tensor, "N S D"], Float[Tensor, "N S"]],
    generated: tuple[Float[Tensor, "N S D"], Float[Tensor, "N S"]],
    shares: Float[Tensor, "N"],
) -> Float[Tensor, ""]:
    """Mean squared norm of the log-odds' gradient in hidden states between real and generated ones.

    Centred at zero, so that the discriminator is flat where the two meet, which makes the game converge.

    Args:
        discriminator: whose slope is penalised.
        real, generated: states and presence, of the same lengths.
        shares: of the real ones in each mixture, in [0, 1].
    Source: H. Thanh-Tung, T. Tran, S. Venkatesh (2019), arXiv 1902.03984; between samples as in I. Gulrajani et al.
        (2017), arXiv 1704.00028.
    """
    states, presence = (
        torch.lerp(of_generated, of_real, shares.to(of_real).reshape(-1, *[1] * (of_real.dim() - 1)))
        for of_real, of_generated in zip(real, generated, strict=True)
    )
    states = states.detach().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator.log_odds(states, presence.detach()).sum(), states, create_graph=True)
    return slope.square().sum((1, 2)).mean()
