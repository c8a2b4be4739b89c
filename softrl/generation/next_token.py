"""How the next token is chosen from a distribution: its argmax, or a draw from what truncation rules leave of it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softrl.tokens.noise import SequenceRandom
from softrl.tokens.truncation import SupportRule, Truncation, chosen, largest


@dataclass(frozen=True)
class NextToken:
    """The temperature comes first, as a part of the distribution, then top-k, then the nucleus of what is left.

    Args:
        greedy: take the likeliest token; the other settings then do nothing.
        temperature: the distribution is `softmax(log p / temperature)`.
        top_k: keep the k likeliest tokens (and those that are as likely as the k-th); None keeps all.
        top_p, min_p: see `Truncation`.
        support: a rule in the place of these three. It judges the distribution before the temperature.
    Raises:
        ValueError: a number outside its range, or another rule beside `support`.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    support: SupportRule | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {self.temperature}; for the likeliest, pass greedy")
        if self.support is not None and self.top_k is not None:
            raise ValueError(f"top_k={self.top_k} beside support: give it alone, top_k=None")
        _ = self.truncation  # which checks the others

    @property
    def truncation(self) -> Truncation:
        """Nucleus rules, and k as a number."""
        return Truncation(1 if self.top_k is None else self.top_k, self.top_p, self.min_p, self.support)

    def choose(self, log_probs: Float[Tensor, "N V"], random: SequenceRandom) -> Int[Tensor, "N"]:
        """A token a row; a draw takes V numbers of its row's stream, whatever the rules leave."""
        if self.greedy:
            return log_probs.argmax(-1)
        logits = log_probs / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = largest(logits, self.top_k)[0][:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        judged = logits if self.support is None else log_probs
        return chosen(judged, self.truncation, logits + random.gumbel(logits.shape[-1], logits.dtype))
