"""`SoftSFTTrainer`: supervised fine-tuning that feeds a model its own soft tokens. The maths is in `estimators`.

Left out: streamed data sets, images, packing, tensor and pipeline parallelism.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from softrl.assets import resolve_model
from softrl.data.supervised import supervised_texts
from softrl.data.texts import INDEX_COLUMN
from softrl.estimators.adjoint import chosen_method
from softrl.estimators.pathwise import Estimate, SurrogateOutput, pathwise_estimate, surrogate
from softrl.estimators.supervised import PlainOutput, fed_entropy, guided_rollout, plain_pass, token_objective
from softrl.estimators.system import Cotangents, ForwardPass
from softrl.generation.soft_settings import Phase, SoftDecoding, save_soft_decoding
from softrl.models.freezing import freeze
from softrl.models.policy import check_policy, evaluation_mode
from softrl.models.think_tokens import ThinkTokens
from softrl.tokens.guidance import GuidedRelaxation, coin_amounts
from softrl.tokens.noise import SequenceRandom, sequence_seed
from softrl.tokens.truncation import Truncation
from softrl.trainers._bridge import ForwardRedirection
from softrl.trainers.announcing import between_think_tokens, with_soft_prefix, with_think_tokens, with_thoughts
from softrl.trainers.batches import IndexedCollator, indexed_rows
from softrl.trainers.checkpoints import CheckpointMixin
from softrl.trainers.engines import (
    check_engine,
    check_wrapped,
    largest_over_processes,
    make_ready,
    may_differentiate_twice,
    parts_callable,
    release_at_once,
    shards_parameters,
)
from softrl.trainers.learned_settings import LearnedSettingsMixin
from softrl.trainers.loading import load_tokenizer, model_name, supported_dtype
from softrl.trainers.metrics import MetricLog
from softrl.trainers.model_card import CITATION
from softrl.trainers.soft_evaluation import TextNLL, measure_texts, summary
from softrl.trainers.soft_sft_config import SoftSFTConfig
from softrl.trainers.step_guard import StepGuardMixin
from softrl.types import Rollout, SupervisedTexts

_COINS = 1  # of a text's random streams: 0 is the relaxation's
_EVALUATION_STEP = -1  # random streams of evaluations are not those of any training step


class SoftSFTTrainer(StepGuardMixin, CheckpointMixin, LearnedSettingsMixin, SFTTrainer):
    """
    Trainer for supervised fine-tuning behind a model's own soft tokens, guided by the true ones.

    With respect to [`~trl.SFTTrainer`], which prepares and collates the texts and counts what a loss is divided by,
    the only change is what is fed: `α e_true + (1 − α) e_soft` in place of the true token. A step rolls soft tokens
    out along the texts and differentiates the likelihood of the true ones, through the feedback or without it; with
    α = 1 it is TRL's. Dropout is off in training too, since the phases of a step have to agree.

    Overrides of the host: `_set_signature_columns_if_needed`, `training_step` (timing only), `compute_loss`,
    `evaluate` (indexes rows), `evaluation_loop`, `log`, `save_model` and `_save` (with the model goes
    `soft_decoding.json`, which says how it is to be decoded), and those of the mixins.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from softrl.trainers import SoftSFTTrainer

    >>> trainer = SoftSFTTrainer(
    ...     model="smollm2-135m",
    ...     train_dataset=Dataset.from_dict({"prompt": ["The film is"], "completion": [" long, and good."]}),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to train: a name (hub, local folder, or `"smollm2-135m"`), a causal LM, or a PEFT model around one.
        args ([`SoftSFTConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset, eval_dataset ([`~datasets.Dataset`]):
            In the formats of [`~trl.SFTTrainer`], as text, conversations or token ids; the latter may be a `dict` of
            several.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. If `None`, it is loaded from the model's name.
        callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.SFTTrainer`]. `learned_settings` need the trainer's own optimizer; `soft_prefix_tokens` is the
            adapter itself, and `think_tokens` goes with LoRA.
    """

    _tag_names = ("trl", "softrl", "soft-sft")
    _name = "SoftSFT"
    think_tokens: ThinkTokens | None
    _paper: ClassVar[dict[str, str]] = {"citation": CITATION}

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: SoftSFTConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            args = SoftSFTConfig(f"{model_name(model)}-{self._name}")
        if processing_class is None:
            processing_class = load_tokenizer(model, args)
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise TypeError(
                f"processing_class must be a tokenizer, got {type(processing_class).__name__}: soft tokens are of text"
            )
        if isinstance(model, str):
            model = resolve_model(model)
            settings = dict(args.model_init_kwargs or {})
            settings["dtype"] = supported_dtype(settings.get("dtype", "float32"), args.device)
            args.model_init_kwargs = settings
        source, self.think_tokens = model, None
        if args.think_tokens:
            model, peft_config, self.think_tokens = with_think_tokens(
                args, model, processing_class, peft_config, quantization_config
            )
            quantization_config = None  # the model has it
        peft_config = with_soft_prefix(args, model, peft_config)
        super().__init__(
            model,
            args,
            train_dataset=self._rows(train_dataset, "train_dataset"),
            eval_dataset=self._rows(eval_dataset, "eval_dataset"),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.data_collator = IndexedCollator(self.data_collator)
        freeze(self.model, args.freeze_embeddings, args.freeze_layers)
        self.policy = args.make_policy(self.model)
        check_policy(self.policy)
        Truncation(max(args.schedules()["top_k"].ends())).check_vocabulary(self.policy.vocab_size)
        check_engine(self.accelerator)
        release_at_once(self.accelerator)
        if shards_parameters(self.accelerator):
            self.policy.largest = partial(largest_over_processes, self.accelerator)
        self._redirect = ForwardRedirection()
        self._numbers = MetricLog()
        self._engine_is_ready = False
        self.attach_learned_settings(source)
        self.last_evaluation: list[TextNLL] = []
        self._follow_schedules()

    # Data

    def _rows(self, dataset: Any, name: str) -> Any:
        return indexed_rows(with_thoughts(dataset, self.think_tokens, name), name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if INDEX_COLUMN not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, INDEX_COLUMN]

    def _texts(self, inputs: dict[str, Tensor]) -> SupervisedTexts:
        """A batch cut where its loss begins; of as many steps on every process that has to make equally many calls."""
        texts = supervised_texts(inputs["input_ids"], inputs["labels"], inputs["attention_mask"])
        num_steps = texts.targets.shape[1]
        longest = int(self.policy.largest(float(num_steps)))
        if longest == num_steps:
            return texts
        return supervised_texts(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], longest)

    def _random(self, indices: Tensor, step: int, *stream: int) -> SequenceRandom:
        """A stream a text, keyed by seed, step and text."""
        seeds = [sequence_seed(self.args.seed, step, index, *stream) for index in indices.tolist()]
        return SequenceRandom(seeds, self.accelerator.device)

    # Training

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if not self._engine_is_ready:
            check_wrapped(self.accelerator, model)
            make_ready(self.accelerator, model)
            self._engine_is_ready = True
        with self._numbers.timed_step(), parts_callable(self.accelerator, model):
            return super().training_step(model, *args, **kwargs)

    def _follow_schedules(self) -> dict[str, float]:
        """Set what changes over training to its values at this step; returns those that do, and α, for the logs."""
        args, step, max_steps = self.args, self.state.global_step, max(self.state.max_steps, 1)
        values = args.values_at(step, max_steps, self.state.epoch or 0.0)
        self.alpha = float(values["guidance_alpha"])
        self.true_token_probability = float(values["true_token_probability"])
        self.terms = args.terms(float(values["entropy_penalty"]))
        self.relaxation = args.make_guided(step, max_steps, self.learned and self.learned.frozen())
        self.adjoint_settings = args.adjoint_settings(step, max_steps)
        changing = {name for name, schedule in args.schedules().items() if not schedule.is_constant}
        logged = {name: float(value) for name, value in values.items() if name in changing | {"guidance_alpha"}}
        return logged | self.learned_numbers()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        scheduled, texts = self._follow_schedules(), self._texts(inputs)
        # Until the backward pass is over: checkpointed layers are recomputed in it, and must not draw dropout.
        unwrapped = self.accelerator.unwrap_model(model)
        evaluation_mode(unwrapped, checkpointed=self.args.gradient_checkpointing)
        # An autocast block of its own: weights that it casts without a graph must not be found in phase 3's cache.
        with self._numbers.timed("rollout"), self.accelerator.autocast():
            rollout = self.rollout(texts, inputs[INDEX_COLUMN])
        with self.accelerator.autocast():
            output = self._output(model, texts, rollout)
        per_token = token_objective(self.terms, output.log_probs, output.entropy)
        count = texts.counted.sum() if num_items_in_batch is None else num_items_in_batch
        count = torch.as_tensor(count, device=per_token.device).clamp(min=1)
        loss = -output.value.sum() / count
        # A surrogate's own value means nothing: the loss has its gradient and the objective's value.
        loss = loss - loss.detach() - (per_token * texts.counted).sum() / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())  # the count is that of all processes
        # Once a step; where the host counts no tokens it divides by the number of micro-batches itself.
        parts = 1 if num_items_in_batch is None else getattr(self, "current_gradient_accumulation_steps", 1)
        loss = loss + output.learned_term / parts
        self._record(inputs, texts, rollout, output, scheduled)
        return loss

    def rollout(self, texts: SupervisedTexts, indices: Tensor) -> Rollout | None:
        """Phase 1; None where nothing but true tokens would be fed."""
        if 1.0 in (self.alpha, self.true_token_probability):
            return None
        step, num_steps = self.state.global_step, texts.targets.shape[1]
        coins = self._random(indices, step, _COINS)
        amounts = coin_amounts(self.alpha, self.true_token_probability, num_steps, coins)
        return guided_rollout(self.policy, texts, self.relaxation, amounts, self._random(indices, step))

    def _output(self, model: nn.Module, texts: SupervisedTexts, rollout: Rollout | None) -> "StepOutput":
        beside = partial(self.beside_learned_term, rollout is not None)
        call = partial(self._redirect, model, self.accelerator.unwrap_model(model), beside)
        if rollout is None or self.args.is_detached:
            plain, term = call(self._plain, texts, rollout)
            return StepOutput(plain.value, plain.log_probs, plain.entropy, term)
        if self._shares_a_pass(rollout):
            (estimate, found), term = call(self._in_one_pass, rollout)
        else:
            estimate = self._estimate(rollout)
            found, term = call(self._surrogate, estimate)
        assert estimate.target_log_probs is not None
        log_probs, cotangents = estimate.target_log_probs, estimate.cotangents
        return StepOutput(found.value, log_probs, rollout.entropy, term, cotangents, found.replay_error)

    def _plain(self, texts: SupervisedTexts, rollout: Rollout | None) -> PlainOutput:
        return plain_pass(self.policy, texts, self.terms, rollout)

    def _shares_a_pass(self, rollout: Rollout) -> bool:
        """Whether phases 2 and 3 differentiate the same forward pass of the wrapped model."""
        num_steps, replayable = rollout.mask.shape[1], self.policy.is_replayable
        method = chosen_method(self.adjoint_settings, self.relaxation, num_steps, replayable)
        return method == "parallel" and may_differentiate_twice(self.accelerator, self.args.gradient_checkpointing)

    def _in_one_pass(self, rollout: Rollout) -> tuple[Estimate, SurrogateOutput]:
        forward = ForwardPass.of(self.policy, rollout)
        estimate = self._estimate(rollout, forward)
        return estimate, self._surrogate(estimate, forward)

    def _estimate(self, rollout: Rollout, forward: ForwardPass | None = None) -> Estimate:
        with self._numbers.timed("cotangents"):
            return pathwise_estimate(
                self.policy, rollout, self.relaxation, None, self.terms, self.adjoint_settings, forward=forward
            )

    def _surrogate(self, estimate: Estimate, forward: ForwardPass | None = None) -> SurrogateOutput:
        return surrogate(self.policy, self.live_relaxation(), estimate, self.terms, self.adjoint_settings, forward)

    def live_relaxation(self) -> GuidedRelaxation:
        """What phase 3 differentiates: learned settings are tensors, which get their gradient there."""
        if self.learned is None:
            return self.relaxation
        return self.args.make_guided(self.state.global_step, max(self.state.max_steps, 1), self.learned.relaxation())

    @torch.no_grad()
    def _record(
        self,
        inputs: dict[str, Tensor],
        texts: SupervisedTexts,
        rollout: Rollout | None,
        output: "StepOutput",
        scheduled: dict[str, float],
    ) -> None:
        counted = texts.counted
        numbers = {"guided_nll": -output.log_probs, "entropy": output.entropy}
        if rollout is not None:
            assert rollout.support.guidance is not None
            numbers |= {"fed_entropy": fed_entropy(rollout), "true_tokens": rollout.support.guidance == 1.0}
        sums = [(value.double() * counted).sum() for value in numbers.values()]
        sums += [counted.sum().double(), inputs["attention_mask"].sum().double()]
        if output.cotangents is not None and output.replay_error is not None:
            norms = output.cotangents.embeds.float().norm(dim=-1).mean().double()
            sums += [norms, output.replay_error.double()]
        gathered = self.accelerator.gather(torch.stack(sums)[None]).sum(0).tolist()
        count, processes = max(gathered[len(numbers)], 1.0), self.accelerator.num_processes
        self.state.num_input_tokens_seen += int(gathered[len(numbers) + 1])
        logged = {name: value / count for name, value in zip(numbers, gathered, strict=False)}
        if output.cotangents is not None:
            norm, error = (value / processes for value in gathered[-2:])
            logged |= {
                "adjoint/norm": norm, "rollout/replay_error": error, "adjoint/residual": output.cotangents.residual,
                "adjoint/sweeps": float(output.cotangents.sweeps),
            }  # fmt: skip
        self._numbers.add(logged | scheduled)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._numbers:
            averages = self._numbers.drained(self.args.gradient_accumulation_steps, "update")
            logs = {**logs, **averages, "num_tokens": self.state.num_input_tokens_seen}
        super().log(logs, start_time)

    # Evaluation

    def evaluate(self, eval_dataset: Any = None, *arguments: Any, **settings: Any) -> dict[str, float]:
        if not isinstance(eval_dataset, str):
            eval_dataset = self._rows(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, *arguments, **settings)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """NLL of every text behind true tokens and behind its own soft ones, with the same noise every time."""
        found: list[TextNLL] = []
        self._follow_schedules()
        for inputs in dataloader:
            with parts_callable(self.accelerator, self.model_wrapped), self.accelerator.autocast():
                found += gather_object(self.measure(self._prepare_inputs(inputs)))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        by_index = {text.text_index: text for text in found}  # ranks may be padded with repeated rows
        self.last_evaluation = [by_index[index] for index in sorted(by_index)]
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in summary(self.last_evaluation).items()},
            num_samples=len(self.last_evaluation),
        )

    def measure(self, inputs: dict[str, Tensor], relaxation: GuidedRelaxation | None = None) -> list[TextNLL]:
        """Both NLLs of a batch; soft tokens are made as at this step of the training, or by another relaxation."""
        indices, texts = inputs[INDEX_COLUMN], self._texts(inputs)
        random = self._random(indices, _EVALUATION_STEP)
        return measure_texts(self.policy, texts, indices.tolist(), relaxation or self.relaxation, random)

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self._aside is None:
            self.create_model_card((self.args.hub_model_id or Path(self.args.output_dir).name).split("/")[-1])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._save_soft_decoding(Path(self.args.output_dir if output_dir is None else output_dir))

    def _save_soft_decoding(self, folder: Path) -> None:
        """How the model is to be decoded: by the soft tokens that it was trained on last, without guidance."""
        last, learned = max(self.state.global_step - 1, 0), self.learned and self.learned.frozen()
        relaxation = self.args.make_guided(last, max(self.state.max_steps, 1), learned).base
        decoding = SoftDecoding(Phase(relaxation), norm_correction=self.policy.norm_correction)
        save_soft_decoding(between_think_tokens(decoding, self.think_tokens), folder)


@dataclass(frozen=True)
class StepOutput:
    """J or its surrogate of every sequence, with a graph, and what a step logs."""

    value: Tensor
    log_probs: Tensor
    entropy: Tensor
    learned_term: Tensor | float
    cotangents: Cotangents | None = None
    replay_error: Tensor | None = None
