"""Configuration that every trainer shares which samples completions and scores them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn
from transformers.trainer_utils import IntervalStrategy

from softrl.models.policy import Policy
from softrl.objectives.schedules import AdaptiveKL
from softrl.tokens.truncation import SupportRule, Truncation
from softrl.trainers.basis_truncation import BasisAwareArguments
from softrl.trainers.engines import load_whole_models
from softrl.trainers.precision import bf16_by_default, checkpoint_without_reentry
from softrl.trainers.scheduled import ScheduledArguments
from softrl.trainers.vllm_config import VLLMConfig


@dataclass
class RolloutConfig(ScheduledArguments, BasisAwareArguments, VLLMConfig):
    r"""
    Configuration class for the [`RolloutTrainer`]; the configurations of the other trainers extend it.

    This class includes only the parameters that are specific to rollouts. For a full list of training arguments,
    please refer to the [`~transformers.TrainingArguments`] documentation. Names that TRL has too mean what they mean
    there. `metric_for_best_model` defaults to `"eval_reward"` where transformers would look for a loss: an evaluation
    has none. `gradient_checkpointing` defaults to `False`, unlike TRL's: with it the cotangents need a forward pass of
    their own.

    Parameters:
        > Parameters that control the model and the data

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `AutoModelForCausalLM.from_pretrained`, used when the `model` argument of the
            trainer is a string. The dtype defaults to float32.
        max_prompt_length (`int`, *optional*):
            Longer prompts lose tokens on the left. By default a prompt that does not fit the context is an error.
        shuffle_dataset (`bool`, *optional*, defaults to `True`):
            Whether to shuffle the prompts.

        > Parameters that control the rollout

        num_generations (`int`, *optional*, defaults to `1`):
            Samples a prompt (G); the prompt is prefilled once. `per_device_train_batch_size` counts samples and must
            be divisible by it.
        max_completion_length (`int`, *optional*, defaults to `32`):
            Tokens to generate (T).
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; part of the policy's definition, at sampling and at scoring.
        top_p, min_p (`float`, *optional*, default to `1.0` and `0.0`):
            Nucleus rules of the sampler; off by default.
        basis_aware, basis_aware_rule, ...:
            Basis-aware truncation in their place; see [`BasisAwareArguments`].
        use_vllm, vllm_mode, ...:
            Hard samples through vLLM, untried on hardware; see [`VLLMConfig`].

        > Parameters that control the objective

        reward_weights (`list[float]`, *optional*):
            One weight a reward; 1 by default.
        beta (`float` or `str`, *optional*, defaults to `0.05`):
            Weight of KL(π‖π_ref), nats a token, summed over the completion; a number or a schedule, see
            `softrl.objectives.schedules`. 0 loads no reference model.
        target_kl (`float`, *optional*):
            Hold the KL at this target, nats a token: `beta` is then where its weight starts.
        kl_horizon (`int`, *optional*, defaults to `10`):
            Steps in which a KL that is off target by a fifth or more moves its weight by a factor e^0.2.
        entropy_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the policy's entropy, nats a token.
        mask_truncated_completions (`bool`, *optional*, defaults to `False`):
            Completions that did not end within `max_completion_length` contribute nothing to the loss. It stays a
            mean over all completions, as in TRL's RLOOTrainer: masking some does not make the others count more.

        > Parameters that control what is not learned from

        max_skipped_steps (`int`, *optional*, defaults to `5`):
            A step whose gradient norm is not finite, or whose reward jumped, is not taken. So many in a row end the
            run with an error, after a checkpoint if there is a `save_strategy`.
        max_reward_jump (`float`, *optional*):
            Do not take a step in which a micro-batch's mean reward is further from the running mean of those before,
            in standard deviations of such means. Off by default.

        > Parameters that control evaluation and logging

        eval_metrics (`list[str]`, *optional*):
            Metrics of decoded completions against the data set's column `reference` (a text or a list of texts a
            row): "sacrebleu", "rouge", of the whole set "self_bleu" and "frechet" (of MiniLM's embeddings), or what
            `evaluate.load` finds; logged as `eval_<metric>/<score>`.
        early_stop_on_gap (`float`, *optional*):
            Stop training when the soft reward is further above the hard one at three logs in a row: soft tokens then
            score what no text does. For trainers that log `reward/gap`.
        early_stop_on_judge_drop (`float`, *optional*):
            Stop training when an evaluation's judge is further below the best one of the run. Needs `eval_strategy`.
        log_completions (`bool`, *optional*, defaults to `False`):
            At every logging step, print a few completions of the last step with their rewards, write all of them to
            `output_dir/completions`, and send them as a table to trackio and wandb where `report_to` names them.
        num_completions_to_print (`int`, *optional*, defaults to `4`):
            How many to print.
    """

    _SCHEDULED: ClassVar[dict[str, bool]] = {"beta": False}
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*VLLMConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Defaults of TrainingArguments and TRL that rewards and rollouts want otherwise
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Keep the data set's columns: rewards may read them."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Use bf16 mixed precision. By default on where a GPU supports it, off on a CPU."},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the last phase: less memory, more time."}
    )

    model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `from_pretrained` when `model` is a string."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longer prompts lose tokens on the left; by default they are an error."}
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Whether to shuffle the prompts."})

    num_generations: int = field(default=1, metadata={"help": "Samples a prompt (G)."})
    max_completion_length: int = field(default=32, metadata={"help": "Tokens to generate (T)."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus mass of the sampler."})
    min_p: float = field(default=0.0, metadata={"help": "Smallest probability relative to the largest one."})

    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight a reward."})
    # A number or a schedule. Annotated as text because HfArgumentParser knows one type an argument.
    beta: str = field(default=0.05, metadata={"help": "KL weight, per nat and token. 0 loads no reference model."})
    target_kl: float | None = field(default=None, metadata={"help": "KL to hold, nats a token; beta then adapts."})
    kl_horizon: int = field(default=10, metadata={"help": "Steps in which the KL weight moves by a factor e^0.2."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Entropy weight, per nat and token."})
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Leave completions that did not end out of the loss."}
    )

    max_skipped_steps: int = field(
        default=5, metadata={"help": "Stop after so many steps in a row that were not taken."}
    )
    max_reward_jump: float | None = field(
        default=None, metadata={"help": "Do not take a step whose mean reward jumps by more standard deviations."}
    )

    eval_metrics: list[str] | None = field(
        default=None, metadata={"help": "Metrics of texts: sacrebleu, rouge, self_bleu, frechet, or of `evaluate`."}
    )
    early_stop_on_gap: float | None = field(
        default=None, metadata={"help": "Stop when the soft reward is further above the hard one at three logs."}
    )
    early_stop_on_judge_drop: float | None = field(
        default=None, metadata={"help": "Stop when the judge of an evaluation is further below the best one."}
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Print, write and report completions at every logging step."}
    )
    num_completions_to_print: int = field(default=4, metadata={"help": "How many completions to print."})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = bf16_by_default(self)
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_reward"
        super().__post_init__()
        load_whole_models()
        checkpoint_without_reentry(self)
        if self.max_skipped_steps < 1:
            raise ValueError(f"max_skipped_steps must be at least 1, got {self.max_skipped_steps}")
        if self.max_reward_jump is not None and not self.max_reward_jump > 0.0:
            raise ValueError(
                f"max_reward_jump counts standard deviations and must be positive, got {self.max_reward_jump}; None "
                "turns it off"
            )
        if self.num_generations < 1:
            raise ValueError(f"num_generations must be at least 1, got {self.num_generations}")
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} counts samples and must be divisible "
                f"by num_generations={self.num_generations}, so that a prompt's samples stay on one device"
            )
        for name in ("early_stop_on_gap", "early_stop_on_judge_drop"):
            if getattr(self, name) is not None and not getattr(self, name) > 0.0:
                raise ValueError(
                    f"{name} must be positive, in units of the reward or the judge; got {getattr(self, name)}"
                )
        if self.early_stop_on_judge_drop is not None and self.eval_strategy == IntervalStrategy.NO:
            raise ValueError(
                f"early_stop_on_judge_drop={self.early_stop_on_judge_drop} looks at evaluations, and there are none; "
                "set eval_strategy='steps' and eval_steps"
            )
        self.constants_as_numbers()
        # Both raise on a number outside its range, before a model is loaded.
        self.make_truncation()
        self.make_kl_control()

    @property
    def needs_reference(self) -> bool:
        """Whether the KL ever has a weight."""
        return max(self.schedules()["beta"].ends()) > 0.0

    def make_kl_control(self) -> AdaptiveKL | None:
        """What adapts the KL weight; None without a target.

        Raises:
            ValueError: a number outside its range, or a schedule of beta together with a target.
        """
        beta = self.schedules()["beta"]
        if min(beta.ends()) < 0.0:
            raise ValueError(f"beta must not be negative, got {self.beta!r}")
        if self.target_kl is None:
            return None
        if not beta.is_constant:
            raise ValueError(
                f"target_kl={self.target_kl} adapts beta by itself; give beta a number, not {self.beta!r}"
            )
        for name, value in (("target_kl", self.target_kl), ("beta", beta.first)):
            if not value > 0.0:
                raise ValueError(f"{name} must be positive to hold the KL at a target, got {value}")
        return AdaptiveKL(beta.first, self.target_kl, self.kl_horizon)

    def make_truncation(self, support: SupportRule | None = None) -> Truncation:
        """The sampler's nucleus rules; K is a soft token's, and hard rollouts do not apply it.

        Args:
            support: of `make_support`, once there is a policy.
        """
        return Truncation(1, self.top_p, self.min_p, support)

    def make_policy(self, model: nn.Module, context: Callable[[], AbstractContextManager] = nullcontext) -> Policy:
        """A model as the policy, or the reference, that these arguments describe."""
        return Policy(model, self.temperature, context=context)
