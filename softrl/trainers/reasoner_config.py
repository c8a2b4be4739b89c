"""Configuration of `ReasonerTrainer`."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

from softrl.estimators.cross_entropy_method import SearchSettings
from softrl.estimators.latent_objective import LatentObjective
from softrl.estimators.thought_base import ThoughtRule
from softrl.estimators.thought_rules import THOUGHT_RULES, make_thought_rule
from softrl.estimators.thought_sets import Ranking, SetRule
from softrl.models.latents import LatentKind
from softrl.models.reasoner_config import Core, HeadActivation, ReasonerConfig
from softrl.objectives.proxy import ProxyDivergence
from softrl.trainers._bridge import BaseConfig
from softrl.trainers.engines import load_whole_models
from softrl.trainers.precision import bf16_by_default

REPARAMETERISED, SURROGATE, SEARCH = "reparameterised", "surrogate", "cem"
OBJECTIVES = (*THOUGHT_RULES, REPARAMETERISED, SURROGATE, SEARCH)
RewardFrom = Literal["data", "proxy"]


@dataclass
class ReasonerTrainingConfig(BaseConfig):
    r"""
    Configuration class for the [`ReasonerTrainer`].

    For a full list of training arguments, please refer to the [`~transformers.TrainingArguments`] documentation. What
    is said of the model is for one that is made from scratch, see [`~softrl.models.reasoner_config.ReasonerConfig`]: a
    model that is loaded keeps its own.

    Parameters:
        > Parameters that control the data

        tokenizer (`str`, *optional*, defaults to `"characters"`):
            `"characters"`, or the size of a vocabulary of byte pairs that is trained on the text.
        block_length_tokens (`int`, *optional*, defaults to `64`):
            Tokens of a training text.
        max_length (`int`, *optional*):
            Tokens of a text; longer ones lose their end. By default nothing is cut.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `AutoModelForCausalLM.from_pretrained`, used when the `model` argument of the
            trainer is a string. The dtype defaults to float32.

        > Parameters that control a model from scratch

        core (`str`, *optional*, defaults to `"gru"`):
            Of each module: `"gru"` or `"transformer"` (a small Llama).
        base_lm_size, reasoner_size, interpreter_size (`int`, *optional*, default to `32`):
            Widths; `reasoner_size` is that of base reasoner and reasoner.
        num_hidden_layers, num_attention_heads (`int`, *optional*, default to `1` and `2`):
            Of every core; heads of a transformer.
        weight_groups (`str`, *optional*, defaults to `"ABCD"`):
            A letter for each of base LM, base reasoner, reasoner and interpreter; equal letters share weights.
        share_lm_head (`bool`, *optional*, defaults to `False`):
            One head for base LM and interpreter.
        simple_lm_head (`bool`, *optional*, defaults to `True`):
            A linear head; otherwise two layers, with `head_activation` between them.
        head_activation (`str`, *optional*, defaults to `"none"`):
            `"none"` (a two-layer linear projection) or `"gelu"`.
        use_reasoner, use_base_lm (`bool`, *optional*, default to `True`):
            Without a reasoner nothing is thought; without a base LM the interpreter predicts alone.
        latent_kind (`str`, *optional*, defaults to `"discrete"`):
            `"discrete"`, `"gaussian"` or `"soft"`.
        num_latents, latent_size (`int`, *optional*, default to `8`):
            Codes of a codebook; size of a Gaussian vector.
        latent_temperature (`float`, *optional*, defaults to `1.0`):
            Of soft latents.
        latent_noise (`bool`, *optional*, defaults to `False`):
            Gumbel noise of soft latents.
        min_log_sigma, max_log_sigma (`float`, *optional*, default to `-5.0` and `2.0`):
            Bounds of a Gaussian latent's log σ, in which it is kept before the exponential; within ±40.
        n_thought (`int`, *optional*, defaults to `2`):
            Latents of a thought; 0 is a control.
        mixing_width (`int`, *optional*, defaults to `32`):
            Hidden units of the mixing head.

        > Parameters that control learning

        objective (`str`, *optional*, defaults to `"reinforce"`):
            How the reasoner learns: a rule of [`~softrl.estimators.thought_rules`], `"reparameterised"` (through
            Gaussian or soft latents), `"surrogate"`: by `surrogate_rule` from an ensemble that is fitted to the
            rewards by least squares, where it is to be trusted (`surrogate_spread`), or `"cem"`: from the best
            latents that the cross-entropy method finds after each token, by the same reward (a baseline, many times
            slower). The ensemble is fitted to every batch of training text once, after it was asked about it: within
            the first epoch its estimates are of texts that neither it nor the policy has seen; no text is kept from
            the policy for it.
        objective_settings (`dict[str, Any]`, *optional*):
            Settings of the rule, for instance `{"positive_only": true}`, or of the search, see
            [`~softrl.estimators.cross_entropy_method.SearchSettings`].
        num_thoughts (`int`, *optional*, defaults to `4`):
            Thoughts after each token (S).
        policy_weight (`float`, *optional*, defaults to `1.0`):
            Of the rule's loss; 0 is a control: nothing teaches the reasoner. What it shares with nothing that reads or
            predicts then stays as it began; the codebook, which the interpreter reads, and shared cores learn on.
            Adam takes a gradient's scale away, so that other weights do little but where weights are shared, or
            gradients clipped. With `"reparameterised"` 0 or 1.
        base_weight, interpreter_weight (`float`, *optional*, default to `1.0`):
            Of the base LM's and the interpreter's own losses, beside that of their mixture.
        reward_from (`str`, *optional*, defaults to `"data"`):
            `"data"`: the log-likelihood of the true next token. `"proxy"`: see `proxy_divergence`, D being
            `proxy_model`, a frozen language model with the same tokenizer.
        proxy_model (`str`, *optional*):
            Its folder or name.
        proxy_divergence (`str`, *optional*, defaults to `"reverse"`):
            `"reverse"`: the expectation of log D under what is predicted, π. `"forward"`: that of log π − log D under
            D, as a text that D writes would teach it. Both are exact sums over the vocabulary.
        beta (`float`, *optional*):
            Weight of the prediction's entropy in the reward. By default 1 with a proxy in reverse (which makes it the
            reverse Kullback-Leibler divergence; 0 seeks the mode), and 0 forward (the forward one) and with data.
        beta_2 (`float`, *optional*):
            Weight of the thoughts' entropy; of objectives whose target is exp(r/β₂) (`listwise`, `partition`,
            `partition_learned`), or π₀ exp(r/β₂) with the model π₀ that training began with (`nca`, and `partition`
            with `{"log_z": "importance"}`), that temperature. By default 0, or the rule's own. The latter two learn
            from thoughts of π₀, which their targets hold for, and with many of them only: on six codes `nca` is a
            total variation of 0.12 from its target with 4 thoughts, 0.03 with 16 and 0.007 with 64.
        surrogate_rule (`str`, *optional*, defaults to `"reinforce"`):
            See `objective`.
        surrogate_spread (`float`, *optional*, defaults to `0.5`):
            Estimates replace rewards where the standard deviation over the ensemble is below this for all thoughts
            after a token, once the ensemble's recent root mean square error on rewards it has not learned from
            (`surrogate/recent_rmse`) is below it too, nats. What one continuation differs from their mean is error:
            on Shakespeare's characters it stays at 1.3 nats, and nothing is trusted. A larger value lets in estimates
            that do not tell siblings apart.
        surrogate_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Of the surrogate's own AdamW.

        > Parameters that control evaluation and faults

        num_eval_thoughts (`int`, *optional*, defaults to `4`):
            Thoughts after each token in an evaluation, whose predictions are averaged.
        max_skipped_steps (`int`, *optional*, defaults to `5`):
            Stop after so many steps in a row whose gradients were not finite.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *BaseConfig._VALID_DICT_FIELDS, "model_init_kwargs", "objective_settings",
    ]  # fmt: skip

    learning_rate: float = field(default=3e-3, metadata={"help": "The initial learning rate for AdamW."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Keep the data set's columns."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Mixed precision. By default on where a GPU supports it, off on a CPU."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Not with thoughts: transformers drops the keys that branches share."}
    )

    tokenizer: str = field(default="characters", metadata={"help": "'characters' or a vocabulary's size."})
    block_length_tokens: int = field(default=64, metadata={"help": "Tokens of a training text."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a text."})
    model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for `from_pretrained` when `model` is a string."}
    )

    core: str = field(default="gru", metadata={"help": "Of each module.", "choices": list(get_args(Core))})
    base_lm_size: int = field(default=32, metadata={"help": "Width of the base LM."})
    reasoner_size: int = field(default=32, metadata={"help": "Width of base reasoner and reasoner."})
    interpreter_size: int = field(default=32, metadata={"help": "Width of the interpreter."})
    num_hidden_layers: int = field(default=1, metadata={"help": "Layers of every core."})
    num_attention_heads: int = field(default=2, metadata={"help": "Attention heads of a transformer."})
    weight_groups: str = field(default="ABCD", metadata={"help": "A letter a module; equal ones share weights."})
    share_lm_head: bool = field(default=False, metadata={"help": "One head for base LM and interpreter."})
    simple_lm_head: bool = field(default=True, metadata={"help": "A linear head; otherwise two layers."})
    head_activation: str = field(
        default="none", metadata={"help": "Between the two layers.", "choices": list(get_args(HeadActivation))}
    )
    use_reasoner: bool = field(default=True, metadata={"help": "Think."})
    use_base_lm: bool = field(default=True, metadata={"help": "Mix with a base LM."})
    latent_kind: str = field(
        default="discrete", metadata={"help": "What is thought in.", "choices": list(get_args(LatentKind))}
    )
    num_latents: int = field(default=8, metadata={"help": "Codes of a codebook."})
    latent_size: int = field(default=8, metadata={"help": "Size of a Gaussian latent."})
    latent_temperature: float = field(default=1.0, metadata={"help": "Temperature of soft latents."})
    latent_noise: bool = field(default=False, metadata={"help": "Gumbel noise of soft latents."})
    min_log_sigma: float = field(default=-5.0, metadata={"help": "Lower bound of a Gaussian latent's log sigma."})
    max_log_sigma: float = field(default=2.0, metadata={"help": "Upper bound of a Gaussian latent's log sigma."})
    n_thought: int = field(default=2, metadata={"help": "Latents of a thought."})
    mixing_width: int = field(default=32, metadata={"help": "Hidden units of the mixing head."})

    objective: str = field(
        default="reinforce", metadata={"help": "How the reasoner learns.", "choices": list(OBJECTIVES)}
    )
    objective_settings: dict | str | None = field(default=None, metadata={"help": "Settings of the rule."})
    num_thoughts: int = field(default=4, metadata={"help": "Thoughts after each token (S)."})
    policy_weight: float = field(default=1.0, metadata={"help": "Weight of the rule's loss."})
    base_weight: float = field(default=1.0, metadata={"help": "Weight of the base LM's own loss."})
    interpreter_weight: float = field(default=1.0, metadata={"help": "Weight of the interpreter's own loss."})
    reward_from: str = field(
        default="data", metadata={"help": "What thoughts are scored by.", "choices": list(get_args(RewardFrom))}
    )
    proxy_model: str | None = field(default=None, metadata={"help": "The frozen model of reward_from='proxy'."})
    proxy_divergence: str = field(
        default="reverse",
        metadata={
            "help": "Expectation under the prediction or the proxy.",
            "choices": list(get_args(ProxyDivergence)),
        },
    )
    beta: float | None = field(default=None, metadata={"help": "Weight of the prediction's entropy."})
    beta_2: float | None = field(default=None, metadata={"help": "Weight of the thoughts' entropy."})
    surrogate_rule: str = field(
        default="reinforce", metadata={"help": "Rule of objective='surrogate'.", "choices": list(THOUGHT_RULES)}
    )
    surrogate_spread: float = field(default=0.5, metadata={"help": "Largest spread and recent error to trust, nats."})
    surrogate_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the surrogate."})

    num_eval_thoughts: int = field(default=4, metadata={"help": "Thoughts after each token in an evaluation."})
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
                "turn it off, and lower per_device_train_batch_size to save memory"
            )
        self._check_numbers()
        self._check_proxy()
        self.model_config(2)  # raises on what is out of range, before anything is loaded
        self.make_objective()

    def _check_numbers(self) -> None:
        for name in ("num_thoughts", "num_eval_thoughts", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("block_length_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name} must leave a token to predict, so be at least 2, got {value}")
        choices = {"objective": OBJECTIVES, "surrogate_rule": THOUGHT_RULES, "reward_from": get_args(RewardFrom)}
        choices["proxy_divergence"] = get_args(ProxyDivergence)
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("surrogate_spread", "surrogate_learning_rate"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def _check_proxy(self) -> None:
        if (self.reward_from == "proxy") != (self.proxy_model is not None):
            raise ValueError(
                f"reward_from={self.reward_from!r} and proxy_model={self.proxy_model!r}: a proxy is a language model "
                "with the same tokenizer; pass both reward_from='proxy' and its folder, or neither"
            )
        if self.proxy_divergence != "reverse" and self.reward_from != "proxy":
            raise ValueError(
                f"proxy_divergence={self.proxy_divergence!r} says how a proxy scores, and there is none; pass "
                "reward_from='proxy' and proxy_model, or leave it out"
            )

    def model_config(self, vocab_size: int, **others: Any) -> ReasonerConfig:
        """Of a model from scratch.

        Args:
            vocab_size: V.
            others: ids of special tokens.
        """
        own = {each.name for each in fields(self)} - _NOT_THE_MODEL_S
        settings = {name: getattr(self, name) for name in ReasonerConfig.__annotations__ if name in own}
        return ReasonerConfig(
            vocab_size=vocab_size, learns_log_z=self.rule_name == "partition_learned",
            max_position_embeddings=self.block_length_tokens + self.n_thought + 1, **settings, **others,
        )  # fmt: skip

    @property
    def draws_from_start(self) -> bool:
        """Whether thoughts are drawn in training from the model that it began with, the rule's reference."""
        settings: Any = self.objective_settings or {}
        estimates = self.rule_name == "partition" and settings.get("log_z") == "importance"
        return self.rule_name == "nca" or estimates

    @property
    def rule_name(self) -> str | None:
        """The rule that the reasoner learns by; None with reparameterised thoughts and with a search."""
        if self.objective == SURROGATE:
            return self.surrogate_rule
        return None if self.objective in (REPARAMETERISED, SEARCH) else self.objective

    def make_objective(self) -> LatentObjective:
        """What is minimised.

        Raises:
            ValueError: settings that the objective does not have.
        """
        name, settings = self.rule_name, dict(self.objective_settings or {})  # type: ignore[arg-type]
        if self.objective == REPARAMETERISED and (settings or self.policy_weight not in (0.0, 1.0)):
            raise ValueError(
                "objective='reparameterised' has no rule whose loss could be weighted or set: policy_weight must be 0 "
                f"or 1 and objective_settings empty, got {self.policy_weight} and {settings}"
            )
        beta = self.beta
        if beta is None:
            beta = 1.0 if self.reward_from == "proxy" and self.proxy_divergence == "reverse" else 0.0
        weights: dict[str, Any] = {
            "base_weight": self.base_weight, "interpreter_weight": self.interpreter_weight,
            "policy_weight": self.policy_weight, "proxy_divergence": self.proxy_divergence,
        }  # fmt: skip
        if name is None:
            search = self._search(settings) if self.objective == SEARCH else None
            return LatentObjective(None, search, beta, self.beta_2 or 0.0, **weights)
        rule = make_thought_rule(name, settings)
        if isinstance(rule, SetRule) and not isinstance(rule, Ranking):  # their temperature, and no weight beside it
            if self.beta_2 is not None:
                if "beta" in settings:
                    raise ValueError(
                        f"beta_2={self.beta_2} and objective_settings={settings} both say the temperature of "
                        f"objective={name!r}; leave one of them out"
                    )
                rule = make_thought_rule(name, {"beta": self.beta_2, **settings})
            return LatentObjective(rule, None, beta, 0.0, **weights)
        return LatentObjective(rule, None, beta, self.beta_2 or 0.0, **weights)

    def _search(self, settings: dict[str, Any]) -> SearchSettings:
        known = {each.name for each in fields(SearchSettings)}
        if unknown := set(settings) - known:
            raise ValueError(f"objective='cem' takes the settings {sorted(known)}, got {sorted(unknown)} as well")
        if self.reward_from == "proxy":
            raise ValueError(
                "objective='cem' searches for what makes the true next token likely: use reward_from='data'"
            )
        return SearchSettings(**settings)

    def check_model(self, config: ReasonerConfig) -> None:
        """Raise ValueError where a model's thoughts cannot learn by the objective."""
        rule = self.make_objective().rule
        if not config.use_reasoner or self.policy_weight == 0.0 or config.n_thought == 0:
            return
        if self.objective == SEARCH and config.latent_kind == "soft":
            raise ValueError("objective='cem' searches for discrete or Gaussian latents, and latent_kind is 'soft'")
        if self.objective == REPARAMETERISED and config.latent_kind == "discrete":
            raise ValueError(
                "objective='reparameterised' needs latents that change continuously, and latent_kind is 'discrete'; "
                "use 'gaussian' or 'soft', or an objective that weights log-probabilities"
            )
        if rule is not None and config.latent_kind == "soft" and not config.latent_noise:
            raise ValueError(
                f"objective={self.objective!r} weights log-probabilities of thoughts, and latent_kind='soft' without "
                "noise has one thought; set latent_noise, or use objective='reparameterised'"
            )
        if self.rule_name == "partition_learned" and not config.learns_log_z:
            raise ValueError(
                "objective='partition_learned' needs a model with a head for log Z, and this one has none; use "
                "'partition', or train one from scratch"
            )
        _check_count(rule, self.num_thoughts, self.objective)


_NOT_THE_MODEL_S = {"num_thoughts"}  # of both configurations, and here it is how many are drawn in training


def _check_count(rule: ThoughtRule | None, num_thoughts: int, objective: str) -> None:
    if rule is not None and num_thoughts < rule.least_thoughts:
        raise ValueError(
            f"objective={objective!r} compares thoughts: num_thoughts must be at least {rule.least_thoughts}, got "
            f"{num_thoughts}; one does for 'reinforce' with objective_settings={{'baseline': 'batch'}}"
        )
