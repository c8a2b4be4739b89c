"""A GRU language model behind transformers' interface: the smallest architecture whose state is not a KV cache.

Its step is a pure function of (input, state), so the cotangent solvers need nothing from it but that.
Left out: a fused kernel; time is a Python loop, since left-padded prompts must leave the state untouched.
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

    vocab_size: int = 32000
    hidden_size: int = 256
    num_hidden_layers: int = 1
    tie_word_embeddings: bool = True


@dataclass
class GRUOutput(ModelOutput):
    """Hidden states [N, S, D] and the recurrent state [N, layers, D] after the last position."""

    last_hidden_state: Tensor | None = None
    state: Tensor | None = None


class GRUPreTrainedModel(PreTrainedModel):
    """Common part of the GRU models."""

    config_class = GRUConfig
    base_model_prefix = "model"


class GRUModel(GRUPreTrainedModel):
    """Embedding and stacked GRU cells, without the head."""

    def __init__(self, config: GRUConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.cells = nn.ModuleList(
            [nn.GRUCell(config.hidden_size, config.hidden_size) for _ in range(config.num_hidden_layers)]
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
        hidden = []
        for position in range(inputs_embeds.shape[1]):
            new = self.step(inputs_embeds[:, position], state)
            if attention_mask is not None:
                new = torch.where(attention_mask[:, position, None, None].bool(), new, state)
            state = new
            hidden.append(state[:, -1])
        return GRUOutput(last_hidden_state=torch.stack(hidden, 1), state=state)


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
