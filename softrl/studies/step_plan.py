"""What the estimates of memory and communication are asked about: a micro-batch, its precision, and the engine."""

from dataclasses import dataclass
from typing import Literal

from softrl.models.shape import ModelShape

Method = Literal["parallel", "blocked", "sequential", "autograd", "score_function"]
Engine = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2"]

ENGINES: tuple[Engine, ...] = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
DEEPSPEED = ("zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Precision:
    """Bytes an element.

    Args:
        weights: of frozen weights, and of trained ones unless there are adapters.
        trained: of trained parameters; PEFT keeps adapters in float32 on a bfloat16 model.
        compute: of what layers compute in.
        autocast: layers compute in less than their weights have, each casting its inputs.
        quantized: of the layers' frozen weights, where these are quantized.
    """

    weights: int = 4
    trained: int = 4
    compute: int = 4
    autocast: bool = False
    quantized: float | None = None

    def weight_bytes(self, shape: ModelShape) -> float:
        """Of a whole policy without adapters."""
        if self.quantized is None:
            return shape.num_parameters * self.weights
        layers = shape.num_layers * shape.layer_parameters
        return layers * self.quantized + (shape.num_parameters - layers) * self.weights


@dataclass(frozen=True)
class StepPlan:
    """One micro-batch of a process, and how its gradient is found.

    Args:
        num_sequences: N = B * G.
        prompt_length, num_steps: P and T, in tokens.
        num_kept: K.
        method: of the cotangents; "score_function" has none.
        block_length: of "blocked", in steps.
        checkpointed: gradient checkpointing, of the surrogate's pass.
        has_kl: a KL to a reference is part of the objective.
        has_entropy: an entropy term is.
        accumulates: gradients of earlier micro-batches are there in every phase.
        states_per_parameter: numbers that the optimiser keeps for each.
    """

    num_sequences: int
    prompt_length: int
    num_steps: int
    num_kept: int = 64
    method: Method = "parallel"
    block_length: int = 32
    checkpointed: bool = False
    has_kl: bool = False
    has_entropy: bool = False
    accumulates: bool = False
    states_per_parameter: float = 2.0

    @property
    def num_tokens(self) -> int:
        """Positions of one parallel pass: the last token is not fed."""
        return self.num_sequences * (self.prompt_length + self.num_steps - 1)


@dataclass(frozen=True)
class Sharding:
    """An engine and how many processes share the work."""

    engine: Engine = "single"
    num_processes: int = 1

    def __post_init__(self) -> None:
        if self.num_processes < 1 or (self.engine == "single" and self.num_processes > 1):
            raise ValueError(
                f"{self.num_processes} processes under {self.engine!r}: 'single' is one, others 1 or more"
            )

    def shared(self, size: float, *engines: str) -> float:
        """A process's part of something that these engines shard."""
        return size / self.num_processes if self.engine in engines else size

    @property
    def shards_parameters(self) -> bool:
        """Whether a process holds a part of each parameter only."""
        return self.engine in ("zero3", "fsdp2")

    @property
    def shares_a_pass(self) -> bool:
        """Whether phases 2 and 3 may differentiate one forward pass; see `SoftRolloutTrainer._shares_a_pass`."""
        return self.engine in ("single", "ddp")
