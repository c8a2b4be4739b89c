"""Count sketches of gradients: 4,096 numbers that keep norms and inner products of vectors too long to keep.

`s_b = Σ_{i: h(i) = b} σ_i x_i` with random signs σ and a random bucket h. Linear; `E⟨s(x), s(y)⟩ = ⟨x, y⟩` and, for m
buckets, `Var⟨s(x), s(y)⟩ <= (‖x‖² ‖y‖² + ⟨x, y⟩²) / m`: at m = 4,096 the standard deviation of a squared norm is 2.2%.
Source: Charikar, Chen and Farach-Colton (2002); the bound as in Weinberger et al. (2009), arXiv:0902.2206.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.tokens.noise import sequence_seed

_ROWS_AT_A_TIME = 256


class CountSketch:
    """A fixed random linear map from named tensors to `size` numbers.

    Args:
        size: m, number of buckets.
        seed: of signs and buckets; equal seeds and names give equal maps.
    Raises:
        ValueError: size < 1.
    """

    def __init__(self, size: int = 4096, seed: int = 0):
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size
        self.seed = seed
        self._maps: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "size"]:
        """The sketch of all tensors together, float64, on the CPU. A name stands for the same map in every call."""
        total = torch.zeros(self.size, dtype=torch.float64)
        for name, tensor in tensors.items():
            total += self._sketched(name, tensor.detach().flatten().cpu())
        return total

    def _sketched(self, name: str, flat: Float[Tensor, "n"]) -> Float[Tensor, "size"]:
        """Blocks of m entries, each with signs of its own and shifted round by a random number of buckets.

        Entries of one block never meet in a bucket, those of different blocks with probability 1/m.
        """
        signs, shifts = self._map(name, len(flat))
        total = torch.zeros(self.size, dtype=torch.float64)
        places = torch.arange(self.size)
        signed = flat.to(torch.promote_types(flat.dtype, torch.float32)) * signs
        padded = torch.nn.functional.pad(signed, (0, -len(flat) % self.size)).view(-1, self.size)
        for rows, shift in zip(padded.split(_ROWS_AT_A_TIME), shifts.split(_ROWS_AT_A_TIME), strict=True):
            total += rows.gather(1, (places + shift[:, None]) % self.size).sum(0, dtype=torch.float64)
        return total

    def _map(self, name: str, length: int) -> tuple[Tensor, Tensor]:
        """Signs of the entries and the shift of each block; kept, since drawing them costs more than using them."""
        if name not in self._maps:
            key = int.from_bytes(name.encode(), "little")  # all of it: names of layers begin alike
            generator = torch.Generator().manual_seed(sequence_seed(self.seed, key))
            signs = torch.randint(0, 2, (length,), generator=generator, dtype=torch.int8) * 2 - 1
            shifts = torch.randint(0, self.size, (-(-length // self.size),), generator=generator)
            self._maps[name] = signs, shifts
        signs, shifts = self._maps[name]
        if len(signs) != length:
            raise ValueError(f"tensor {name!r} had {len(signs)} entries in an earlier sketch and has {length} now")
        return signs, shifts
