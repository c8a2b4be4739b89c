"""`RolloutTrainer`: what all trainers share that sample completions from a policy and score them.

Left out: the loss, streamed data sets, several evaluation samples a prompt.
"""

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from jaxtyping import Float
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from softrl.models.policy import check_policy
from softrl.objectives.token_terms import DirectTerms
from softrl.rewards.base import Reward, WeightedRewards
from softrl.rewards.metrics import load_metric
from softrl.rewards.resolve import resolve_rewards
from softrl.rollouts.hard import hard_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.trainers._bridge import BaseTrainer
from softrl.trainers.basis_truncation import BasisAwareMixin
from softrl.trainers.batches import (
    Completions,
    PromptBatch,
    as_rows,
    decode,
    indexed,
    indexed_for_evaluation,
    prompt_batch,
)
from softrl.trainers.callbacks import GamingCallback
from softrl.trainers.checkpoints import CheckpointMixin
from softrl.trainers.completions import CompletionLog
from softrl.trainers.engines import (
    check_engine,
    check_wrapped,
    largest_over_processes,
    make_ready,
    parts_callable,
    release_at_once,
    shards_parameters,
)
from softrl.trainers.evaluation import Evaluator, Judge, Sample, hard_scores, metrics_of_texts, repetition, summary
from softrl.trainers.generation_engine import make_engine
from softrl.trainers.loading import (
    eos_token_ids,
    load_model,
    load_tokenizer,
    model_name,
    reference_policy,
    with_adapter,
)
from softrl.trainers.metrics import MetricLog, named_metrics
from softrl.trainers.model_card import CITATION, CardFacts, finish_card
from softrl.trainers.rollout_config import RolloutConfig
from softrl.trainers.sampling import GroupSampler
from softrl.trainers.step_guard import StepGuardMixin

_KL_CONTROL = "adaptive_kl"  # its key in the trainer's state


class RolloutTrainer(StepGuardMixin, BasisAwareMixin, CheckpointMixin, BaseTrainer):
    """
    Base class of the trainers that sample completions and score them: everything but the loss.

    A subclass names its configuration in `_config_class`, builds what else it needs in `set_up`, and gives
    `compute_loss`, which is a mean over the micro-batch of values that `loss_weights` multiplies, and reports through
    `hard_scores` and `record`. With respect to `~transformers.Trainer` this class overrides
    `_set_signature_columns_if_needed`, `_get_train_sampler`, `get_eval_dataloader`, `_prepare_inputs`, `training_step`
    (timing only), `evaluation_loop`, `log`, `save_model` and `create_model_card` (model card).

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy: a name (hub, local folder, or `"smollm2-135m"`), a causal LM, or a PEFT model around one.
        reward_funcs (`Reward`, `str`, `Callable`, [`~transformers.PreTrainedModel`], or a `list` of them):
            Objects with a soft and a hard face, names, sequence classifiers in the policy's vocabulary, differentiable
            functions of soft tokens or, where they need not be differentiated, TRL's functions of texts; see
            [`~softrl.rewards.resolve.resolve_rewards`].
        args ([`RolloutConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`], *optional*):
            Data set with a column `"prompt"`, of texts or of conversations; other columns reach the rewards.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Held-out prompts of the same form.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The policy's tokenizer. If `None`, it is loaded from the model's name.
        callbacks, optimizers:
            As in [`~transformers.Trainer`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization used when `model` is loaded from a name. Combine with `peft_config` for QLoRA.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. The reference is then the model with its adapters off.
        judge (`Callable[[list[str]], Tensor]`, *optional*):
            Scores decoded completions; logged, never trained on.
    """

    loss_is_scaled_for_ga = False  # the loss is a mean over this micro-batch
    _tag_names = ("trl", "softrl")
    _name = "Rollout"
    _paper: ClassVar[dict[str, str]] = {"citation": CITATION}
    _config_class: type[RolloutConfig] = RolloutConfig
    _last_phase = "update"  # what the seconds of a step are called that no `timed` accounts for

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: Any,
        args: RolloutConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        judge: Judge | None = None,
    ):
        if args is None:
            args = self._config_class(f"{model_name(model)}-{self._name}")
        if processing_class is None:
            processing_class = load_tokenizer(model, args)
        if train_dataset is not None:
            train_dataset = indexed(train_dataset, "train_dataset", processing_class)
        eval_dataset = indexed_for_evaluation(eval_dataset, processing_class)

        policy_name = model if isinstance(model, str) else model.config._name_or_path
        set_seed(args.seed)  # adapters are initialised at random
        model = with_adapter(load_model(model, args, quantization_config), peft_config)
        if judge is None and args.early_stop_on_judge_drop is not None:
            raise ValueError(
                f"early_stop_on_judge_drop={args.early_stop_on_judge_drop} looks at a judge, and there is none; pass "
                "judge, a function from a list of texts to a tensor of scores"
            )
        self.judge = judge
        self.eval_metrics = {name: load_metric(name) for name in args.eval_metrics or []}
        self.policy = args.make_policy(model)
        check_policy(self.policy)
        rewards = self.make_rewards(reward_funcs, processing_class, policy_name, args)
        self.rewards = WeightedRewards(rewards, args.reward_weights)
        self.reference = reference_policy(model, args)
        self.kl_control = args.make_kl_control()
        self.terms = DirectTerms(
            float(args.values_at(0, 1)["beta"]), args.entropy_coef, self.reference if args.needs_reference else None
        )
        self.support = args.make_support(self.policy)
        self.truncation = args.make_truncation(support=self.support)
        self._check_vocabularies()
        self.set_up(args)

        self._metrics = MetricLog()
        self._step_kl: list[float] = []  # nats a token, of the step's micro-batches
        self.last_evaluation: list[Sample] = []
        self._engine_is_ready = False
        self._reward_jumped = False
        super().__init__(
            model=model,
            args=args,
            data_collator=as_rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.early_stop_on_gap is not None or args.early_stop_on_judge_drop is not None:
            self.add_callback(GamingCallback(args.early_stop_on_gap, args.early_stop_on_judge_drop))
        check_engine(self.accelerator)
        self.check_support_engine()
        release_at_once(self.accelerator)
        if shards_parameters(self.accelerator):
            self.policy.largest = partial(largest_over_processes, self.accelerator)
        self.eos_ids = eos_token_ids(model, processing_class)
        self.generation_engine = make_engine(args, self.model, self.accelerator, processing_class)
        self.sample_hard = hard_rollout if self.generation_engine is None else self.generation_engine.hard_rollout
        step_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._completions = CompletionLog(step_size)
        for module in (*self.rewards.rewards, *([self.reference.model] if self.reference else [])):
            if isinstance(module, nn.Module):
                module.to(self.accelerator.device)
        self.model_accepts_loss_kwargs = False

    def make_rewards(
        self, reward_funcs: Any, tokenizer: PreTrainedTokenizerBase, policy_name: str | None, args: RolloutConfig
    ) -> list[Reward]:
        """Rewards from what the user passes; the policy is there already."""
        return resolve_rewards(
            reward_funcs, tokenizer, policy_name, self.policy.vocab_size, self._differentiates_rewards(args)
        )

    def _differentiates_rewards(self, args: RolloutConfig) -> bool:
        """Whether the method reads the soft faces of rewards."""
        return True

    def set_up(self, args: RolloutConfig) -> None:
        """Build and check what a method needs beside policy, reference and rewards; they are there already."""

    def _check_vocabularies(self) -> None:
        self.truncation.check_vocabulary(self.policy.vocab_size)
        for reward in self.rewards.rewards:
            if reward.vocab_size is not None and reward.vocab_size != self.policy.vocab_size:
                raise ValueError(
                    f"reward {reward.name!r} knows {reward.vocab_size} token ids, the policy has "
                    f"{self.policy.vocab_size}: their vocabularies differ. Use a reward made for the policy's "
                    "tokenizer"
                )

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt", "prompt_index"]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        seed = args.data_seed if args.data_seed is not None else args.seed
        return GroupSampler(
            len(dataset), args.num_generations, args.shuffle_dataset, seed, lambda: int((self.state.epoch or 0) + 1e-6)
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        if not isinstance(eval_dataset, str):
            eval_dataset = indexed_for_evaluation(eval_dataset, self.processing_class)
        return super().get_eval_dataloader(eval_dataset)

    def _prepare_inputs(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def prompt_batch(self, rows: list[dict[str, Any]], num_samples: int) -> PromptBatch:
        """Tokenised, padded prompts of rows in which each prompt stands `num_samples` times in a row."""
        limit = self.args.max_prompt_length
        return prompt_batch(rows, self.processing_class, num_samples, limit, self.accelerator.device)

    def random_for(self, batch: PromptBatch) -> SequenceRandom:
        """The random streams of a training batch, one a sequence, keyed by seed, step, prompt and sample."""
        args = self.args
        return SequenceRandom.keyed(
            args.seed, self.rollout_step, batch.indices, args.num_generations, self.accelerator.device
        )

    @property
    def rollout_step(self) -> int:
        """The step that the current rollout belongs to."""
        return self.state.global_step

    # Training

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if not self._engine_is_ready:
            check_wrapped(self.accelerator, model)
            make_ready(self.accelerator, model)
            self._engine_is_ready = True
        with self._metrics.timed_step():
            if self.generation_engine is not None:
                with self._metrics.timed("push"):
                    self.generation_engine.push(self.rollout_step)
            with parts_callable(self.accelerator, model):
                loss = super().training_step(model, *args, **kwargs)
            if self.accelerator.sync_gradients:  # the last micro-batch of the step
                self.finish_step()
        return loss

    def finish_step(self) -> None:
        """What is learned from a whole step beside the gradient: here the KL weight. Called before the optimizer."""
        self._adapt_kl_weight()

    def follow_schedules(self) -> dict[str, float]:
        """Set what changes over training to its values at this step; returns those that do, for the logs."""
        values = self.args.values_at(self.state.global_step, self.state.max_steps)
        if self.kl_control is not None:
            saved = self.state.stateful_callbacks.get(_KL_CONTROL)
            if saved is not None:  # of the last step, or of the checkpoint that is gone on from
                self.kl_control.load_state_dict(saved)
            values["beta"] = self.kl_control.weight
        self.terms = replace(self.terms, kl_weight=float(values["beta"]))
        changing = {name for name, schedule in self.args.schedules().items() if not schedule.is_constant}
        changing |= set() if self.kl_control is None else {"beta"}
        # In an order that all processes share: they gather these by position.
        return {name: float(value) for name, value in values.items() if name in changing}

    def _adapt_kl_weight(self) -> None:
        measured, self._step_kl = self._step_kl, []
        mean = sum(measured) / len(measured) if measured else math.nan
        if self.kl_control is not None and math.isfinite(mean):
            self.kl_control.update(mean)
            # What lies here is saved with every checkpoint, and restored from it.
            self.state.stateful_callbacks[_KL_CONTROL] = self.kl_control.state_dict()

    def loss_weights(self, completions: Completions) -> Float[Tensor, "N"]:
        """What multiplies each sequence's loss: 0 where `mask_truncated_completions` leaves it out, else 1.

        NaN where the reward jumped, so that the step is not taken; see `step_guard`. Call it after `record`.
        """
        weights = torch.ones_like(completions.ended, dtype=torch.float32)
        if self.args.mask_truncated_completions:
            weights = completions.ended.float()
        return weights * torch.nan if self._reward_jumped else weights

    def hard_scores(self, batch: PromptBatch, completions: Completions) -> dict[str, Float[Tensor, "N"]]:
        """See `softrl.trainers.evaluation.hard_scores`."""
        return hard_scores(self.rewards, batch, completions)

    @torch.no_grad()
    def record(self, batch: PromptBatch, completions: Completions, values: dict[str, Float[Tensor, "N"]]) -> None:
        """Add a micro-batch to the metrics and the completions, gathered over processes.

        Args:
            batch: its prompts.
            completions: what was sampled for them.
            values: `hard_scores`, and whatever else is logged as a mean over sequences.
        """
        mask = completions.mask
        values = {**values, "length": mask.sum(-1).float(), "clipped": (~completions.ended).float()}
        values["repetition"] = repetition(completions.tokens, mask)
        texts = decode(self.processing_class, completions.tokens, mask) if self._texts_wanted else []
        if self.judge is not None:
            values["judge"] = self.judge(texts).to(values["length"])
        stacked = torch.stack([value.float() for value in values.values()], 1)
        gathered = dict(zip(values, self.accelerator.gather(stacked).unbind(1), strict=True))
        tokens = (batch.prompts.mask.sum() * self.args.num_generations + mask.sum()).float()
        self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens).sum())
        if "kl" in gathered:
            self._step_kl.append(gathered["kl"].mean().item())
        self._reward_jumped = self.reward_jumps(gathered["reward/hard"].mean().item())
        self._metrics.add(named_metrics(gathered, self.args.num_generations))
        if self.args.log_completions:
            shown = [name for name in gathered if name == "judge" or name.startswith("rewards/")]
            scores = {name.removeprefix("rewards/"): gathered[name].tolist() for name in shown}
            self._completions.add(gather_object(batch.columns["prompt"]), gather_object(texts), scores)

    @property
    def _texts_wanted(self) -> bool:
        return self.judge is not None or self.args.log_completions

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        in_training = "loss" in logs and bool(self._metrics)  # not an evaluation's log or the final summary
        if in_training:
            averages = self._metrics.drained(self.args.gradient_accumulation_steps, self._last_phase)
            logs = {**logs, **averages, "num_tokens": self.state.num_input_tokens_seen}
        super().log(logs, start_time)
        if in_training and self.args.log_completions and self.is_world_process_zero():
            folder = Path(self.args.output_dir) / "completions"
            self._completions.report(
                self.state.global_step, self.args.num_completions_to_print, folder, self.args.report_to
            )

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """One hard sample a prompt, with the same random streams in every evaluation; metrics of the decoded text."""
        args = self.args
        samples: list[Sample] = []
        if self.generation_engine is not None:
            self.generation_engine.push(None)  # the weights of another step may have been loaded
        for rows in dataloader:
            with parts_callable(self.accelerator, self.model_wrapped):
                measured = self.evaluate_rows(rows)
            samples += gather_object(measured)
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        by_index = {sample.prompt_index: sample for sample in samples}  # ranks may be padded with repeated rows
        self.last_evaluation = [by_index[index] for index in sorted(by_index)]
        metrics = summary(self.last_evaluation) | metrics_of_texts(self.eval_metrics, self.last_evaluation)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=len(self.last_evaluation))

    def evaluate_rows(self, rows: list[dict[str, Any]]) -> list[Sample]:
        """Sample and measure one completion for every row."""
        args = self.args
        evaluator = Evaluator(
            self.policy, self.reference, self.rewards, self.processing_class, self.eos_ids,
            args.max_completion_length, self.truncation, self.judge, args.seed, self.sample_hard,
        )  # fmt: skip
        with self.accelerator.autocast():
            return evaluator.samples(self.prompt_batch(rows, 1))

    # Model card

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """TRL's card, with what it gets wrong for our models put right; see `softrl.trainers.model_card`."""
        name = model_name or (self.args.hub_model_id or Path(self.args.output_dir).name).split("/")[-1]
        super().create_model_card(name, dataset_name, tags)
        if not self.is_world_process_zero():
            return
        facts = CardFacts(
            name,
            self.hub_model_id,
            self.model.config._name_or_path,
            isinstance(self.accelerator.unwrap_model(self.model), PeftModel),
            self.train_dataset is not None and not isinstance(self.train_dataset[0]["prompt"], str),
            self.args,
        )
        finish_card(Path(self.args.output_dir) / "README.md", facts)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.create_model_card()  # PEFT has written one that names the base model by its folder on this machine
        card = Path(self.args.output_dir) / "README.md"
        elsewhere = output_dir is not None and Path(output_dir).resolve() != card.parent.resolve()
        if elsewhere and self.is_world_process_zero():
            shutil.copy(card, Path(output_dir) / card.name)
