"""A reward that is linear in tokens: one weight for each token of the policy's vocabulary.

Exactly differentiable in soft tokens, shares the policy's vocabulary, costs nothing, and is easily hacked: a policy
may learn to repeat the best token. Judge what it does to texts with another classifier (`judge.py`).
"""

import json
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from softrl.assets import write_atomically
from softrl.masking import survival_mean, survival_sum
from softrl.rewards.base import TrlReward, as_trl
from softrl.types import SoftTokens

Link = Literal["sigmoid", "identity"]
Pooling = Literal["mean", "sum"]


class TokenLinearReward(nn.Module):
    """`link(bias + pool_t Σ_k q_tk · w[id_tk])`, tokens pooled by survival; an empty sequence scores `link(bias)`.

    Args:
        weight: one number per token id, shape [V].
        bias: a scalar.
        name: what logs call it.
        link: "sigmoid" gives the probability that a logistic regression assigns, "identity" its log-odds.
        pooling: "mean" over the tokens, which does not grow with length, or "sum".
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "V"],
        bias: Float[Tensor, ""] | float,
        name: str = "sentiment",
        link: Link = "sigmoid",
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__()
        if link not in get_args(Link):
            raise ValueError(f"link must be one of {get_args(Link)}, got {link!r}")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {get_args(Pooling)}, got {pooling!r}")
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", torch.as_tensor(bias, dtype=weight.dtype).detach().clone())
        self.name = name
        self.link = link
        self.pooling = pooling
        self.vocab_size: int | None = len(weight)

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of soft tokens; float64 weights give float64 rewards, all others float32."""
        values = self._token_values(tokens.ids, tokens.mask[..., None], tokens.weights.dtype)
        return self._pooled((tokens.weights.to(values.dtype) * values).sum(-1), tokens.survival.to(values.dtype))

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """Rewards of token ids, in the precision of the token weights."""
        values = self._token_values(ids, mask, self.weight.dtype)
        return self._pooled(values, mask.to(values.dtype))

    def as_trl(self, tokenizer: PreTrainedTokenizerBase) -> TrlReward:
        """This reward as a function for TRL's own trainers."""
        return as_trl(self, tokenizer)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise a ValueError unless a policy with this many token ids shares the vocabulary of the reward."""
        if vocab_size != self.vocab_size:
            raise ValueError(
                f"reward {self.name!r} knows {self.vocab_size} token ids, the policy has {vocab_size}: their "
                "vocabularies differ. Fit the reward with the policy's tokenizer "
                "(softrl.rewards.fit.sentiment_reward(<tokenizer or model path>)), or choose the policy that it was "
                "fitted for."
            )

    def save(self, path: str | Path) -> None:
        """Write it as one safetensors file, with its settings as JSON in the header; whole or not at all."""
        settings = {"name": self.name, "link": self.link, "pooling": self.pooling}
        tensors = {"weight": self.weight.cpu().contiguous(), "bias": self.bias.cpu()}
        with write_atomically(path) as temporary:
            save_file(tensors, temporary, metadata={"token_linear": json.dumps(settings)})

    @classmethod
    def load(cls, path: str | Path) -> "TokenLinearReward":
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if "token_linear" not in metadata:
                    raise ValueError(f"{path} is no token-linear reward: its header has no 'token_linear' settings")
                return cls(file.get_tensor("weight"), file.get_tensor("bias"), **json.loads(metadata["token_linear"]))
        except SafetensorError as error:
            raise ValueError(f"{path} is no token-linear reward: it is no safetensors file ({error})") from error

    def _token_values(self, ids: Int[Tensor, "..."], mask: Bool[Tensor, "..."], dtype: torch.dtype) -> Tensor:
        """The weight of each id; ids of masked steps may be anything."""
        vocab_size = cast(int, self.vocab_size)
        ids = ids.masked_fill(~mask, 0)
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if outside.numel():
            raise ValueError(
                f"token id {int(outside[0])} is outside the {vocab_size} ids of reward {self.name!r}: "
                "the vocabularies of policy and reward differ"
            )
        precision = torch.promote_types(dtype, torch.float32)
        return self.weight.to(device=ids.device, dtype=precision)[ids]

    def _pooled(self, values: Float[Tensor, "N T"], survival: Float[Tensor, "N T"]) -> Float[Tensor, "N"]:
        pool = survival_mean if self.pooling == "mean" else survival_sum
        log_odds = self.bias.to(values) + pool(values, survival)
        return log_odds.sigmoid() if self.link == "sigmoid" else log_odds
