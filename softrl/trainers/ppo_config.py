"""Configuration of `PPOTrainer`."""

from dataclasses import dataclass, field
from typing import Any

from softrl.estimators.ppo import PPO, ValueFunction
from softrl.trainers.rollout_config import RolloutConfig


@dataclass
class PPOConfig(RolloutConfig):
    r"""
    Configuration class for the [`PPOTrainer`].

    This class includes only the parameters that are specific to PPO. Model, data, sampler, objective and logging are
    those of [`RolloutConfig`]. Names and defaults are those of TRL's former PPOTrainer where it had the thing.
    `max_steps`, `save_steps` and `logging_steps` count optimizer steps, of which there are
    `num_ppo_epochs * num_mini_batches` to a rollout.

    Parameters:
        num_ppo_epochs (`int`, *optional*, defaults to `4`):
            How often the samples of a rollout are gone through.
        num_mini_batches (`int`, *optional*, defaults to `1`):
            Optimizer steps of an epoch, each on another part of every micro-batch; must divide
            `per_device_train_batch_size`.
        cliprange (`float`, *optional*, defaults to `0.2`):
            Bound of the ratio.
        cliprange_value (`float`, *optional*, defaults to `0.2`):
            How far the value may move from the rollout's before its loss stops pulling.
        vf_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the value loss.
        value_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of the value head.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount of rewards.
        lam (`float`, *optional*, defaults to `0.95`):
            λ of generalized advantage estimation.
        whiten_advantages (`bool`, *optional*, defaults to `False`):
            Bring a micro-batch's advantages to mean 0 and variance 1.
        kl_in (`str`, *optional*, defaults to `"reward"`):
            `"reward"`: the returns hold the KL and entropy of later contexts, as in every other method here.
            `"loss"`: they do not, which is another objective.
    """

    num_ppo_epochs: int = field(default=4, metadata={"help": "Epochs over the samples of a rollout."})
    num_mini_batches: int = field(default=1, metadata={"help": "Optimizer steps of an epoch."})
    cliprange: float = field(default=0.2, metadata={"help": "Bound of the ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Bound of the value's change."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    value_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the value head."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of rewards."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    whiten_advantages: bool = field(default=False, metadata={"help": "Bring advantages to mean 0 and variance 1."})
    kl_in: str = field(
        default="reward", metadata={"help": "Whether returns hold the KL.", "choices": ["reward", "loss"]}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_ppo_epochs", "num_mini_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.per_device_train_batch_size % self.num_mini_batches:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} must be divisible by "
                f"num_mini_batches={self.num_mini_batches}: every optimizer step takes an equal part of it"
            )
        for name in ("cliprange", "cliprange_value"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.vf_coef < 0.0:
            raise ValueError(f"vf_coef must not be negative, got {self.vf_coef}")
        if self.kl_in not in ("reward", "loss"):
            raise ValueError(f"kl_in must be 'reward' or 'loss', got {self.kl_in!r}")

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps of a cycle."""
        return self.num_ppo_epochs * self.num_mini_batches

    def make_estimator(self, value: ValueFunction | Any) -> PPO:
        """The estimator with a value function."""
        return PPO(
            value, self.cliprange, self.cliprange, self.lam, self.gamma, self.whiten_advantages, self.kl_in,
            self.vf_coef, self.cliprange_value,
        )  # fmt: skip
