"""A discriminator of real and generated completions as a reward: the adversary of `trainers.gan`.

It reads embeddings, so soft tokens and real ones alike. Left out: its training data, optimiser and checkpoints.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from softrl.data.prompts import prompt_ids
from softrl.rewards.base import one_hot_tokens
from softrl.rewards.sequences import mixtures, packed
from softrl.types import SoftTokens

_WINDOWS = (1, 2, 3, 4)  # tokens


class Discriminator(nn.Module):
    """Log-odds that a completion is real, by convolutions over embeddings and a maximum over time (Kim 2014).

    As a reward: with the best discriminator the log-odds are `log p_data − log π` of a completion, so their mean under
    the policy is minus the reverse KL to the data. Under soft stopping a token's features count by its survival; they
    are not negative, so that a token which is absent never is the maximum.

    Args:
        embedding: of the policy, on its token ids; a frozen copy of its weight is kept.
        tokenizer: the policy's, for the prompts, which are read in front of the completions; None to leave them out.
        width: features of each window length.
        name: what logs call it.
    Source: Y. Kim (2014), arXiv 1408.5882; as a discriminator of texts: L. Yu et al. (2017), SeqGAN, arXiv 1609.05473.
    """

    def __init__(
        self,
        embedding: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        width: int = 64,
        name: str = "discriminator",
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be 1 or more, got {width}")
        source: Any = embedding
        weight = source.weight.detach().clone()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        # Embeddings of trained models are small and of different scales: the convolutions see unit deviations.
        self.embedding = nn.Embedding.from_pretrained(weight / weight.std(), freeze=True)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(weight.shape[1], width, length, padding=length - 1) for length in _WINDOWS
        )
        self.head = nn.Linear(width * len(_WINDOWS), 1)
        self.to(weight.dtype)
        self.tokenizer = tokenizer
        self.name = name
        self.vocab_size: int | None = len(weight)

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Log-odds of soft completions.

        Raises:
            ValueError: no `prompt` column where prompts are read.
        """
        return self.log_odds(*self.embedded(tokens, columns))

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Log-odds of token ids."""
        return self.soft(one_hot_tokens(ids, mask), **columns)

    def embedded(
        self, tokens: SoftTokens, columns: Mapping[str, Any]
    ) -> tuple[Float[Tensor, "N S D"], Float[Tensor, "N S"]]:
        """Embeddings of prompts with completions behind them, and what each token counts."""
        prompts = self._prompts(tokens.ids, columns)
        ids = tokens.ids.masked_fill(~tokens.mask[..., None], 0)
        mixed = mixtures(self.embedding, ids, tokens.weights)
        fronts = [self.embedding(prompt) for prompt in prompts]
        certain = [tokens.survival.new_ones(len(prompt)) for prompt in prompts]
        return packed(fronts, mixed, 0.0), packed(certain, tokens.survival, 0.0).to(mixed.dtype)

    def log_odds(self, embeds: Float[Tensor, "N S D"], presence: Float[Tensor, "N S"]) -> Float[Tensor, "N"]:
        """Log-odds of embedded texts whose tokens are present to a degree, in [0, 1]."""
        texts = (embeds * presence[..., None]).transpose(1, 2)
        pooled = []
        for convolution, length in zip(self.convolutions, _WINDOWS, strict=True):
            last = F.pad(presence, (0, length - 1))  # a window counts by its last token; behind the text it does not
            pooled.append((convolution(texts).relu() * last[:, None]).amax(-1))
        return self.head(torch.cat(pooled, -1)).squeeze(-1)

    def trainable(self) -> list[nn.Parameter]:
        """What its optimiser updates: all but the embedding."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _prompts(self, ids: Int[Tensor, "N T K"], columns: Mapping[str, Any]) -> list[Int[Tensor, "_"]]:
        if self.tokenizer is None:
            return [ids.new_zeros(0)] * len(ids)
        if "prompt" not in columns:
            raise ValueError(
                f"reward {self.name!r} reads the prompts, and there is no column 'prompt' among {sorted(columns)}; "
                "pass prompt=[...], or make it without a tokenizer"
            )
        return [ids.new_tensor(prompt_ids(prompt, self.tokenizer)) for prompt in columns["prompt"]]


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
    """Mean squared norm of the log-odds' gradient in embeddings between real and generated ones.

    Centred at zero, so that the discriminator is flat where the two meet, which makes the game converge.

    Args:
        discriminator: whose slope is penalised.
        real, generated: embeddings and presence, of the same lengths.
        shares: of the real ones in each mixture, in [0, 1].
    Source: H. Thanh-Tung, T. Tran, S. Venkatesh (2019), arXiv 1902.03984; between samples as in I. Gulrajani et al.
        (2017), arXiv 1704.00028.
    """
    embeds, presence = (
        torch.lerp(of_generated, of_real, shares.to(of_real).reshape(-1, *[1] * (of_real.dim() - 1)))
        for of_real, of_generated in zip(real, generated, strict=True)
    )
    embeds = embeds.detach().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator.log_odds(embeds, presence.detach()).sum(), embeds, create_graph=True)
    return slope.square().sum((1, 2)).mean()
