"""Collapsing beam search: a beam search whose hypotheses are folded back into one stream of soft tokens.

There is one trunk a prompt, of soft tokens. From its end W hypotheses of hard tokens are searched for, n steps long.
Then they are folded: the posterior of hypothesis h is `w_h ∝ exp(Σ_i log p(x_h,i) / τ)` over the n steps, and the
trunk is fed n soft tokens, `e_i = Σ_h w_h W[x_h,i]`. The likeliest hypothesis's tokens are what is written, and the
search goes on from the trunk. So all hypotheses keep a say in what comes next, at the price of one row.

- n = 1 searches nothing: the trunk is greedy soft decoding with the W likeliest tokens.
- W = 1: the only hypothesis is fed again, and the search is greedy decoding.

A hypothesis that has ended stays in its beam with the probability it has. Once the likeliest one has ended, so has the
text; else those that ended have no share in the fold, since the text goes on. A segment costs `W (n − 1) + n` fed
embeddings, against `W n` of a beam search; they are equal at n = W. Left out: length penalties.
Source: ours; the idea is from the project's notes (seeds/004, section 6.6: a beam search whose embeddings collapse
back down into a soft one).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.generation.beam import Searched, check_search
from softrl.masking import is_any_of, mask_through_eos, per_sequence_sum
from softrl.models.policy import Policy, evaluating
from softrl.models.state import DecodeState
from softrl.types import Prompts


@dataclass(frozen=True)
class Folded(Searched):
    """B texts, and the fold of every step: W ids with their posterior, which the trunk was fed.

    `log_probs` are those of the written tokens, each given the trunk before its segment and its own tokens in it.
    """

    ids: Int[Tensor, "B T W"]
    weights: Float[Tensor, "B T W"]


@dataclass(frozen=True)
class _Segment:
    """W hypotheses a prompt in falling order of probability, n steps long; after an end there is filler."""

    tokens: Int[Tensor, "B W n"]
    log_probs: Float[Tensor, "B W n"]  # of each token; 0 after an end
    ended: Bool[Tensor, "B W"]
    forward_tokens: Int[Tensor, "B"]

    def posterior(self, temperature: float) -> Float[Tensor, "B W"]:
        """Weights of the hypotheses that go on; of all of them where none does."""
        left_out = self.ended & ~self.ended.all(-1, keepdim=True)
        return (self.log_probs.sum(-1) / temperature).masked_fill(left_out, -torch.inf).softmax(-1)

    def picked(self, order: Int[Tensor, "B W"]) -> "_Segment":
        """The same with other hypotheses of each prompt in their place."""
        wide = order[..., None].expand(-1, -1, self.tokens.shape[-1])
        tokens, log_probs = self.tokens.gather(1, wide), self.log_probs.gather(1, wide)
        return _Segment(tokens, log_probs, self.ended.gather(1, order), self.forward_tokens)

    def extended(
        self, tokens: Int[Tensor, "B W"], log_probs: Float[Tensor, "B W"], eos_ids: tuple[int, ...]
    ) -> "_Segment":
        """The same with another token each."""
        return _Segment(
            torch.cat([self.tokens, tokens[..., None]], -1), torch.cat([self.log_probs, log_probs[..., None]], -1),
            self.ended | is_any_of(tokens, eos_ids), self.forward_tokens,
        )  # fmt: skip


@torch.no_grad()
def collapsing_beam_search(
    policy: Policy,
    prompts: Prompts,
    max_new_tokens: int,
    num_beams: int = 4,
    fold_every: int = 4,
    temperature: float = 1.0,
    eos_ids: tuple[int, ...] = (),
) -> Folded:
    """Search, fold, and search on.

    Args:
        policy: the model; its temperature is part of the distribution.
        prompts: B left-padded prompts.
        max_new_tokens: T.
        num_beams: W hypotheses a segment.
        fold_every: n, tokens of a segment; the last one may be shorter.
        temperature: τ of the posterior; towards 0 only the likeliest hypothesis is fed.
        eos_ids: a text ends at the first of these.
    Returns:
        One text a prompt; T is cut to the longest.
    Raises:
        ValueError: as `soft_rollout`, a number below 1, more hypotheses than tokens, or temperature <= 0.
    """
    _check(policy, num_beams, fold_every, temperature)
    check_search(policy, prompts, max_new_tokens)
    segments: list[_Segment] = []
    posteriors: list[Float[Tensor, "B W"]] = []
    with evaluating(policy.model):
        hidden, trunk = policy.begin(prompts, 1, capacity=max_new_tokens)
        is_open = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        forward_tokens = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        for start in range(0, max_new_tokens, fold_every):
            num_steps = min(fold_every, max_new_tokens - start)
            segment = _explore(policy, trunk, hidden, num_steps, num_beams, eos_ids)
            segments.append(segment)
            posteriors.append(segment.posterior(temperature))
            forward_tokens += segment.forward_tokens * is_open
            is_open = is_open & ~segment.ended[:, 0]
            if start + num_steps >= max_new_tokens or not policy.largest(float(is_open.any())):
                break
            forward_tokens += num_steps * is_open
            hidden = policy.advance(trunk, _fold(policy, segment, posteriors[-1]))[:, -1]
    return _result(prompts, segments, posteriors, forward_tokens, eos_ids)


def _check(policy: Policy, num_beams: int, fold_every: int, temperature: float) -> None:
    if not 1 <= num_beams <= policy.vocab_size:
        raise ValueError(f"num_beams must lie between 1 and V={policy.vocab_size}, got {num_beams}")
    if fold_every < 1:
        raise ValueError(f"fold_every must be at least 1, got {fold_every}")
    if not temperature > 0.0:
        raise ValueError(f"the posterior's temperature must be positive, got {temperature}")


def _explore(
    policy: Policy,
    trunk: DecodeState,
    hidden: Float[Tensor, "B D"],
    num_steps: int,
    num_beams: int,
    eos_ids: tuple[int, ...],
) -> _Segment:
    """A beam search of so many steps from the trunk, which stays as it is; fewer where everything has ended."""
    num_prompts, device = len(hidden), hidden.device
    log_probs, tokens = policy.head(hidden).log_softmax(-1).topk(num_beams, -1)
    nothing = torch.zeros(num_prompts, num_beams, 0, dtype=torch.long, device=device)
    none_ended = torch.zeros(num_prompts, num_beams, dtype=torch.bool, device=device)
    segment = _Segment(nothing, nothing.to(log_probs.dtype), none_ended, torch.zeros_like(nothing[:, 0].sum(-1)))
    segment = segment.extended(tokens, log_probs, eos_ids)
    first_row = torch.arange(num_prompts, device=device)[:, None]
    origin, state = first_row.expand(-1, num_beams), None
    for _ in range(num_steps - 1):
        goes_on = ~segment.ended.all(-1)
        if not policy.largest(float(goes_on.any())):
            break
        if state is None:
            state = trunk.branched(origin.flatten())
        else:
            state.select((first_row * num_beams + origin).flatten())
        hidden = policy.advance(state, policy.embed(segment.tokens[..., -1].flatten())[:, None])[:, 0]
        origin, tokens, log_probs = _continued(segment, policy.head(hidden).log_softmax(-1), eos_ids)
        segment = segment.picked(origin).extended(tokens, log_probs, eos_ids)
        segment.forward_tokens.add_(num_beams * goes_on)
    return segment


def _continued(
    segment: _Segment, log_probs: Float[Tensor, "M V"], eos_ids: tuple[int, ...]
) -> tuple[Int[Tensor, "B W"], Int[Tensor, "B W"], Float[Tensor, "B W"]]:
    """The W likeliest continuations: which hypothesis, which token, its log p. Ended ones go on with filler, p = 1."""
    num_prompts, width = segment.ended.shape
    log_probs = log_probs.view(num_prompts, width, -1).masked_fill(segment.ended[..., None], -torch.inf)
    if eos_ids:
        log_probs[..., eos_ids[0]] = log_probs[..., eos_ids[0]].masked_fill(segment.ended, 0.0)
    vocab_size = log_probs.shape[-1]
    sums = segment.log_probs.sum(-1, keepdim=True) + log_probs
    index = sums.flatten(1).topk(width, -1)[1]
    origin, tokens = index // vocab_size, index % vocab_size
    return origin, tokens, log_probs.flatten(1).gather(1, index)


def _fold(policy: Policy, segment: _Segment, posterior: Float[Tensor, "B W"]) -> Float[Tensor, "B n D"]:
    """The soft tokens of a segment: at every step the mean of the hypotheses' embeddings under their posterior."""
    num_steps = segment.tokens.shape[-1]
    ids = segment.tokens.transpose(1, 2).flatten(0, 1)
    return policy.embed_soft(ids, posterior.repeat_interleave(num_steps, 0)).unflatten(0, (-1, num_steps))


def _result(
    prompts: Prompts,
    segments: list[_Segment],
    posteriors: list[Float[Tensor, "B W"]],
    forward_tokens: Int[Tensor, "B"],
    eos_ids: tuple[int, ...],
) -> Folded:
    tokens = torch.cat([segment.tokens[:, 0] for segment in segments], 1)
    ids = torch.cat([segment.tokens.transpose(1, 2) for segment in segments], 1)
    weights = [
        posterior[:, None].expand(-1, segment.tokens.shape[-1], -1)
        for segment, posterior in zip(segments, posteriors, strict=True)
    ]
    mask = mask_through_eos(tokens, eos_ids)
    log_probs = per_sequence_sum(torch.cat([segment.log_probs[:, 0] for segment in segments], 1), mask)
    length = int(mask.sum(-1).max())
    return Folded(
        prompts, tokens[:, :length], mask[:, :length], forward_tokens, log_probs, log_probs,
        ids[:, :length], torch.cat(weights, 1)[:, :length],
    )  # fmt: skip
