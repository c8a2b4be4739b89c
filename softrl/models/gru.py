"""A GRU language model behind transformers' interface: the smallest architecture whose state is not a KV cache.

Its step is a pure function of (input, state), so the cotangent solvers need nothing from it but that. A whole text
runs through torch's fused loop over time; padding leaves the state untouched, since real tokens are moved together
before. Left out: cuDNN's kernel, which has no second derivative.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput


class GRUConfig(PreTrainedConfig):
    """Configuration of `GRUForCausalLM`."""

    model_type = "softrl_gru"
    __no_type_check__ = True  # jaxtyping's check of dataclasses, under pytest, knows no arguments beyond the fields

    vocab_size: int = 32000
    hidden_size: int = 256
    num_hidden_layers: int = 1
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02  # of embeddings and head; cells keep torch's own


@dataclass
class GRUOutput(ModelOutput):
    """Hidden states [N, S, D] and the recurrent state [N, layers, D] after the last position."""

    last_hidden_state: Tensor | None = None
    state: Tensor | None = None


class GRUPreTrainedModel(PreTrainedModel):
    """Common part of the GRU models."""

    config_class = GRUConfig
    base_model_prefix = "model"


class SequenceGRUCell(nn.GRUCell):
    """A cell that also takes a whole sequence [N, S, D]; its call is a module's, which engines gather weights for."""

    def forward(self, input: Tensor, hx: Float[Tensor, "N D"] | None = None) -> Tensor:
        """The state after one input [N, D], or after each of a sequence [N, S, D]."""
        if input.ndim == 2:
            return super().forward(input, hx)
        assert hx is not None
        weights = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]
        with torch.backends.cudnn.flags(enabled=False):
            return torch.gru(input, hx[None].contiguous(), weights, True, 1, 0.0, False, False, True)[0]


class GRUModel(GRUPreTrainedModel):
    """Embedding and stacked GRU cells, without the head."""

    def __init__(self, config: GRUConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.cells = nn.ModuleList(
            [SequenceGRUCell(config.hidden_size, config.hidden_size) for _ in range(config.num_hidden_layers)]
        )
        self.post_init()

    def initial_state(self, inputs: Float[Tensor, "N D"]) -> Float[Tensor, "N L D"]:
        """The zero state, on the inputs' device and in their dtype."""
        return inputs.new_zeros(inputs.shape[0], len(self.cells), self.config.hidden_size)

    def step(self, inputs: Float[Tensor, "N D"], state: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        """One step of time; the hidden state is the last layer of the result."""
        layers = []
        for index, cell in enumerate(self.cells):
            inputs = cell(inputs, state[:, index])
            layers.append(inputs)
        return torch.stack(layers, 1)

    def forward(
        self,
        input_ids: Int[Tensor, "N S"] | None = None,
        attention_mask: Bool[Tensor, "N S"] | Int[Tensor, "N S"] | None = None,
        inputs_embeds: Float[Tensor, "N S D"] | None = None,
        state: Float[Tensor, "N L D"] | None = None,
    ) -> GRUOutput:
        """Runs over time from `state`; positions whose mask is 0 leave the state as it was."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if state is None:
            state = self.initial_state(inputs_embeds[:, 0])
        states = self.states(inputs_embeds, state, attention_mask)
        return GRUOutput(last_hidden_state=states[:, :, -1], state=states[:, -1])

    def states(
        self,
        inputs_embeds: Float[Tensor, "N S D"],
        state: Float[Tensor, "N L D"],
        attention_mask: Bool[Tensor, "N S"] | Int[Tensor, "N S"] | None = None,
    ) -> Float[Tensor, "N S L D"]:
        """The state after every position, as `step` by `step`; where the mask is 0 it is the one before."""
        if attention_mask is None or attention_mask.all():
            return self._through(inputs_embeds, state)
        real = attention_mask.bool()
        order = (~real).long().argsort(dim=1, stable=True)  # real tokens first; what comes after them is not read
        together = inputs_embeds.gather(1, order[..., None].expand_as(inputs_embeds))
        states = torch.cat([state[:, None], self._through(together, state)], 1)
        read = real.long().cumsum(1)[..., None, None].expand(-1, -1, *states.shape[2:])
        return states.gather(1, read)

    def _through(self, inputs: Float[Tensor, "N S D"], state: Float[Tensor, "N L D"]) -> Float[Tensor, "N S L D"]:
        layers = []
        for index, cell in enumerate(self.cells):
            inputs = cell(inputs, state[:, index])
            layers.append(inputs)
        return torch.stack(layers, 2)


class GRUForCausalLM(GRUPreTrainedModel):
    """GRU with a linear head over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - transformers' convention

    def __init__(self, config: GRUConfig):
        super().__init__(config)
        self.model = GRUModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "N S"] | None = None,
        attention_mask: Bool[Tensor, "N S"] | Int[Tensor, "N S"] | None = None,
        inputs_embeds: Float[Tensor, "N S D"] | None = None,
    ) -> CausalLMOutput:
        """Logits of the next token at every position."""
        hidden = self.model(input_ids, attention_mask, inputs_embeds).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden))


# So that transformers' Auto classes load what was saved; whoever loads by them imports this module.
AutoConfig.register(GRUConfig.model_type, GRUConfig)
AutoModelForCausalLM.register(GRUConfig, GRUForCausalLM)
