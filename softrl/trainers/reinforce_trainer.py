"""`ReinforceTrainer`: score-function estimators, the baselines that pathwise ones are compared with."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softrl.estimators.advantages import returns_to_go
from softrl.estimators.base import Problem
from softrl.estimators.running_mean import RunningMean
from softrl.estimators.score_function import ScoreOutput, Scores
from softrl.masking import per_sequence_mean
from softrl.models.policy import evaluation_mode
from softrl.objectives.clipped import clipped_value_loss
from softrl.rewards.base import checked_soft
from softrl.rollouts.given import rollout_of
from softrl.rollouts.soft import soft_rollout
from softrl.trainers._bridge import ForwardRedirection
from softrl.trainers.batches import Completions, PromptBatch
from softrl.trainers.reinforce_config import ReinforceConfig
from softrl.trainers.rollout_trainer import RolloutTrainer
from softrl.trainers.soft_rollout_trainer import hard_completions
from softrl.trainers.value_head import ValueHeadMixin, attached_value_head
from softrl.types import HardRollout, Rollout

_RUNNING_MEAN = "running_mean"  # its key in the trainer's state


class ReinforceTrainer(ValueHeadMixin, RolloutTrainer):
    """
    Trainer that maximises a reward by the score function of sampled tokens: REINFORCE, RLOO, GRPO and their relatives.

    Data, sampler, rewards, KL, logging and checkpoints are those of [`SoftRolloutTrainer`], so that a comparison
    differs in the estimator only. The KL is exact at every context and part of the returns. Rewards need no gradient:
    TRL's functions of texts are taken as they are, except by the estimators that relax tokens. With respect to
    [`RolloutTrainer`], which lists the arguments, it adds `set_up`, `compute_loss`, `follow_schedules` and
    `finish_step`, and for a learned value what [`~softrl.trainers.value_head.ValueHeadMixin`] lists.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from softrl.trainers import ReinforceConfig, ReinforceTrainer

    >>> def short(completions, **kwargs):
    ...     return [-len(completion) / 100 for completion in completions]

    >>> trainer = ReinforceTrainer(
    ...     model="smollm2-135m",
    ...     reward_funcs=short,
    ...     args=ReinforceConfig("short", estimator="rloo", num_generations=4),
    ...     train_dataset=Dataset.from_dict({"prompt": ["The film is", "I went to see"]}),
    ... )
    >>> trainer.train()
    ```

    Args:
        args ([`ReinforceConfig`], *optional*):
            Configuration for this trainer; the default one asks for `num_generations` of at least 2.
        others:
            As in [`RolloutTrainer`].
    """

    _tag_names = ("trl", "softrl", "reinforce")
    _name = "Reinforce"
    _config_class = ReinforceConfig
    _last_phase = "surrogate"

    def _differentiates_rewards(self, args: ReinforceConfig) -> bool:
        return args.differentiates_rewards

    def set_up(self, args: ReinforceConfig) -> None:
        self.estimator = args.make_estimator(support=self.support)
        if args.uses_relaxation:
            replace(self.truncation, top_k=max(args.schedules()["top_k"].ends())).check_vocabulary(
                self.policy.vocab_size
            )
        self.value_head = attached_value_head(self.policy) if args.estimator == "reinforce_value" else None
        self._step_rewards: list[float] = []
        self._redirect = ForwardRedirection()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: list[dict[str, Any]],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        args, unwrapped = self.args, self.accelerator.unwrap_model(model)
        batch = self.prompt_batch(inputs, args.num_generations)
        scheduled = self.follow_schedules()
        with self._metrics.timed("rollout"), self.accelerator.autocast():
            rollout = self.rollout(batch)
        completions = self._completions_of(rollout)
        with self._metrics.timed("reward"):
            scores = self.hard_scores(batch, completions)
        problem = Problem(self.policy, self.rewards, self.terms, self.truncation, args.num_generations, batch.columns)
        with self.accelerator.autocast():
            evaluation_mode(unwrapped, checkpointed=args.gradient_checkpointing)
            output, logged = self.output(model, problem, rollout, scores["reward/hard"])
        self.record(batch, completions, scores | output.statistics | logged | self._as_values(scores, scheduled))
        return -(output.value * self._weights(completions)).mean()

    # Phase 1

    def rollout(self, batch: PromptBatch) -> HardRollout | Rollout:
        """Samples of the policy, with what the estimator's relaxation records of them."""
        args, random, relaxation = self.args, self.random_for(batch), self.estimator.relaxation
        mixes = relaxation is not None and not relaxation.feeds_one_hot
        if mixes or (self.generation_engine is None and relaxation is not None and relaxation.samples_policy):
            return soft_rollout(
                self.policy, batch.prompts, relaxation, random, args.max_completion_length, args.num_generations,
                self.eos_ids, args.soft_stopping,
            )  # fmt: skip
        sampled = self.sample_hard(
            self.policy, batch.prompts, self.truncation, random, args.max_completion_length, args.num_generations,
            self.eos_ids,
        )  # fmt: skip
        if relaxation is None:
            return sampled
        # Its own sampler draws from the kept ids only, and the score function is that of the whole policy.
        return rollout_of(self.policy, sampled, relaxation, random, self.eos_ids if args.soft_stopping else ())

    def _completions_of(self, rollout: HardRollout | Rollout) -> Completions:
        if isinstance(rollout, Rollout):
            return hard_completions(rollout, self.eos_ids, self.args.max_completion_length)
        return Completions.of(rollout.tokens, rollout.mask, self.eos_ids)

    # Phases 2 and 3

    def output(
        self, model: nn.Module, problem: Problem, rollout: HardRollout | Rollout, hard: Float[Tensor, "N"]
    ) -> tuple[ScoreOutput, dict[str, Float[Tensor, "N"]]]:
        """S of every sequence, through the wrapped model, and what else is logged.

        Args:
            model: the wrapped model.
            problem: what is maximised.
            rollout: phase 1's.
            hard: the hard rewards.
        """
        unwrapped = self.accelerator.unwrap_model(model)
        if self.value_head is not None:
            return self._redirect(model, unwrapped, self._output_with_value, problem, rollout, hard), {}
        logged, given = {}, {}
        rewards = hard
        if self.args.estimator == "soft_score":
            rewards = checked_soft(problem.reward, rollout.soft_tokens, **problem.columns).float().detach()
            logged = {"reward/soft": rewards, "reward/gap": rewards - hard}
        elif self.args.estimator == "reinforce_running_mean":
            given = {"baseline": self.running_mean.value}
            logged = {"baseline": torch.full_like(hard, given["baseline"])}
        with self._metrics.timed("cotangents"):
            estimate = self.estimator.estimate(problem, rollout, rewards, **given)
        return self._redirect(model, unwrapped, self.estimator.output, problem, estimate), logged

    def _output_with_value(self, problem: Problem, rollout: HardRollout, rewards: Float[Tensor, "N"]) -> ScoreOutput:
        """The value is read off the same forward pass, and depends on earlier steps only: no bias comes from it."""
        scores = Scores.of(problem, rollout)
        values = self.value_head(scores.hidden.detach())  # its loss does not move the policy
        estimate = self.estimator.estimate(problem, rollout, rewards, values.detach())
        output = self.estimator.output_of(problem, estimate, scores)
        returns = returns_to_go(rewards.to(values.dtype), scores.direct.detach().to(values.dtype), rollout.mask)
        losses = per_sequence_mean(clipped_value_loss(values, values.detach(), returns, None), rollout.mask)
        statistics = output.statistics | {
            "value_loss": losses.detach(),
            "baseline": per_sequence_mean(values.detach(), rollout.mask),
        }
        return ScoreOutput(output.value - self.args.vf_coef * losses.to(output.value.dtype), statistics)

    def _weights(self, completions: Completions) -> Float[Tensor, "N"]:
        weights = self.loss_weights(completions)
        if self.args.estimator == "grpo" and self.args.loss_type == "dapo":  # a mean over the tokens of all processes
            tokens = completions.mask.sum().float()
            weights = weights * (tokens / self.accelerator.gather(tokens).mean())
        return weights

    # Across steps

    def follow_schedules(self) -> dict[str, float]:
        changing = super().follow_schedules()
        if not self.args.uses_relaxation:
            return {name: value for name, value in changing.items() if name == "beta"}
        if changing.keys() - {"beta"}:
            step, max_steps = self.state.global_step, self.state.max_steps
            self.estimator = self.args.make_estimator(step, max_steps, self.support)
        return changing

    @property
    def running_mean(self) -> RunningMean:
        """The mean reward of the steps before this one, from the trainer's state, which checkpoints hold."""
        mean = RunningMean(self.args.running_mean_decay)
        saved = self.state.stateful_callbacks.get(_RUNNING_MEAN)
        if saved is not None:
            mean.load_state_dict(saved)
        return mean

    def finish_step(self) -> None:
        super().finish_step()
        rewards, self._step_rewards = self._step_rewards, []
        if self.args.estimator == "reinforce_running_mean" and rewards:
            mean = self.running_mean
            mean.update(sum(rewards) / len(rewards))
            self.state.stateful_callbacks[_RUNNING_MEAN] = mean.state_dict()

    def _as_values(self, scores: dict[str, Tensor], scheduled: dict[str, float]) -> dict[str, Tensor]:
        """What schedules say, a sequence; and the rewards are kept for the running mean."""
        hard = scores["reward/hard"]
        if self.args.estimator == "reinforce_running_mean":
            self._step_rewards.append(self.accelerator.gather(hard).mean().item())
        return {name: torch.full_like(hard, value) for name, value in scheduled.items()}
