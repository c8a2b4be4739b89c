"""The model of a trainer of thoughts: made, kept as a prior, saved, and loaded from checkpoints."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINING_ARGS_NAME

from softrl.assets import resolve_model
from softrl.models.thinking import ThinkingConfig, ThinkingLM, is_thinking_folder
from softrl.trainers.loading import load_model, with_adapter, without_adapters
from softrl.trainers.quietstar_config import QuietSTaRConfig
from softrl.trainers.reference_state import ReferenceStateMixin
from softrl.trainers.thought_surrogate import SurrogateStateMixin

# Of a model that thinks, and what the trainer's arguments call them.
_SETTINGS = {
    "temperature": "temperature", "mixing": "mixing", "residual": "residual_mixing", "sigmoid": "sigmoid_mixing",
}  # fmt: skip


class ThinkingModelMixin(SurrogateStateMixin, ReferenceStateMixin):
    """
    How a [`ThinkingLM`], what is fitted beside it and what it is compared with are saved and loaded.

    Overrides `_save`, `_load_from_checkpoint` and `_load_best_model` of [`~transformers.Trainer`].
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        model = self.accelerator.unwrap_model(self.model)
        of_lm = None
        if state_dict is not None:
            of_lm = {name[3:]: value for name, value in state_dict.items() if name.startswith("lm.")}
        model.save_pretrained(folder, of_lm)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        thinking = self.accelerator.unwrap_model(self.model if model is None else model)
        if isinstance(thinking.lm, PeftModel):
            set_peft_model_state_dict(thinking.lm, load_peft_weights(resume_from_checkpoint))
        else:
            dtype = next(thinking.lm.parameters()).dtype
            loaded = AutoModelForCausalLM.from_pretrained(resume_from_checkpoint, dtype=dtype)
            thinking.lm.load_state_dict(loaded.state_dict())
        thinking.load_own_state(resume_from_checkpoint)

    def load_thinking(self, folder: str | Path) -> None:
        """Put what a run of the same kind left in a folder into the model, in place."""
        self._load_from_checkpoint(str(folder))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def thinking_model(
    model: "str | PreTrainedModel | PeftModel | ThinkingLM",
    args: QuietSTaRConfig,
    quantization_config: Any = None,
    peft_config: PeftConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ThinkingLM:
    """What a trainer trains: a model that thinks already, or one that is taught to by `args`.

    Raises:
        ValueError: an adapter, or another way to think, for a model that thinks already; or a partition objective for
            one without its head.
    """
    if isinstance(model, str) and is_thinking_folder(resolve_model(model)):
        settings = {"dtype": "float32", **(args.model_init_kwargs or {})}
        model = ThinkingLM.from_pretrained(resolve_model(model), is_trainable=True, **settings)
    if isinstance(model, ThinkingLM):
        if peft_config is not None:
            raise ValueError("peft_config is given, but model thinks already; wrap its lm before you make it think")
        if args.estimator == "partition_learned" and model.log_z is None:
            raise ValueError(
                "estimator='partition_learned' needs a model with a head for log Z, and this one has none; make it "
                "with ThinkingLM(lm, config, learns_log_z=True), or use 'partition'"
            )
        _check_settings(model.thinking, args.thinking_config())
        return model
    lm = with_adapter(load_model(model, args, quantization_config), peft_config)
    thinking = ThinkingLM(lm, args.thinking_config(), learns_log_z=args.estimator == "partition_learned")
    if args.start_text is not None:
        ids = [] if tokenizer is None else tokenizer(args.start_text, add_special_tokens=False).input_ids
        if not ids:
            raise ValueError(
                f"start_text={args.start_text!r} has no tokens, or there is no tokenizer; pass a text and "
                "processing_class"
            )
        thinking.start_like(ids, args.start_share)
    return thinking


def _check_settings(own: ThinkingConfig, asked: ThinkingConfig) -> None:
    """Raise ValueError where a model that thinks already is asked for another way to; its length may change."""
    for name, argument in _SETTINGS.items():
        if getattr(own, name) != getattr(asked, name):
            raise ValueError(
                f"the model thinks with {name}={getattr(own, name)!r} already, and {argument}="
                f"{getattr(asked, name)!r} is asked for; pass {argument}={getattr(own, name)!r}"
            )


def frozen_prior(model: ThinkingLM) -> ThinkingLM:
    """The model as it is now: a copy, or, with adapters, the same base with the adapters off."""
    if not isinstance(model.lm, PeftModel):
        return copy.deepcopy(model).eval().requires_grad_(False)
    prior = ThinkingLM(model.lm, model.thinking)
    prior.load_state_dict(copy.deepcopy(model.own_state()), strict=False)
    for policy in (prior.policy, prior.talk):
        policy.context = partial(without_adapters, model.lm)
    return prior
