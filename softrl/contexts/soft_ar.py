"""softAR: any causal LM read through compressed windows of its history, so that it reads and writes without an end.

What is older than the window is not cut off but summed up in memory slots in front of it; see `contexts/window.py`.
The forward pass over a history of any length is one causal, differentiable function of its embeddings, in one batch of
windows: rewards and losses reach what has left the window long ago through the slots. Inside a window the language
model is as it was: slots have types of their own, learned and zero at first, hard tokens have none, and the first
window, which has no filled slot, is exactly the model's own pass. Positions count what a window holds, so the filled
slots come first and a window never asks for a position that the model has not.

Output "tokens" keeps the model's head. Output "embedding" puts out one vector y a position (`distance_head`). A head
for collapses (`collapse`) may stand beside either, and is saved with the model.

Left out: transformers' cache arguments. Step by step decoding with a cache inside the window is `window_state`,
which `Policy` finds by `new_state`; `model.generate` runs the whole history at every token (`soft_ar_generation`).
"""

import copy
import inspect
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from softrl.contexts.collapse import LearnedCollapse
from softrl.contexts.distance_head import DistanceHead
from softrl.contexts.soft_ar_config import SPECIAL_IDS, Output, SoftARConfig
from softrl.contexts.soft_ar_generation import WholeHistoryGeneration, refuse_cache
from softrl.contexts.window import LearnedNormalisation, WindowLayout, Windows, windows
from softrl.contexts.window_state import WindowState
from softrl.models.policy import Policy, model_logits
from softrl.models.state import DecodeState, PrefixState, positions

NO_MEMORY = -1  # of `memory_of`: a row that sees none
_IGNORED = -100  # of labels, in transformers


class SoftARPreTrainedModel(PreTrainedModel):
    """Common part of the softAR models."""

    config_class = SoftARConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SoftARModel):
            nn.init.zeros_(module.place_types)


class SoftARModel(SoftARPreTrainedModel):
    """A causal LM's decoder behind the window, without the head."""

    def __init__(self, config: SoftARConfig, backbone: Any = None):
        backbone = _new_lm(config).base_model if backbone is None else backbone
        super().__init__(config)
        self.layout = config.layout
        self.backbone = backbone
        _check_width(self.get_input_embeddings(), config)
        self.place_types = nn.Parameter(torch.zeros(self.layout.num_kinds, cast(int, config.hidden_size)))
        is_learned = self.layout.normalisation == "learned"
        self.normalisation = LearnedNormalisation(self.layout) if is_learned else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def new_state(self, mask: Bool[Tensor, "B P"], capacity: int, growing: bool = False) -> DecodeState:
        """What decoding starts from; where gradients are to flow through it, the whole history at every step."""
        return PrefixState(self, mask) if growing else WindowState(self, mask)

    def forward(
        self,
        input_ids: Int[Tensor, "N n"] | None = None,
        attention_mask: Bool[Tensor, "N n"] | Int[Tensor, "N n"] | None = None,
        inputs_embeds: Float[Tensor, "N n D"] | None = None,
        soft_mask: Bool[Tensor, "N n"] | None = None,
        soft_embeds: Float[Tensor, "N n D"] | None = None,
        memory_of: Int[Tensor, "N"] | None = None,
        use_cache: bool = False,
    ) -> BaseModelOutput:
        """Hidden states of a history of any length, each from the window in which its token is new.

        Args:
            input_ids, inputs_embeds: the history, one of the two.
            attention_mask: 1 on tokens; padding may stand on either side.
            soft_mask: tokens that are soft as long as they are in the soft region, the last `num_soft` places of a
                window; there they get its type.
            soft_embeds: what is fed in their place there; elsewhere they have collapsed into what the history says.
                None: the same.
            memory_of: the row whose memory slots each row sees, its own by default; `NO_MEMORY` for none. For the
                controls of an evaluation, and for training without memory.
            use_cache: ignored; there is no cache here.
        Returns:
            `last_hidden_state`, shape (N, n, D), 0 at padding.
        Raises:
            ValueError: not exactly one of ids and embeddings, soft embeddings without their mask, or no token at all.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, exactly one of the two")
        if soft_embeds is not None and soft_mask is None:
            raise ValueError("soft_embeds needs soft_mask, which says of which tokens they are")
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        mask = mask if attention_mask is None else attention_mask.bool()
        if not mask.any():
            raise ValueError(f"attention_mask: no row has a token, shape {tuple(mask.shape)}; pass one at least")
        cut = windows(embeds, mask, self.layout, self.normalisation)
        inputs, seen = self._slots(cut, memory_of)
        tokens = cut.inputs[:, :, self.layout.num_slots :]
        if soft_mask is not None:
            tokens = self._with_soft(cut, tokens, soft_mask, embeds if soft_embeds is None else soft_embeds)
        hidden = self._read(torch.cat([inputs, tokens], 2), torch.cat([seen, cut.mask[:, :, inputs.shape[2] :]], 2))
        return BaseModelOutput(last_hidden_state=cut.per_token(hidden))

    def _slots(
        self, cut: Windows, memory_of: Int[Tensor, "N"] | None
    ) -> tuple[Float[Tensor, "N C M D"], Bool[Tensor, "N C M"]]:
        """Memory with its types, and which of it is seen."""
        count = self.layout.num_slots
        slots, seen = cut.inputs[:, :, :count], cut.mask[:, :, :count]
        if memory_of is not None:
            rows, present = memory_of.clamp(min=0), cut.mask[:, :, count:].any(-1)
            slots, seen = slots[rows], seen[rows] & present[..., None] & (memory_of >= 0)[:, None, None]
        return self.memory(slots, seen)

    def memory(
        self, slots: Float[Tensor, "*batch M D"], seen: Bool[Tensor, "*batch M"]
    ) -> tuple[Float[Tensor, "*batch M D"], Bool[Tensor, "*batch M"]]:
        """Slots in the layout's order with their types, empty ones first: some models count how far back they look by
        places, and an aggregate behind the segments is empty for longer than they are.
        """
        slots = slots + self.types(self.layout.kinds[: self.layout.num_slots].to(slots.device))
        order = seen.long().argsort(dim=-1, stable=True)
        return slots.gather(-2, order[..., None].expand_as(slots)), seen.gather(-1, order)

    def types(self, kinds: Int[Tensor, "*batch"] | int) -> Float[Tensor, "*batch D"]:
        """The learned vectors that say of what kind a place is; added to slots and to soft tokens only."""
        return self.place_types[kinds]

    def _with_soft(
        self,
        cut: Windows,
        tokens: Float[Tensor, "N C U D"],
        soft_mask: Bool[Tensor, "N n"],
        soft_embeds: Float[Tensor, "N n D"],
    ) -> Float[Tensor, "N C U D"]:
        """The windows' tokens, soft ones in their last places."""
        if not self.layout.num_soft:
            return tokens
        source = cut.source[:, :, self.layout.num_hard :]
        index = source.flatten(1)[..., None].expand(-1, -1, tokens.shape[-1])
        fed = soft_embeds.to(tokens.dtype).gather(1, index).view(*source.shape, -1)
        is_soft = soft_mask.gather(1, source.flatten(1)).view_as(source)[..., None]
        hard, last = tokens.split([self.layout.num_hard, self.layout.num_soft], 2)
        return torch.cat([hard, torch.where(is_soft, fed + self.types(cut.kinds[-1]), last)], 2)

    def _read(self, inputs: Float[Tensor, "N C W D"], mask: Bool[Tensor, "N C W"]) -> Float[Tensor, "N C W D"]:
        """The language model's hidden states of all windows that a row reaches; zeros of the others."""
        first = 0
        if inputs.shape[1] == 1:  # no slot is filled, and places behind the longest row are empty
            first, last = self.layout.num_slots, self.layout.num_slots + int(mask.sum(-1).max())
            short = self._decoded(inputs[:, 0, first:last], mask[:, 0, first:last])
            return nn.functional.pad(short, (0, 0, first, inputs.shape[2] - last))[:, None]
        reached = mask.any(-1)
        hidden = self._decoded(inputs[reached], mask[reached])
        if reached.all():
            return hidden.view_as(inputs)
        return torch.zeros_like(inputs).masked_scatter(reached[..., None, None], hidden)

    def _decoded(self, inputs: Float[Tensor, "M S D"], mask: Bool[Tensor, "M S"]) -> Float[Tensor, "M S D"]:
        arguments = {"attention_mask": mask.long(), "position_ids": positions(mask), "use_cache": False}
        accepted = {name: value for name, value in arguments.items() if name in self._accepted}
        return self.checked(self.backbone(inputs_embeds=inputs, **accepted).last_hidden_state, mask)

    @staticmethod
    def checked(hidden: Float[Tensor, "M S D"], mask: Bool[Tensor, "M S"]) -> Float[Tensor, "M S D"]:
        """Hidden states of windows, in float64 only if they are numbers.

        Raises:
            ValueError: eager attention took its softmax in float32, where the mask of float64 is infinite: at an empty
                slot, which sees nothing, that is 0/0, and the next layer spreads it.
        """
        if hidden.dtype == torch.float64 and not mask.all() and not hidden[mask].isfinite().all():
            raise ValueError(
                "hidden states are not finite: eager attention in float64 cannot read windows with empty places; use "
                'float32, sdpa attention (attn_implementation="sdpa"), or another model'
            )
        return hidden

    @cached_property
    def _accepted(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.backbone.forward).parameters)


class SoftARForCausalLM(SoftARPreTrainedModel, WholeHistoryGeneration, GenerationMixin):
    """A softAR model with its head; loads by transformers' Auto classes once this module is imported.

    Example:

    ```python
    >>> layout = WindowLayout(num_segments=2, segment_tokens=32, num_hard=64, num_soft=0)
    >>> model = SoftARForCausalLM.from_backbone(lm, layout)
    >>> model(input_ids).logits  # of a history of any length
    ```
    """

    def __init__(self, config: SoftARConfig):
        lm = _new_lm(config)
        super().__init__(config)
        self.model = SoftARModel(config, lm.base_model)
        if config.output == "embedding":
            self.lm_head = DistanceHead(self.model, cast(int, config.hidden_size), config.distance_temperature)
        else:
            self.lm_head = lm.get_output_embeddings()
            embedding = self.model.get_input_embeddings()
            name = next(name for name, module in self.model.named_modules() if module is embedding)
            self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.collapse_head = LearnedCollapse(cast(int, config.hidden_size)) if config.collapse_head else None
        self.generation_config.use_cache = False
        self.post_init()
        self.generation_config.use_cache = False

    @classmethod
    def from_backbone(
        cls, lm: PreTrainedModel, layout: WindowLayout, output: Output = "tokens", **settings: Any
    ) -> "SoftARForCausalLM":
        """A softAR model with a causal LM's weights, in its dtype; the LM itself stays as it is.

        Its kind of attention and the special tokens of its generation settings go along.

        Args:
            lm: any causal LM with a parallel forward over `inputs_embeds`.
            layout: the window.
            output: "embedding" leaves the LM's head behind for a new one.
            settings: further arguments of `SoftARConfig`.
        Raises:
            ValueError: the LM reads what the attention mask leaves out, as RWKV does: slots are empty at first, and
                rows of a batch move on at different times.
        """
        window = {name: getattr(layout, name) for name in layout.__dataclass_fields__}
        config = SoftARConfig(backbone_config=lm.config.to_dict(), window=window, output=output, **settings)
        config._attn_implementation = lm.config._attn_implementation
        model: Any = cls(config)
        _check_masks(lm)
        model.to(dtype=lm.dtype, device=lm.device)
        model.model.backbone.load_state_dict(lm.base_model.state_dict())
        if output == "tokens":
            model.lm_head.load_state_dict(lm.get_output_embeddings().state_dict())
        if getattr(lm, "generation_config", None) is not None:
            for name in SPECIAL_IDS:  # which may be more than its configuration says
                setattr(model.generation_config, name, copy.copy(getattr(lm.generation_config, name)))
        return model.train(lm.training)

    def add_collapse_head(self) -> LearnedCollapse:
        """A new head that says what soft tokens become, in the place of an older one; see `fit_collapse`."""
        self.config.collapse_head = True
        self.collapse_head = LearnedCollapse(self.config.hidden_size).to(self.device, self.dtype)
        return self.collapse_head

    @property
    def head(self) -> DistanceHead:
        """The head of a model whose output is an embedding.

        Raises:
            ValueError: its output is logits.
        """
        if not isinstance(self.lm_head, DistanceHead):
            raise ValueError("output='tokens' has logits and no vector y; make the model with output='embedding'")
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def _resize_token_embeddings(self, *given: Any, **settings: Any) -> nn.Module:
        """A head by distance has no rows of its own to resize."""
        if not isinstance(self.lm_head, DistanceHead):
            return super()._resize_token_embeddings(*given, **settings)
        self.set_input_embeddings(self.model._resize_token_embeddings(*given, **settings))
        return self.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def logits(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Logits of hidden states, in their dtype."""
        return model_logits(self.config, self.lm_head(hidden))

    def soft_outputs(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """What is fed for a soft token: y, or `Σ_v p_v e_v` over the whole vocabulary where the output is logits.

        The latter is what a regression to token embeddings would learn to put out; build it for few states at a time.
        """
        if isinstance(self.lm_head, DistanceHead):
            return self.lm_head.outputs(hidden)
        embedding = self.get_input_embeddings()
        vectors = embedding(torch.arange(self.config.vocab_size, device=hidden.device))
        return self.logits(hidden).softmax(-1).to(vectors.dtype) @ vectors

    def forward(
        self,
        input_ids: Int[Tensor, "N n"] | None = None,
        attention_mask: Bool[Tensor, "N n"] | Int[Tensor, "N n"] | None = None,
        inputs_embeds: Float[Tensor, "N n D"] | None = None,
        soft_mask: Bool[Tensor, "N n"] | None = None,
        soft_embeds: Float[Tensor, "N n D"] | None = None,
        memory_of: Int[Tensor, "N"] | None = None,
        labels: Int[Tensor, "N n"] | None = None,
        logits_to_keep: int = 0,
        cache: Any = None,
        past_key_values: Any = None,
        **ignored: Any,
    ) -> CausalLMOutput:
        """Logits of the next token at every position, of either output; see `SoftARModel.forward`.

        Args:
            labels: the tokens themselves, −100 where the loss leaves them out; the loss is the mean cross-entropy of
                those that a token stands before.
            logits_to_keep: without labels, compute the last so many positions only; 0 for all.
            cache, past_key_values: transformers' names of a cache; an empty one is ignored.
            ignored: what transformers' generation passes along, such as position ids, which are the window's here.
        Raises:
            ValueError: as `SoftARModel.forward`, or a cache that holds something.
        """
        refuse_cache(cache, past_key_values)
        output = self.model(input_ids, attention_mask, inputs_embeds, soft_mask, soft_embeds, memory_of)
        if labels is None:
            return CausalLMOutput(logits=self.logits(output.last_hidden_state[:, -logits_to_keep:]))
        logits = self.logits(output.last_hidden_state)
        targets = labels[:, 1:]
        if attention_mask is not None:
            targets = targets.masked_fill(~attention_mask[:, :-1].bool(), _IGNORED)
        pairs = logits[:, :-1].flatten(0, 1).float(), targets.flatten()
        loss = nn.functional.cross_entropy(*pairs, ignore_index=_IGNORED)
        return CausalLMOutput(loss=loss, logits=logits)


def _check_width(embedding: Any, config: SoftARConfig) -> None:
    width = embedding.weight.shape[-1]
    if width != config.hidden_size:
        raise ValueError(
            f"the language model's token embeddings are {width} wide, and its hidden_size is {config.hidden_size}; "
            "windows need one width, so choose a model without a projection between the two"
        )


def _check_masks(lm: PreTrainedModel) -> None:
    if lm.dtype == torch.float64 and lm._supports_sdpa and lm.config._attn_implementation == "eager":
        return  # attention of 0/0 at empty places: `SoftARModel.checked` says so where a window has some
    if not Policy(lm).honours_padding:
        raise ValueError(
            f"lm: {type(lm).__name__} does not leave out what attention_mask says, and windows have empty places "
            "(slots of nothing yet, rows that move on later than others); choose a model that does"
        )


def _new_lm(config: SoftARConfig) -> Any:
    """With the kind of attention that is asked for; without one transformers chooses by the model."""
    lm = AutoModelForCausalLM.from_config(config.backbone, attn_implementation=config._attn_implementation)
    config._attn_implementation = lm.config._attn_implementation  # nothing else attends
    return lm


# So that transformers' Auto classes load what was saved; whoever loads by them imports this module.
AutoConfig.register(SoftARConfig.model_type, SoftARConfig)
AutoModel.register(SoftARConfig, SoftARModel)
AutoModelForCausalLM.register(SoftARConfig, SoftARForCausalLM)
