"""Generation by a model that thinks before its next tokens, in batches and with a cache.

The text's keys grow by one token a step, and every thought is a branch of them: nothing is computed twice, and the
text that goes on has not seen its thoughts, as in training. Left out: thoughts that speak on after the first token
(n_talk); and a row that does not think costs as much as one that does, where another row of its batch thinks.
Source: Zelikman et al. (2024), Quiet-STaR, arXiv:2403.09629; softrl maths, section 6.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.generation.next_token import NextToken
from softrl.generation.record import ThoughtfulText
from softrl.masking import is_any_of, mask_through_eos
from softrl.models.branches import BranchAttention, read_texts
from softrl.models.policy import evaluating
from softrl.models.text_state import TextState
from softrl.models.thinking import ThinkingLM
from softrl.rollouts.soft import check_rollout
from softrl.rollouts.thoughts import ThoughtSource, think
from softrl.tokens.divergences import entropy
from softrl.tokens.noise import SequenceRandom, sequence_seed
from softrl.tokens.relaxation import Relaxation
from softrl.types import Prompts, Support

_RECORDED = 5  # ids of a soft thought token that a record keeps


@dataclass(frozen=True)
class Thinking:
    """When and how a model thinks while it generates: before the tokens for which all of these hold.

    Args:
        every: before every so many-th generated token, the first one included.
        steps: before these generated tokens only, counted from 0; none of them: it does not think.
        above_nats: only where the prediction without a thought has a larger entropy than this.
        n_thought: tokens of a thought; None for the model's own number.
        source: what is thought, see `rollouts.thoughts`: draws of the policy or its argmax, or a control.
        relaxation: think soft tokens.
    Raises:
        ValueError: a number outside its range, or a relaxation of what is not the policy's.
    """

    every: int = 1
    steps: tuple[int, ...] | None = None
    above_nats: float | None = None
    n_thought: int | None = None
    source: ThoughtSource = "policy"
    relaxation: Relaxation | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}; with steps=() the model does not think")
        if self.steps is not None and any(step < 0 for step in self.steps):
            raise ValueError(f"steps are generated tokens, counted from 0, got {self.steps}")
        if self.n_thought is not None and self.n_thought < 0:
            raise ValueError(f"n_thought must not be negative, got {self.n_thought}")
        if self.relaxation is not None and self.source != "policy":
            raise ValueError(f"source={self.source!r} has no soft thoughts; leave the relaxation out")

    def before(self, step: int, spread: Float[Tensor, "N"]) -> Bool[Tensor, "N"]:
        """Which rows think before this token, given the entropy of what they predict without, nats."""
        due = step % self.every == 0 and (self.steps is None or step in self.steps)
        unsure = torch.ones_like(spread, dtype=torch.bool) if self.above_nats is None else spread > self.above_nats
        return unsure & due


@dataclass(frozen=True)
class _Rows:
    """The model, and the keys of the rows' random numbers: (seed, prompt, sample)."""

    model: ThinkingLM
    thinking: Thinking
    keys: list[tuple[int, int, int]]
    device: torch.device

    @property
    def n_thought(self) -> int:
        own = self.thinking.n_thought
        return self.model.thinking.n_thought if own is None else own

    @property
    def recorded(self) -> int:
        relaxation = self.thinking.relaxation
        return 1 if relaxation is None else min(_RECORDED, relaxation.truncation.top_k)

    def random(self, *stream: int) -> SequenceRandom:
        """A row's streams have nothing to do with the other rows, nor with when it thought before."""
        return SequenceRandom([sequence_seed(*key, *stream) for key in self.keys], self.device)


@dataclass(frozen=True)
class _Step:
    """One step of all rows; fields as in `ThoughtfulText`."""

    thinks: Bool[Tensor, "N"]
    thought_ids: Int[Tensor, "N n k"]
    thought_weights: Float[Tensor, "N n k"]
    mixing: Float[Tensor, "N"]
    base_entropy: Float[Tensor, "N"]
    entropy: Float[Tensor, "N"]


@torch.no_grad()
def generate_with_thoughts(
    model: ThinkingLM,
    prompts: Prompts,
    max_new_tokens: int,
    thinking: Thinking | None = None,
    next_token: NextToken | None = None,
    num_samples: int = 1,
    eos_ids: tuple[int, ...] = (),
    seed: int = 0,
    prompt_indices: list[int] | None = None,
    attention: BranchAttention = "shared",
) -> ThoughtfulText:
    """Go on with prompts, thinking before tokens and choosing these from the mixed prediction.

    Args:
        model: as it was trained, or any; where the mixing weight is zero, its thoughts do nothing.
        prompts: B left-padded prompts.
        max_new_tokens: T.
        thinking: when and how; by default before every token, sampled thoughts of the model's own length.
        next_token: how tokens are chosen; by default they are sampled.
        num_samples: G texts a prompt.
        eos_ids: a text ends at the first of these.
        seed, prompt_indices: random numbers are keyed by these, sample and step, so that a row is the same in any
            batch; indices count the rows by default.
        attention: see `models.branches`; "naive" for architectures that others do not know.
    Returns:
        N = B * G rows, samples of a prompt side by side, of T tokens at most; T is cut to the longest.
    Raises:
        ValueError: prompts that nothing can be generated from, K larger than V, more tokens than the model's context
            holds, or an architecture that the attention asked for cannot do.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    thinking, next_token = thinking or Thinking(), next_token or NextToken()
    indices = list(range(len(prompts.ids))) if prompt_indices is None else prompt_indices
    keys = [(seed, index, sample) for index in indices for sample in range(num_samples)]
    rows = _Rows(model, thinking, keys, prompts.ids.device)
    random = rows.random()
    check_rollout(model.talk, prompts, max_new_tokens, num_samples, random)
    _check_room(rows, prompts, max_new_tokens)
    repeated, tokens, steps = prompts.repeated(num_samples), [], []
    with evaluating(model):
        state = read_texts(model.talk, attention, len(keys), rows.device)
        hidden = state.extend(model.talk.embed(repeated.ids), repeated.mask)[:, -1]
        ended = torch.zeros(len(keys), dtype=torch.bool, device=rows.device)
        ones = torch.ones_like(ended[:, None])
        for step in range(max_new_tokens):
            log_probs, record = _predicted(rows, state, hidden, step)
            tokens.append(next_token.choose(log_probs, random))
            steps.append(record)
            ended |= is_any_of(tokens[-1], eos_ids)
            if step == max_new_tokens - 1 or ended.all():
                break
            hidden = state.extend(model.talk.embed(tokens[-1])[:, None], ones)[:, 0]
    stacked = torch.stack(tokens, 1)
    columns = {name: torch.stack([getattr(each, name) for each in steps], 1) for name in _Step.__dataclass_fields__}
    return ThoughtfulText(repeated, stacked, mask_through_eos(stacked, eos_ids), **columns, source=thinking.source)


def _check_room(rows: _Rows, prompts: Prompts, max_new_tokens: int) -> None:
    """Raise ValueError where a thought before the last token would stand beyond the model's positions."""
    limit, length = rows.model.talk.max_length, prompts.ids.shape[1] + max_new_tokens
    beside = rows.n_thought + 1  # the last token is not fed: its start token has its place
    if limit is not None and length + beside > limit:
        raise ValueError(
            f"a prompt of {prompts.ids.shape[1]} tokens, {max_new_tokens} generated ones and a thought of "
            f"{rows.n_thought} with its start and end exceed the model's context of {limit}; generate fewer tokens "
            "(max_new_tokens), or think fewer (n_thought)"
        )


def _predicted(
    rows: _Rows, state: TextState, hidden: Float[Tensor, "N D"], step: int
) -> tuple[Float[Tensor, "N V"], _Step]:
    """log p of the next token, mixed with a thought's prediction where there is one."""
    model = rows.model
    base = model.talk.head(hidden).log_softmax(-1)
    spread = entropy(base)
    thinks = rows.thinking.before(step, spread)
    shape = (len(hidden), rows.n_thought, rows.recorded)
    ids = torch.zeros(shape, dtype=torch.long, device=hidden.device)
    weights, mixing, mixed = torch.zeros(shape, dtype=base.dtype, device=hidden.device), torch.zeros_like(spread), base
    if thinks.any():
        thought, ids, weights = _thought(rows, state, step)
        mixing = model.mixing(hidden, thought).to(base.dtype).masked_fill(~thinks, 0.0)
        mixed = torch.where(thinks[:, None], model.mixed_log_probs(hidden, thought, mixing), base)
        ids, weights = (values.masked_fill(~thinks[:, None, None], 0) for values in (ids, weights.to(base.dtype)))
    return mixed, _Step(thinks, ids, weights, mixing, spread, entropy(mixed))


def _thought(
    rows: _Rows, state: TextState, step: int
) -> tuple[Float[Tensor, "N D"], Int[Tensor, "N n k"], Float[Tensor, "N n k"]]:
    """Think after the last token of every row: the hidden state at the thought's end, and the heaviest ids."""
    model, thinking = rows.model, rows.thinking
    num_rows, num_slots = state.mask.shape
    branches = state.branch(torch.full((num_rows, 1), num_slots - 1, device=rows.device))
    steps, weights, last = think(
        model, branches, (num_rows, 1), rows.random(step), rows.n_thought, thinking.source, thinking.relaxation
    )
    fed = torch.cat([last, model.end.to(last.dtype).expand_as(last)], 2)
    hidden = branches.advance(fed)[:, 0, -1]
    if not steps:
        nothing = torch.zeros(num_rows, 0, rows.recorded, device=rows.device)
        return hidden, nothing.long(), nothing
    heaviest, order = torch.stack(weights, 1).topk(rows.recorded, -1)
    return hidden, Support.stacked(steps).ids.gather(-1, order), heaviest
