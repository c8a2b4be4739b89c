"""Text GANs: a generator trained on the log-odds of a discriminator that is trained beside it.

`TextGANTrainer` backpropagates them through soft tokens, `ReinforceGANTrainer` is its score-function baseline. The
discriminator's updates are in `adversary.py`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softrl.rewards.base import Reward, one_hot_tokens
from softrl.rewards.discriminator import Discriminator
from softrl.rollouts.hard import hard_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.trainers.adversary import Adversary, Pair, pairs_of
from softrl.trainers.batches import Completions, PromptBatch
from softrl.trainers.gan_config import ReinforceGANConfig, TextGANConfig
from softrl.trainers.reinforce_trainer import ReinforceTrainer
from softrl.trainers.soft_rollout_trainer import SoftRolloutTrainer
from softrl.types import SoftTokens

DISCRIMINATOR = "discriminator"  # its name in reward_funcs
REFERENCE_COLUMN = "reference"
_WARMUP_STEP = -2  # random streams of the completions before the first step


class AdversarialMixin:
    """
    What a text GAN adds to its generator's trainer: the discriminator as a reward, and its training.

    The data set needs a column `reference`, the real completion of each prompt. Before the first step the
    discriminator is trained on completions of the start. After every rollout the generator's gradient is taken, with
    the discriminator as it was, and then the discriminator is updated, by an optimiser of its own. Its loss, accuracy
    (in training, and on the rollout before it is trained on) and slope are logged as `discriminator/...`; a checkpoint
    has its weights, optimiser and buffer.

    Every process has a buffer of its own share of the prompts, and all have the same discriminator.

    Overrides `__init__`, `make_rewards`, `compute_loss` (the first updates), `finish_step` (the others),
    `save_own_state` and `_load_optimizer_and_scheduler`, which is called under every engine.
    """

    def __init__(self, model: Any, reward_funcs: Any = DISCRIMINATOR, args: Any = None, *others: Any, **settings: Any):
        self._pending: list[Pair] = []
        super().__init__(model, reward_funcs, args, *others, **settings)
        names = getattr(self.train_dataset, "column_names", [REFERENCE_COLUMN])
        if REFERENCE_COLUMN not in names:
            raise ValueError(
                f"train_dataset has no column {REFERENCE_COLUMN!r}, the real completions that generated ones are told "
                f"from; it has {names}"
            )
        self.adversary = Adversary(self.discriminator, self.args, self.args.seed)

    def make_rewards(self, reward_funcs: Any, tokenizer: Any, policy_name: str | None, args: Any) -> list[Reward]:
        """The discriminator where `reward_funcs` names it, and what else it holds."""
        items = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if items.count(DISCRIMINATOR) != 1:
            raise ValueError(
                f"reward_funcs={items!r}: a text GAN needs {DISCRIMINATOR!r} among them, once; others may be added"
            )
        self.discriminator = Discriminator(
            self.policy.model, tokenizer, args.discriminator_width, args.discriminator_layers
        )
        place = items.index(DISCRIMINATOR)
        return super().make_rewards(
            [*items[:place], self.discriminator, *items[place + 1 :]], tokenizer, policy_name, args
        )

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.adversary.num_updates == 0 and self.args.discriminator_warmup_steps:
            with self._metrics.timed(DISCRIMINATOR):
                self._warm_up()
        return super().compute_loss(*args, **kwargs)

    def finish_step(self) -> None:
        super().finish_step()
        pending, self._pending = self._pending, []
        with self._metrics.timed(DISCRIMINATOR):
            unseen = self.adversary.add(pending)
            measured = self.adversary.train(self.args.discriminator_steps, self.accelerator)
        measured = self._over_processes({**measured, "accuracy_unseen": unseen})
        self._metrics.add({f"{DISCRIMINATOR}/{name}": value for name, value in measured.items()})

    def _over_processes(self, values: dict[str, float]) -> dict[str, float]:
        """The means of all processes' numbers."""
        own = torch.tensor([list(values.values())], device=self.accelerator.device)
        return dict(zip(values, self.accelerator.gather(own).mean(0).tolist(), strict=True))

    def keep(self, batch: PromptBatch, tokens: SoftTokens) -> None:
        """Remember generated completions for the discriminator's next updates."""
        columns = batch.columns
        self._pending += pairs_of(columns["prompt"], tokens, self._real_ids(columns[REFERENCE_COLUMN]))

    def _real_ids(self, references: list[Any]) -> list[list[int]]:
        """References as completions: cut to the longest that is generated, and ended where they are shorter."""
        tokenizer, longest = self.processing_class, self.args.max_completion_length
        texts = [text if isinstance(text, str) else text[0] for text in references]
        rows = tokenizer(texts, add_special_tokens=False).input_ids
        return [[*ids, tokenizer.eos_token_id][:longest] for ids in rows]

    def _warm_up(self) -> None:
        """Train the discriminator on completions of the start; every process on its own share of the prompts.

        Shares are of one size, if need be by a prompt that two processes have: all call a sharded model equally often.
        """
        args, dataset, size = self.args, self.train_dataset, self.args.per_device_eval_batch_size
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        count = min(-(-len(dataset) // world), args.discriminator_warmup_samples)
        rows = [(rank + index * world) % len(dataset) for index in range(count)]
        for start in range(0, len(rows), size):
            batch = self.prompt_batch([dataset[row] for row in rows[start : start + size]], 1)
            random = SequenceRandom.keyed(args.seed, _WARMUP_STEP, batch.indices, 1, self.accelerator.device)
            with self.accelerator.autocast():
                sampled = hard_rollout(
                    self.policy, batch.prompts, self.truncation, random, args.max_completion_length,
                    eos_ids=self.eos_ids,
                )  # fmt: skip
            self.keep(batch, one_hot_tokens(sampled.tokens, sampled.mask))
        pending, self._pending = self._pending, []
        self.adversary.add(pending)
        measured = self._over_processes(self.adversary.train(args.discriminator_warmup_steps, self.accelerator))
        numbers = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in measured.items())
        self.accelerator.print(
            f"Discriminator after {args.discriminator_warmup_steps} updates on the start: {numbers}"
        )

    def save_own_state(self, folder: Path) -> None:
        super().save_own_state(folder)
        self.adversary.save(folder, self.accelerator.process_index)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.adversary.load(checkpoint, self.accelerator.process_index)


class TextGANTrainer(AdversarialMixin, SoftRolloutTrainer):
    """
    Text GAN whose generator is trained by backpropagating the discriminator's log-odds through soft tokens.

    With respect to [`SoftRolloutTrainer`] it adds what [`AdversarialMixin`] lists, and `_record_step`, which keeps the
    soft tokens. A generated text that a relaxation makes of mixtures is seen as such by the discriminator.

    Args:
        reward_funcs (*optional*, defaults to `"discriminator"`):
            Further rewards beside it, e.g. `["discriminator", "sentiment"]`.
        args ([`TextGANConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        others:
            As in [`RolloutTrainer`].
    """

    _tag_names = ("trl", "softrl", "text-gan")
    _name = "TextGAN"
    _config_class = TextGANConfig

    @torch.no_grad()
    def _record_step(self, batch: PromptBatch, completions: Completions, estimate: Any, *others: Any) -> None:
        super()._record_step(batch, completions, estimate, *others)
        self.keep(batch, estimate.rollout.soft_tokens)


class ReinforceGANTrainer(AdversarialMixin, ReinforceTrainer):
    """
    Text GAN whose generator is trained by a score function on the discriminator's log-odds, as SeqGAN's is.

    With respect to [`ReinforceTrainer`] it adds what [`AdversarialMixin`] lists, and `record`, which keeps the tokens.

    Args:
        reward_funcs (*optional*, defaults to `"discriminator"`):
            Further rewards beside it.
        args ([`ReinforceGANConfig`], *optional*):
            Configuration for this trainer; the default one asks for `num_generations` of at least 2.
        others:
            As in [`RolloutTrainer`].
    Source: L. Yu et al. (2017), SeqGAN, arXiv 1609.05473; without its Monte Carlo search.
    """

    _tag_names = ("trl", "softrl", "reinforce-gan")
    _name = "ReinforceGAN"
    _config_class = ReinforceGANConfig

    def record(self, batch: PromptBatch, completions: Completions, values: dict[str, Tensor]) -> None:
        super().record(batch, completions, values)
        self.keep(batch, one_hot_tokens(completions.tokens, completions.mask))
