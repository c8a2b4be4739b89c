"""TRL's `SFTConfig` with this project's defaults, for the supervised start of a policy."""

from dataclasses import dataclass, field

from trl import SFTConfig

from softrl.trainers.precision import bf16_by_default


@dataclass
class SupervisedConfig(SFTConfig):
    r"""
    [`~trl.SFTConfig`] with this project's defaults.

    Parameters:
        append_eos (`bool`, *optional*, defaults to `True`):
            End every reference with the end-of-sequence token; not for references that are cut in mid-sentence.
    """

    output_dir: str | None = field(default="runs/sft", metadata={"help": "Where the model goes."})
    learning_rate: float = field(default=5e-4, metadata={"help": "The initial learning rate for AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "How often the texts are gone through."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Texts a step."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, below 1 as a share of all."})
    max_length: int | None = field(default=256, metadata={"help": "Tokens of prompt and reference; more are cut off."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision. By default on where a GPU supports it, off on a CPU."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations: less memory."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "For GPUs."})
    save_strategy: str = field(
        default="no", metadata={"help": "When checkpoints are written; to go on from, 'steps'."}
    )
    append_eos: bool = field(default=True, metadata={"help": "End every reference with the end-of-sequence token."})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = bf16_by_default(self)
        super().__post_init__()
