"""Configuration of `QuietSTaRTrainer`."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from softrl.estimators.system import AdjointSettings
from softrl.estimators.thought_base import ThoughtRule
from softrl.estimators.thought_rules import THOUGHT_RULES, make_thought_rule
from softrl.estimators.thoughts import ThoughtObjective
from softrl.models.branches import BranchAttention
from softrl.models.thinking import Mixing, ThinkingConfig
from softrl.objectives.schedules import Schedule, parse_schedule
from softrl.rollouts.thoughts import ThoughtSource
from softrl.tokens.relaxation import RELAXATIONS, Relaxation, make_relaxation
from softrl.tokens.truncation import Truncation
from softrl.trainers._bridge import BaseConfig
from softrl.trainers.engines import load_whole_models
from softrl.trainers.precision import bf16_by_default

SOFT = "soft"
ThinkAt = Literal["every", "entropy", "given"]
ThoughtsFed = Literal["policy", "random", "pause", "none"]
Proposal = Literal["policy", "prior", "mixture"]


@dataclass
class QuietSTaRConfig(BaseConfig):
    r"""
    Configuration class for the [`QuietSTaRTrainer`].

    This class includes only the parameters that are specific to thoughts. For a full list of training arguments,
    please refer to the [`~transformers.TrainingArguments`] documentation.

    Parameters:
        > Parameters that control the data

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `AutoModelForCausalLM.from_pretrained`, used when the `model` argument of the
            trainer is a string. The dtype defaults to float32.
        max_length (`int`, *optional*, defaults to `256`):
            Tokens of a text; longer ones lose their end. `None` cuts nothing.

        > Parameters that control thoughts

        n_thought (`int` or `str`, *optional*, defaults to `4`):
            Tokens of a thought; a number, or a schedule such as `"linear:4->0"`, which shortens thoughts to none (Fast
            Quiet-STaR's curriculum).
        n_talk (`int`, *optional*, defaults to `4`):
            True tokens that a thought is scored by.
        num_thoughts (`int`, *optional*, defaults to `2`):
            Thoughts after each token (S).
        think_at (`str`, *optional*, defaults to `"every"`):
            `"every"`: after every `think_every`-th token; `"entropy"`: after the `think_count` tokens of a text whose
            next one the model is least sure of; `"given"`: after those that the column `anchors` lists.
        think_every (`int`, *optional*, defaults to `1`):
            See `think_at`; which one is the first changes from step to step.
        think_count (`int`, *optional*, defaults to `16`):
            See `think_at`.
        thoughts (`str`, *optional*, defaults to `"policy"`):
            What is fed as a thought: the model's own tokens, or, as controls, `"random"` tokens, a learned `"pause"`
            embedding, or `"none"`: it does not think, and learns from the loss without thoughts alone.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of thoughts, at sampling and at scoring alike.
        mixing (`str`, *optional*, defaults to `"hidden"`):
            Mix `"hidden"` states or `"log_probs"`.
        residual_mixing (`bool`, *optional*, defaults to `False`):
            `base + w * thought` instead of `(1 - w) * base + w * thought`.
        sigmoid_mixing (`bool`, *optional*, defaults to `False`):
            Keep w within (0, 1), 1/2 at the start; by default it is any number, 0 at the start.
        branch_attention (`str`, *optional*, defaults to `"shared"`):
            `"shared"`, `"dense"` or `"naive"`, see [`~softrl.models.branches`].

        > Parameters that control learning

        estimator (`str`, *optional*, defaults to `"reinforce"`):
            How thoughts learn: `"soft"` backpropagates through soft tokens; the others learn from sampled ones, see
            [`~softrl.estimators.thought_rules`].
        estimator_settings (`dict[str, Any]`, *optional*):
            Settings of that rule, for instance `{"positive_only": true}`.
        proposal (`str`, *optional*, defaults to `"policy"`):
            Where sampled thoughts come from: the `"policy"`, the `"prior"` (the model as it was when training began),
            or a `"mixture"`, half of each; not with `rloo`, `log_mean_exp` and `reinforce`'s mean baseline, which
            compare a thought with the others after its token, of which each half then has another mixture.
        relative_to_prior (`bool`, *optional*, defaults to `False`):
            Whether rules that compare thoughts score them by `log π − log π_prior`.
        reward_surrogate (`bool`, *optional*, defaults to `False`):
            Fit an ensemble r_ψ to the rewards and learn thoughts from it where it is to be trusted.
        surrogate_spread (`float`, *optional*, defaults to `0.5`):
            Estimates replace rewards where the standard deviation over the ensemble is below this for all thoughts
            after a token, once the ensemble's recent root mean square error on rewards it has not learned from
            (`surrogate/recent_rmse`) is below it too, nats. What one continuation differs from their mean is error.
        surrogate_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Of the surrogate's own AdamW.
        base_weight, talk_weight, policy_weight, entropy_weight (`float`, *optional*, default to `1.0`, `1.0`, `1.0`
            and `0.0`):
            Weights of the loss without thoughts, of the mixed one after thoughts, of the thoughts' own, and of their
            entropy.
        thinking_learning_rate (`float`, *optional*):
            Of the learned embeddings; by default that of everything else.
        mixing_learning_rate (`float`, *optional*):
            Of the mixing head; by default that of everything else. A small one keeps it from closing before thoughts
            are of use.
        start_text (`str`, *optional*):
            Let the embedding that starts a thought begin as the mean of these tokens', by `start_share`; Quiet-STaR
            took a dash, after which texts explain themselves.
        start_share (`float`, *optional*, defaults to `1.0`):
            Share of `start_text` in it; the rest is the mean of all tokens' embeddings.

        > Parameters that control soft thoughts

        relaxation (`str`, *optional*, defaults to `"st_gumbel"`):
            `"softmax"`, `"gumbel_softmax"`, `"straight_through"`, `"st_gumbel"`, `"gumbel_rao"` or `"reinmax"`.
        top_k (`int`, *optional*, defaults to `64`):
            Kept ids of a soft token, at most V.
        relaxation_temperature (`float`, *optional*, defaults to `1.0`):
            τ of the weights.
        max_entropy_nats (`float`, *optional*):
            Bound the entropy of every soft token instead, in (0, log K).
        hops (`int`, *optional*):
            Sweeps of the cotangents at most; all by default.
        feedback_discount (`float`, *optional*, defaults to `1.0`):
            γ per feedback edge.
        adjoint_clip (`float`, *optional*):
            Bound of the adjoint's norm at each thought token.

        > Parameters that control evaluation and faults

        num_eval_thoughts (`int`, *optional*, defaults to `1`):
            Sampled thoughts after each token in an evaluation.
        max_skipped_steps (`int`, *optional*, defaults to `5`):
            Stop after so many steps in a row whose gradients were not finite.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs", "estimator_settings",
    ]  # fmt: skip

    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Keep the data set's columns."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision. By default on where a GPU supports it, off on a CPU."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Not with thoughts: transformers drops the keys that branches share."}
    )

    model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `from_pretrained` when `model` is a string."}
    )
    max_length: int | None = field(default=256, metadata={"help": "Tokens of a text."})

    n_thought: str = field(default=4, metadata={"help": "Tokens of a thought; a number or a schedule."})
    n_talk: int = field(default=4, metadata={"help": "True tokens that a thought is scored by."})
    num_thoughts: int = field(default=2, metadata={"help": "Thoughts after each token (S)."})
    think_at: str = field(default="every", metadata={"help": "Where to think.", "choices": list(get_args(ThinkAt))})
    think_every: int = field(default=1, metadata={"help": "Interval in tokens, for think_at='every'."})
    think_count: int = field(default=16, metadata={"help": "Tokens a text, for think_at='entropy'."})
    thoughts: str = field(
        default="policy",
        metadata={"help": "What is fed as a thought.", "choices": ["policy", "random", "pause", "none"]},
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of thoughts."})
    mixing: str = field(default="hidden", metadata={"help": "What is mixed.", "choices": list(get_args(Mixing))})
    residual_mixing: bool = field(default=False, metadata={"help": "base + w * thought."})
    sigmoid_mixing: bool = field(default=False, metadata={"help": "Keep w within (0, 1)."})
    branch_attention: str = field(
        default="shared", metadata={"help": "Attention of branches.", "choices": list(get_args(BranchAttention))}
    )

    estimator: str = field(
        default="reinforce", metadata={"help": "How thoughts learn.", "choices": [SOFT, *THOUGHT_RULES]}
    )
    estimator_settings: dict | str | None = field(default=None, metadata={"help": "Settings of the estimator."})
    proposal: str = field(
        default="policy", metadata={"help": "Where thoughts come from.", "choices": list(get_args(Proposal))}
    )
    relative_to_prior: bool = field(default=False, metadata={"help": "Score thoughts relative to the prior."})
    reward_surrogate: bool = field(default=False, metadata={"help": "Learn thoughts from an ensemble of estimates."})
    surrogate_spread: float = field(default=0.5, metadata={"help": "Largest spread and recent error to trust, nats."})
    surrogate_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the surrogate."})
    base_weight: float = field(default=1.0, metadata={"help": "Weight of the loss without thoughts."})
    talk_weight: float = field(default=1.0, metadata={"help": "Weight of the loss after thoughts."})
    policy_weight: float = field(default=1.0, metadata={"help": "Weight of the thoughts' loss."})
    entropy_weight: float = field(default=0.0, metadata={"help": "Weight of the thoughts' entropy."})
    thinking_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the learned embeddings."}
    )
    mixing_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the mixing head."})
    start_text: str | None = field(default=None, metadata={"help": "What thoughts' start begins as."})
    start_share: float = field(default=1.0, metadata={"help": "Share of start_text in it."})

    relaxation: str = field(default="st_gumbel", metadata={"help": "Relaxation.", "choices": list(RELAXATIONS)})
    top_k: int = field(default=64, metadata={"help": "Kept ids of a soft token (K), at most V."})
    relaxation_temperature: float = field(default=1.0, metadata={"help": "Temperature of the weights."})
    max_entropy_nats: float | None = field(default=None, metadata={"help": "Entropy bound of a soft token."})
    hops: int | None = field(default=None, metadata={"help": "Sweeps of the cotangents at most."})
    feedback_discount: float = field(default=1.0, metadata={"help": "Discount per feedback edge."})
    adjoint_clip: float | None = field(default=None, metadata={"help": "Bound of the adjoint's norm."})

    num_eval_thoughts: int = field(default=1, metadata={"help": "Thoughts after each token in an evaluation."})
    max_skipped_steps: int = field(default=5, metadata={"help": "Stop after so many steps that were not taken."})
    max_reward_jump: ClassVar[float | None] = None  # of `StepGuardMixin`: rewards of thoughts are log-likelihoods

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = bf16_by_default(self)
        super().__post_init__()
        load_whole_models()
        if self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing=True: transformers then drops the keys that thoughts share with their text; "
                "turn it off, and lower per_device_train_batch_size or think less often (think_every) to save memory"
            )
        self._check_numbers()
        lengths = self.lengths
        if lengths.is_constant:  # the command line gives numbers as text
            self.n_thought = lengths.first
        # They raise on what is out of range, before a model is loaded.
        self.thinking_config()
        if self.is_soft:
            self.make_relaxation(self.top_k)
            self.adjoint_settings()
        objective = self.objective(self.make_relaxation(self.top_k) if self.is_soft else None)
        if objective.rule is not None and objective.teaches_thoughts and self.thinks:
            self._check_count(objective.rule)

    def _check_count(self, rule: ThoughtRule) -> None:
        least = rule.least_thoughts
        if self.num_thoughts < least and max(self.lengths.ends()) > 0:
            raise ValueError(
                f"estimator={self.estimator!r} compares thoughts: num_thoughts must be at least {least}, got "
                f"{self.num_thoughts}; one does for 'reinforce' with estimator_settings={{'baseline': 'batch'}}"
            )

    def _check_numbers(self) -> None:
        at_least = {
            "n_talk": 1, "num_thoughts": 1, "think_every": 1, "think_count": 1, "num_eval_thoughts": 1,
            "max_skipped_steps": 1, "top_k": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must leave a token to predict, so be at least 2, got {self.max_length}")
        choices = {
            "think_at": get_args(ThinkAt), "thoughts": get_args(ThoughtsFed), "proposal": get_args(Proposal),
            "branch_attention": get_args(BranchAttention),
            "estimator": (SOFT, *THOUGHT_RULES),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("surrogate_spread", "surrogate_learning_rate"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.is_soft and (self.proposal != "policy" or self.estimator_settings):
            raise ValueError(
                f"estimator='soft' differentiates the policy's own thoughts: proposal={self.proposal!r} and "
                f"estimator_settings={self.estimator_settings} are of sampled ones; leave them out"
            )
        if not 0.0 <= self.start_share <= 1.0:
            raise ValueError(f"start_share is a share, from 0 to 1, got {self.start_share}")
        if self.proposal == "mixture" and self.num_thoughts % 2:
            raise ValueError(
                f"proposal='mixture' draws half of the thoughts from each, so num_thoughts must be even, got "
                f"{self.num_thoughts}"
            )
        settings: Any = self.estimator_settings or {}
        by_mean = self.estimator == "reinforce" and settings.get("baseline", "mean") == "mean"
        if self.proposal == "mixture" and (by_mean or self.estimator in ("rloo", "log_mean_exp")):
            raise ValueError(
                f"proposal='mixture' with estimator={self.estimator!r}: half of a token's thoughts come from each "
                "side, so that a baseline made of the others differs between the halves and biases the estimate; use "
                "estimator='reinforce' with estimator_settings {'baseline': 'batch'}, or an objective on sets"
            )

    @property
    def is_soft(self) -> bool:
        """Whether gradients go through soft thoughts."""
        return self.estimator == SOFT

    @property
    def thinks(self) -> bool:
        """Whether anything is fed between a text's tokens."""
        return self.thoughts != "none"

    @property
    def needs_prior(self) -> bool:
        """Whether the model as it was at the start is kept."""
        return self.proposal != "policy" or self.scores_by_prior

    @property
    def scores_by_prior(self) -> bool:
        """Whether thoughts are scored relative to that; noise contrastive alignment always does."""
        return self.relative_to_prior or self.estimator == "nca"

    @property
    def lengths(self) -> Schedule:
        """n_thought over the run."""
        return parse_schedule(self.n_thought, "n_thought", is_integer=True)

    def thinking_config(self) -> ThinkingConfig:
        """How the model thinks when training begins."""
        return ThinkingConfig(
            int(self.lengths.first), self.temperature, self.mixing, self.residual_mixing, self.sigmoid_mixing
        )

    def make_rule(self) -> ThoughtRule | None:
        """How sampled thoughts learn; None for soft ones."""
        settings: Any = self.estimator_settings or {}
        return None if self.is_soft else make_thought_rule(self.estimator, settings)

    def make_relaxation(self, top_k: int) -> Relaxation:
        """That of soft thoughts, with K kept ids."""
        return make_relaxation(self.relaxation, Truncation(top_k), self.relaxation_temperature, self.max_entropy_nats)

    def adjoint_settings(self) -> AdjointSettings:
        """How far and how strongly gradients go through soft thoughts."""
        return AdjointSettings("parallel", self.hops, self.feedback_discount, self.adjoint_clip)

    def objective(self, relaxation: Relaxation | None) -> ThoughtObjective:
        """What is minimised."""
        source: ThoughtSource = self.thoughts if self.thinks else "policy"  # type: ignore[assignment]
        return ThoughtObjective(
            self.n_talk, self.make_rule(), relaxation, self.adjoint_settings(), self.base_weight, self.talk_weight,
            self.policy_weight, self.entropy_weight, source, self.branch_attention,
        )  # fmt: skip
