"""Configuration of `SoftRolloutTrainer`."""

from dataclasses import dataclass, field

from softrl.trainers.relaxation_config import RelaxationConfig


@dataclass
class SoftRolloutConfig(RelaxationConfig):
    r"""
    Configuration class for the [`SoftRolloutTrainer`].

    Model, data, sampler, objective and logging are those of [`RolloutConfig`], relaxation and cotangents those of
    [`RelaxationConfig`]. A pathwise gradient needs no group, unlike RLOO or GRPO, so `num_generations` may stay 1.

    Parameters:
        surrogate_chunks (`int`, *optional*, defaults to `1`):
            Parts of a micro-batch whose surrogates are run one after the other, each with a forward and a backward
            pass of its own: the last phase keeps the activations of one part, while rollout and cotangents are of the
            whole. The sequential cotangents keep those of one step anyway; the parallel ones need the whole pass.
    """

    surrogate_chunks: int = field(default=1, metadata={"help": "Parts of a micro-batch in the last phase."})

    def __post_init__(self):
        super().__post_init__()
        if self.surrogate_chunks < 1 or self.per_device_train_batch_size % self.surrogate_chunks:
            raise ValueError(
                f"surrogate_chunks={self.surrogate_chunks} must be at least 1 and divide "
                f"per_device_train_batch_size={self.per_device_train_batch_size}: parts are of one size, on every "
                "process"
            )
