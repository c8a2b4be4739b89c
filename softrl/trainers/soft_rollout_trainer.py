"""`SoftRolloutTrainer`: backpropagates a differentiable reward through soft rollouts. The maths is in `estimators`."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softrl.estimators.adjoint import chosen_method
from softrl.estimators.pathwise import Estimate, SurrogateOutput, pathwise_estimate, surrogate
from softrl.estimators.system import ForwardPass
from softrl.masking import survival_mean
from softrl.models.policy import evaluation_mode
from softrl.rewards.base import checked_soft
from softrl.rollouts.given import rollout_of
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.truncation import Truncation
from softrl.trainers._bridge import ForwardRedirection
from softrl.trainers.batches import Completions, PromptBatch
from softrl.trainers.engines import backward_but_last, may_differentiate_twice
from softrl.trainers.rollout_trainer import RolloutTrainer
from softrl.trainers.soft_rollout_config import SoftRolloutConfig
from softrl.types import Rollout

ADJOINT_NORM_AT = "adjoint/norm_at/"  # and a position: mean of ‖λ_t‖ over sequences


class SoftRolloutTrainer(RolloutTrainer):
    """
    Trainer that maximises a differentiable reward by backpropagating it through rollouts of soft tokens.

    A step has three phases: a rollout without gradients, cotangents by input-only products on the unwrapped model, and
    one forward and backward (or `surrogate_chunks` of them) of a surrogate through the wrapped one, whose gradient is
    the estimate. With respect to
    [`RolloutTrainer`], which lists the arguments, it adds `set_up` and `compute_loss`.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from softrl.rewards.fit import sentiment_reward
    >>> from softrl.trainers import SoftRolloutTrainer

    >>> trainer = SoftRolloutTrainer(
    ...     model="smollm2-135m",
    ...     reward_funcs=sentiment_reward(),
    ...     train_dataset=Dataset.from_dict({"prompt": ["The film is", "I went to see"]}),
    ... )
    >>> trainer.train()
    ```

    Args:
        args ([`SoftRolloutConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        others:
            As in [`RolloutTrainer`].
    """

    _tag_names = ("trl", "softrl", "soft-rollout")
    _name = "SoftRollout"
    _config_class = SoftRolloutConfig
    _last_phase = "surrogate"

    def set_up(self, args: SoftRolloutConfig) -> None:
        self.relaxation = args.make_relaxation(support=self.support)
        self.adjoint_settings = args.adjoint_settings()
        Truncation(max(args.schedules()["top_k"].ends())).check_vocabulary(self.policy.vocab_size)
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
        # An autocast block of its own: weights that it casts without a graph must not be found in phase 3's cache.
        with self._metrics.timed("rollout"), self.accelerator.autocast():
            rollout = self.rollout(batch)
        with self.accelerator.autocast():
            # Until the backward pass is over: checkpointed layers are recomputed in it, and must not draw dropout.
            evaluation_mode(unwrapped, checkpointed=args.gradient_checkpointing)
            if shares_a_pass := self._shares_a_pass(rollout):
                estimate, output = self._redirect(model, unwrapped, self._in_one_pass, rollout, batch.columns)
            else:
                estimate = self._estimate(rollout, batch.columns)
        completions = hard_completions(rollout, self.eos_ids, args.max_completion_length)
        self._record_step(batch, completions, estimate, scheduled)
        weights = self.loss_weights(completions)
        if shares_a_pass:
            loss, replay_error = -(output.value * weights).mean(), output.replay_error
        else:
            loss, replay_error = self._surrogate_loss(model, estimate, weights)
        self._metrics.add({"rollout/replay_error": self.accelerator.gather(replay_error[None]).mean().item()})
        return loss

    def rollout(self, batch: PromptBatch) -> Rollout:
        """Phase 1, by our own loop or of an engine's tokens."""
        args, random, relaxation = self.args, self.random_for(batch), self.relaxation
        if self.generation_engine is None:
            return soft_rollout(
                self.policy, batch.prompts, relaxation, random, args.max_completion_length, args.num_generations,
                self.eos_ids, args.soft_stopping,
            )  # fmt: skip
        top_k = 0 if relaxation.samples_policy else relaxation.truncation.top_k
        sampled = self.generation_engine.hard_rollout(
            self.policy, batch.prompts, relaxation.truncation, random, args.max_completion_length,
            args.num_generations, self.eos_ids, top_k,
        )  # fmt: skip
        return rollout_of(self.policy, sampled, relaxation, random, self.eos_ids if args.soft_stopping else ())

    def follow_schedules(self) -> dict[str, float]:
        changing = super().follow_schedules()
        step, max_steps = self.state.global_step, self.state.max_steps
        if changing.keys() - {"beta"}:
            self.relaxation = self.args.make_relaxation(step, max_steps, self.support)
            self.adjoint_settings = self.args.adjoint_settings(step, max_steps)
        return changing

    def _shares_a_pass(self, rollout: Rollout) -> bool:
        """Whether phases 2 and 3 differentiate the same forward pass of the wrapped model."""
        num_steps, replayable = rollout.mask.shape[1], self.policy.is_replayable
        method = chosen_method(self.adjoint_settings, self.relaxation, num_steps, replayable)
        whole = self.args.surrogate_chunks == 1
        twice = may_differentiate_twice(self.accelerator, self.args.gradient_checkpointing)
        return method == "parallel" and whole and twice

    def _in_one_pass(self, rollout: Rollout, columns: dict[str, list]) -> tuple[Estimate, SurrogateOutput]:
        forward = ForwardPass.of(self.policy, rollout)
        estimate = self._estimate(rollout, columns, forward)
        return estimate, self._surrogate(estimate, forward)

    def _estimate(self, rollout: Rollout, columns: dict[str, list], forward: ForwardPass | None = None) -> Estimate:
        with self._metrics.timed("cotangents"):
            return pathwise_estimate(
                self.policy, rollout, self.relaxation, self.rewards, self.terms, self.adjoint_settings, columns,
                forward,
            )  # fmt: skip

    def _surrogate_loss(
        self, model: nn.Module, estimate: Estimate, weights: Float[Tensor, "N"]
    ) -> tuple[Tensor, Tensor]:
        """Minus the surrogate's weighted mean, and the replay's largest error.

        All but the last of `surrogate_chunks` parts have been differentiated then.
        """
        unwrapped, chunks = self.accelerator.unwrap_model(model), self.args.surrogate_chunks
        errors: list[Tensor] = []

        def loss_of(part: Estimate, of_part: Float[Tensor, "M"]) -> Tensor:
            with self.accelerator.autocast():
                output = self._redirect(model, unwrapped, self._surrogate, part)
            errors.append(output.replay_error)
            return -(output.value * of_part).mean() / chunks

        if chunks == 1:
            return loss_of(estimate, weights), errors[0]
        parts = zip(estimate.split(chunks), weights.chunk(chunks), strict=True)
        losses = [partial(loss_of, *part) for part in parts]
        loss = backward_but_last(self.accelerator, model, losses, self.current_gradient_accumulation_steps)
        return loss, torch.stack(errors).max()

    def _surrogate(self, estimate: Estimate, forward: ForwardPass | None = None) -> SurrogateOutput:
        return surrogate(self.policy, self.relaxation, estimate, self.terms, self.adjoint_settings, forward)

    @torch.no_grad()
    def _record_step(
        self,
        batch: PromptBatch,
        completions: Completions,
        estimate: Estimate,
        scheduled: dict[str, float],
    ) -> None:
        rollout, cotangents = estimate.rollout, estimate.cotangents
        scores = self.hard_scores(batch, completions)
        hard, survival = scores["reward/hard"], rollout.soft_tokens.survival
        soft = checked_soft(self.rewards, rollout.soft_tokens, **batch.columns).float()
        norms = cotangents.embeds.float().norm(dim=-1)
        values = scores | {
            "reward/soft": soft,
            "reward/gap": soft - hard,
            "entropy": survival_mean(rollout.entropy, survival),
            "completions/mean_soft_length": survival.sum(-1),
            "adjoint/norm": norms.mean(-1),
            "adjoint/residual": torch.full_like(hard, cotangents.residual),
            "adjoint/sweeps": torch.full_like(hard, float(cotangents.sweeps)),
        }
        for position in shown_positions(self.args.max_completion_length):
            here = norms[:, position] if position < norms.shape[1] else torch.zeros_like(hard)
            values[f"{ADJOINT_NORM_AT}{position}"] = here
        if estimate.kl is not None:
            values["kl"] = survival_mean(estimate.kl, survival)
        values |= {name: torch.full_like(hard, value) for name, value in scheduled.items()}
        self.record(batch, completions, values)


def shown_positions(num_steps: int) -> list[int]:
    """At most 16 positions from the first to the last, whose adjoint norms are logged one by one."""
    count = min(16, num_steps)
    return sorted({round(i * (num_steps - 1) / max(count - 1, 1)) for i in range(count)})


def hard_completions(rollout: Rollout, eos_ids: tuple[int, ...], max_completion_length: int) -> Completions:
    """The hard tokens of a soft rollout: through the first end of sequence, where soft stopping may have gone on.

    A sequence that soft stopping cut off has ended as well, whatever its hard tokens are: by its survival before the
    last step, or because all sequences of a rollout that stopped early had ended.
    """
    completions = Completions.of(rollout.tokens, rollout.hard.mask, eos_ids)
    stopped_early = rollout.mask.shape[1] < max_completion_length
    return replace(completions, ended=completions.ended | ~rollout.mask[:, -1] | stopped_early)
