"""What a network that reads whole texts needs of soft tokens: their embeddings, texts behind their prompts, what each
token counts in attention, and which position is pooled. Pure functions; networks are in `classifier.py` and
`likelihood.py`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from softrl.masking import is_any_of
from softrl.models.policy import chunk_length
from softrl.tokens.embedding import mixture_embedding
from softrl.types import SoftTokens

Pooling = Literal["last", "mean"]

_PRESENCE_FLOOR = 1e-13  # e^-30, what survival is never below either


def packed(
    prompts: Sequence[Num[Tensor, "_ *rest"]], completions: Num[Tensor, "N T *rest"], fill: float | int
) -> Num[Tensor, "N S *rest"]:
    """Values of each prompt with those of its completion right behind them; `fill` on the right of shorter rows.

    Every text starts at position 0, so position ids are those that a model counts by itself, its first token is where
    classifiers of the BERT kind look for it, and nothing in front of a text has to be hidden from it.
    """
    rows = [torch.cat(parts) for parts in zip(prompts, completions, strict=True)]
    return pad_sequence(rows, batch_first=True, padding_value=fill)


def mixtures(
    embedding: nn.Module, ids: Int[Tensor, "N T K"], weights: Float[Tensor, "N T K"]
) -> Float[Tensor, "N T D"]:
    """Embeddings of soft tokens, in chunks that the backward pass computes again: [N, T, K, D] is never kept.

    Args:
        embedding: the network's own module, called on ids.
        ids: within its vocabulary, also where a text has ended.
        weights: of any precision; the result has the module's.
    """

    def mixture(ids_piece: Int[Tensor, "M K"], weights_piece: Float[Tensor, "M K"]) -> Float[Tensor, "M D"]:
        vectors = embedding(ids_piece)
        precise = torch.promote_types(vectors.dtype, weights.dtype)  # weights rounded to bfloat16 do not sum to one
        return mixture_embedding(weights_piece, vectors.to(precise)).to(vectors.dtype)

    width = embedding(ids[:1, :1, 0]).shape[-1]
    size = chunk_length(ids.shape[-1] * width)
    pieces = zip(ids.flatten(0, 1).split(size), weights.flatten(0, 1).split(size), strict=True)
    mixed = [checkpoint(mixture, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return torch.cat(mixed).unflatten(0, ids.shape[:2])


def with_end(tokens: SoftTokens, eos_id: int, ends: tuple[int, ...] = ()) -> SoftTokens:
    """The same tokens, and an end of sequence behind those that have not come to it or to another of `ends`.

    Reward models that learned from whole texts read their verdict off it, and off nothing else: TRL's `RewardTrainer`
    puts one behind every text. Under soft stopping it counts by the probability that nothing has ended the text.
    """
    ended = (tokens.weights * is_any_of(tokens.ids, (eos_id, *ends))).sum(-1) * tokens.mask
    length = tokens.mask.sum(-1)
    last = F.pad(ended, (1, 0)).gather(1, length[:, None])[:, 0]  # 0 where nothing was written
    steps = torch.arange(tokens.mask.shape[1] + 1, device=length.device)
    here = (steps == length[:, None]) & (last < 1.0)[:, None]
    ids, weights = (F.pad(values, (0, 0, 0, 1)) for values in (tokens.ids, tokens.weights))
    first = torch.arange(ids.shape[-1], device=ids.device) == 0
    ids = torch.where(here[..., None] & first, eos_id, ids)
    weights = torch.where(here[..., None], first.to(weights), weights)
    return replace(tokens, ids=ids, weights=weights, mask=F.pad(tokens.mask, (0, 1)) | here)


def last_token_weights(tokens: SoftTokens, pad_id: int | None) -> Float[Tensor, "N positions"]:
    """How likely each position is the last one that counts: the prompt's last token, then tokens 1..T.

    Without a pad id `w_t = s_t − s_{t+1}` with s_{T+1} = 0: under hard stopping, one on the last real token.
    With one, which often is the end-of-sequence token, the classifiers of transformers pool the last token that is
    not it: `w_t = s_t (e_t + g_t r_{t+1})` and `w_0 = r_1`. Here e_t is the weight of ending with a token that counts,
    g_t that of going on after one, and r_t the probability that nothing counts from t on: `r_{T+1} = 1`, and
    `r_t = q_t[pad]` if the pad id ends the text, else `q_t[pad] r_{t+1}`.

    Args:
        tokens: N soft sequences whose weights sum to one.
        pad_id: what the classifier takes for padding; None if it has no such id.
    Returns:
        Weights, each row summing to one, shape (N, 1 + T).
    Source: ours (softrl maths, section 3; the pad id after `ForSequenceClassification.forward` of transformers).
    """
    pad = _weight_of(tokens, pad_id)
    pad_ends = pad_id in tokens.eos_ids
    end = tokens.eos_weight - pad if pad_ends else tokens.eos_weight
    going_on = 1.0 - tokens.eos_weight if pad_ends else 1.0 - tokens.eos_weight - pad
    nothing = torch.cat([pad.masked_fill(~tokens.mask, 1.0), torch.ones_like(pad.sum(-1, keepdim=True))], -1)
    if not pad_ends:
        nothing = nothing.flip(-1).cumprod(-1).flip(-1)
    return torch.cat([nothing[:, :1], tokens.survival * (end + going_on * nothing[:, 1:])], -1)


def pooling_weights(
    tokens: SoftTokens, prompt_lengths: Sequence[int], pooling: Pooling, pad_id: int | None
) -> Float[Tensor, "N S"]:
    """What every position of the packed texts counts in the pooled state.

    Args:
        tokens: N completions.
        prompt_lengths: tokens of each prompt; without a prompt, a text in which nothing counts pools its first token.
        pooling: "last", see `last_token_weights`, or "mean": `s_t / Σ s`, prompt tokens counting as survivors.
        pad_id: what the classifier takes for padding; matters to "last" alone.
    """
    if pooling == "mean":
        weights = packed([tokens.weights.new_ones(length) for length in prompt_lengths], tokens.survival, 0.0)
        return weights / weights.sum(-1, keepdim=True)
    rows = [
        torch.cat([row.new_zeros(length - 1), row]) if length else torch.cat([row[:1] + row[1:2], row[2:]])
        for row, length in zip(last_token_weights(tokens, pad_id), prompt_lengths, strict=True)
    ]
    return pad_sequence(rows, batch_first=True)


def log_of_presence(presence: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """What goes on the attention to tokens that are present to a degree: nats, at least −30; −inf outside the mask."""
    return presence.clamp(min=_PRESENCE_FLOOR).log().masked_fill(~mask, -torch.inf)


def attention_bias(log_survival: Float[Tensor, "N S"], causal: bool, dtype: torch.dtype) -> Float[Tensor, "N 1 S S"]:
    """An additive attention mask: `log s` on every key, so that a token is read as much as it counts.

    Args:
        log_survival: nats; −inf where there is no token, and such keys are hidden.
        causal: hide from every query what comes after it.
        dtype: of the network; hidden keys get its lowest number, as in transformers.
    """
    num_rows, length = log_survival.shape
    hidden = torch.isneginf(log_survival)[:, None, None, :].expand(num_rows, 1, length, length)
    if causal:
        hidden = hidden | torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
    bias = log_survival.to(dtype)[:, None, None, :].expand(num_rows, 1, length, length)
    return bias.masked_fill(hidden, torch.finfo(dtype).min)


def _weight_of(tokens: SoftTokens, token_id: int | None) -> Float[Tensor, "N T"]:
    if token_id is None:
        return torch.zeros_like(tokens.weights[..., 0])
    return (tokens.weights * (tokens.ids == token_id)).sum(-1)
