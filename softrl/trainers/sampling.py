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
    """

    def __init__(self, num_prompts: int, num_samples: int, shuffle: bool, seed: int, epoch: Callable[[], int]):
        self.num_prompts = num_prompts
        self.num_samples = num_samples
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_prompts * self.num_samples

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.num_prompts))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch())
            order = torch.randperm(self.num_prompts, generator=generator).tolist()
        for index in order:
            yield from [index] * self.num_samples
