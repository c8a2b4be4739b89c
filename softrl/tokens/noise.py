"""Random numbers that belong to a sequence, not to a batch.

Every sequence draws from a generator of its own, keyed by (seed, step, prompt index, sample). A step can then be
replayed, and the draws do not depend on how sequences are spread over batches, accumulation steps or processes.
"""

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sequence_seed(*key: int) -> int:
    """A 63-bit seed from a key such as (seed, step, prompt index, sample); equal keys give equal seeds."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class SequenceRandom:
    """One random stream a sequence.

    Args:
        seeds: one seed a sequence, see `sequence_seed`.
        device: where the numbers are drawn and returned.
        rows: rows of numbers that a sequence draws each time, side by side: N = sequences * rows.
    """

    def __init__(self, seeds: list[int], device: torch.device | str = "cpu", rows: int = 1):
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        self.device = torch.device(device)
        self.rows = rows

    @classmethod
    def keyed(
        cls, seed: int, step: int, prompt_indices: list[int], num_samples: int, device: torch.device | str = "cpu"
    ) -> "SequenceRandom":
        """Streams for `num_samples` samples of every prompt, in the order of `Prompts.repeated`."""
        keys = [(seed, step, index, sample) for index in prompt_indices for sample in range(num_samples)]
        return cls([sequence_seed(*key) for key in keys], device)

    def __len__(self) -> int:
        return len(self.generators)

    def part(self, sequences: slice, rows: int) -> "SequenceRandom":
        """Some of the streams, drawing so many rows each time; what is drawn there is gone here."""
        part = SequenceRandom([], self.device, rows)
        part.generators = self.generators[sequences]
        return part

    def of(self, sequences: list[int]) -> "SequenceRandom":
        """The streams of these sequences, in this order; what is drawn there is gone here."""
        chosen = SequenceRandom([], self.device, self.rows)
        chosen.generators = [self.generators[each] for each in sequences]
        return chosen

    def uniform(self, size: int) -> Float[Tensor, "N size"]:
        """Draws of [0, 1) in float64. On a CPU the first numbers of a row are the same whatever the size."""
        drawn = torch.empty(len(self), self.rows * size, dtype=torch.float64, device=self.device)
        for row, generator in zip(drawn, self.generators, strict=True):
            row.uniform_(generator=generator)
        return drawn.reshape(len(self) * self.rows, size)

    def exponential(self, size: int, dtype: torch.dtype) -> Float[Tensor, "N size"]:
        """Exp(1) draws, strictly positive.

        On a CPU by inversion in float64: torch's own `exponential_` takes three times as long there, and a float32
        uniform is too coarse, since it is zero once in 2^24 draws and a zero would win any race.
        """
        if self.device.type == "cpu":
            drawn = self.uniform(size).neg_().log1p_().neg_().to(dtype)
        else:
            drawn = torch.empty(len(self), self.rows * size, dtype=dtype, device=self.device)
            for row, generator in zip(drawn, self.generators, strict=True):
                row.exponential_(generator=generator)
        return drawn.clamp_(min=torch.finfo(dtype).tiny).reshape(-1, size)

    def gumbel(self, size: int, dtype: torch.dtype) -> Float[Tensor, "N size"]:
        """Standard Gumbel draws, `-log E` with E ~ Exp(1)."""
        return self.exponential(size, dtype).log_().neg_()


def gumbel_posterior(
    log_probs: Float[Tensor, "N V"], tokens: Int[Tensor, "N"], random: SequenceRandom
) -> Float[Tensor, "N V"]:
    """Perturbed log-probabilities `y = log π + g` given that `argmax y = tokens`.

    The largest of V perturbed log-probabilities is Gumbel(0) whichever wins; given it, each other one is a Gumbel
    truncated below it: `y_v = −log(E_v / π_v + exp(−y_winner))`, `E_v ~ Exp(1)`.

    Args:
        log_probs: log π of *exactly* the distribution that the tokens were sampled from (temperature and truncation
            included), nats, −inf where π is zero, shape (N, V).
        tokens: the sampled ids, shape (N,); π must be positive there.
        random: one stream a row.
    Returns:
        y, shape (N, V); −inf where π is zero. The noise `y − log π` is a constant: never differentiate this draw.
    Raises:
        ValueError: a token has probability zero under `log_probs`.
    Source: Maddison, Tarlow and Minka (2014), arXiv:1411.0030 (truncated Gumbels); Paulus et al. (2021),
        arXiv:2010.04838.
    """
    log_probs = log_probs.detach()
    if not torch.isfinite(log_probs.gather(1, tokens[:, None])).all():
        raise ValueError(
            "tokens: a sampled id has probability zero under log_probs; pass the log-probabilities of exactly the "
            "sampler's distribution, its temperature and truncation included"
        )
    exponentials = random.exponential(log_probs.shape[1] + 1, log_probs.dtype)
    winner = -exponentials[:, -1:].log()
    # y_v in logarithms throughout: E_v / π_v overflows for the rare tokens of a large vocabulary.
    others = -torch.logaddexp(exponentials[:, :-1].log() - log_probs, -winner)
    # Rounding may tie a near-certain loser with the winner; the argmax has to stay the sampled id.
    others = torch.minimum(others, torch.nextafter(winner, winner - 1))
    return others.scatter(1, tokens[:, None], winner)
