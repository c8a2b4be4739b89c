"""Configuration of softAR models: the language model inside, the window it reads, and what it puts out.

It imports no model; the GRU is imported so that a configuration of one can be read.
"""

from typing import Any, Literal, get_args

from transformers import AutoConfig, PreTrainedConfig

import softrl.models.gru  # noqa: F401 - which transformers then knows
from softrl.contexts.window import WindowLayout

Output = Literal["tokens", "embedding"]

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FOR_LOGITS = ("logit_scale", "logits_scaling", "final_logit_softcapping")  # what `Policy` does to a head's output


class SoftARConfig(PreTrainedConfig):
    """Configuration of `SoftARForCausalLM`.

    Args:
        backbone_config: of a causal LM, as a dictionary with its `model_type`.
        window: the arguments of `WindowLayout`, as a dictionary.
        output: "tokens" for a head over the vocabulary; "embedding" for one vector y, whose logits are −‖y − e‖²/τ
            over the token embeddings e.
        distance_temperature: τ at the start, in squared units of the embedding; it is learned where logits are.
        collapse_head: whether there is a `LearnedCollapse`, which says what soft tokens become.
    Raises:
        ValueError: an unknown output, τ that is not positive, a window that does not fit, or one that is longer than
            the positions that the language model has.
    """

    model_type = "softrl_soft_ar"
    __no_type_check__ = True  # jaxtyping's check of dataclasses, under pytest, knows no arguments beyond the fields

    backbone_config: dict[str, Any] | None = None
    window: dict[str, Any] | None = None
    output: str = "tokens"
    distance_temperature: float = 0.2
    collapse_head: bool = False
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    tie_word_embeddings: bool | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    logit_scale: float | None = None
    logits_scaling: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.backbone_config is not None:
            self.backbone_config = {k: v for k, v in self.backbone_config.items() if k not in ("dtype", "torch_dtype")}
            self._take_from(self.backbone)
            self._check()
        super().__post_init__(**kwargs)

    def _take_from(self, backbone: PreTrainedConfig) -> None:
        """What this configuration does not say itself."""
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")
        of_head = _FOR_LOGITS if self.output == "tokens" else ()  # distances are not the head's logits
        for name in (*names, *SPECIAL_IDS, *of_head):
            if getattr(self, name) is None:
                setattr(self, name, getattr(backbone, name, None))

    def _check(self) -> None:
        if self.output not in get_args(Output):
            raise ValueError(f"output must be one of {get_args(Output)}, got {self.output!r}; choose one of them")
        if not 0.0 < self.distance_temperature < float("inf"):
            raise ValueError(
                f"distance_temperature must be positive and finite, got {self.distance_temperature}; it divides "
                "squared distances"
            )
        longest = getattr(self.backbone, "max_position_embeddings", None)
        if longest is not None and self.layout.size > longest:
            raise ValueError(
                f"window has {self.layout.size} places, and the language model max_position_embeddings={longest}; "
                "choose a smaller window, or a language model with more positions"
            )

    @property
    def layout(self) -> WindowLayout:
        """How the window is divided."""
        if self.window is None:
            raise ValueError("window is None; give the arguments of WindowLayout as a dictionary")
        return WindowLayout(**self.window)

    @property
    def backbone(self) -> PreTrainedConfig:
        """Configuration of the language model inside; with this one's vocabulary, which may have grown since."""
        given = dict(self.backbone_config or {})
        if "model_type" not in given:
            raise ValueError(
                f"backbone_config must be a causal LM's configuration as a dictionary, with model_type, got {given}"
            )
        if self.vocab_size is not None:
            given["vocab_size"] = self.vocab_size
        return AutoConfig.for_model(**given)
