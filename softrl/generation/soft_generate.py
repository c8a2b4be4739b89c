"""Generation with soft tokens: in batches, with a cache, each row thinking, stopping and ending by itself.

Only the newest embedding is fed to a step, positions are counted from the mask, and of a step K numbers are kept,
never V. Left out: rows that have ended are fed on until the last one ends; their tokens are padding.
Source: softrl maths, sections 1 and 8; seeds/004.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from softrl.generation.delimiters import Stop, Turns
from softrl.generation.soft_record import SoftText
from softrl.generation.soft_settings import Phase, SoftDecoding
from softrl.masking import is_any_of
from softrl.models.nearest import mean_norm, nearest_tokens
from softrl.models.policy import Policy, evaluating
from softrl.rollouts.soft import check_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.temperature import softmax_entropy
from softrl.types import Prompts

# Logits (N, V) of the next token as token ids (N, S) would have them: transformers' processors are such functions.
LogitsProcessor = Callable[[Any, Tensor], Any]


@runtime_checkable
class Streamer(Protocol):
    """What transformers' streamers are: they get the prompts (N, P), then the tokens (N,) of every step."""

    def put(self, value: Tensor) -> None:
        """Take token ids, on the CPU."""

    def end(self) -> None:
        """There are no more."""


@dataclass(frozen=True)
class _Step:
    """One step of all rows; fields as in `SoftText`."""

    tokens: Int[Tensor, "N"]
    is_soft: Bool[Tensor, "N"]
    ids: Int[Tensor, "N K"]
    weights: Float[Tensor, "N K"]
    probs: Float[Tensor, "N K"]
    likeliest: Int[Tensor, "N"]
    entropy: Float[Tensor, "N"]


@torch.no_grad()
def soft_generate(
    policy: Policy,
    prompts: Prompts,
    max_new_tokens: int,
    decoding: SoftDecoding,
    num_samples: int = 1,
    eos_ids: tuple[int, ...] = (),
    seed: int = 0,
    prompt_indices: list[int] | None = None,
    streamer: Streamer | None = None,
    stop: str | Sequence[str] | Stop | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    logits_processor: LogitsProcessor | None = None,
    pad_id: int = 0,
    num_recorded: int = 1,
    find_nearest: bool = True,
) -> SoftText:
    """Go on with prompts, feeding mixtures of token embeddings back where `decoding` says so.

    Args:
        policy: the model. Its temperature and a phase's multiply; logits are divided by both.
        prompts: B left-padded prompts.
        max_new_tokens: T, forced delimiters included.
        decoding: where tokens are soft, and how they are made.
        num_samples: G texts a prompt; the prompt is prefilled once.
        eos_ids: a text ends where the token that it is shown as is one of these.
        seed, prompt_indices: random numbers are keyed by these and the sample, so that a row is the same in any batch;
            indices count the rows by default.
        streamer: gets prompts and tokens as `model.generate` gives them.
        stop: strings that end a text when its tokens contain them, which needs the tokenizer, or a stopping criterion
            of transformers. It sees the tokens that are shown, prompts included.
        tokenizer: the model's. With it, delimiters of several ids are found as text, however the model cuts it.
        logits_processor: of transformers, applied before the temperature; it sees the tokens that are shown.
        pad_id: what stands behind a text's end.
        num_recorded: keep at least so many ids a step in the record; the further ones are the likeliest, of weight 0.
        find_nearest: look for the embedding nearest to every soft token: one product of all soft tokens with the
            vocabulary, at the end. Without it `nearest` is the heaviest token, and `distance` is to that.
    Returns:
        N = B * G rows, samples of a prompt side by side, of T tokens at most; T is cut to the longest. Where the mask
        is False all numbers are zero.
    Raises:
        ValueError: K larger than V, prompts that nothing can be generated from, more tokens than the model's context
            holds, or stop strings without a tokenizer.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if decoding.norm_correction not in (None, policy.norm_correction):
        policy = _corrected(policy, decoding)
    num_kept = max(num_recorded, decoding.num_kept)
    _check_vocabulary(num_kept, policy.vocab_size)
    for phase in (decoding.thinking, decoding.answering):
        if phase.relaxation is not None:
            phase.relaxation.truncation.check_temperature(policy.temperature * phase.temperature)
    indices = list(range(len(prompts.ids))) if prompt_indices is None else prompt_indices
    random = SequenceRandom.keyed(seed, 0, indices, num_samples, prompts.ids.device)
    check_rollout(policy, prompts, max_new_tokens, num_samples, random)
    rows, stop = prompts.repeated(num_samples), stop_criterion(stop, tokenizer)
    turns = Turns(decoding, rows, tokenizer)
    if streamer is not None:
        streamer.put(rows.ids.cpu())
    tokens, ended, mask, steps = rows.ids, torch.zeros_like(rows.mask[:, 0]), [], []
    with evaluating(policy.model):
        hidden, state = policy.begin(prompts, num_samples, capacity=max_new_tokens)
        for number in range(max_new_tokens):
            logits = policy.head(hidden)
            logits = logits if logits_processor is None else logits_processor(tokens, logits)
            step = _step(logits, decoding, turns, random, num_kept)
            shown = step.tokens.masked_fill(ended, pad_id)
            tokens = torch.cat([tokens, shown[:, None]], 1)
            step = _moved_on(step, turns, tokens)
            steps.append(step)
            mask.append(~ended)
            if streamer is not None:
                streamer.put(shown.cpu())
            ended = ended | is_any_of(step.tokens, eos_ids)
            if stop is not None:
                ended = ended | stop(tokens, None)
            if number == max_new_tokens - 1 or not policy.largest(float(not ended.all())):
                break
            hidden = policy.advance(state, _fed(policy, step)[:, None])[:, 0]
    if streamer is not None:
        streamer.end()
    generated = tokens[:, rows.ids.shape[1] :]
    return _record(policy, rows, generated, torch.stack(mask, 1), steps, find_nearest)


def _corrected(policy: Policy, decoding: SoftDecoding) -> Policy:
    assert decoding.norm_correction is not None
    other = policy.at_temperature(policy.temperature)
    other.norm_correction = decoding.norm_correction
    return other


def _check_vocabulary(num_kept: int, vocab_size: int) -> None:
    if num_kept > vocab_size:
        raise ValueError(
            f"K={num_kept} kept tokens a step (top_k of a relaxation, or num_recorded) are more than the vocabulary, "
            f"V={vocab_size}; keep at most {vocab_size}"
        )


def stop_criterion(stop: str | Sequence[str] | Stop | None, tokenizer: PreTrainedTokenizerBase | None) -> Stop | None:
    """Stop strings as transformers finds them: across the borders of tokens, at the end of what is generated."""
    if stop is None or callable(stop):
        return stop
    strings = [stop] if isinstance(stop, str) else list(stop)
    if not strings:
        return None
    if tokenizer is None or not all(strings):
        raise ValueError(f"stop={strings}: expected non-empty strings, and the model's tokenizer to find them with")
    try:
        return StopStringCriteria(tokenizer, strings)
    except ValueError as error:
        raise ValueError(
            f"stop={strings}: transformers cannot find strings among the tokens of {type(tokenizer).__name__}, as "
            f"in a vocabulary of whole words ({error}); stop at token ids instead (eos_ids)"
        ) from error


def _step(
    logits: Float[Tensor, "N V"], decoding: SoftDecoding, turns: Turns, random: SequenceRandom, num_kept: int
) -> _Step:
    """Choose the next token of every row by the phase that it is in, or take what it has to be fed."""
    forced, phases = turns.forced(), (decoding.answering, decoding.thinking)
    phase_of = [-1 if token is not None else int(thinks) for token, thinks in zip(forced, turns.thinks, strict=True)]
    shape = (len(logits), num_kept)
    ids = torch.zeros(shape, dtype=torch.long, device=logits.device)
    weights, log_probs = logits.new_zeros(shape), torch.empty_like(logits)
    is_soft = torch.zeros_like(ids[:, 0], dtype=torch.bool)
    for number in sorted(set(phase_of)):
        group = [row for row, phase in enumerate(phase_of) if phase == number]
        rows = torch.tensor(group, device=logits.device)
        phase = phases[max(number, 0)]
        mine = logits if len(group) == len(logits) else logits[rows]
        if number < 0:
            kept = torch.tensor([[forced[row]] for row in group], device=logits.device)
            fed = torch.ones_like(kept, dtype=logits.dtype)
        else:
            kept, fed = _chosen(phase, mine, random.of(group))
            is_soft[rows] = phase.relaxation is not None and not phase.relaxation.feeds_one_hot
        ids[rows], weights[rows, : kept.shape[1]] = _filled(kept, mine, num_kept), fed
        log_probs[rows] = (mine / phase.temperature).log_softmax(-1)
    probs = log_probs.gather(-1, ids).exp()
    return _Step(ids[:, 0], is_soft, ids, weights, probs, logits.argmax(-1), softmax_entropy(log_probs))


def _chosen(
    phase: Phase, logits: Float[Tensor, "n V"], random: SequenceRandom
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """What is fed: ids and weights, the heaviest first."""
    if phase.relaxation is None:
        tokens = phase.next_token.choose(logits, random)[:, None]
        return tokens, torch.ones_like(tokens, dtype=logits.dtype)
    logits = logits / phase.temperature
    support = phase.relaxation.draw(logits, random)
    weights = phase.relaxation.weights(logits.gather(-1, support.ids), support)
    fed, order = phase.relaxation.fed(weights, support).sort(dim=-1, descending=True, stable=True)
    return support.ids.gather(-1, order), fed


def _filled(ids: Int[Tensor, "n k"], logits: Float[Tensor, "n V"], num_kept: int) -> Int[Tensor, "n K"]:
    """The ids and, behind them, the likeliest of the others."""
    others = logits.scatter(-1, ids, -torch.inf).topk(num_kept - ids.shape[1]).indices
    return torch.cat([ids, others], 1)


def _moved_on(step: _Step, turns: Turns, tokens: Int[Tensor, "N S"]) -> _Step:
    """The step, hard where it closes the thinking: what follows is to see the delimiter, and not a mixture with it."""
    closes = turns.closes(tokens)
    turns.advance(tokens, step.entropy.tolist(), closes.tolist())
    one_hot = torch.zeros_like(step.weights)
    one_hot[:, 0] = 1.0
    weights = torch.where(closes[:, None], one_hot, step.weights)
    return replace(step, weights=weights, is_soft=step.is_soft & ~closes)


def _fed(policy: Policy, step: _Step) -> Float[Tensor, "N D"]:
    """What each row is fed: the token's own embedding where it is hard, whatever the norm correction."""
    hard = policy.embed(step.tokens)
    if not step.is_soft.any():
        return hard
    return torch.where(step.is_soft[:, None], policy.embed_soft(step.ids, step.weights), hard)


def _record(
    policy: Policy,
    prompts: Prompts,
    tokens: Int[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
    steps: list[_Step],
    find_nearest: bool,
) -> SoftText:
    columns = {name: torch.stack([getattr(step, name) for step in steps], 1) for name in _Step.__dataclass_fields__}
    columns.pop("tokens")
    columns = {
        name: values.masked_fill(~(mask if values.ndim == 2 else mask[..., None]), 0)
        for name, values in columns.items()
    }
    soft, weights = columns["is_soft"], columns["weights"]
    fed_entropy = -(weights * weights.log().masked_fill(weights == 0.0, 0.0)).sum(-1)
    nearest, distance = columns["ids"][..., 0].clone(), torch.zeros_like(fed_entropy)
    if soft.any():
        ids, weights = columns["ids"][soft], weights[soft]
        embeds = policy.embed_soft(ids, weights)
        if find_nearest:
            nearest[soft], far = nearest_tokens(policy, embeds)
        else:
            far = (embeds - policy.embed(ids[:, 0])).norm(dim=-1)
        distance[soft] = far.to(distance.dtype) / mean_norm(policy, ids, weights)
    return SoftText(prompts, tokens, mask, **columns, fed_entropy=fed_entropy, nearest=nearest, distance=distance)
