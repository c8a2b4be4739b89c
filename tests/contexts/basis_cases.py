"""Random contexts for basis-aware truncation: W's rows, probabilities, and candidates below τ."""

from dataclasses import dataclass

import torch
from torch import Tensor

from softrl.contexts.basis_thresholds import Programs


@dataclass(frozen=True)
class Case:
    directions: Tensor
    probs: Tensor
    tau: float
    tokens: Tensor

    @property
    def programs(self) -> Programs:
        return Programs(self.directions, self.probs[None], torch.tensor([self.tau], dtype=torch.float64))


def random_case(seed: int, vocab_size: int, num_directions: int, tau: float, num_tokens: int) -> Case:
    """Logits are partly linear in the directions, as a model's are; candidates are spread over [τ/6, τ]."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(vocab_size, num_directions, generator=generator, dtype=torch.float64)
    directions *= torch.linspace(3.0, 0.5, num_directions, dtype=torch.float64)
    state = torch.randn(num_directions, generator=generator, dtype=torch.float64) / num_directions**0.5
    noise = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
    probs = (directions @ state * (seed % 3) / 2 + 1.5 * noise).softmax(-1)
    within = torch.nonzero((probs < tau) & (probs > tau / 6))[:, 0]
    order = torch.randperm(len(within), generator=generator)[:num_tokens]
    return Case(directions, probs, tau, within[order])
