"""The order of prompts: the G samples of a prompt side by side, the same order again when a run is resumed."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class GroupSampler(Sampler[int]):
    """Every index `num_samples` times in a row, shuffled by (seed, epoch).

    The order is a function of the epoch, not of how often the sampler was started, so a resumed run sees the prompts
    that the interrupted one would have seen.

    Args:
        num_prompts: length of the data set.
        num_samples: G.
        shuffle: keep the data set's order if False.
        seed: of the order.
        epoch: returns the current epoch, from 0.
        block: with it, whole blocks of so many prompts only; those that do not fill one wait for another epoch.
        repeats: how often each block is gone through before the next.
    """

    def __init__(
        self,
        num_prompts: int,
        num_samples: int,
        shuffle: bool,
        seed: int,
        epoch: Callable[[], int],
        block: int | None = None,
        repeats: int = 1,
    ):
        self.num_prompts = num_prompts
        self.num_samples = num_samples
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = epoch
        self.block = block
        self.repeats = repeats

    def __len__(self) -> int:
        whole = self.num_prompts if self.block is None else self.num_prompts // self.block * self.block
        return whole * self.num_samples * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.num_prompts))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch())
            order = torch.randperm(self.num_prompts, generator=generator).tolist()
        block = self.block or len(order)
        for start in range(0, len(order) - block + 1, block):
            for _ in range(self.repeats):
                for index in order[start : start + block]:
                    yield from [index] * self.num_samples
