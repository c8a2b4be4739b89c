"""Configuration of `SoftSFTTrainer`."""

from dataclasses import dataclass, field
from typing import ClassVar, get_args

from torch import nn
from trl import SFTConfig

from softrl.models.policy import Policy
from softrl.objectives.token_terms import DirectTerms
from softrl.tokens.guidance import GuidanceRule, GuidedRelaxation, guided
from softrl.tokens.learned import SETTINGS
from softrl.tokens.relaxation import RELAXATIONS, Relaxation
from softrl.trainers.engines import load_whole_models
from softrl.trainers.learned_settings import make_learned, with_learned
from softrl.trainers.precision import bf16_by_default, checkpoint_without_reentry
from softrl.trainers.relaxation_config import SoftTokenArguments


@dataclass
class SoftSFTConfig(SoftTokenArguments, SFTConfig):
    r"""
    Configuration class for the [`SoftSFTTrainer`].

    Model, data and training are those of [`~trl.SFTConfig`], relaxation and cotangents those of
    [`SoftTokenArguments`]; `hops=0` detaches the feedback, so that a step is one ordinary pass behind its rollout. The
    learning rate's warm-up is `warmup_steps`.

    Parameters:
        guidance (`str`, *optional*, defaults to `"mix"`):
            How the true token is fed beside the model's own soft one: `"mix"` feeds `α e_true + (1 − α) e_soft`,
            `"floor"` lifts the true token's weight to at least α. An entropy bound is on the model's own soft token;
            a true one beside it may raise the entropy of what is fed above it.
        guidance_alpha (`float` or `str`, *optional*, defaults to `"linear:1.0->0.5"`):
            α in [0, 1]; a number, a schedule over the run, or values by epoch such as `"epochs:1.0,0.7,0.5"`. 1 is
            teacher forcing, 0 feeds the model its own soft tokens only.
        true_token_probability (`float` or `str`, *optional*, defaults to `0.0`):
            Scheduled sampling: at each step the true token is fed with this probability, else the guided soft one; a
            number, a schedule or values by epoch.
        entropy_penalty (`float` or `str`, *optional*, defaults to `0.0`):
            β of `+ β H` in the loss, nats a token; a number or a schedule.
        top_p, min_p (`float`, *optional*, default to `1.0` and `0.0`):
            Nucleus rules of a soft token.
        learned_settings (`list[str]`, *optional*, defaults to `[]`):
            What is learned of the relaxation, among `"temperature"`, `"max_entropy_nats"`, `"min_p"` and `"top_k"`.
            The first three start from `relaxation_temperature`, `max_entropy_nats` and `min_p`, which is then no hard
            rule any more. `top_k` stays the number of kept ids K, and a smooth top-k starts at K / 2. Needs a
            relaxation that feeds mixtures, and feedback (`hops` other than 0). A step that feeds true tokens only does
            not move them. Saved in `soft_decoding.json` as numbers; training from that folder goes on from them.
        learned_settings_learning_rate (`float`, *optional*, defaults to `1e-2`):
            Their learning rate, in a parameter group of its own that follows the scheduler too.
        learned_settings_barrier (`float`, *optional*, defaults to `0.0`):
            Weight of a log barrier in the loss that holds them off the ends where decoding becomes greedy.
        soft_prefix_tokens (`int`, *optional*, defaults to `0`):
            Train so many vectors before the prompt (PEFT's prompt tuning), and nothing else. Not beside an adapter.
        think_tokens (`bool`, *optional*, defaults to `False`):
            Add `<think>` and `</think>` to tokenizer and model, put the first behind every prompt and the second
            behind every completion that has none, and train their rows, with LoRA too. The data need `prompt` and
            `completion` as text. Saved is that generation thinks softly between them, from the beginning.
        freeze_embeddings (`bool`, *optional*, defaults to `False`):
            Keep the input embedding as it is, and a head that is tied to it.
        freeze_layers (`int`, *optional*, defaults to `0`):
            Keep so many of the first layers as they are.
        max_skipped_steps (`int`, *optional*, defaults to `5`):
            A step whose gradient norm is not finite is not taken. So many in a row end the run with an error, after a
            checkpoint if there is a `save_strategy`.
    """

    _SCHEDULED: ClassVar[dict[str, bool]] = SoftTokenArguments._SCHEDULED | {
        "guidance_alpha": False, "true_token_probability": False, "entropy_penalty": False,
    }  # fmt: skip
    _BY_EPOCH: ClassVar[tuple[str, ...]] = ("guidance_alpha", "true_token_probability")
    max_reward_jump: ClassVar[float | None] = None  # of `StepGuardMixin`: there are no rewards

    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision. By default on where a GPU supports it, off on a CPU."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the last phase: less memory, more time."}
    )
    # Annotated as text because HfArgumentParser knows one type an argument.
    guidance_alpha: str = field(
        default="linear:1.0->0.5", metadata={"help": "How much of the true token is fed; a number or a schedule."}
    )
    guidance: str = field(default="mix", metadata={"help": "How it is fed.", "choices": list(get_args(GuidanceRule))})
    true_token_probability: str = field(
        default=0.0, metadata={"help": "Probability of feeding the true token alone; a number or a schedule."}
    )
    entropy_penalty: str = field(default=0.0, metadata={"help": "Weight of the entropy in the loss."})
    relaxation: str = field(default="softmax", metadata={"help": "Relaxation.", "choices": list(RELAXATIONS)})
    top_k: str = field(default=16, metadata={"help": "Kept ids of a soft token (K)."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus mass of a soft token."})
    min_p: float = field(default=0.0, metadata={"help": "Smallest probability relative to the largest one."})
    learned_settings: list[str] = field(
        default_factory=list, metadata={"help": f"Learned settings of the relaxation, among {', '.join(SETTINGS)}."}
    )
    learned_settings_learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of these settings."})
    learned_settings_barrier: float = field(
        default=0.0, metadata={"help": "Weight of the barrier that holds these settings off greedy decoding."}
    )
    soft_prefix_tokens: int = field(default=0, metadata={"help": "Train so many vectors before the prompt instead."})
    think_tokens: bool = field(
        default=False, metadata={"help": "Put <think> behind prompts and </think> behind completions."}
    )
    freeze_embeddings: bool = field(default=False, metadata={"help": "Keep the input embedding as it is."})
    freeze_layers: int = field(default=0, metadata={"help": "Keep so many of the first layers as they are."})
    max_skipped_steps: int = field(
        default=5, metadata={"help": "Stop after so many steps in a row that were not taken."}
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = bf16_by_default(self)
        super().__post_init__()
        load_whole_models()
        checkpoint_without_reentry(self)
        self._check_numbers()
        self._check_against_host()
        self.constants_as_numbers()

    def _check_numbers(self) -> None:
        schedules = self.schedules()
        for name in ("guidance_alpha", "true_token_probability"):
            if not all(0.0 <= end <= 1.0 for end in schedules[name].ends()):
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")
        if min(schedules["entropy_penalty"].ends()) < 0.0:
            raise ValueError(f"entropy_penalty must not be negative, got {self.entropy_penalty!r}")
        if self.guidance not in get_args(GuidanceRule):
            raise ValueError(f"guidance must be one of {get_args(GuidanceRule)}, got {self.guidance!r}")
        for name, least in (("freeze_layers", 0), ("max_skipped_steps", 1), ("soft_prefix_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

        make_learned(self)  # raises
        if self.think_tokens and (self.freeze_embeddings or self.soft_prefix_tokens):
            name = "freeze_embeddings" if self.freeze_embeddings else "soft_prefix_tokens"
            raise ValueError(
                f"think_tokens trains the rows of its tokens, which {name}={getattr(self, name)} keeps as they are; "
                "leave out one of the two"
            )

    def _check_against_host(self) -> None:
        """Refuse what TRL's trainer would do to texts or to the loss that soft tokens do not go with."""
        refused = {
            "packing": (False, "soft tokens are rolled out text by text"),
            "eval_packing": (None, "soft tokens are rolled out text by text"),
            "padding_free": (False, "soft tokens are rolled out text by text"),
            "loss_type": ("nll", "the loss is the log-likelihood"),
            "label_smoothing_factor": (0.0, "the loss is the log-likelihood"),
            "activation_offloading": (False, "phases without gradients would be offloaded as well"),
        }
        for name, (allowed, reason) in refused.items():
            given = getattr(self, name)
            if given != allowed and not (name == "eval_packing" and given is False):
                raise ValueError(f"{name}={given!r} does not go with soft tokens: {reason}; leave it at {allowed!r}")

    def make_policy(self, model: nn.Module) -> Policy:
        """The model as it is trained: at temperature 1, since the loss is on raw logits."""
        return Policy(model, 1.0, self.norm_correction)

    def make_guided(self, step: int = 0, max_steps: int = 1, learned: Relaxation | None = None) -> GuidedRelaxation:
        """The guided relaxation at a step of the run; `learned` has the settings that are learned, if any are."""
        relaxation = self.make_relaxation(step, max_steps)
        if learned is not None:
            relaxation = with_learned(relaxation, learned, self.learned_settings)
        return guided(relaxation, self.guidance)

    @property
    def is_detached(self) -> bool:
        """Whether no gradient goes through the feedback."""
        return self.hops == 0

    def terms(self, entropy_penalty: float) -> DirectTerms:
        """The objective of a token: log-likelihood less the entropy's penalty."""
        return DirectTerms(entropy_weight=-entropy_penalty, target_weight=1.0)
