"""Rewards for studies: small, differentiable, and each with one property that decides which estimator wins.

They know tokens by id only; what a user trains on is in `softrl.rewards`.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from softrl.rewards.base import one_hot_tokens
from softrl.types import SoftTokens


class StudyReward(ABC):
    """A reward given by its soft face; the hard one is that of one-hot tokens."""

    name = "study"
    vocab_size: int | None = None

    @abstractmethod
    def soft(self, tokens: SoftTokens, **columns: object) -> Float[Tensor, "N"]:
        """R of soft tokens."""

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: object) -> Float[Tensor, "N"]:
        """R of token ids."""
        tokens = one_hot_tokens(ids, mask)
        return self.soft(tokens.with_weights(tokens.weights.to(self.dtype)))

    @property
    def dtype(self) -> torch.dtype:
        """Of the reward's own numbers."""
        return torch.float64


def _scored(tokens: SoftTokens, values: Float[Tensor, "V"]) -> Float[Tensor, "N T"]:
    """`s_t Σ_k q_tk v[id_tk]`."""
    weights = tokens.weights.to(values.dtype)
    return (weights * values[tokens.ids]).sum(-1) * tokens.survival.to(values.dtype)


class AdditiveReward(StudyReward):
    """`Σ_t s_t u·q_t`: linear in every token."""

    name = "additive"

    def __init__(self, vocab_size: int, seed: int = 0):
        self.vocab_size = vocab_size
        self.values = _normal(seed, vocab_size)

    def soft(self, tokens: SoftTokens, **columns: object) -> Float[Tensor, "N"]:
        return _scored(tokens, self.values).sum(-1)


class PairReward(StudyReward):
    """`tanh(mean u·q) + Σ_t (u·q_t)(v·q_{t+1})`: what a token is worth depends on its neighbours."""

    name = "pair"

    def __init__(self, vocab_size: int, seed: int = 0):
        self.vocab_size = vocab_size
        self.first, self.second = _normal(seed, 2, vocab_size)

    def soft(self, tokens: SoftTokens, **columns: object) -> Float[Tensor, "N"]:
        first, second = _scored(tokens, self.first), _scored(tokens, self.second)
        length = tokens.survival.to(first.dtype).sum(-1).clamp(min=1.0)
        return torch.tanh(first.sum(-1) / length) + (first[:, :-1] * second[:, 1:]).sum(-1)


class SharpReward(StudyReward):
    """`sigmoid(κ (Σ_t s_t u·q_t − c))`: a threshold. The larger κ, the less its slope at a sample says of the jump.

    Args:
        sharpness: κ.
        threshold: c; 0 is about the mean of the sums.
    """

    name = "sharp"

    def __init__(self, vocab_size: int, sharpness: float = 20.0, threshold: float = 0.0, seed: int = 0):
        self.vocab_size = vocab_size
        self.values = _normal(seed, vocab_size)
        self.sharpness = sharpness
        self.threshold = threshold

    def soft(self, tokens: SoftTokens, **columns: object) -> Float[Tensor, "N"]:
        return torch.sigmoid(self.sharpness * (_scored(tokens, self.values).sum(-1) - self.threshold))


class NearlyConstantReward(StudyReward):
    """`offset + spread · R`: a reward whose differences within a prompt nearly vanish beside its level."""

    name = "nearly constant"

    def __init__(self, reward: StudyReward, offset: float = 10.0, spread: float = 1e-3):
        self.vocab_size = reward.vocab_size
        self.reward = reward
        self.offset = offset
        self.spread = spread

    def soft(self, tokens: SoftTokens, **columns: object) -> Float[Tensor, "N"]:
        return self.offset + self.spread * self.reward.soft(tokens)


class OracleLikelihood(StudyReward):
    """Log-likelihood of the completion under a fixed random LSTM, nats: `Σ_t s_t Σ_k q_tk log o(id_tk | q_<t)`.

    The LSTM reads mixtures of its own embeddings, so it is differentiable in what was fed and in what is scored. Its
    weights are standard normal, as in the synthetic task of Yu et al. (2017), arXiv:1609.05473.
    """

    name = "oracle LSTM"

    def __init__(self, vocab_size: int, width: int = 32, seed: int = 0, scale: float = 1.0):
        self.vocab_size = vocab_size
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding(vocab_size, width, dtype=torch.float64)
        self.lstm = nn.LSTM(width, width, batch_first=True, dtype=torch.float64)
        self.head = nn.Linear(width, vocab_size, dtype=torch.float64)
        for module in (self.embedding, self.lstm, self.head):
            for parameter in module.parameters():
                with torch.no_grad():
                    parameter.normal_(0.0, scale, generator=generator)
                parameter.requires_grad_(False)

    def soft(self, tokens: SoftTokens, **columns: object) -> Float[Tensor, "N"]:
        weights = tokens.weights.to(torch.float64)
        fed = (weights[..., None] * self.embedding(tokens.ids)).sum(-2)
        fed = torch.cat([torch.zeros_like(fed[:, :1]), fed[:, :-1]], 1)
        log_probs = self.head(self.lstm(fed)[0]).log_softmax(-1)
        chosen = (weights * log_probs.gather(-1, tokens.ids)).sum(-1)
        return (chosen * tokens.survival.to(chosen.dtype)).sum(-1)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
