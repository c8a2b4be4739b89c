"""Configuration of `fit_classifier` and `fit_preferences`: TRL's `RewardConfig` with defaults for small machines."""

from dataclasses import dataclass, field

from trl import RewardConfig

from softrl.trainers.precision import bf16_by_default


@dataclass
class RewardModelConfig(RewardConfig):
    r"""
    [`~trl.RewardConfig`] with this project's defaults, for reward models of labelled texts and of preference pairs.

    Parameters:
        calibrate (`bool`, *optional*, defaults to `True`):
            Divide the logits by the temperature that fits a tenth of the training data best, which is not trained on.
    """

    output_dir: str | None = field(default="runs/reward-model", metadata={"help": "Where the model goes."})
    learning_rate: float = field(default=5e-5, metadata={"help": "The initial learning rate for AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "How often the texts are gone through."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Texts, or pairs, a step."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Texts, or pairs, at a time."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up, below 1 as a share of all."})
    max_length: int | None = field(
        default=128, metadata={"help": "Tokens of a text; longer ones are cut or left out."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "How batches are made; of equal lengths has little padding."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision. By default on where a GPU supports it, off on a CPU."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations: less memory."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "For GPUs."})
    save_strategy: str = field(
        default="no", metadata={"help": "When checkpoints are written; to go on from, 'steps'."}
    )
    calibrate: bool = field(default=True, metadata={"help": "Fit a temperature on held-out training data."})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = bf16_by_default(self)
        super().__post_init__()
