"""`ListwisePreferenceTrainer`: learns from several ranked completions of a prompt. The losses are in `objectives`."""

import copy
from typing import Any, ClassVar

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from jaxtyping import Float
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from softrl.data.ranked import RankedBatch, check_ranked_rows, ranked_batch
from softrl.objectives.listwise import (
    listwise_cross_entropy,
    noise_contrastive,
    one_winner,
    plackett_luce,
    target_weights,
)
from softrl.objectives.partition import partition_loss
from softrl.trainers._bridge import BaseTrainer, disable_dropout_in_model
from softrl.trainers.batches import as_rows
from softrl.trainers.checkpoints import CheckpointMixin
from softrl.trainers.engines import check_engine, check_wrapped
from softrl.trainers.listwise_config import ListwisePreferenceConfig
from softrl.trainers.loading import (
    load_model,
    load_tokenizer,
    model_name,
    with_adapter,
    without_adapters,
)
from softrl.trainers.model_card import CITATION


class ListwisePreferenceTrainer(CheckpointMixin, BaseTrainer):
    """
    Trainer for sets of ranked completions: Plackett-Luce and its relatives, of which DPO is the case of two.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from softrl.trainers import ListwisePreferenceTrainer

    >>> trainer = ListwisePreferenceTrainer(
    ...     model="smollm2-135m",
    ...     train_dataset=Dataset.from_list(
    ...         [{"prompt": "The film is", "completions": [" great.", " fine.", " bad."], "rewards": [1.0, 0.5, 0.0]}]
    ...     ),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy: a name (hub, local folder, or `"smollm2-135m"`), a causal LM, or a PEFT model around one.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Reference. If `None`, the policy with its adapter off, or a frozen copy of it as training begins.
        args ([`ListwisePreferenceConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset, eval_dataset ([`~datasets.Dataset`]):
            Columns `prompt`, `completions` and `rewards` or `ranking`, see [`~softrl.data.ranked`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The policy's tokenizer. If `None`, it is loaded from the model's name.
        callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`].
    """

    loss_is_scaled_for_ga = False  # the loss is a mean over this micro-batch
    _tag_names = ("trl", "softrl", "listwise-preference")
    _name = "ListwisePreference"
    _paper: ClassVar[dict[str, str]] = {"citation": CITATION}

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: ListwisePreferenceConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ):
        if args is None:
            args = ListwisePreferenceConfig(f"{model_name(model)}-{self._name}")
        tokenizer = load_tokenizer(model, args) if processing_class is None else processing_class
        evaluation_sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        for dataset in (train_dataset, *evaluation_sets):
            if dataset is not None:
                needs = f"loss_type={args.loss_type!r}" if args.needs_rewards else ""
                check_ranked_rows(dataset, tokenizer, args.max_length, needs)
        set_seed(args.seed)  # adapters are initialised at random
        model = with_adapter(load_model(model, args, quantization_config), peft_config)
        self.reference = ref_model
        if ref_model is None and not isinstance(model, PeftModel):
            self.reference = copy.deepcopy(model)
        if args.disable_dropout:
            for each in (model, self.reference):
                if each is not None:
                    disable_dropout_in_model(each)
        self._sums: dict[str, Tensor | float] = {"train": 0.0, "eval": 0.0}  # since the last log
        self._engine_is_checked = False
        super().__init__(
            model=model,
            args=args,
            data_collator=as_rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_engine(self.accelerator)
        if self.reference is not None:
            self.reference.eval().requires_grad_(False).to(self.accelerator.device)
        self.model_accepts_loss_kwargs = False

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt", "completions", "rewards", "ranking"]

    def _prepare_inputs(self, inputs: list[dict[str, Any]]) -> RankedBatch:
        batch = ranked_batch(inputs, self.processing_class, self.args.max_length)
        return batch.to(self.accelerator.device)

    def compute_loss(
        self, model: nn.Module, inputs: RankedBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self._engine_is_checked and model.training:
            check_wrapped(self.accelerator, model)
            self._engine_is_checked = True
        log_ratio = inputs.by_set(completion_log_probs(model, inputs) - self.reference_log_probs(model, inputs))
        loss = self.losses(log_ratio, inputs).mean()
        self._record(log_ratio.detach() * self.args.beta, inputs, "train" if model.training else "eval")
        return (loss, log_ratio) if return_outputs else loss

    def losses(self, log_ratio: Float[Tensor, "N S"], batch: RankedBatch) -> Float[Tensor, "N"]:
        """One loss a set; see `objectives.listwise` and `objectives.partition`."""
        args, mask, ranks = self.args, batch.mask, batch.ranks
        scores = args.beta * log_ratio
        if args.loss_type == "plackett_luce":
            return plackett_luce(scores, ranks, mask)
        if args.loss_type == "one_winner":
            first = ranks.masked_fill(~mask, torch.inf).argsort(dim=-1, stable=True)
            return one_winner(scores.gather(1, first), mask.gather(1, first))
        rewards = batch.rewards
        if rewards is None:
            raise ValueError(
                f"loss_type={args.loss_type!r} needs the column 'rewards', and some rows have a ranking alone"
            )
        if args.loss_type == "partition":
            sets = zip(log_ratio, rewards, mask, strict=True)
            return torch.cat(
                [partition_loss(ratio[there][None], r[there][None], args.beta) for ratio, r, there in sets]
            )
        loss = listwise_cross_entropy if args.loss_type == "listwise" else noise_contrastive
        return loss(scores, target_weights(rewards, args.reward_temperature, mask), mask)

    @torch.no_grad()
    def reference_log_probs(self, model: nn.Module, batch: RankedBatch) -> Float[Tensor, "M"]:
        if self.reference is not None:
            return completion_log_probs(self.reference, batch)
        with without_adapters(self.accelerator.unwrap_model(model)):
            return completion_log_probs(model, batch)

    @torch.no_grad()
    def _record(self, scores: Float[Tensor, "N S"], batch: RankedBatch, mode: str) -> None:
        """Metrics of DPOTrainer's names: the best item is the chosen one, all others are the rejected ones."""
        ranks, mask = batch.ranks.masked_fill(~batch.mask, torch.inf), batch.mask
        best = ranks == ranks.min(-1, keepdim=True).values
        others = mask & ~best
        right, ordered = pairs_in_order(scores, batch)
        sums = ((scores * best).sum(), best.sum(), (scores * others).sum(), others.sum(), right.sum(), ordered.sum())
        gathered = self.accelerator.gather(torch.stack([each.float() for each in sums])[None]).sum(0)
        self._sums[mode] = self._sums[mode] + gathered

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **settings: Any) -> EvalLoopOutput:
        """The host's, with the metrics of ranked items among its own, where the best model is looked for by them."""
        self._sums["eval"] = 0.0
        output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **settings)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._drained("eval").items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self._drained("train")} if "loss" in logs else logs, start_time)

    def _drained(self, mode: str) -> dict[str, float]:
        sums, self._sums[mode] = self._sums[mode], 0.0
        if not isinstance(sums, Tensor):
            return {}
        chosen, num_best, rejected, num_others, num_right, num_ordered = sums.tolist()
        chosen, rejected = chosen / max(num_best, 1.0), rejected / max(num_others, 1.0)
        return {
            "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
            "rewards/accuracies": num_right / max(num_ordered, 1.0),
        }  # fmt: skip


def completion_log_probs(model: nn.Module, batch: RankedBatch) -> Float[Tensor, "M"]:
    """log π(completion | prompt) of every row, summed over tokens, nats, in float32 at least."""
    output = model(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False)
    logits = output.logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    taken = logits.gather(-1, batch.ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
    return (taken * batch.completion[:, 1:]).sum(-1)


def pairs_in_order(scores: Float[Tensor, "N S"], batch: RankedBatch) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Pairs of each set that scores order as the ranks do, equal scores counting half, and all that are not ties."""
    ranks, mask = batch.ranks, batch.mask
    ordered = (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    differences = scores[:, :, None] - scores[:, None, :]
    right = (differences.sign() + 1.0) / 2.0 * ordered
    return right.sum((1, 2)), ordered.sum((1, 2)).to(scores.dtype)
