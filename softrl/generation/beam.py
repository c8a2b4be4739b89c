"""Beam search: the W likeliest hypotheses of every prompt, extended a token at a time.

What a hypothesis is fed is the caller's: here its own hard token, in `soft_beam` a mixture around it. With hard tokens
the texts are those of transformers' `model.generate(num_beams=W)`, token by token, with its length penalty and its
rules for stopping. The search of a prompt does not depend on the others of its batch, and neither does its price,
which is counted in token embeddings fed behind the prompt. Left out: sampling beams, and groups of diverse ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.masking import is_any_of, mask_through_eos
from softrl.models.policy import Policy, evaluating
from softrl.rollouts.soft import check_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.types import HardRollout, Prompts

_Never = Literal["never"]
EarlyStopping = bool | _Never


@dataclass(frozen=True)
class BeamSettings:
    """The settings of a beam search, with transformers' names, meanings and defaults (but for the width).

    Args:
        num_beams: W, the width.
        length_penalty: texts are ranked by `Σ log p / length ** length_penalty`: 0 by probability, 1 by the mean
            log-probability of a token; the end-of-sequence token counts.
        early_stopping: when to stop once W texts have ended: True at once; False when the best hypothesis that goes on
            would not beat the worst of them if it ended now; "never" when it could not at any length.
    Raises:
        ValueError: num_beams < 1, or an unknown rule.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {self.num_beams}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping not in get_args(_Never):
            raise ValueError(f"early_stopping must be True, False or 'never', got {self.early_stopping!r}")


@dataclass(frozen=True)
class Found(HardRollout):
    """N texts that a search found, R for each of B prompts side by side, and its price.

    `forward_tokens` are the token embeddings that were fed behind a prompt, rows times steps, until the prompt's own
    search was over: the number of forward passes of a single row. Reading the prompt is not in it, since every method
    does that once; nor is a text's last token, which nobody feeds.
    """

    forward_tokens: Int[Tensor, "B"]


@dataclass(frozen=True)
class Searched(Found):
    """The best text of a prompt first. `scores` is what ranked them, −inf where there are fewer than R."""

    log_probs: Float[Tensor, "N"]  # Σ log p of the tokens through the end, nats
    scores: Float[Tensor, "N"]


@dataclass(frozen=True)
class Expansion:
    """A step of a search: which hypotheses go on, with which token, after which prediction.

    `parents` are rows of `logits`, from 0 to B * W − 1; where `alive` is False there is no hypothesis.
    """

    logits: Float[Tensor, "M V"]
    parents: Int[Tensor, "B W"]
    tokens: Int[Tensor, "B W"]
    alive: Bool[Tensor, "B W"]


Feed = Callable[[Policy, Expansion], Float[Tensor, "M D"]]


def feed_hard(policy: Policy, expansion: Expansion) -> Float[Tensor, "M D"]:
    """Every hypothesis is fed its own token."""
    return policy.embed(expansion.tokens.flatten())


@dataclass(frozen=True)
class _Hypotheses:
    """W (or more) of each prompt in falling order of `scores`; −inf is none. Tokens past the last step are filler."""

    tokens: Int[Tensor, "B W T"]
    log_probs: Float[Tensor, "B W"]
    scores: Float[Tensor, "B W"]
    parents: Int[Tensor, "B W"]  # rows of the step before

    @property
    def is_any(self) -> Bool[Tensor, "B W"]:
        return self.scores > -torch.inf

    def scored(self, scores: Float[Tensor, "B W"]) -> "_Hypotheses":
        return _Hypotheses(self.tokens, self.log_probs, scores, self.parents)

    def with_others(self, others: "_Hypotheses") -> "_Hypotheses":
        names = _Hypotheses.__dataclass_fields__
        return _Hypotheses(*(torch.cat([getattr(self, name), getattr(others, name)], 1) for name in names))

    def best(self, count: int) -> "_Hypotheses":
        scores, order = self.scores.topk(count, -1)
        tokens = self.tokens.gather(1, order[..., None].expand(-1, -1, self.tokens.shape[-1]))
        return _Hypotheses(tokens, self.log_probs.gather(1, order), scores, self.parents.gather(1, order))


@torch.no_grad()
def beam_search(
    policy: Policy,
    prompts: Prompts,
    max_new_tokens: int,
    settings: BeamSettings | None = None,
    num_return: int = 1,
    eos_ids: tuple[int, ...] = (),
    feed: Feed = feed_hard,
) -> Searched:
    """Search for the likeliest texts.

    Args:
        policy: the model; its temperature is part of the distribution.
        prompts: B left-padded prompts.
        max_new_tokens: T.
        settings: width, length penalty and stopping.
        num_return: R texts a prompt, at most W.
        eos_ids: a text ends at the first of these, or after T tokens.
        feed: what the hypotheses that go on are fed.
    Returns:
        N = B * R texts; T is cut to the longest.
    Raises:
        ValueError: as `soft_rollout`, or num_return outside 1..W.
    Source: transformers 5 (`GenerationMixin._beam_search`), where one difference is left: what does not exist, in a
        vocabulary of fewer tokens than hypotheses, cannot end there and fill the beam.
    """
    settings = settings or BeamSettings()
    width, num_prompts = settings.num_beams, len(prompts.ids)
    if not 1 <= num_return <= width:
        raise ValueError(f"num_return must lie between 1 and num_beams={width}, got {num_return}")
    check_search(policy, prompts, max_new_tokens)
    with evaluating(policy.model):
        hidden, state = policy.begin(prompts, width, capacity=max_new_tokens)
        running, finished = _start(policy, prompts, width, max_new_tokens, eos_ids)
        is_open = torch.ones(num_prompts, 1, dtype=torch.bool, device=hidden.device)
        forward_tokens = torch.zeros(num_prompts, dtype=torch.long, device=hidden.device)
        for step in range(max_new_tokens):
            logits = policy.head(hidden)
            candidates = _candidates(running, logits.log_softmax(-1), step, (1 + max(1, len(eos_ids))) * width)
            ends = is_any_of(candidates.tokens[..., step], eos_ids) | (step == max_new_tokens - 1)
            finished = _with_finished(finished, candidates, ends, is_open, step + 1, settings)
            running = candidates.scored(candidates.scores.masked_fill(ends, -torch.inf)).best(width)
            is_open = is_open & _may_improve(running, finished, step + 1, max_new_tokens, settings)
            if not policy.largest(float(is_open.any())):
                break
            forward_tokens += width * is_open[:, 0]
            state.select(running.parents.flatten())
            expansion = Expansion(logits, running.parents, running.tokens[..., step], running.is_any)
            hidden = policy.advance(state, feed(policy, expansion)[:, None])[:, 0]
    return _result(prompts, finished.best(num_return), forward_tokens, eos_ids)


def check_search(policy: Policy, prompts: Prompts, max_new_tokens: int) -> None:
    """Raise ValueError for prompts and lengths that nothing can be searched for."""
    nothing_drawn = SequenceRandom([0] * len(prompts.ids))
    check_rollout(policy, prompts, max_new_tokens, 1, nothing_drawn)


def _start(
    policy: Policy, prompts: Prompts, width: int, num_steps: int, eos_ids: tuple[int, ...]
) -> tuple[_Hypotheses, _Hypotheses]:
    """One empty hypothesis a prompt, and no finished text."""
    num_prompts, device = len(prompts.ids), prompts.ids.device
    filler = eos_ids[0] if eos_ids else 0
    dtype = torch.promote_types(policy.dtype, torch.float32)  # that of the head
    tokens = torch.full((num_prompts, width, num_steps), filler, dtype=torch.long, device=device)
    nothing = torch.full((num_prompts, width), -torch.inf, dtype=dtype, device=device)
    first = nothing.index_fill(1, torch.zeros(1, dtype=torch.long, device=device), 0.0)
    parents = torch.zeros_like(nothing, dtype=torch.long)
    return _Hypotheses(tokens, first, first, parents), _Hypotheses(tokens, nothing, nothing, parents)


def _candidates(running: _Hypotheses, log_probs: Float[Tensor, "M V"], step: int, count: int) -> _Hypotheses:
    """The likeliest continuations of all hypotheses of a prompt; more than W, since some may end."""
    num_prompts, width = running.scores.shape
    vocab_size = log_probs.shape[-1]
    sums = (running.scores[..., None] + log_probs.view(num_prompts, width, vocab_size)).flatten(1)
    best, index = sums.topk(min(count, sums.shape[-1]), -1)
    origin = index // vocab_size
    tokens = running.tokens.gather(1, origin[..., None].expand(-1, -1, running.tokens.shape[-1])).clone()
    tokens[..., step] = index % vocab_size
    first_row = torch.arange(num_prompts, device=origin.device)[:, None] * width
    return _Hypotheses(tokens, best, best, origin + first_row)


def _with_finished(
    finished: _Hypotheses,
    candidates: _Hypotheses,
    ends: Bool[Tensor, "B C"],
    is_open: Bool[Tensor, "B 1"],
    length_tokens: int,
    settings: BeamSettings,
) -> _Hypotheses:
    """The best W of what has ended before and what ends now, as one of the W best candidates."""
    among_best = torch.arange(ends.shape[1], device=ends.device) < settings.num_beams
    scores = candidates.log_probs / length_tokens**settings.length_penalty
    ended = candidates.scored(scores.masked_fill(~(ends & among_best & is_open), -torch.inf))
    return finished.with_others(ended).best(settings.num_beams)


def _may_improve(
    running: _Hypotheses, finished: _Hypotheses, length_tokens: int, max_new_tokens: int, settings: BeamSettings
) -> Bool[Tensor, "B 1"]:
    """Whether a prompt's search goes on."""
    is_full = finished.is_any.all(-1, keepdim=True)
    at_full_length = settings.early_stopping == "never" and settings.length_penalty > 0.0
    length = max_new_tokens if at_full_length else length_tokens
    possible = running.log_probs[:, :1] / length**settings.length_penalty
    goes_on = running.is_any[:, :1] & (possible > finished.scores.amin(-1, keepdim=True))
    return goes_on & ~is_full if settings.early_stopping is True else goes_on


def _result(
    prompts: Prompts, found: _Hypotheses, forward_tokens: Int[Tensor, "B"], eos_ids: tuple[int, ...]
) -> Searched:
    tokens = found.tokens.flatten(0, 1)
    mask = mask_through_eos(tokens, eos_ids)
    length = int(mask.sum(-1).max())
    return Searched(
        prompts.repeated(found.scores.shape[1]), tokens[:, :length], mask[:, :length], forward_tokens,
        found.log_probs.flatten(), found.scores.flatten(),
    )  # fmt: skip
