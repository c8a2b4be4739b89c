"""Basis-aware truncation as a transformers `LogitsProcessor`, and in settings of soft decoding.

    processor = BasisAwareLogitsProcessor(model, epsilon=0.002)
    model.generate(**inputs, do_sample=True, top_k=0, logits_processor=LogitsProcessorList([processor]))

It sees the model's own scores, since `generate` calls processors that are passed to it before its warpers:
temperature, top-k and top-p then work on the accepted tokens. Processors that change scores (repetition penalty, ...)
come before it, and their scores are no longer the model's probabilities; where one has removed a token it says so.

"draw" chooses the token itself, by asking about drawn tokens only, and leaves `generate` no other: a few milliseconds
a token. "mask" removes what is not accepted and leaves the choice to `generate`: it asks about many tokens.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from softrl.contexts.basis_aware import BasisAware, Counts, basis_aware
from softrl.generation.soft_settings import Phase, SoftDecoding
from softrl.models.policy import Policy


class BasisAwareLogitsProcessor(LogitsProcessor):
    """BA-τ and BA-η for `model.generate`.

    Args:
        model: a causal LM; its directions are computed here, once.
        epsilon, rule, num_directions, representation: see `basis_aware`.
        max_candidates: of "mask", see `BasisAware`. A draw is from all accepted tokens.
        how: "draw" or "mask".
        temperature: of the accepted tokens, for "draw"; `generate`'s own comes too late for it.
        seed: of the draws.
    Raises:
        ValueError: as `basis_aware`; a temperature that is not positive, or one beside "mask"; an unknown `how`.
    """

    def __init__(
        self,
        model: Any,
        epsilon: float,
        rule: str = "eta",
        num_directions: int = 20,
        representation: str = "before_norm",
        max_candidates: int | None = 64,
        how: str = "draw",
        temperature: float = 1.0,
        seed: int = 0,
    ):
        if how not in ("draw", "mask"):
            raise ValueError(f"how must be 'draw' or 'mask', got {how!r}")
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if how == "mask" and temperature != 1.0:
            raise ValueError(f"temperature={temperature} is for how='draw'; with 'mask' pass it to generate")
        candidates = max_candidates if how == "mask" else None
        self.rule: BasisAware = basis_aware(Policy(model), epsilon, rule, num_directions, representation, candidates)
        self.how, self.temperature, self.seed = how, temperature, seed
        self._generator: torch.Generator | None = None

    @property
    def counts(self) -> Counts:
        """What has been asked and accepted so far."""
        return self.rule.counts

    @torch.no_grad()
    def __call__(self, input_ids: Int[Tensor, "N S"], scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """The scores with −inf for tokens that are not accepted, or, when drawing, not drawn."""
        if self.how == "mask":
            return scores.masked_fill(~self.rule.mask(scores), -torch.inf)
        if self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self.seed)
        uniform = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self._generator)
        drawn = self.rule.best(scores, scores.float() / self.temperature - uniform.log())
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)


def truncated_by(rule: BasisAware, decoding: SoftDecoding) -> SoftDecoding:
    """Settings whose draws and soft tokens are truncated by the rule; the likeliest tokens stay as they are.

    Args:
        rule: of the model that is to decode. Its `max_candidates` is for soft tokens; draws are from all accepted
            tokens. Both count in `rule.counts`.
        decoding: other settings.
    Raises:
        ValueError: they truncate by top-k (draws), top-p or min-p.
    """

    def phase(given: Phase) -> Phase:
        if given.relaxation is not None:
            truncation = replace(given.relaxation.truncation, support=rule)
            return replace(given, relaxation=replace(given.relaxation, truncation=truncation))
        if given.next_token.greedy:
            return given
        return replace(given, next_token=replace(given.next_token, support=replace(rule, max_candidates=None)))

    answer = None if decoding.answer is None else phase(decoding.answer)
    return replace(decoding, thinking=phase(decoding.thinking), answer=answer)
