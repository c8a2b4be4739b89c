"""`PPOTrainer`: several clipped updates on the samples of a rollout, with a learned value."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Sampler

from softrl.estimators.base import Problem
from softrl.estimators.ppo import PPOEstimate
from softrl.masking import per_sequence_mean
from softrl.models.policy import evaluation_mode
from softrl.tokens.noise import sequence_seed
from softrl.trainers._bridge import ForwardRedirection
from softrl.trainers.batches import INDEX_COLUMN, Completions
from softrl.trainers.ppo_config import PPOConfig
from softrl.trainers.rollout_trainer import RolloutTrainer
from softrl.trainers.sampling import GroupSampler
from softrl.trainers.value_head import ValueHeadMixin, attached_value_head


@dataclass(frozen=True)
class _Collected:
    """What the steps of a cycle share: one micro-batch's rollout, with phase 2's constants."""

    step: int
    problem: Problem
    estimate: PPOEstimate
    weights: Float[Tensor, "N"]


class PPOTrainer(ValueHeadMixin, RolloutTrainer):
    """
    Trainer that maximises a reward by proximal policy optimisation (Schulman et al., 2017).

    A cycle is `num_ppo_epochs * num_mini_batches` optimizer steps on one rollout, which is made in the first of them;
    prompts are repeated for the others, as in TRL's GRPOTrainer, so that none is skipped. With gradient accumulation
    every micro-batch has a rollout of its own, of which each step takes its part. Data, rewards, KL, logging and
    checkpoints are those of [`ReinforceTrainer`]; metrics of a rollout are logged with the cycle's first step. The KL
    and entropy of a cycle are weighed as `beta` has it in its first step.

    A run resumed from the end of a cycle (`save_steps` a multiple of the cycle's length) goes on as if it had not
    stopped. From inside a cycle the rest of it is run on new samples: the same random streams, drawn from the
    checkpoint's policy.

    With respect to [`RolloutTrainer`], which lists the arguments, it adds `set_up`, `compute_loss`, `rollout_step` and
    another `_get_train_sampler`, and what [`~softrl.trainers.value_head.ValueHeadMixin`] lists.

    Args:
        args ([`PPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        others:
            As in [`RolloutTrainer`].
    """

    _tag_names = ("trl", "softrl", "ppo")
    _name = "PPO"
    _config_class = PPOConfig
    _last_phase = "surrogate"

    def _differentiates_rewards(self, args: PPOConfig) -> bool:
        return False

    def set_up(self, args: PPOConfig) -> None:
        self.value_head = attached_value_head(self.policy)
        self.estimator = args.make_estimator(self.value_head)
        self._redirect = ForwardRedirection()
        self._collected: dict[tuple[int, ...], _Collected] = {}  # by the prompts of a micro-batch

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        args, sampler = self.args, super()._get_train_sampler(train_dataset)
        sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        prompts = sequences // args.num_generations
        if sampler.num_prompts < prompts:
            raise ValueError(
                f"train_dataset has {sampler.num_prompts} prompts, a rollout takes {prompts} "
                "(per_device_train_batch_size * gradient_accumulation_steps * processes / num_generations); "
                "give it more prompts, or make the batch smaller"
            )
        return GroupSampler(
            sampler.num_prompts, args.num_generations, sampler.shuffle, sampler.seed, sampler.epoch, prompts,
            args.steps_per_rollout,
        )  # fmt: skip

    @property
    def rollout_step(self) -> int:
        """The first step of the cycle."""
        return self.state.global_step - self.state.global_step % self.args.steps_per_rollout

    def compute_loss(
        self,
        model: nn.Module,
        inputs: list[dict[str, Any]],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        args, unwrapped = self.args, self.accelerator.unwrap_model(model)
        collected = self._of_this_cycle(inputs)
        rows = self._rows(len(collected.weights), inputs[0][INDEX_COLUMN]).to(collected.weights.device)
        with self.accelerator.autocast():
            evaluation_mode(unwrapped, checkpointed=args.gradient_checkpointing)
            estimate = collected.estimate.at(rows)
            output = self._redirect(model, unwrapped, self.estimator.output, collected.problem, estimate)
        stacked = torch.stack([value.float().mean() for value in output.statistics.values()])[None]
        means = self.accelerator.gather(stacked).mean(0).tolist()
        self._metrics.add(dict(zip(output.statistics, means, strict=True)))
        return -(output.value * collected.weights[rows]).mean()

    def _of_this_cycle(self, inputs: list[dict[str, Any]]) -> _Collected:
        """The rollout of these prompts, made when the cycle has none yet."""
        self._collected = {key: value for key, value in self._collected.items() if value.step == self.rollout_step}
        key = tuple(row[INDEX_COLUMN] for row in inputs)
        if key not in self._collected:
            self._collected[key] = self._collect(inputs)
        return self._collected[key]

    def _collect(self, inputs: list[dict[str, Any]]) -> _Collected:
        """Phases 1 and 2: sample, score, and fix advantages and returns."""
        args = self.args
        batch = self.prompt_batch(inputs, args.num_generations)
        scheduled = self.follow_schedules()
        with self._metrics.timed("rollout"), self.accelerator.autocast():
            sampled = self.sample_hard(
                self.policy, batch.prompts, self.truncation, self.random_for(batch), args.max_completion_length,
                args.num_generations, self.eos_ids,
            )  # fmt: skip
        completions = Completions.of(sampled.tokens, sampled.mask, self.eos_ids)
        with self._metrics.timed("reward"):
            scores = self.hard_scores(batch, completions)
        hard = scores["reward/hard"]
        problem = Problem(self.policy, self.rewards, self.terms, self.truncation, args.num_generations, batch.columns)
        with self._metrics.timed("advantages"), self.accelerator.autocast():
            estimate = self.estimator.estimate(problem, sampled, hard)
        mask = sampled.mask
        values = scores | {
            "entropy": per_sequence_mean(estimate.entropy, mask),
            "advantages": per_sequence_mean(estimate.advantages, mask),
            "baseline": per_sequence_mean(estimate.old_values, mask),
        }
        if self.terms.kl_weight > 0.0:
            values["kl"] = per_sequence_mean(estimate.kl, mask)
        values |= {name: torch.full_like(hard, value) for name, value in scheduled.items()}
        self.record(batch, completions, values)
        return _Collected(self.rollout_step, problem, estimate, self.loss_weights(completions))

    def _rows(self, count: int, prompt_index: int) -> Int[Tensor, "M"]:
        """The part of a micro-batch's sequences that this step takes; the parts of an epoch make up the whole."""
        args = self.args
        epoch, part = divmod(self.state.global_step - self.rollout_step, args.num_mini_batches)
        size = count // args.num_mini_batches
        seed = sequence_seed(args.seed, self.rollout_step, epoch, prompt_index)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return order[part * size : (part + 1) * size]
