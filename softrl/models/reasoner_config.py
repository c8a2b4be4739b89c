"""Configuration of the latent reasoner: four modules, which of them share weights, and what is thought in."""

from itertools import product
from numbers import Integral, Real
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from softrl.models.latents import LatentKind, check_log_sigma_bounds, check_temperature

MODULES = ("base_lm", "base_reasoner", "reasoner", "interpreter")
Core = Literal["gru", "transformer"]
HeadActivation = Literal["none", "gelu"]


def canonical_groups(weight_groups: str) -> str:
    """The same partition with letters in the order of their first use: "BBAA" is "AABB".

    Raises:
        ValueError: not one letter for each of the four modules.
    """
    if not (isinstance(weight_groups, str) and len(weight_groups) == len(MODULES) and weight_groups.isalpha()):
        raise ValueError(
            f"weight_groups must have one letter for each of {', '.join(MODULES)}, such as 'AABC', got "
            f"{weight_groups!r}; equal letters share weights"
        )
    letters = list(dict.fromkeys(weight_groups))
    return "".join("ABCD"[letters.index(letter)] for letter in weight_groups)


# The 15 partitions of four modules, from all shared to none.
WEIGHT_GROUPS = tuple(
    sorted(
        {canonical_groups("".join(letters)) for letters in product("ABCD", repeat=4)}, key=lambda g: (len(set(g)), g)
    )
)


class ReasonerConfig(PreTrainedConfig):
    """Configuration of `ReasonerForCausalLM`.

    Args:
        vocab_size: V.
        core: "gru", or "transformer": a small Llama.
        base_lm_size, reasoner_size, interpreter_size: width D of each core; `reasoner_size` is that of the base
            reasoner and of the reasoner.
        num_hidden_layers: of every core.
        num_attention_heads: of a transformer; twice their number divides every size.
        max_position_embeddings: of a transformer: tokens of a text with a thought.
        weight_groups: one letter for each of base_lm, base_reasoner, reasoner and interpreter; equal letters share a
            core with its embeddings. Kept in canonical form.
        share_lm_head: one head for base LM and interpreter (which is projected where the sizes differ).
        simple_lm_head: a linear head; False: two layers.
        head_activation: between the two: "none" is the two-layer linear projection, "gelu" a perceptron.
        use_reasoner: False: no latents; base LM and interpreter both read the text alone, in one pass.
        use_base_lm: False: the interpreter alone predicts. Without both, the model is one plain language model.
        n_thought: latents of a thought.
        num_thoughts: S thoughts at every position where a call does not say.
        latent_kind: "discrete", "gaussian" or "soft", see `softrl.models.latents`.
        num_latents: K codes of a codebook.
        latent_size: of a Gaussian vector.
        latent_temperature, latent_noise: τ of soft latents, and whether they have Gumbel noise.
        min_log_sigma, max_log_sigma: bounds of a Gaussian latent's log σ, within ±40.
        learns_log_z: add a head that estimates log Z of the thoughts after a token, for the partition objective.
        mixing_width: hidden units of the mixing head.
    Raises:
        ValueError: a number out of range, an unknown name, or modules of one group whose sizes differ.
    """

    model_type = "softrl_reasoner"
    __no_type_check__ = True  # jaxtyping's check of dataclasses, under pytest, knows no arguments beyond the fields

    vocab_size: int = 128
    core: str = "gru"
    base_lm_size: int = 32
    reasoner_size: int = 32
    interpreter_size: int = 32
    num_hidden_layers: int = 1
    num_attention_heads: int = 2
    max_position_embeddings: int = 1024
    weight_groups: str = "ABCD"
    share_lm_head: bool = False
    simple_lm_head: bool = True
    head_activation: str = "none"
    use_reasoner: bool = True
    use_base_lm: bool = True
    n_thought: int = 2
    num_thoughts: int = 2
    latent_kind: str = "discrete"
    num_latents: int = 8
    latent_size: int = 8
    latent_temperature: float = 1.0
    latent_noise: bool = False
    min_log_sigma: float = -5.0
    max_log_sigma: float = 2.0
    learns_log_z: bool = False
    mixing_width: int = 32
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.weight_groups = canonical_groups(self.weight_groups)
        self._check_numbers()
        for name, names in (("core", Core), ("latent_kind", LatentKind), ("head_activation", HeadActivation)):
            if getattr(self, name) not in get_args(names):
                raise ValueError(f"{name} must be one of {get_args(names)}, got {getattr(self, name)!r}")
        if self.simple_lm_head and self.head_activation != "none":
            raise ValueError(
                f"head_activation={self.head_activation!r} is between two layers of a head, and simple_lm_head=True "
                "has one; set simple_lm_head=False"
            )
        self._check_sizes()

    def _check_numbers(self) -> None:
        least = {
            "vocab_size": 2, "base_lm_size": 1, "reasoner_size": 1, "interpreter_size": 1, "num_hidden_layers": 1,
            "num_attention_heads": 1, "max_position_embeddings": 1, "n_thought": 0, "num_thoughts": 1,
            "num_latents": 2, "latent_size": 1, "mixing_width": 1,
        }  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if value < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}")
        for name in ("latent_temperature", "min_log_sigma", "max_log_sigma"):
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
            setattr(self, name, float(getattr(self, name)))  # 2 as well as 2.0
        check_temperature(self.latent_temperature)
        check_log_sigma_bounds(self.min_log_sigma, self.max_log_sigma)

    def _check_sizes(self) -> None:
        for letter in set(self.weight_groups):
            sizes = {name: self.size_of(name) for name in self.modules if self.group_of(name) == letter}
            if len(set(sizes.values())) > 1:
                described = ", ".join(f"{name} {size}" for name, size in sizes.items())
                raise ValueError(
                    f"weight_groups={self.weight_groups!r} lets modules of different sizes share weights: "
                    f"{described}; make the sizes equal, or give these modules different letters"
                )
        if self.core == "transformer":
            step = 2 * self.num_attention_heads
            if wrong := {name: size for name in self.modules if (size := self.size_of(name)) % step}:
                raise ValueError(
                    f"sizes of transformers must be multiples of 2 * num_attention_heads = {step}, got {wrong}; "
                    "choose others, or fewer heads"
                )

    @property
    def hidden_size(self) -> int:
        """Of the states that predict after a thought."""
        return self.interpreter_size

    @property
    def modules(self) -> tuple[str, ...]:
        """Those of the four modules that this model has."""
        absent = set() if self.use_base_lm else {"base_lm"}
        if not self.use_reasoner:
            absent |= {"base_reasoner", "reasoner"}
        return tuple(name for name in MODULES if name not in absent)

    def group_of(self, module: str) -> str:
        """Letter of the core that a module uses."""
        return self.weight_groups[MODULES.index(module)]

    def size_of(self, module: str) -> int:
        """Width of a module's core."""
        return getattr(self, "reasoner_size" if module == "base_reasoner" else f"{module}_size")
