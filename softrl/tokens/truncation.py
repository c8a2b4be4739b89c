"""Which tokens a step may use: nucleus rules on the clean distribution, then the K best by score.

Truncation comes first and the relaxation temperature after it, on the kept support. It masks weights, never ids. Its
rules have no gradient in their own numbers; `SmoothTruncation` has, inside the K ids.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.tokens.temperature import Setting, check_setting, number_of


@runtime_checkable
class SupportRule(Protocol):
    """A further rule, as `softrl.contexts.basis_aware.BasisAware` is: it judges the model's own probabilities."""

    def mask(self, logits: Float[Tensor, "N V"]) -> Bool[Tensor, "N V"]:
        """The tokens it leaves, at least one a row, of logits at temperature 1 up to a constant."""

    def best(self, logits: Float[Tensor, "N V"], scores: Float[Tensor, "N V"]) -> Int[Tensor, "N"]:
        """The token of the highest score among those that it leaves; cheaper than the mask where few are asked for."""


@dataclass(frozen=True)
class Truncation:
    """Rules of truncation.

    Args:
        top_k: number of ids kept a step (K). With Gumbel noise these are the K largest *perturbed* logits.
        top_p: keep the smallest set of most probable tokens whose mass reaches `top_p` (Holtzman et al. 2020).
        min_p: keep tokens with `p_i >= min_p * max p` (Nguyen et al. 2024).
        support: a rule in the place of these two, for sampling temperature 1 only.
    Raises:
        ValueError: top_k < 1, top_p outside (0, 1], min_p outside [0, 1), or a nucleus rule beside `support`.
    """

    top_k: int
    top_p: float = 1.0
    min_p: float = 0.0
    support: SupportRule | None = None

    def __post_init__(self) -> None:
        if self.support is not None and (self.top_p < 1.0 or self.min_p > 0.0):
            raise ValueError(
                f"top_p={self.top_p} and min_p={self.min_p} beside support: give it alone, top_p=1 and min_p=0"
            )
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}; 1.0 switches it off")
        if not 0.0 <= self.min_p < 1.0:
            raise ValueError(f"min_p must lie in [0, 1), got {self.min_p}; 0.0 switches it off")

    @property
    def has_nucleus(self) -> bool:
        """Whether `top_p`, `min_p` or `support` may remove tokens."""
        return self.top_p < 1.0 or self.min_p > 0.0 or self.support is not None

    def check_temperature(self, temperature: float) -> None:
        """Raise ValueError when `support` would judge logits that were divided by a sampling temperature."""
        if self.support is not None and temperature != 1.0:
            raise ValueError(
                f"truncation by support judges the model's own probabilities, at temperature 1, and the sampling "
                f"temperature is {temperature}; leave it at 1, and cool the kept tokens (the relaxation's temperature)"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError when K is larger than the vocabulary."""
        if self.top_k > vocab_size:
            raise ValueError(
                f"top_k={self.top_k} is larger than the vocabulary, V={vocab_size}; choose top_k <= {vocab_size}"
            )


def nucleus(logits: Float[Tensor, "N V"], truncation: Truncation) -> Bool[Tensor, "N V"]:
    """The tokens that the rules leave, judged on the clean distribution softmax(logits).

    The most probable token always stays, except that `support` may leave others instead.
    """
    if truncation.support is not None:
        return truncation.support.mask(logits)
    kept = torch.ones_like(logits, dtype=torch.bool)
    if truncation.min_p > 0.0:
        kept &= logits >= logits.amax(-1, keepdim=True) + torch.tensor(truncation.min_p).log()
    if truncation.top_p < 1.0:
        ordered, order = logits.sort(-1, descending=True)
        probs = ordered.softmax(-1)
        mass_before = probs.cumsum(-1) - probs
        inside = mass_before < truncation.top_p
        inside[..., 0] = True
        kept &= torch.zeros_like(kept).scatter(-1, order, inside)
    return kept


def chosen(logits: Float[Tensor, "N V"], truncation: Truncation, scores: Float[Tensor, "N V"]) -> Int[Tensor, "N"]:
    """The token of the highest score among those that the rules leave.

    Args:
        logits: by which the rules judge.
        truncation: its nucleus rules.
        scores: log p for the likeliest; with Gumbel noise (Gumbel-max) the token is a draw.
    """
    if truncation.support is not None:
        return truncation.support.best(logits, scores)
    if truncation.has_nucleus:
        scores = scores.masked_fill(~nucleus(logits, truncation), -torch.inf)
    return scores.argmax(-1)


def sampler_log_probs(
    logits: Float[Tensor, "N V"], truncation: Truncation, tokens: Int[Tensor, "N"] | None = None
) -> Float[Tensor, "N V"]:
    """log π of the sampler: the nucleus of softmax(logits), renormalised; −inf outside it.

    `tokens` are ids that were sampled already. They count as inside, come what may: an engine that computes in another
    precision may draw one from just beyond the edge.
    """
    if not truncation.has_nucleus:
        return logits.log_softmax(-1)
    inside = nucleus(logits, truncation)
    if tokens is not None:
        inside = inside.scatter(-1, tokens[:, None], True)
    return logits.masked_fill(~inside, -torch.inf).log_softmax(-1)


def largest(
    scores: Float[Tensor, "N V"], top_k: int
) -> tuple[Float[Tensor, "N K"], Int[Tensor, "N K"], Bool[Tensor, "N K"]]:
    """The K largest scores in falling order, their ids, and whether each is finite, i.e. inside the nucleus."""
    values, ids = scores.topk(top_k, dim=-1)
    return values, ids, torch.isfinite(values)


@dataclass(frozen=True)
class SmoothTruncation:
    """min-p and top-k as factors between 0 and 1 on the weights of the K kept ids, differentiable in m and in k.

    A factor is `σ(distance above the threshold / δ)`, so that at δ → 0 it is the hard rule; see `min_p_log_factor` and
    `top_k_log_factor`.

    Args:
        min_p: m in (0, 1); None leaves the rule out.
        top_k: k in [1, K], real; None leaves the rule out.
        width_nats: δ > 0: a logit that lies δ above the threshold has the factor 0.73, one 3δ below it 0.05.
    Raises:
        ValueError: a number outside its range, or a tensor that is not a scalar.
    """

    min_p: Setting | None = None
    top_k: Setting | None = None
    width_nats: float = 0.25

    def __post_init__(self) -> None:
        if not self.width_nats > 0.0:
            raise ValueError(
                f"width_nats must be positive, got {self.width_nats}; for hard rules use Truncation(top_k, min_p=...)"
            )
        if self.min_p is not None:
            check_setting("the smooth min_p", self.min_p)
            if not 0.0 < number_of(self.min_p) < 1.0:
                raise ValueError(f"the smooth min_p must lie in (0, 1), got {number_of(self.min_p)}")
        if self.top_k is not None:
            check_setting("the smooth top_k", self.top_k)
            if not number_of(self.top_k) >= 1.0:
                raise ValueError(f"the smooth top_k must be at least 1, got {number_of(self.top_k)}")

    def check_support(self, num_kept: int) -> None:
        """Raise ValueError when the smooth k is larger than K, the number of ids that it could keep."""
        if self.top_k is not None and number_of(self.top_k) > num_kept:
            raise ValueError(
                f"the smooth top_k={number_of(self.top_k)} is larger than the number of kept ids, K={num_kept}; keep "
                "more of them (the truncation's top_k)"
            )

    def log_factor(
        self, clean: Float[Tensor, "*batch K"], perturbed: Float[Tensor, "*batch K"]
    ) -> Float[Tensor, "*batch K"]:
        """Logarithm of the product of the factors, at most 0.

        Args:
            clean: kept logits, nats, −inf where a nucleus rule removed the id: min-p is judged on these.
            perturbed: the same with the relaxation's noise: the top k are chosen among these, as the top K are.
        """
        total = torch.zeros_like(clean)
        if self.min_p is not None:
            total = total + min_p_log_factor(clean, self.min_p, self.width_nats)
        if self.top_k is not None:
            total = total + top_k_log_factor(perturbed, self.top_k, self.width_nats)
        return total


def min_p_log_factor(
    logits: Float[Tensor, "*batch K"], min_p: Setting, width_nats: float
) -> Float[Tensor, "*batch K"]:
    """`log σ((log p_i − log m − log max p) / δ)`: at δ → 0 it keeps exactly the ids with `p_i > m max p`.

    Args:
        logits: kept ones, nats, −inf where not kept (their factor is 1), shape (*batch, K). The largest of them stands
            for max p: the vocabulary's, unless noise pushed its id out of the K.
        min_p: m.
        width_nats: δ.
    Source: ours (softrl maths, section 1).
    """
    kept = torch.isfinite(logits)
    below_largest = logits.masked_fill(~kept, 0.0) - logits.amax(-1, keepdim=True)
    log_min_p = min_p.log() if isinstance(min_p, Tensor) else math.log(min_p)
    return _log_sigmoid((below_largest - log_min_p) / width_nats).masked_fill(~kept, 0.0)


def top_k_log_factor(
    logits: Float[Tensor, "*batch K"], top_k: Setting, width_nats: float
) -> Float[Tensor, "*batch K"]:
    """`log σ((z_i − θ(k)) / δ)`: a top-k rule for real k.

    With the kept logits in falling order, `θ(j) = (z_(j) + z_(j+1)) / 2` for whole j, and linear between: continuous
    in k, with slope `θ(⌊k⌋+1) − θ(⌊k⌋) <= 0`. At δ → 0 and whole k the threshold lies between the k-th and the next,
    so exactly the k largest are left. Logits tied across the threshold share it: all of them get the factor 1/2. Below
    the n logits that there are one more is imagined at their mean distance, `z_(n) − (z_(1) − z_(n)) / (n − 1)`, so
    that k = n keeps all; k > n keeps them too.

    Args:
        logits: kept ones, nats, −inf where not kept (their factor is 1), shape (*batch, K).
        top_k: k in [1, K].
        width_nats: δ.
    Source: ours.
    """
    kept = torch.isfinite(logits)
    count = kept.sum(-1, keepdim=True)
    largest_one, smallest = logits.amax(-1, keepdim=True), logits.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    imagined = smallest - (largest_one - smallest) / (count - 1).clamp(min=1)
    ordered = torch.cat([torch.where(kept, logits, imagined), imagined], -1).sort(-1, descending=True).values
    thresholds = (ordered[..., :-1] + ordered[..., 1:]) / 2
    index = min(int(number_of(top_k)), logits.shape[-1] - 1) - 1
    if index < 0:  # K = 1: nothing to choose from
        return torch.zeros_like(logits)
    fraction = torch.as_tensor(top_k, dtype=logits.dtype, device=logits.device) - (index + 1)  # keeps the graph
    threshold = torch.lerp(thresholds[..., index], thresholds[..., index + 1], fraction)
    finite = logits.masked_fill(~kept, 0.0)
    return _log_sigmoid((finite - threshold[..., None]) / width_nats).masked_fill(~kept, 0.0)


_log_sigmoid = torch.nn.functional.logsigmoid
