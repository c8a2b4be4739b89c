"""Text GANs: a generator trained on the log-odds of a discriminator that is trained beside it.

`TextGANTrainer` backpropagates them through soft tokens, `ReinforceGANTrainer` is its score-function baseline.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from softrl.rewards.base import one_hot_tokens
from softrl.rewards.discriminator import Discriminator
from softrl.rollouts.hard import hard_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.trainers.adversary import Adversary, Pair, pairs_of
from softrl.trainers.batches import Completions, PromptBatch
from softrl.trainers.gan_config import ReinforceGANConfig, TextGANConfig
from softrl.trainers.reinforce_trainer import ReinforceTrainer
from softrl.trainers.rollout_trainer import RolloutTrainer
from softrl.trainers.soft_rollout_trainer import SoftRolloutTrainer
from softrl.types import SoftTokens

_WARMUP_STEP = -2  # random streams of the completions before the first step
REFERENCE_COLUMN = "reference"


class AdversarialMixin(RolloutTrainer):
    """
    What a text GAN adds to its generator's trainer: the discriminator as the first reward, and its training.

    The data set needs a column `reference`, the real completion of each prompt. Before the first step the
    discriminator is trained on completions of the start; after every rollout the generator's gradient is taken first,
    with the discriminator as it was, and then the discriminator's updates are made. Its loss, accuracy and slope are
    logged as `discriminator/...`; a checkpoint has its weights, optimiser and buffer in `discriminator.pt`.

    Overrides `__init__` (the reward), `_inner_training_loop` (the first updates), `record` (keeps the completions),
    `finish_step` (the updates), `_save_checkpoint` and `_load_from_checkpoint`.

    Args:
        reward_funcs (*optional*):
            Further rewards, added to the discriminator's with their `reward_weights`.
        others:
            As in [`RolloutTrainer`].
    """

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, **settings: Any) -> None:
        self._others = [] if reward_funcs is None else reward_funcs
        if not isinstance(self._others, list | tuple):
            self._others = [self._others]
        self._pending: list[Pair] = []
        super().__init__(model, _Later(), args, **settings)
        for name in ("train_dataset", "eval_dataset"):
            dataset = getattr(self, name)
            if dataset is not None and REFERENCE_COLUMN not in getattr(dataset, "column_names", [REFERENCE_COLUMN]):
                raise ValueError(
                    f"{name} has no column {REFERENCE_COLUMN!r}, the real completions that generated ones are told from; "
                    f"it has {dataset.column_names}"
                )

