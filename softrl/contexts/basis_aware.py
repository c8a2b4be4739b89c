"""Basis-aware truncation: accept a token above the threshold τ, or below it where the softmax bottleneck proves it.

The theorem: a model that minimises cross-entropy has `Wᵀp = Wᵀp̂` for the true distribution p, and a truncation at τ
assumes `p <= p̂ / (1−τ)`. Where no such p has `p_i = 0`, token i has true probability. It is about the model's own
probabilities, at temperature 1, of a model trained by cross-entropy.

Only tokens below τ need a program. `mask` asks about all of them, or the likeliest `max_candidates`. `best` asks about
the same tokens in the order of any scores and stops as soon as it can, which makes hard sampling cheap and leaves it
exact: perturbed log-probabilities (Gumbel-max), asked from the top, give a draw from what `mask` leaves, renormalised.
Source: Finlayson et al. (2024), arXiv:2310.01693; BA-η's τ: Hewitt et al. (2022), arXiv:2210.15191.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.contexts.basis_directions import Directions, svd_directions
from softrl.contexts.basis_models import check_basis_model
from softrl.contexts.basis_thresholds import Programs, Verdicts, verdicts
from softrl.contexts.final_norm import last_module, norm_of
from softrl.models.policy import Policy


def eta_threshold(entropy_nats: Float[Tensor, "*batch"], epsilon: float) -> Float[Tensor, "*batch"]:
    """`min(ε, √ε e^{−H})`. Source: Hewitt et al. (2022), arXiv:2210.15191."""
    return (epsilon**0.5 * torch.exp(-entropy_nats)).clamp(max=epsilon)


@dataclass
class Counts:
    """What the truncation has done so far.

    Args:
        contexts: distributions that were truncated.
        asked: tokens below τ that a verdict was asked for.
        solved: of these, for which a program had to be solved; the others were rejected in closed form.
        accepted: of these, accepted.
        failed: of these, rejected because the solver did not come to a verdict.
        greedy: contexts in which nothing was accepted, so that the likeliest token was taken.
    """

    contexts: int = 0
    asked: int = 0
    solved: int = 0
    accepted: int = 0
    failed: int = 0
    greedy: int = 0

    def __str__(self) -> str:
        """For people."""
        return (
            f"{self.contexts} distributions; {self.asked} tokens below tau asked about, {self.accepted} of them "
            f"accepted, {self.failed} without a verdict; {self.greedy} fallbacks to the likeliest token"
        )


@dataclass(eq=False)  # an identity: settings that hold one can be compared and hashed
class BasisAware:
    """BA-τ and BA-η.

    Args:
        directions: of the model, see `basis_directions`.
        epsilon: τ itself for BA-τ; for BA-η `τ = min(ε, √ε e^{−H})`, H the entropy in nats.
        rule: "tau" or "eta".
        max_candidates: this many of the likeliest tokens below τ may be accepted, all others are rejected; None asks
            about all, which only `best` does at a bearable price.
        source: where directions come from that change; None for directions that stay.
    Raises:
        ValueError: ε outside (0, 1), an unknown rule, or max_candidates < 1.
    """

    directions: Directions
    epsilon: float
    rule: str = "eta"
    max_candidates: int | None = 64
    counts: Counts = field(default_factory=Counts)
    source: "PolicyDirections | None" = None

    def __post_init__(self) -> None:
        if not 0.0 < self.epsilon < 1.0:
            raise ValueError(f"epsilon must lie in (0, 1), got {self.epsilon}")
        if self.rule not in ("tau", "eta"):
            raise ValueError(f"rule must be 'tau' or 'eta', got {self.rule!r}")
        if self.max_candidates is not None and self.max_candidates < 1:
            raise ValueError(
                f"max_candidates must be at least 1, got {self.max_candidates}; None asks about all tokens"
            )

    def tau(self, probs: Float[Tensor, "N V"]) -> Float[Tensor, "N"]:
        """τ of each context."""
        if self.rule == "tau":
            return torch.full_like(probs[:, 0], self.epsilon)
        return eta_threshold(torch.special.entr(probs).sum(-1), self.epsilon)

    def verdicts(
        self, logits: Float[Tensor, "N V"], tokens: Int[Tensor, "N C"], is_asked: Bool[Tensor, "N C"] | None = None
    ) -> Verdicts:
        """Verdicts, with bounds and certificates, of C tokens a context.

        Args:
            logits: the model's own, at temperature 1, up to a constant a context.
            tokens: ids.
            is_asked: False where `tokens` is only filled up.
        """
        return self._verdicts(self.programs(logits), tokens, is_asked)

    def programs(self, logits: Float[Tensor, "N V"]) -> Programs:
        """The constraints of these contexts."""
        if not torch.isfinite(logits).all():
            raise ValueError(
                "logits: expected the model's own, all finite; something has removed tokens or changed scores before. "
                "Put basis-aware truncation first"
            )
        if self.source is not None:
            self.directions = self.source.current()
        columns = self.directions.columns
        if columns.device != logits.device:
            self.directions = self.directions.to(logits.device)
            columns = self.directions.columns
        logits = logits.to(columns.dtype)
        probs = logits.softmax(-1)
        return Programs(columns, probs, self.tau(probs), self.directions.excluded(logits))

    def _verdicts(
        self, programs: Programs, tokens: Int[Tensor, "N C"], is_asked: Bool[Tensor, "N C"] | None = None
    ) -> Verdicts:
        found = verdicts(programs, tokens, is_asked)
        below = programs.probs.gather(1, tokens) <= programs.tau[:, None]
        below = below if is_asked is None else below & is_asked
        self.counts.asked += int(below.sum())
        self.counts.solved += int((found.solved & below).sum())
        self.counts.accepted += int((found.accepted & below).sum())
        self.counts.failed += int(found.undecided.sum())
        return found

    def mask(self, logits: Float[Tensor, "N V"]) -> Bool[Tensor, "N V"]:
        """The accepted tokens; the likeliest one where there is none.

        Args:
            logits: the model's own, at temperature 1, up to a constant a context.
        """
        programs = self.programs(logits)
        self.counts.contexts += len(logits)
        kept = programs.probs > programs.tau[:, None]
        tokens, is_below = self._candidates(programs.probs, kept)
        if tokens.shape[1] > 0:
            found = self._verdicts(programs, tokens, is_below)
            kept = kept.scatter(1, tokens, found.accepted | kept.gather(1, tokens))
        return self._or_greedy(kept, programs.probs)

    def _candidates(
        self, probs: Float[Tensor, "N V"], is_above: Bool[Tensor, "N V"]
    ) -> tuple[Int[Tensor, "N C"], Bool[Tensor, "N C"]]:
        """Ids that a verdict is asked for, the likeliest first, and where they are not only filled up."""
        below = probs.masked_fill(is_above, 0.0)
        most = int((below > 0.0).sum(-1).max())
        values, tokens = below.topk(most if self.max_candidates is None else min(most, self.max_candidates), dim=-1)
        return tokens, values > 0.0

    def _or_greedy(self, kept: Bool[Tensor, "N V"], probs: Float[Tensor, "N V"]) -> Bool[Tensor, "N V"]:
        is_empty = ~kept.any(-1)
        self.counts.greedy += int(is_empty.sum())
        likeliest = torch.zeros_like(kept).scatter(1, probs.argmax(-1, keepdim=True), True)
        return torch.where(is_empty[:, None], likeliest, kept)

    def best(self, logits: Float[Tensor, "N V"], scores: Float[Tensor, "N V"]) -> Int[Tensor, "N"]:
        """The accepted token of the highest score of each context; the likeliest token where none is accepted.

        Args:
            logits: the model's own, at temperature 1, up to a constant a context.
            scores: by which tokens are preferred; −inf leaves one out. With `log p̂ / temperature` and Gumbel noise the
                result is a draw.
        """
        programs = self.programs(logits)
        self.counts.contexts += len(logits)
        chosen = programs.probs.argmax(-1)
        scores, rows = self._askable(programs, scores), torch.arange(len(logits), device=logits.device)
        size = 1
        while len(rows):
            values, tokens = scores[rows].topk(min(size, scores.shape[1]), dim=-1)
            is_there = values > -torch.inf
            found = self._verdicts(programs.of_contexts(rows), tokens, is_there)
            has_one = found.accepted.any(-1)
            first = found.accepted.int().argmax(-1, keepdim=True)
            chosen[rows[has_one]] = tokens.gather(1, first)[has_one, 0]
            self.counts.greedy += int((~has_one & ~is_there.all(-1)).sum())
            scores[rows[:, None], tokens] = -torch.inf
            rows = rows[~has_one & is_there.all(-1)]
            size *= 4
        return chosen

    def _askable(self, programs: Programs, scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """The scores, as a copy, −inf where `max_candidates` leaves no verdict to ask for."""
        if self.max_candidates is None:
            return scores.clone()
        is_above = programs.probs > programs.tau[:, None]
        tokens, is_below = self._candidates(programs.probs, is_above)
        askable = is_above.scatter(1, tokens, is_below | is_above.gather(1, tokens))
        return scores.masked_fill(~askable, -torch.inf)


class PolicyDirections:
    """Directions of a policy that may train: computed anew after its output embedding or final norm have changed.

    Changes are seen by where these tensors lie and by autograd's counters of changes in place. Fused optimizers change
    weights past the counters, so whoever steps one calls `outdate`.

    Args:
        policy, num_directions, representation: see `basis_aware`.
    """

    def __init__(self, policy: Policy, num_directions: int, representation: str):
        self.policy, self.num_directions = policy, num_directions
        self._last_module = last_module(policy) if representation == "before_norm" else None
        self._directions = self._computed()
        self._seen: list[tuple[int, int]] | None = self._state()

    def current(self) -> Directions:
        """The directions of the weights as they are."""
        if self._seen != self._state():
            self._directions, self._seen = self._computed(), self._state()
        return self._directions

    def outdate(self) -> None:
        """Have `current` compute them anew, unless nothing that they are made of trains."""
        if any(tensor.requires_grad for tensor in self._weights()):
            self._seen = None

    def _state(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), tensor._version) for tensor in self._weights()]

    def _weights(self) -> list[Tensor]:
        norm = [] if self._last_module is None else list(self._last_module.parameters())
        return [self.policy.causal_lm.get_output_embeddings().weight, *norm]

    def _computed(self) -> Directions:
        norm = None if self._last_module is None else norm_of(self._last_module, self.policy)
        with self.policy.context():
            weight = self.policy.causal_lm.get_output_embeddings().weight.detach()
        return svd_directions(weight, self.num_directions, norm)


def basis_aware(
    policy: Policy,
    epsilon: float,
    rule: str = "eta",
    num_directions: int = 20,
    representation: str = "before_norm",
    max_candidates: int | None = 64,
    follow: bool = False,
) -> BasisAware:
    """Basis-aware truncation of a model, with directions from its output embedding.

    Args:
        policy: the model; its temperature has to be 1.
        epsilon, rule, max_candidates: see `BasisAware`.
        num_directions: k.
        representation: "before_norm" takes the constraints of the state before the final norm, which are sound;
            "output" those of W, as published: behind a norm they accept more, some of it falsely.
        follow: compute directions anew when the model has changed, see `PolicyDirections`; for models that train.
    Raises:
        ValueError: what `check_basis_model` refuses, an unknown representation, or k outside [1, D].
    Warns:
        UserWarning: the model was tuned by rewards or preferences.
    """
    if representation not in ("before_norm", "output"):
        raise ValueError(f"representation must be 'before_norm' or 'output', got {representation!r}")
    check_basis_model(policy)
    source = PolicyDirections(policy, num_directions, representation)
    return BasisAware(source.current(), epsilon, rule, max_candidates, source=source if follow else None)
