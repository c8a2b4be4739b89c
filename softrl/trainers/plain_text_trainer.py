"""What trainers on plain text have in common: rows of token ids, micro-batches of texts, evaluation text by text.

Left out: the loss, the model, and what a text is measured by, which are a trainer's own.
"""

from abc import abstractmethod
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from softrl.data.texts import ANCHOR_COLUMN, INDEX_COLUMN, MASK_COLUMN, padded_texts, text_rows
from softrl.trainers._bridge import BaseTrainer, ForwardRedirection
from softrl.trainers.batches import as_rows
from softrl.trainers.checkpoints import CheckpointMixin
from softrl.trainers.engines import check_engine, check_wrapped, shards_parameters
from softrl.trainers.loading import load_tokenizer, model_name
from softrl.trainers.metrics import MetricLog
from softrl.trainers.model_card import CITATION, finish_text_card
from softrl.trainers.step_guard import StepGuardMixin
from softrl.types import Texts


class PlainTextTrainer(StepGuardMixin, CheckpointMixin, BaseTrainer):
    """
    Common part of the trainers on plain text (columns as of [`~softrl.data.texts`]).

    Of `~transformers.Trainer` it overrides `_set_signature_columns_if_needed`, `_prepare_inputs`, `training_step`
    (timing only), `get_eval_dataloader`, `evaluation_loop`, `log`, `save_model` and `create_model_card` (of models of
    our own classes), and what its mixins list. A trainer adds `make_model`, `compute_loss`, `measure` and
    `summarised`, and says in `_why_whole` why it needs whole parameters.
    """

    loss_is_scaled_for_ga = False  # the loss is a mean over this micro-batch
    _name: ClassVar[str]
    _why_whole: ClassVar[str]
    _model_module: ClassVar[str | None] = None  # of a class of ours, which the Auto classes know once it is imported
    _paper: ClassVar[dict[str, str]] = {"citation": CITATION}

    def __init__(
        self,
        model: Any,
        args: Any,
        train_dataset: Dataset | None,
        eval_dataset: Dataset | dict[str, Dataset] | None,
        processing_class: PreTrainedTokenizerBase | None,
        callbacks: list[TrainerCallback] | None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None],
        needs_anchors: bool = False,
    ):
        tokenizer = processing_class
        if tokenizer is None and model_name(model):  # rows of token ids need none
            tokenizer = load_tokenizer(model, args)
        rows = partial(text_rows, tokenizer=tokenizer, max_length=args.max_length, needs_anchors=needs_anchors)
        self._rows = rows
        if train_dataset is not None:
            train_dataset = rows(train_dataset, "train_dataset")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: rows(each, f"eval_dataset[{name!r}]") for name, each in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = rows(eval_dataset, "eval_dataset")
        set_seed(args.seed)  # what a model adds to one that is loaded is initialised at random
        made = self.make_model(model, args, tokenizer)
        self._redirect = ForwardRedirection()
        self._metrics = MetricLog()
        self._engine_is_checked = False
        self.last_evaluation: list[Any] = []
        super().__init__(
            model=made,
            args=args,
            data_collator=as_rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_engine(self.accelerator)
        if shards_parameters(self.accelerator):
            raise ValueError(
                f"{type(self).__name__} runs alone, under DDP and under ZeRO-1 and 2; "
                f"{self.accelerator.distributed_type} here shards parameters, and {self._why_whole}"
            )
        self.model_accepts_loss_kwargs = False

    @abstractmethod
    def make_model(self, model: Any, args: Any, tokenizer: PreTrainedTokenizerBase | None) -> nn.Module:
        """What is trained, loaded or wrapped; also where a trainer sets up what it reads beside it."""

    @abstractmethod
    def measure(self, model: Any, rows: list[dict[str, Any]]) -> list[Any]:
        """Results of rows of an evaluation set, each with its `text_index`."""

    @abstractmethod
    def summarised(self, model: Any) -> dict[str, float]:
        """Metrics of `last_evaluation`."""

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["input_ids", INDEX_COLUMN, ANCHOR_COLUMN, MASK_COLUMN]

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        if isinstance(eval_dataset, Dataset) and INDEX_COLUMN not in eval_dataset.column_names:
            eval_dataset = self._rows(eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def _prepare_inputs(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def _texts(self, rows: list[dict[str, Any]]) -> Texts:
        return padded_texts(rows, self.accelerator.device)

    # Training

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if not self._engine_is_checked:
            check_wrapped(self.accelerator, model)
            self._engine_is_checked = True
        with self._metrics.timed_step():
            return super().training_step(model, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._metrics:
            averages = self._metrics.drained(self.args.gradient_accumulation_steps, "update")
            logs = {**logs, **averages, "num_tokens": self.state.num_input_tokens_seen}
        super().log(logs, start_time)

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Every text by `measure`, on all ranks, with the same random streams every time."""
        model, found = self.accelerator.unwrap_model(self.model), []
        for rows in dataloader:
            found += gather_object(self.measure(model, rows))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        by_index = {text.text_index: text for text in found}  # ranks may be padded with repeated rows
        self.last_evaluation = [by_index[index] for index in sorted(by_index)]
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in self.summarised(model).items()},
            num_samples=len(self.last_evaluation),
        )

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self._model_module is not None and self._aside is None:
            self.create_model_card((self.args.hub_model_id or Path(self.args.output_dir).name).split("/")[-1])

    def create_model_card(self, model_name: str | None = None, *others: Any, **settings: Any) -> None:
        super().create_model_card(model_name, *others, **settings)
        if self._model_module is not None and self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            base = self.accelerator.unwrap_model(self.model).config._name_or_path
            finish_text_card(folder / "README.md", model_name or folder.name, base, self._model_module)
