"""`SoftRolloutTrainer`: backpropagates a differentiable reward through soft rollouts. The maths is in `estimators`.

Left out: streamed data sets, conversational prompts, soft stopping, schedules.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from softrl.assets import resolve_model
from softrl.estimators.pathwise import Estimate, SurrogateOutput, pathwise_estimate, surrogate
from softrl.masking import is_any_of, per_sequence_mean
from softrl.models.policy import Policy, check_policy, evaluation_mode
from softrl.objectives.token_terms import DirectTerms
from softrl.rewards.base import Reward, WeightedRewards, checked_hard, checked_soft
from softrl.rollouts.hard import hard_rollout
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.trainers._bridge import BaseTrainer, ForwardRedirection
from softrl.trainers.batches import PromptBatch, decode, indexed, prompt_batch
from softrl.trainers.evaluation import Judge, Sample, kl_and_base_nll, summary
from softrl.trainers.sampling import GroupSampler
from softrl.trainers.soft_rollout_config import SoftRolloutConfig

_EVALUATION_STEP = -1  # random streams of evaluations: the same draws before, during and after training


class SoftRolloutTrainer(BaseTrainer):
    """
    Trainer that maximises a differentiable reward by backpropagating it through rollouts of soft tokens.

    A step has three phases: a rollout without gradients, cotangents by input-only products on the unwrapped model, and
    one forward and backward of a surrogate through the wrapped one, whose gradient is the estimate. With respect to
    `~transformers.Trainer` it overrides `_set_signature_columns_if_needed`, `_get_train_sampler`, `_prepare_inputs`,
    `training_step` (timing only), `compute_loss`, `evaluation_loop`, `log`, and `_save_checkpoint` (model card).

    Example:

    ```python
    >>> from softrl.data.prompts import review_openings
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
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy: a name (hub, local folder, or `"smollm2-135m"`), a causal LM, or a PEFT model around one.
        reward_funcs (`Reward | list[Reward]`):
            Objects with a soft and a hard face, see [`~softrl.rewards.base.Reward`].
        args ([`SoftRolloutConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset, eval_dataset ([`~datasets.Dataset`], *optional*):
            Data sets with a text column `"prompt"`; other columns reach the rewards.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The policy's tokenizer. If `None`, it is loaded from the model's name.
        callbacks, optimizers:
            As in [`~transformers.Trainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. The reference is then the model with its adapters off.
        judge (`Callable[[list[str]], Tensor]`, *optional*):
            Scores decoded completions; logged, never trained on.
    """

    loss_is_scaled_for_ga = False  # the loss is a mean over this micro-batch
    _tag_names = ("trl", "softrl", "soft-rollout")
    _name = "SoftRollout"

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: Reward | list[Reward],
        args: SoftRolloutConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        judge: Judge | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SoftRolloutConfig(f"{name.split('/')[-1]}-SoftRollout")
        if train_dataset is not None:
            train_dataset = indexed(train_dataset, "train_dataset")
        if eval_dataset is not None:
            eval_dataset = indexed(eval_dataset, "eval_dataset")
        if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
            args.gradient_checkpointing_kwargs = {"use_reentrant": False}

        set_seed(args.seed)  # adapters are initialised at random
        model = _loaded(model, args)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path, padding_side="left")
        if peft_config is not None:
            model = get_peft_model(model, peft_config)

        self.rewards = WeightedRewards(
            reward_funcs if isinstance(reward_funcs, list) else [reward_funcs], args.reward_weights
        )
        self.judge = judge
        self.relaxation = args.make_relaxation()
        self.adjoint_settings = args.adjoint_settings()
        self.policy = Policy(model, args.temperature, args.norm_correction)
        check_policy(self.policy)
        self.reference = _reference(model, args)
        self.terms = DirectTerms(args.beta, args.entropy_coef, self.reference if args.beta > 0.0 else None)
        self._check_vocabularies()

        self._redirect = ForwardRedirection()
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)
        self._num_tokens = 0
        self.last_evaluation: list[Sample] = []
        super().__init__(
            model=model,
            args=args,
            data_collator=_identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.eos_ids = _eos_ids(model, processing_class)
        for module in (*self.rewards.rewards, *([self.reference.model] if self.reference else [])):
            if isinstance(module, nn.Module):
                module.to(self.accelerator.device)
        self.model_accepts_loss_kwargs = False

    def _check_vocabularies(self) -> None:
        self.relaxation.truncation.check_vocabulary(self.policy.vocab_size)
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

    def _prepare_inputs(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def prompt_batch(self, rows: list[dict[str, Any]], num_samples: int) -> PromptBatch:
        """Tokenised, padded prompts of rows in which each prompt stands `num_samples` times in a row."""
        limit = self.args.max_prompt_length
        return prompt_batch(rows, self.processing_class, num_samples, limit, self.accelerator.device)

    # Training

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        started = time.perf_counter()
        self._seconds["micro/rollout"] = self._seconds["micro/cotangents"] = 0.0
        loss = super().training_step(*args, **kwargs)
        total = time.perf_counter() - started
        self._seconds["step_time"] += total
        self._seconds["step_time/surrogate"] += (
            total - self._seconds["micro/rollout"] - self._seconds["micro/cotangents"]
        )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: list[dict[str, Any]],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        unwrapped = self.accelerator.unwrap_model(model)
        batch = self.prompt_batch(inputs, self.args.num_generations)
        random = SequenceRandom.keyed(
            self.args.seed, self.state.global_step, batch.indices, self.args.num_generations, self.accelerator.device
        )
        with self.accelerator.autocast():
            with self._timed("rollout"):
                rollout = soft_rollout(
                    self.policy, batch.prompts, self.relaxation, random, self.args.max_completion_length,
                    self.args.num_generations, self.eos_ids,
                )  # fmt: skip
            with self._timed("cotangents"):
                estimate = pathwise_estimate(
                    self.policy,
                    rollout,
                    self.relaxation,
                    self.rewards,
                    self.terms,
                    self.adjoint_settings,
                    batch.columns,
                )
            # Until the backward pass is over: checkpointed layers are recomputed in it, and must not draw dropout.
            evaluation_mode(unwrapped, checkpointed=self.args.gradient_checkpointing)
            output = self._redirect(
                model, unwrapped, surrogate, self.policy, self.relaxation, estimate, self.terms, self.adjoint_settings
            )
        self._record_step(batch, estimate, output)
        return -output.value.mean()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        self._seconds[f"step_time/{phase}"] += elapsed
        self._seconds[f"micro/{phase}"] += elapsed

    @torch.no_grad()
    def _record_step(self, batch: PromptBatch, estimate: Estimate, output: SurrogateOutput) -> None:
        rollout, cotangents, outputs = estimate.rollout, estimate.cotangents, output.outputs
        mask, columns = rollout.mask, batch.columns
        soft = checked_soft(self.rewards, rollout.soft_tokens, **columns).float()
        each = [checked_hard(reward, rollout.tokens, mask, **columns).float() for reward in self.rewards.rewards]
        hard = sum(weight * value for weight, value in zip(self.rewards.weights, each, strict=True))
        lengths = mask.sum(-1).float()
        values = {
            "reward/soft": soft,
            "reward/hard": hard,
            "reward/gap": soft - hard,
            "kl": per_sequence_mean(outputs.kl, mask),
            "entropy": per_sequence_mean(outputs.entropy, mask),
            "length": lengths,
            "clipped": (~_ended(rollout.tokens, mask, self.eos_ids)).float(),
            "adjoint/norm": cotangents.embeds.float().norm(dim=-1).mean(-1),
            "adjoint/residual": torch.full_like(hard, cotangents.residual),
            "adjoint/sweeps": torch.full_like(hard, float(cotangents.sweeps)),
            "rollout/replay_error": torch.full_like(hard, output.replay_error.item()),
        } | {f"rewards/{reward.name}": value for reward, value in zip(self.rewards.rewards, each, strict=True)}
        if self.judge is not None:
            texts = decode(self.processing_class, rollout.tokens, mask)
            values["judge"] = self.judge(texts).to(hard)
        tokens = (batch.prompts.mask.sum() * self.args.num_generations + mask.sum()).float()
        gathered = dict(
            zip(values, self.accelerator.gather(torch.stack(list(values.values()), 1)).unbind(1), strict=True)
        )
        self._num_tokens += int(self.accelerator.gather(tokens).sum())
        for name, value in self._named_metrics(gathered).items():
            self._metrics[name].append(value)

    def _named_metrics(self, gathered: dict[str, Tensor]) -> dict[str, float]:
        """TRL's metric keys, and ours, from per-sequence values of all processes."""
        lengths, clipped = gathered.pop("length"), gathered.pop("clipped")
        hard = gathered["reward/hard"]
        spread = hard.view(-1, self.args.num_generations).std(-1, unbiased=False)
        metrics = {
            "reward": hard.mean().item(),
            "reward_std": hard.std(unbiased=False).item(),
            "frac_reward_zero_std": (spread == 0).float().mean().item() if self.args.num_generations > 1 else 0.0,
            "completions/mean_length": lengths.mean().item(),
            "completions/min_length": lengths.min().item(),
            "completions/max_length": lengths.max().item(),
            "completions/clipped_ratio": clipped.mean().item(),
        }
        for name, value in gathered.items():
            if name.startswith("rewards/"):
                metrics |= {f"{name}/mean": value.mean().item(), f"{name}/std": value.std(unbiased=False).item()}
            elif name != "kl" or self.terms.reference is not None:
                metrics[name] = value.mean().item()
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._metrics:  # a training log, not an evaluation's or the final summary
            steps = max(1, len(self._metrics["reward"]) // self.args.gradient_accumulation_steps)
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._metrics.items()}}
            logs |= {name: seconds / steps for name, seconds in self._seconds.items() if name.startswith("step_time")}
            logs["num_tokens"] = self._num_tokens
            self._metrics.clear()
            self._seconds.clear()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.create_model_card(model_name=Path(self.args.output_dir).name)
        super()._save_checkpoint(model, trial)

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
        for rows in dataloader:
            samples += gather_object(self.evaluate_rows(rows))
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        by_index = {sample.prompt_index: sample for sample in samples}  # ranks may be padded with repeated rows
        self.last_evaluation = [by_index[index] for index in sorted(by_index)]
        metrics = summary(self.last_evaluation)
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(self.last_evaluation),
        )

    @torch.no_grad()
    def evaluate_rows(self, rows: list[dict[str, Any]]) -> list[Sample]:
        """Sample and measure one completion for every row."""
        batch = self.prompt_batch(rows, 1)
        random = SequenceRandom.keyed(self.args.seed, _EVALUATION_STEP, batch.indices, 1, self.accelerator.device)
        with self.accelerator.autocast():
            tokens, mask = hard_rollout(
                self.policy, batch.prompts, self.relaxation.truncation, random, self.args.max_completion_length,
                eos_ids=self.eos_ids,
            )  # fmt: skip
            rewards = checked_hard(self.rewards, tokens, mask, **batch.columns)
            kl, nll = [None] * len(rows), [None] * len(rows)
            if self.reference is not None:
                measured = kl_and_base_nll(self.policy, self.reference, batch.prompts, tokens, mask)
                kl, nll = (values.tolist() for values in measured)
        texts = decode(self.processing_class, tokens, mask)
        judged = [None] * len(rows) if self.judge is None else self.judge(texts).tolist()
        ended = _ended(tokens, mask, self.eos_ids).tolist()
        return [
            Sample(
                batch.indices[i], batch.columns["prompt"][i], texts[i], tuple(tokens[i][mask[i]].tolist()), ended[i],
                rewards[i].item(), judged[i], kl[i], nll[i],
            )
            for i in range(len(rows))
        ]  # fmt: skip


def _identity(rows: list[Any]) -> list[Any]:
    return rows


def _loaded(model: "str | PreTrainedModel | PeftModel", args: SoftRolloutConfig) -> nn.Module:
    if not isinstance(model, str):
        return model
    settings = {"dtype": "float32", **(args.model_init_kwargs or {})}
    return AutoModelForCausalLM.from_pretrained(resolve_model(model), **settings)


def _reference(model: nn.Module, args: SoftRolloutConfig) -> Policy | None:
    """The model with its adapters off, or a frozen copy; no copy when nothing needs it."""
    if isinstance(model, PeftModel):
        return Policy(model, args.temperature, args.norm_correction, model.disable_adapter)
    if args.beta == 0.0:
        return None
    frozen_copy = copy.deepcopy(model).eval().requires_grad_(False)
    return Policy(frozen_copy, args.temperature, args.norm_correction, nullcontext)


def _eos_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    configured = getattr(model, "generation_config", None)
    eos = configured.eos_token_id if configured is not None else None
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _ended(tokens: Tensor, mask: Tensor, eos_ids: tuple[int, ...]) -> Tensor:
    """Whether each sequence stopped at an end-of-sequence token."""
    return (is_any_of(tokens, eos_ids) & mask).any(-1)
