"""A causal language model seen through its input embeddings: parallel forward, step by step decoding, and its head.

Works with any transformers causal LM that has a parallel forward over `inputs_embeds`, PEFT adapters included. Token
embeddings always go through the model's own embedding module: some models scale inside it, and sharding engines only
gather its weight there. Nothing here builds a [N, T, V] tensor; the head is applied to as many positions as asked for.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from softrl.models.kv import KVCache, num_key_value_layers
from softrl.models.state import (
    DecodeState,
    KeyValueState,
    ReplayableState,
    cache_argument,
    decode_state,
    positions,
)
from softrl.models.virtual_tokens import VirtualTokens, unwrap
from softrl.tokens.embedding import NormCorrection, check_norm_correction, mixture_embedding
from softrl.types import Prompts

CHUNK_ELEMENTS = 2**23  # 32 MiB in float32: bounds every temporary that has a V or a K x D axis


def chunk_length(elements_per_item: int) -> int:
    """How many items of that size fit into one chunk; at least one."""
    return max(1, CHUNK_ELEMENTS // elements_per_item)


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a model's parts whose activations the backward pass computes again.

    Whether it computes the same is not checked: of a frozen parameter that ZeRO-3 has freed after the call the check
    sees the shape (0,), while the backward pass, which gathers it again, reads what it should.
    """
    return checkpoint(function, *arguments, use_reentrant=False, determinism_check="none")


class Policy:
    """A causal LM as the rollouts and the gradient phases use it.

    Args:
        model: transformers causal LM, or a PEFT model around one.
        temperature: sampling temperature, part of the policy's definition: every logit is divided by it, at sampling
            and at scoring alike.
        norm_correction: see `mixture_embedding`.
        context: entered around every use of the model; a reference that is a PEFT model without its adapter passes
            `model.disable_adapter`.

    Attributes:
        largest: of a number, over all processes that have to call the model equally often, since they shard its
            parameters; what decides how often it is called goes through it. Alone, a process keeps its own number.
    Raises:
        TypeError: the model has no parallel forward over `inputs_embeds`, or no output embeddings.
        ValueError: temperature <= 0, unknown norm correction, virtual tokens of a kind that is not fed, or prefix
            tuning of a model whose state is not keys and values.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 1.0,
        norm_correction: NormCorrection = "none",
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        if not temperature > 0.0:
            raise ValueError(f"the sampling temperature must be positive, got {temperature}")
        check_norm_correction(norm_correction)
        self.model = model
        self.temperature = temperature
        self.norm_correction = norm_correction
        self.context = context
        self.largest: Callable[[float], float] = float
        # Any: to a type checker every attribute of an nn.Module is a Tensor or a Module.
        self.virtual = VirtualTokens(model)
        self.causal_lm: Any = self.virtual.model.get_base_model() if self.virtual.exist else unwrap(model)
        self.decoder: Any = self.causal_lm.base_model
        self._accepted = self._check_interface()
        self.virtual.check_state(self._keeps_keys_and_values, type(self.causal_lm).__name__)

    def _check_interface(self) -> frozenset[str]:
        name = type(self.causal_lm).__name__
        accepted = frozenset(inspect.signature(self.decoder.forward).parameters)
        if self.decoder is self.causal_lm or "inputs_embeds" not in accepted:
            raise TypeError(
                f"{name} has no parallel forward over inputs_embeds, which soft tokens are fed through; use a causal "
                "LM of transformers whose decoder accepts inputs_embeds (Llama, GPT-2, Qwen, Gemma, Mamba, ...)"
            )
        if self.causal_lm.get_output_embeddings() is None:
            raise TypeError(f"{name} has no output embeddings (lm_head), so it gives no logits to sample from")
        return accepted

    def at_temperature(self, temperature: float) -> "Policy":
        """The same model with another sampling temperature."""
        other = Policy(self.model, temperature, self.norm_correction, self.context)
        other.largest = self.largest
        return other

    @property
    def vocab_size(self) -> int:
        """V, the number of logits."""
        return self.causal_lm.config.get_text_config().vocab_size

    @property
    def max_length(self) -> int | None:
        """Longest input that position embeddings allow, without virtual tokens; None where none is configured."""
        limit = getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        if limit is None or not self.virtual.exist:
            return limit
        with self.context():
            return limit - self.virtual.count

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings, which is that of everything that is fed."""
        return self.causal_lm.get_input_embeddings().weight.dtype

    @property
    def trains_embedding(self) -> bool:
        """Whether the input embedding has trainable parameters, so that the embedding's own gradient is wanted."""
        return any(parameter.requires_grad for parameter in self.causal_lm.get_input_embeddings().parameters())

    @property
    def trains_head(self) -> bool:
        """Whether the output embeddings have trainable parameters (tied to the input embedding or not)."""
        return any(parameter.requires_grad for parameter in self.causal_lm.get_output_embeddings().parameters())

    @property
    def is_replayable(self) -> bool:
        """Whether `begin` gives a `ReplayableState`: keys and values only, or a recurrent step."""
        return hasattr(self.decoder, "initial_state") or self._keeps_keys_and_values

    @cached_property
    def _keeps_keys_and_values(self) -> bool:
        return self.cache_argument is not None and num_key_value_layers(self.decoder) is not None

    @cached_property
    def cache_argument(self) -> str | None:
        """What the decoder calls its cache, None if it takes none."""
        return cache_argument(self.decoder)

    def accepted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Those of a call's arguments that the decoder has."""
        return {name: value for name, value in arguments.items() if name in self._accepted}

    def embed(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        """Token embeddings as the model's own module returns them."""
        with self.context():
            return self.causal_lm.get_input_embeddings()(ids)

    def embed_soft(self, ids: Int[Tensor, "M K"], weights: Float[Tensor, "M K"]) -> Float[Tensor, "M D"]:
        """E(q): embeddings of M soft tokens, in chunks, differentiable in the weights and in W."""
        pieces = []
        size = chunk_length(ids.shape[-1] * self.causal_lm.config.get_text_config().hidden_size)
        for ids_piece, weights_piece in zip(ids.split(size), weights.split(size), strict=True):
            pieces.append(mixture_embedding(weights_piece, self.embed(ids_piece), self.norm_correction))
        return torch.cat(pieces)

    def feedback(
        self, ids: Int[Tensor, "M K"], weights: Float[Tensor, "M K"], cotangents: Float[Tensor, "M D"]
    ) -> Float[Tensor, "M K"]:
        """`(∂e/∂q)ᵀ λ` of M soft tokens, in chunks; parameters get no gradient."""
        pieces = []
        size = chunk_length(ids.shape[-1] * cotangents.shape[-1])
        for ids_piece, weights_piece, cotangent in zip(
            ids.split(size), weights.split(size), cotangents.split(size), strict=True
        ):
            with torch.no_grad():
                vectors = self.embed(ids_piece)
            with torch.enable_grad():
                leaf = weights_piece.detach().requires_grad_()
                embedding = mixture_embedding(leaf, vectors, self.norm_correction)
            (grad,) = torch.autograd.grad(embedding, leaf, cotangent.to(embedding.dtype))
            pieces.append(grad)
        return torch.cat(pieces)

    def head(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
        """Logits at the sampling temperature, in float32 at least. M is the caller's chunk: keep it small."""
        with self.context():
            logits = self.causal_lm.get_output_embeddings()(hidden)
        return self._scaled(logits)

    def _scaled(self, logits: Float[Tensor, "M n"]) -> Float[Tensor, "M n"]:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return model_logits(self.causal_lm.config.get_text_config(), logits) / self.temperature

    def kept_logits(self, hidden: Float[Tensor, "M D"], ids: Int[Tensor, "M K"]) -> Float[Tensor, "M K"]:
        """Logits of the kept ids only, at the sampling temperature; M is the caller's chunk.

        A plain, unsharded linear head is read at K rows instead of multiplied by all V. Which of the two must not
        change between a forward pass and its recomputation, so ZeRO-3's mark on a parameter decides, and not whether
        its values happen to be there.
        """
        head = self.causal_lm.get_output_embeddings()
        is_whole = type(head) is nn.Linear and type(head.weight) is nn.Parameter and not hasattr(head.weight, "ds_id")
        if not is_whole:
            return self.head(hidden).gather(-1, ids)
        logits = torch.einsum("md,mkd->mk", hidden, head.weight[ids])
        if head.bias is not None:
            logits = logits + head.bias[ids]
        return self._scaled(logits)

    def hidden(self, prompts: Prompts, embeds: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
        """Hidden states from which tokens 1..T are predicted, in one parallel pass over recorded embeddings.

        Args:
            prompts: N rows, left-padded.
            embeds: embeddings of tokens 1..T; the last one is not fed, since nothing is predicted from it.
        Raises:
            ValueError: gradient checkpointing together with prefix tuning, whose keys it would drop.
        """
        prompt_embeds = self.embed(prompts.ids)
        with self.context():
            first, mask = self.virtual.prepended(prompt_embeds, prompts.mask)
            fed = torch.cat([first, embeds[:, :-1].to(first.dtype)], 1)
            mask = torch.cat([mask, mask.new_ones(embeds.shape[0], embeds.shape[1] - 1)], 1)
            where = positions(mask)[:, -fed.shape[1] :]
            arguments = {"inputs_embeds": fed, "attention_mask": mask.long(), "position_ids": where}
            output = self.decoder(**self.accepted(arguments | self._past(len(fed))))
        return output.last_hidden_state[:, first.shape[1] - 1 :]

    def _past(self, num_rows: int) -> dict[str, Any]:
        """The decoder's cache arguments where nothing is decoded: none but for a learned prefix of keys and values."""
        pairs = self.virtual.past(num_rows)
        if pairs is None:
            return {"use_cache": False}
        self.refuse_checkpointing()
        cache = KVCache(len(pairs), capacity=0, growing=True)
        cache.fill(pairs)
        assert self.cache_argument is not None
        return {"use_cache": True, self.cache_argument: cache}

    @cached_property
    def honours_padding(self) -> bool:
        """Whether padding on the left leaves the hidden states alone; some recurrent models ignore the mask."""
        # Ids away from the pad token, so that a zero embedding cannot hide the difference.
        ids = torch.arange(3, 5, device=self.causal_lm.get_input_embeddings().weight.device) % self.vocab_size
        padded = Prompts(ids[None].flip(1), torch.tensor([[False, True]], device=ids.device))
        alone = Prompts(padded.ids[:, 1:], padded.mask[:, 1:])
        with torch.no_grad(), evaluating(self.model):
            last = self.embed(ids[None, :1])
            with_padding, without = (self.hidden(prompts, last).double() for prompts in (padded, alone))
        return ((with_padding - without).norm() <= 1e-2 * without.norm()).item()

    def begin(
        self, prompts: Prompts, num_samples: int, capacity: int, growing: bool = False
    ) -> tuple[Float[Tensor, "N D"], DecodeState]:
        """Prefill every prompt once and give each of its samples the result.

        Args:
            prompts: B rows.
            num_samples: G.
            capacity: how many embeddings will be fed at most.
            growing: keep the state inside the autograd graph (plain backpropagation through the loop).
        Returns:
            Hidden state that token 1 is predicted from, shape (N, D), and the decoding state of the N sequences.
        Raises:
            ValueError: gradient checkpointing is active, which silently drops the cache.
        """
        self.refuse_checkpointing()
        with torch.no_grad(), self.context():
            first, mask = self.virtual.prepended(self.embed(prompts.ids), prompts.mask)
            state = self._new_state(mask, capacity, growing)
            hidden = state.advance(first)[:, -1]
        if num_samples > 1:
            state.repeat(num_samples)
        return hidden.repeat_interleave(num_samples, 0), state

    def advance(self, state: DecodeState, embeds: Float[Tensor, "N S D"]) -> Float[Tensor, "N S D"]:
        """Feed S embeddings to a decoding state; hidden states at their positions."""
        with self.context():
            return state.advance(embeds)

    def replay(self, state: ReplayableState, index: int, embeds: Float[Tensor, "N L D"]) -> Float[Tensor, "N L D"]:
        """See `ReplayableState.replay`."""
        with self.context():
            return state.replay(index, embeds)

    def _new_state(self, mask: Bool[Tensor, "B slots"], capacity: int, growing: bool) -> DecodeState:
        state = decode_state(self.decoder, mask, capacity, growing)
        if isinstance(state, KeyValueState) and (pairs := self.virtual.past(len(mask))) is not None:
            state.cache.fill(pairs)
        return state

    def refuse_checkpointing(self) -> None:
        """Raise ValueError where transformers would drop a key-value cache."""
        if any(
            layer.gradient_checkpointing and layer.training
            for layer in self.decoder.modules()
            if isinstance(layer, GradientCheckpointingLayer)
        ):
            raise ValueError(
                "gradient checkpointing is active, and transformers then drops the key-value cache, which gives wrong "
                "gradients; call model.eval() or model.gradient_checkpointing_disable() before decoding"
            )


def model_logits(config: object, logits: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch V"]:
    """What some causal LMs do to the head's output in their own forward."""
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def check_policy(policy: Policy, relative_tolerance: float = 1e-3) -> None:
    """Compare our decoder-then-head with the model's own forward on two tokens.

    Raises:
        TypeError: the logits differ, i.e. the model does something between its decoder and its logits that softrl
            does not know, or its decoder is not a plain function of inputs_embeds.
    """
    embedding = policy.causal_lm.get_input_embeddings()
    ids = torch.tensor([[0, min(1, policy.vocab_size - 1)]], device=embedding.weight.device)
    prompts = Prompts(ids[:, :1], torch.ones_like(ids[:, :1], dtype=torch.bool))
    with evaluating(policy.causal_lm):
        not_fed = ids[:, 1:]  # `hidden` does not feed its last embedding
        hidden = policy.hidden(prompts, policy.embed(torch.cat([ids[:, 1:], not_fed], 1)))
        ours = policy.head(hidden[0, 1:]) * policy.temperature
        whole = policy.model if policy.virtual.exist else policy.causal_lm  # only the wrapper has virtual tokens
        with policy.context():
            theirs = whole(input_ids=ids).logits[0, -1:].to(ours.dtype)
    _ = policy.honours_padding  # measured here, on every rank, rather than when some rank first needs it
    difference = ((ours - theirs).norm() / theirs.norm()).item()
    limit = relative_tolerance if policy.dtype in (torch.float32, torch.float64) else 3e-2
    if not difference < limit:
        raise TypeError(
            f"{type(policy.causal_lm).__name__}: its logits differ from decoder + lm_head by {difference:.1e} "
            "(relative), so soft rollouts would not be its own; please report the architecture"
        )


def evaluation_mode(model: nn.Module, checkpointed: bool = False) -> None:
    """Switch a model to evaluation: dropout is off in all three phases.

    Args:
        model: any module.
        checkpointed: leave the layers that implement gradient checkpointing in training mode, which is what
            transformers' switch for it looks at; their children, dropout among them, are in evaluation mode.
    """
    model.eval()
    if checkpointed:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient: phases 1 and 2 differentiate inputs only, and keep less for it."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
