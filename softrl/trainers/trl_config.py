"""TRL's own configurations with this project's defaults, so that its trainers are compared at the same settings."""

from dataclasses import dataclass, field

from trl import GRPOConfig, RLOOConfig

from softrl.trainers.precision import bf16_by_default


@dataclass
class _OurDefaults:
    """Where the two have the same argument it has the default that it has in [`RolloutConfig`], dropout is off as in
    our phases, and `top_k`, which here is the sampler's, stays off."""

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Use bf16 mixed precision. By default on where a GPU supports it, off on a CPU."},
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations: less memory."})
    max_completion_length: int | None = field(default=32, metadata={"help": "Tokens to generate (T)."})
    num_completions_to_print: int | None = field(default=4, metadata={"help": "How many completions to print."})
    num_generations_eval: int | None = field(default=1, metadata={"help": "Samples a held-out prompt."})
    disable_dropout: bool = field(default=True, metadata={"help": "Switch dropout off, as all trainers here do."})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = bf16_by_default(self)
        if self.min_p == 0.0:
            self.min_p = None
        super().__post_init__()


@dataclass
class TrlRLOOConfig(_OurDefaults, RLOOConfig):
    r"""
    [`~trl.RLOOConfig`] with this project's defaults.

    `beta` weighs log π − log π_ref of the sampled tokens in the reward, an estimate of the exact KL that our trainers
    use: the same objective, more noise. One update a rollout (`num_iterations=1`) leaves the ratio at 1.
    """

    beta: float = field(default=0.05, metadata={"help": "KL weight, in the reward. 0 loads no reference model."})


@dataclass
class TrlGRPOConfig(_OurDefaults, GRPOConfig):
    r"""
    [`~trl.GRPOConfig`] with this project's defaults.

    `beta` weighs a per-token KL estimate in the loss (k3), whose gradient is not that of the KL in our trainers'
    returns; set it to 0 on both sides to compare estimators alone.
    """

    beta: float = field(default=0.05, metadata={"help": "KL weight, in the loss. 0 loads no reference model."})
    loss_type: str = field(
        default="grpo",
        metadata={"help": "How the loss sums over tokens: grpo, bnpo, dapo or dr_grpo, as ReinforceTrainer's."},
    )
