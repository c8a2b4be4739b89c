"""Configuration of `SoftARTrainer`."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from softrl.contexts.soft_ar_config import Output
from softrl.contexts.window import Normalisation, WindowLayout
from softrl.objectives.soft_ar import SoftARObjective
from softrl.trainers._bridge import BaseConfig
from softrl.trainers.engines import load_whole_models
from softrl.trainers.precision import bf16_by_default
from softrl.trainers.scheduled import ScheduledArguments

CORES = ("transformer", "gru")
SLOT_ORDERS = {"aggregate_first": ("aggregate", "segments"), "aggregate_last": ("segments", "aggregate")}

_COUNTS = ("hidden_size", "num_layers", "num_heads", "block_length_tokens", "max_skipped_steps")


@dataclass
class SoftARTrainingConfig(ScheduledArguments, BaseConfig):
    r"""
    Configuration class for the [`SoftARTrainer`].

    For a full list of training arguments, please refer to the [`~transformers.TrainingArguments`] documentation. The
    defaults train a small model from scratch. What is said of model and window is for a model that is made: one that
    has a window already keeps it.

    Parameters:
        > Parameters that control a model from scratch and its data

        tokenizer (`str`, *optional*, defaults to `"characters"`):
            `"characters"`, or the size of a vocabulary of byte pairs that is trained on the text.
        block_length_tokens (`int`, *optional*, defaults to `384`):
            Tokens of a training text, several windows long.
        core (`str`, *optional*, defaults to `"transformer"`):
            `"transformer"` (a small Llama) or `"gru"`.
        hidden_size, num_layers, num_heads (`int`, *optional*, default to `128`, `4` and `4`):
            Its sizes.
        max_length (`int`, *optional*):
            Tokens of a text; longer ones lose their end. By default nothing is cut.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `AutoModelForCausalLM.from_pretrained`, used when the `model` argument of the
            trainer is a string. The dtype defaults to float32.

        > Parameters that control the window, see [`~softrl.contexts.window.WindowLayout`]

        aggregate (`bool`, *optional*, defaults to `True`):
            Whether a slot sums up all that is older than the segments.
        num_segments, segment_tokens (`int`, *optional*, default to `2` and `32`):
            Slots that each sum up so many tokens. No aggregate and no segments: the window truncates.
        num_hard, num_soft (`int`, *optional*, default to `64` and `0`):
            Uncompressed tokens, hard and soft.
        stride (`int`, *optional*, defaults to `0`):
            Tokens from a window to the next; 0 for all soft ones, or half of the hard ones without any.
        slot_order (`str`, *optional*, defaults to `"aggregate_first"`):
            Or `"aggregate_last"`, which puts it behind the segments.
        normalisation (`str`, *optional*, defaults to `"mean"`):
            Of a slot's sum: `"mean"`, `"sqrt"`, `"decay"` (by `decay` a token), `"learned"` or `"none"`.
        decay (`float`, *optional*, defaults to `0.99`):
            See `normalisation`.

        > Parameters that control what is put out and learned

        output (`str`, *optional*, defaults to `"tokens"`):
            `"tokens"`: a head over the vocabulary. `"embedding"`: one vector, whose logits are −‖y − e‖²/τ.
        distance_temperature (`float`, *optional*, defaults to `0.2`):
            τ at the start; it is learned.
        cross_entropy_weight (`float`, *optional*, defaults to `1.0`):
            Of the tokens' negative log-likelihood. With `output="embedding"` it is what holds the embeddings apart.
        regression_weight (`float`, *optional*, defaults to `0.0`):
            Of the squared distance to the true tokens' embeddings behind a stop-gradient; with `output="embedding"`.
        collapse_head_weight (`float`, *optional*, defaults to `0.0`):
            Of the squared error of a linear head from hidden states to the next token's embedding, which says what
            soft tokens become: `softrl generate --collapse learned`. Above 0 the model gets such a head where it has
            none. The model does not learn from it, but the head's gradient counts in `max_grad_norm`, and Adam does
            not care how large a loss is: give a small weight such as `0.001`.
        soft_share (`float` or `str`, *optional*, defaults to `0.0`):
            Share of the tokens in the soft region that are fed as the model's own outputs; a number or a schedule. 0
            is pre-training on hard tokens only.
        detach_soft (`bool`, *optional*, defaults to `True`):
            Whether no gradient goes through what is fed there.
        memory_dropout (`float`, *optional*, defaults to `0.0`):
            Share of the texts that are read without memory, so that the model knows how to do without.
        eval_beyond_tokens (`int`, *optional*):
            Evaluations call predictions from more than so many tokens `_beyond`. By default as many as the window
            holds uncompressed; to compare windows of different sizes give all the largest one's. Some text must reach
            it. Metrics `_permuted` need batches of two texts, see `per_device_eval_batch_size`.
        max_skipped_steps (`int`, *optional*, defaults to `5`):
            Stop after so many steps in a row whose gradients were not finite.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs"]
    _SCHEDULED: ClassVar[dict[str, bool]] = {"soft_share": False}

    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate for AdamW."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, below 1 as a share of all."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Keep the data set's columns."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision. By default on where a GPU supports it, off on a CPU."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Not of windows: leave it off."})

    tokenizer: str = field(default="characters", metadata={"help": "'characters' or a vocabulary's size."})
    block_length_tokens: int = field(default=384, metadata={"help": "Tokens of a training text."})
    core: str = field(default="transformer", metadata={"help": "Model from scratch.", "choices": list(CORES)})
    hidden_size: int = field(default=128, metadata={"help": "Its width."})
    num_layers: int = field(default=4, metadata={"help": "Its layers."})
    num_heads: int = field(default=4, metadata={"help": "Its attention heads."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a text."})
    model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `from_pretrained` when `model` is a string."}
    )

    aggregate: bool = field(default=True, metadata={"help": "One slot for all that is old."})
    num_segments: int = field(default=2, metadata={"help": "Slots of segments (S)."})
    segment_tokens: int = field(default=32, metadata={"help": "Tokens of a segment (L)."})
    num_hard: int = field(default=64, metadata={"help": "Hard tokens of a window."})
    num_soft: int = field(default=0, metadata={"help": "Soft tokens of a window."})
    stride: int = field(default=0, metadata={"help": "Tokens from a window to the next; 0 for a default."})
    slot_order: str = field(
        default="aggregate_first", metadata={"help": "Order of the slots.", "choices": list(SLOT_ORDERS)}
    )
    normalisation: str = field(
        default="mean", metadata={"help": "Normalisation of slots.", "choices": list(get_args(Normalisation))}
    )
    decay: float = field(default=0.99, metadata={"help": "Of normalisation 'decay', a token."})

    output: str = field(default="tokens", metadata={"help": "What is put out.", "choices": list(get_args(Output))})
    distance_temperature: float = field(default=0.2, metadata={"help": "Temperature of distances at the start."})
    cross_entropy_weight: float = field(default=1.0, metadata={"help": "Weight of the log-likelihood."})
    regression_weight: float = field(default=0.0, metadata={"help": "Weight of the squared error of embeddings."})
    collapse_head_weight: float = field(default=0.0, metadata={"help": "Weight of the head that collapses."})
    soft_share: str = field(default=0.0, metadata={"help": "Share of soft tokens; a number or a schedule."})
    detach_soft: bool = field(default=True, metadata={"help": "No gradient goes through soft tokens."})
    memory_dropout: float = field(default=0.0, metadata={"help": "Share of texts that are read without memory."})
    eval_beyond_tokens: int | None = field(default=None, metadata={"help": "Where an evaluation's `_beyond` begins."})

    max_skipped_steps: int = field(default=5, metadata={"help": "Stop after so many steps that were not taken."})
    max_reward_jump: ClassVar[float | None] = None  # of `StepGuardMixin`: there are no rewards

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = bf16_by_default(self)
        super().__post_init__()
        load_whole_models()
        self._check()
        self.constants_as_numbers()

    def _check(self) -> None:
        _ = self.layout, self.objective  # they raise on what is out of range, before a model is loaded
        if self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing=True is not for windows; turn it off, and lower per_device_train_batch_size "
                "or block_length_tokens to save memory"
            )
        for name, allowed in (("core", CORES), ("output", get_args(Output))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.regression_weight > 0.0 and self.output != "embedding":
            raise ValueError(
                f"regression_weight={self.regression_weight} is of a vector that is put out; pass output='embedding'"
            )
        shares = {"memory_dropout": (self.memory_dropout,), "soft_share": self.schedules()["soft_share"].ends()}
        for name, values in shares.items():
            if not all(0.0 <= value <= 1.0 for value in values):
                raise ValueError(f"{name} is a share and must lie in [0, 1], got {getattr(self, name)!r}")
        if max(shares["soft_share"]) > 0.0 and not self.num_soft:
            raise ValueError(f"soft_share={self.soft_share!r} needs a soft region; pass num_soft, 1 or more")
        for name in (*_COUNTS, "max_length"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if not 0.0 < self.distance_temperature < float("inf"):
            raise ValueError(f"distance_temperature must be positive and finite, got {self.distance_temperature}")

    @property
    def layout(self) -> WindowLayout:
        """The window of a model that has none yet."""
        if self.slot_order not in SLOT_ORDERS:
            raise ValueError(f"slot_order must be one of {', '.join(SLOT_ORDERS)}, got {self.slot_order!r}")
        order: Any = SLOT_ORDERS[self.slot_order]
        normalisation: Any = self.normalisation
        return WindowLayout(
            self.num_segments, self.segment_tokens, self.num_hard, self.num_soft, self.aggregate, order,
            normalisation, self.decay, self.stride,
        )  # fmt: skip

    @property
    def objective(self) -> SoftARObjective:
        """What is minimised."""
        return SoftARObjective(
            self.cross_entropy_weight, self.regression_weight, self.detach_soft, self.collapse_head_weight
        )
