"""Configuration of `SoftRolloutTrainer`."""

from dataclasses import dataclass

from softrl.trainers.relaxation_config import RelaxationConfig


@dataclass
class SoftRolloutConfig(RelaxationConfig):
    r"""
    Configuration class for the [`SoftRolloutTrainer`].

    Model, data, sampler, objective and logging are those of [`RolloutConfig`], relaxation and cotangents those of
    [`RelaxationConfig`]; there are no others. A pathwise gradient needs no group, unlike RLOO or GRPO, so
    `num_generations` may stay 1.
    """
