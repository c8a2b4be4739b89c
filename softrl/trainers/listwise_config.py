"""Configuration of `ListwisePreferenceTrainer`."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from softrl.trainers._bridge import BaseConfig
from softrl.trainers.engines import load_whole_models
from softrl.trainers.precision import bf16_by_default, checkpoint_without_reentry

ListwiseLoss = Literal["plackett_luce", "listwise", "one_winner", "nca", "partition"]


@dataclass
class ListwisePreferenceConfig(BaseConfig):
    r"""
    Configuration class for the [`ListwisePreferenceTrainer`].

    This class includes only the parameters that are specific to ranked completions. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] documentation. Names that TRL's `DPOConfig` has
    too mean what they mean there.

    Parameters:
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `AutoModelForCausalLM.from_pretrained`, used when the `model` argument of the
            trainer is a string. The dtype defaults to float32.
        max_length (`int`, *optional*, defaults to `1024`):
            Tokens of prompt and completion; longer ones lose the completion's end. `None` cuts nothing.
        loss_type (`str`, *optional*, defaults to `"plackett_luce"`):
            `"plackett_luce"`: the likelihood of the ranking, DPO for two completions. `"listwise"`: cross-entropy to
            `softmax(rewards / reward_temperature)` (InfoNCA). `"one_winner"`: the best against all others (S-DPO).
            `"nca"`: noise contrastive alignment. `"partition"`: squared residuals of rewards, with log Z eliminated
            (VarGrad). The second and the last two need rewards.
        beta (`float`, *optional*, defaults to `0.1`):
            Weight of the reference: scores are `beta * (log π − log π_ref)`; with `"partition"` the temperature of
            rewards.
        reward_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of rewards as weights, for `"listwise"` and `"nca"`.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to turn dropout off.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate for AdamW."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Keep the data set's columns."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision. By default on where a GPU supports it, off on a CPU."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations: less memory."})

    model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `from_pretrained` when `model` is a string."}
    )
    max_length: int | None = field(default=1024, metadata={"help": "Tokens of prompt and completion."})
    loss_type: str = field(default="plackett_luce", metadata={"help": f"One of {', '.join(get_args(ListwiseLoss))}."})
    beta: float = field(default=0.1, metadata={"help": "Weight of the reference."})
    reward_temperature: float = field(default=1.0, metadata={"help": "Temperature of rewards as weights."})
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to turn dropout off."})

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = bf16_by_default(self)
        super().__post_init__()
        load_whole_models()
        checkpoint_without_reentry(self)
        if self.loss_type not in get_args(ListwiseLoss):
            raise ValueError(f"loss_type must be one of {', '.join(get_args(ListwiseLoss))}, got {self.loss_type!r}")
        for name in ("beta", "reward_temperature"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must leave room for a prompt and a completion, got {self.max_length}")

    @property
    def needs_rewards(self) -> bool:
        """Whether a ranking is not enough."""
        return self.loss_type in ("listwise", "nca", "partition")
