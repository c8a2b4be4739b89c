"""Configuration of `SoftRolloutTrainer`."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from softrl.estimators.adjoint import AdjointSettings
from softrl.tokens.relaxation import Relaxation, make_relaxation
from softrl.tokens.truncation import Truncation
from softrl.trainers._bridge import BaseConfig


@dataclass
class SoftRolloutConfig(BaseConfig):
    r"""
    Configuration class for the [`SoftRolloutTrainer`].

    This class includes only the parameters that are specific to soft rollouts. For a full list of training arguments,
    please refer to the [`~transformers.TrainingArguments`] documentation. Names that TRL has too mean what they mean
    there.

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
            be divisible by it. A pathwise gradient needs no group, unlike RLOO or GRPO.
        max_completion_length (`int`, *optional*, defaults to `32`):
            Tokens to generate (T).
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; part of the policy's definition, at sampling and at scoring.
        top_k (`int`, *optional*, defaults to `64`):
            Kept ids of a soft token (K).
        top_p, min_p (`float`, *optional*, default to `1.0` and `0.0`):
            Nucleus rules of the sampler; off by default.

        > Parameters that control the relaxation

        relaxation (`str`, *optional*, defaults to `"st_gumbel"`):
            `"softmax"`, `"gumbel_softmax"`, `"straight_through"` or `"st_gumbel"`.
        relaxation_temperature (`float`, *optional*, defaults to `1.0`):
            τ of the weights.
        max_entropy_nats (`float`, *optional*):
            Bound the entropy of every soft token instead, in (0, log K).
        detach_temperature (`bool`, *optional*, defaults to `False`):
            Treat the entropy bound's temperature as a constant in the backward pass.
        norm_correction (`str`, *optional*, defaults to `"none"`):
            `"none"`, `"inverse_l2"` or `"match"`: restore the norm that a mean of embeddings loses.

        > Parameters that control the cotangents

        cotangent_method (`str`, *optional*, defaults to `"parallel"`):
            `"parallel"`, `"sequential"` or `"autograd"`.
        hops (`int`, *optional*):
            Stop the parallel method after this many sweeps; 0 detaches the feedback.
        feedback_discount (`float`, *optional*, defaults to `1.0`):
            γ per feedback edge; 1 is exact.
        adjoint_clip (`float`, *optional*):
            Bound of the adjoint's norm at each step.
        adjoint_tol (`float`, *optional*, defaults to `1e-2`):
            Relative residual at which the parallel sweeps stop.

        > Parameters that control the objective

        reward_weights (`list[float]`, *optional*):
            One weight a reward; 1 by default.
        beta (`float`, *optional*, defaults to `0.05`):
            Weight of KL(π‖π_ref), nats a token, summed over the completion. 0 loads no reference model.
        entropy_coef (`float`, *optional*, defaults to `0.0`):
            Weight of the policy's entropy, nats a token.

        > Parameters that control logging

        log_completions (`bool`, *optional*, defaults to `False`):
            Print a few completions with their rewards at every logging step.
        num_completions_to_print (`int`, *optional*, defaults to `4`):
            How many.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Defaults of TrainingArguments and TRL that rewards and rollouts want otherwise
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Keep the data set's columns: rewards may read them."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Use bf16 mixed precision. By default on where a GPU supports it, off on a CPU."},
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
    top_k: int = field(default=64, metadata={"help": "Kept ids of a soft token (K)."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus mass of the sampler."})
    min_p: float = field(default=0.0, metadata={"help": "Smallest probability relative to the largest one."})

    relaxation: str = field(
        default="st_gumbel",
        metadata={"help": "Relaxation.", "choices": ["softmax", "gumbel_softmax", "straight_through", "st_gumbel"]},
    )
    relaxation_temperature: float = field(default=1.0, metadata={"help": "Temperature of the weights."})
    max_entropy_nats: float | None = field(default=None, metadata={"help": "Entropy bound of a soft token."})
    detach_temperature: bool = field(default=False, metadata={"help": "Entropy bound's temperature as a constant."})
    norm_correction: str = field(
        default="none", metadata={"help": "Norm of mixtures.", "choices": ["none", "inverse_l2", "match"]}
    )

    cotangent_method: str = field(
        default="parallel",
        metadata={"help": "How cotangents are solved for.", "choices": ["parallel", "sequential", "autograd"]},
    )
    hops: int | None = field(default=None, metadata={"help": "Sweeps of the parallel method; 0 detaches."})
    feedback_discount: float = field(default=1.0, metadata={"help": "Discount per feedback edge."})
    adjoint_clip: float | None = field(default=None, metadata={"help": "Bound of the adjoint's norm at each step."})
    adjoint_tol: float = field(default=1e-2, metadata={"help": "Residual at which the parallel sweeps stop."})

    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight a reward."})
    beta: float = field(default=0.05, metadata={"help": "KL weight, per nat and token. 0 loads no reference model."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Entropy weight, per nat and token."})

    log_completions: bool = field(default=False, metadata={"help": "Print completions at every logging step."})
    num_completions_to_print: int = field(default=4, metadata={"help": "How many completions to print."})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()
        if self.num_generations < 1:
            raise ValueError(f"num_generations must be at least 1, got {self.num_generations}")
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} counts samples and must be divisible "
                f"by num_generations={self.num_generations}, so that a prompt's samples stay on one device"
            )
        # Both raise on a number outside its range, before a model is loaded.
        self.make_relaxation()
        self.adjoint_settings()

    def make_truncation(self) -> Truncation:
        """The sampler's nucleus rules, and K."""
        return Truncation(self.top_k, self.top_p, self.min_p)

    def make_relaxation(self) -> Relaxation:
        """The relaxation that these arguments describe."""
        return make_relaxation(
            self.relaxation,
            self.make_truncation(),
            self.relaxation_temperature,
            self.max_entropy_nats,
            self.detach_temperature,
        )

    def adjoint_settings(self) -> AdjointSettings:
        """How cotangents are solved for."""
        return AdjointSettings(
            self.cotangent_method, self.hops, self.feedback_discount, self.adjoint_clip, self.adjoint_tol
        )
