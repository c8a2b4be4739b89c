"""A causal language model that thinks: learned embeddings that start and end a thought, and a mixing head.

The model itself stays what it was: `save_pretrained` writes it as transformers does, loadable without softrl (it then
does not think), and what thinking adds beside it, in `thinking.safetensors` and `thinking.json`.
Source: Zelikman et al. (2024), Quiet-STaR, arXiv:2403.09629.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import softrl.models.gru  # noqa: F401 - which transformers then knows
from softrl._store import write_atomically
from softrl.models.heads import ValueHead
from softrl.models.policy import Policy

Mixing = Literal["hidden", "log_probs"]

_SETTINGS, _WEIGHTS, _ADAPTER = "thinking.json", "thinking.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class ThinkingConfig:
    """How a model thinks; saved with it, so that it thinks in the same way when it is loaded.

    Args:
        n_thought: tokens of a thought, start and end not counted. 0 leaves only these two.
        temperature: sampling temperature of thoughts, and of their log-probabilities alike.
        mixing: what is mixed: "hidden" states, or "log_probs", renormalised.
        residual: add w times the thought's to the base's, `base + w * thought`, instead of `(1 − w) base + w thought`.
        sigmoid: squash the weight into (0, 1): 1/2 at the start; without, it is any number: 0 at the start.
        mixing_width: hidden units of the mixing head; None for D.
    Raises:
        ValueError: a number outside its range, or an unknown mixing.
    """

    n_thought: int = 4
    temperature: float = 1.0
    mixing: str = "hidden"
    residual: bool = False
    sigmoid: bool = False
    mixing_width: int | None = None

    def __post_init__(self) -> None:
        if self.n_thought < 0:
            raise ValueError(f"n_thought must not be negative, got {self.n_thought}")
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.mixing not in get_args(Mixing):
            raise ValueError(f"mixing must be one of {get_args(Mixing)}, got {self.mixing!r}")
        if self.mixing_width is not None and self.mixing_width < 1:
            raise ValueError(f"mixing_width must be at least 1, got {self.mixing_width}")


class MixingHead(nn.Module):
    """`w = MLP([h_base; h_thought])`, zero at the start, in float32.

    Both states are normalised first: their scale differs between models by orders of magnitude.

    Args:
        width: D of the hidden states.
        hidden_width: of the two hidden layers.
        sigmoid: squash w into (0, 1).
        thought_width: of the thought's states; None for D.
        normalised: False reads states as they are: a norm leaves nothing of width 2 but a sign.
    """

    def __init__(
        self, width: int, hidden_width: int, sigmoid: bool, thought_width: int | None = None, normalised: bool = True
    ):
        super().__init__()
        widths = (width, width if thought_width is None else thought_width)
        self.norm, self.thought_norm = (
            nn.LayerNorm(each, elementwise_affine=False) if normalised else nn.Identity() for each in widths
        )
        self.first = nn.Linear(sum(widths), hidden_width)
        self.second = nn.Linear(hidden_width, hidden_width)
        self.last = nn.Linear(hidden_width, 1)
        self.sigmoid = sigmoid
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, base: Float[Tensor, "*batch D"], thought: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        """Weights w of the thought's prediction."""
        dtype = self.last.weight.dtype
        with torch.autocast(base.device.type, enabled=False):
            both = torch.cat([self.norm(base.to(dtype)), self.thought_norm(thought.to(dtype))], -1)
            features = nn.functional.relu(self.second(nn.functional.relu(self.first(both))))
            weight = self.last(features).squeeze(-1)
        return weight.sigmoid() if self.sigmoid else weight


class ThinkingLM(nn.Module):
    """A causal LM with what thinking adds to it, as one module, so that engines and optimizers see one.

    Args:
        lm: transformers causal LM, or a PEFT model around one.
        config: how it thinks.
        learns_log_z: add a head that estimates log Z of the thoughts after a token, for the partition objective.

    Attributes:
        start, end: learned embeddings around a thought, shape (D,); they begin as the mean of all token embeddings.
        pause: learned embedding in place of every thought token, for the control that only waits.
        policy: the LM at the thoughts' temperature.
        talk: the LM at temperature 1, which true tokens are scored by.
    """

    def __init__(self, lm: nn.Module, config: ThinkingConfig, learns_log_z: bool = False):
        super().__init__()
        self.lm: Any = lm
        self.thinking = config
        self.policy = Policy(lm, config.temperature)
        self.policy.virtual.refuse("a model that thinks")
        self.talk = self.policy.at_temperature(1.0)
        mean = _mean_embedding(self.policy)
        self.start, self.end, self.pause = (nn.Parameter(mean.clone()) for _ in range(3))
        width, dtype = len(mean), torch.promote_types(mean.dtype, torch.float32)
        self.mixing = MixingHead(width, config.mixing_width or width, config.sigmoid).to(mean.device, dtype)
        self.log_z = ValueHead(width).to(mean.device, dtype) if learns_log_z else None

    @torch.no_grad()
    def start_like(self, ids: list[int], share: float = 1.0) -> None:
        """Let thoughts start as after these tokens: `share` of their mean embedding in that which starts a thought."""
        like = self.policy.embed(torch.tensor(ids, device=self.start.device)).mean(0)
        self.start.lerp_(like.to(self.start.dtype), share)

    @property
    def config(self) -> Any:
        """The LM's configuration."""
        return self.policy.causal_lm.config

    def forward(self, input_ids: Int[Tensor, "N T"], attention_mask: Tensor | None = None) -> Any:
        """The LM's own forward pass, without thoughts."""
        return self.lm(input_ids=input_ids, attention_mask=attention_mask)

    def mixed_log_probs(
        self, base: Float[Tensor, "M D"], thought: Float[Tensor, "M D"], weight: Float[Tensor, "M"]
    ) -> Float[Tensor, "M V"]:
        """log p of the next token, thought and base mixed; M is the caller's chunk."""
        share = torch.ones_like(weight) if self.thinking.residual else 1.0 - weight
        if self.thinking.mixing == "hidden":
            mixed = share.to(base.dtype)[:, None] * base + weight.to(base.dtype)[:, None] * thought
            return self.talk.head(mixed).log_softmax(-1)
        log_probs = [self.talk.head(states).log_softmax(-1) for states in (base, thought)]
        return (share[:, None] * log_probs[0] + weight[:, None] * log_probs[1]).log_softmax(-1)

    def own_state(self) -> dict[str, Tensor]:
        """The tensors beside the LM's."""
        return {name: value.detach().contiguous() for name, value in self.state_dict().items() if name[:3] != "lm."}

    def save_pretrained(self, folder: str | Path, lm_state: dict[str, Tensor] | None = None, **settings: Any) -> None:
        """Write the LM as transformers (or PEFT) does, and what thinking adds beside it.

        Args:
            folder: is made if it is not there.
            lm_state: the LM's tensors, where an engine has gathered them.
            settings: of the LM's own `save_pretrained`.
        """
        folder = Path(folder)
        self.lm.save_pretrained(folder, state_dict=lm_state, **settings)
        with write_atomically(folder / _WEIGHTS) as temporary:
            save_file(self.own_state(), temporary)
        with write_atomically(folder / _SETTINGS) as temporary:
            temporary.write_text(json.dumps(asdict(self.thinking), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, is_trainable: bool = False, **settings: Any) -> "ThinkingLM":
        """Load what `save_pretrained` wrote, adapters included.

        Args:
            folder: where it is.
            is_trainable: of adapters.
            settings: of `AutoModelForCausalLM.from_pretrained`.
        Raises:
            ValueError: the folder holds no model that thinks, or settings that this version does not know.
        """
        folder = Path(folder)
        config = load_thinking_config(folder)
        if (folder / _ADAPTER).is_file():
            from peft import AutoPeftModelForCausalLM

            lm = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=is_trainable, **settings)
        else:
            lm = AutoModelForCausalLM.from_pretrained(folder, **settings)
        state = _own_tensors(folder)
        model = cls(lm, config, learns_log_z=any(name.startswith("log_z.") for name in state))
        model.load_own_state(folder)
        return model

    def load_own_state(self, folder: str | Path) -> None:
        """Read the tensors beside the LM's from a folder that `save_pretrained` wrote.

        Raises:
            ValueError: the file is missing, broken, or of a model with other tensors.
        """
        state, own = _own_tensors(folder), self.own_state()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            raise ValueError(f"{folder}/{_WEIGHTS} does not fit: it lacks {missing} and has {unexpected} besides")
        if other := [name for name, value in state.items() if value.shape != own[name].shape]:
            raise ValueError(f"{folder}/{_WEIGHTS} does not fit: {sorted(other)} have another shape in this model")
        self.load_state_dict(state, strict=False)


def _own_tensors(folder: str | Path) -> dict[str, Tensor]:
    path = Path(folder) / _WEIGHTS
    if not path.is_file():
        raise ValueError(f"{path} is missing, beside {_SETTINGS}; the folder was not copied whole")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is broken ({error}); it was not copied whole") from error


@torch.no_grad()
def _mean_embedding(policy: Policy) -> Float[Tensor, "D"]:
    """Of all tokens, as the model's own module returns them: some scale inside it."""
    device = policy.causal_lm.get_input_embeddings().weight.device
    vectors = policy.embed(torch.arange(policy.vocab_size, device=device))
    return vectors.float().mean(0).to(vectors.dtype)


def is_thinking_folder(name: str | Path) -> bool:
    """Whether a name is a folder that holds a model that thinks."""
    return (Path(name) / _SETTINGS).is_file()


def load_thinking_config(folder: str | Path) -> ThinkingConfig:
    """How the model in a folder thinks.

    Raises:
        ValueError: it holds no model that thinks, or settings that this version does not know.
    """
    path = Path(folder) / _SETTINGS
    if not is_thinking_folder(folder):
        raise ValueError(
            f"{folder} holds no model that thinks ({_SETTINGS} is missing); pass a folder that QuietSTaRTrainer or "
            "ThinkingLM.save_pretrained wrote"
        )
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds no settings, but {type(given).__name__}")
    known = {each.name for each in fields(ThinkingConfig)}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"{path}: unknown settings {unknown}; this version knows {sorted(known)}")
    try:
        return ThinkingConfig(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
