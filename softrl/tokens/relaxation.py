"""Relaxations: how logits and noise become the weights of a soft token.

A relaxation draws a step's support without gradients (`draw`) and computes the differentiable weights p from the kept
logits and that support (`weights`), in the rollout and in both gradient phases alike, so that all three use the same
numbers. `fed` turns p into q, what is fed back and scored; the derivative of q is taken to be that of p.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softrl.tokens.noise import SequenceRandom, gumbel_posterior
from softrl.tokens.temperature import Setting, bounded_softmax, check_entropy_bound, check_setting, number_of
from softrl.tokens.truncation import SmoothTruncation, Truncation, largest, sampler_log_probs
from softrl.types import Support


@dataclass(frozen=True)
class Relaxation(ABC):
    """Common part of the relaxations.

    Args:
        truncation: nucleus rules and the number of kept ids.
        temperature: fixed relaxation temperature τ > 0 of the weights, `softmax(· / τ)`. A scalar tensor gets its
            gradient from the weights, as the bound and the smooth rules do: see `softrl.tokens.learned`.
        max_entropy_nats: bound the entropy of every soft token instead, 0 < H_max < log K; needs temperature=1.
        detach_temperature: treat the bound's temperature as a constant in the backward pass.
        smooth: smooth min-p and top-k among the kept ids, in addition to the truncation's hard rules. With factors s
            the weights are `softmax(· / τ) s`, renormalised; under a bound they are those of `softmax(· + log s)`,
            cooled until they meet it.
    Raises:
        ValueError: temperature <= 0, both a temperature and a bound, a bound outside (0, log K), a smooth top-k above
            K, or a learned bound together with detach_temperature, which would leave it without a gradient.
    """

    truncation: Truncation
    temperature: Setting = 1.0
    max_entropy_nats: Setting | None = None
    detach_temperature: bool = False
    smooth: SmoothTruncation | None = None

    name: ClassVar[str]
    feeds_one_hot: ClassVar[bool]  # q is the one-hot of the hard choice, so soft and hard rewards agree
    samples_policy: ClassVar[bool] = True  # hard choices are draws of π, not of its K kept ids or its argmax

    def __post_init__(self) -> None:
        check_setting("the relaxation temperature", self.temperature)
        temperature = number_of(self.temperature)
        if not temperature > 0.0:
            raise ValueError(f"the relaxation temperature must be positive, got {temperature}")
        if self.max_entropy_nats is not None:
            check_entropy_bound(self.max_entropy_nats, self.truncation.top_k)
            if temperature != 1.0 or isinstance(self.temperature, Tensor):
                raise ValueError(
                    f"max_entropy_nats={number_of(self.max_entropy_nats)} sets the relaxation temperature itself; "
                    f"leave temperature at 1.0 (got {self.temperature})"
                )
            if isinstance(self.max_entropy_nats, Tensor) and self.detach_temperature:
                raise ValueError(
                    "detach_temperature=True leaves a learned max_entropy_nats without a gradient; set it to False, "
                    "or give the bound as a number"
                )
        if self.smooth is not None:
            self.smooth.check_support(self.truncation.top_k)

    @abstractmethod
    def draw(
        self, logits: Float[Tensor, "N V"], random: SequenceRandom, tokens: Int[Tensor, "N"] | None = None
    ) -> Support:
        """A step's support, without gradients.

        Args:
            logits: log-probabilities of the sampler up to a constant (its temperature applied), nats, shape (N, V).
            random: one stream a sequence.
            tokens: hard tokens that any sampler drew from `sampler_log_probs(logits, truncation)`, shape (N,); then
                the noise is drawn from its posterior given them. Left out, the relaxation samples for itself.
        """

    def perturbed(self, kept_logits: Float[Tensor, "*batch K"], support: Support) -> Float[Tensor, "*batch K"]:
        """The kept logits that the weights are a softmax of: here the clean ones."""
        return kept_logits

    def weights(self, kept_logits: Float[Tensor, "*batch K"], support: Support) -> Float[Tensor, "*batch K"]:
        """The differentiable weights p, renormalised on the kept support, shape (*batch, K)."""
        logits = self.perturbed(kept_logits, support).masked_fill(~support.kept, -torch.inf)
        log_factor = self._log_factor(kept_logits, logits, support)
        if self.max_entropy_nats is not None:
            bounded = logits if log_factor is None else logits + log_factor
            return bounded_softmax(bounded, self.max_entropy_nats, self.detach_temperature)
        cooled = self._cooled(logits, support)
        return (cooled if log_factor is None else cooled + log_factor).softmax(-1)

    def _log_factor(
        self, kept_logits: Float[Tensor, "*batch K"], logits: Float[Tensor, "*batch K"], support: Support
    ) -> Float[Tensor, "*batch K"] | None:
        """Of the smooth rules, which judge before the temperature, as hard ones do."""
        if self.smooth is None:
            return None
        return self.smooth.log_factor(kept_logits.masked_fill(~support.kept, -torch.inf), logits)

    def _cooled(self, logits: Float[Tensor, "*batch K"], support: Support) -> Float[Tensor, "*batch K"]:
        """z / τ; absent logits stay −inf, and a learned τ, whose gradient they would make NaN, does not see them."""
        if not isinstance(self.temperature, Tensor):
            return logits / self.temperature
        finite = logits.masked_fill(~support.kept, 0.0) / self.temperature
        return finite.masked_fill(~support.kept, -torch.inf)

    def fed(self, weights: Float[Tensor, "*batch K"], support: Support) -> Float[Tensor, "*batch K"]:
        """q: the weights themselves for mixtures, the one-hot of the hard choice for straight-through."""
        if self.feeds_one_hot:
            return torch.zeros_like(weights).scatter(-1, support.choice[..., None], 1.0)
        return weights


def _given(tokens: Int[Tensor, "N"], scores: Float[Tensor, "N V"], top_k: int) -> Support:
    """Noise-free support of the K best ids, the given tokens forced in where they are missing."""
    _, ids, kept = largest(scores, top_k)
    missing = ~(ids == tokens[:, None]).any(-1)
    ids[missing, -1] = tokens[missing]
    kept[missing, -1] = True
    choice = (ids == tokens[:, None]).int().argmax(-1)
    return Support(ids, torch.zeros_like(ids, dtype=scores.dtype), kept, choice)


@dataclass(frozen=True)
class SoftmaxMixture(Relaxation):
    """Deterministic mixture: the K best ids, `p = softmax(z / τ)`, `q = p`; the hard token is the argmax."""

    name = "softmax"
    feeds_one_hot = False
    samples_policy = False

    @torch.no_grad()
    def draw(
        self, logits: Float[Tensor, "N V"], random: SequenceRandom, tokens: Int[Tensor, "N"] | None = None
    ) -> Support:
        log_probs = sampler_log_probs(logits, self.truncation, tokens)
        return _given(log_probs.argmax(-1) if tokens is None else tokens, log_probs, self.truncation.top_k)


@dataclass(frozen=True)
class StraightThrough(Relaxation):
    """`q` is the one-hot of a token sampled from the K kept ids, p = softmax(z / τ) and dq := dp.

    The sampler is p itself at τ=1, so a reward that is linear in the tokens of one step gets an unbiased gradient.
    Source: Bengio, Léonard and Courville (2013), arXiv:1308.3432.
    """

    name = "straight_through"
    feeds_one_hot = True
    samples_policy = False

    @torch.no_grad()
    def draw(
        self, logits: Float[Tensor, "N V"], random: SequenceRandom, tokens: Int[Tensor, "N"] | None = None
    ) -> Support:
        log_probs = sampler_log_probs(logits, self.truncation, tokens)
        if tokens is None:
            kept_log_probs, ids, _ = largest(log_probs, self.truncation.top_k)
            race = kept_log_probs + random.gumbel(self.truncation.top_k, logits.dtype)
            tokens = ids.gather(-1, race.argmax(-1, keepdim=True)).squeeze(-1)
        return _given(tokens, log_probs, self.truncation.top_k)


@dataclass(frozen=True)
class GumbelSoftmax(Relaxation):
    """Mixture of the K best ids of `y = log π + g`: `p = softmax(y / τ)`, `q = p`.

    Its argmax is an exact sample of π. Source: Jang, Gu and Poole (2017), arXiv:1611.01144; Maddison et al. (2017),
    arXiv:1611.00712.
    """

    name = "gumbel_softmax"
    feeds_one_hot = False

    @torch.no_grad()
    def draw(
        self, logits: Float[Tensor, "N V"], random: SequenceRandom, tokens: Int[Tensor, "N"] | None = None
    ) -> Support:
        log_probs = sampler_log_probs(logits, self.truncation, tokens)
        if tokens is None:
            perturbed = log_probs + random.gumbel(logits.shape[-1], logits.dtype)
        else:
            perturbed = gumbel_posterior(log_probs, tokens, random)
        values, ids, kept = largest(perturbed, self.truncation.top_k)
        # The noise goes onto raw logits in the replay, hence y − z and not y − log π: the constant drops out.
        noise = (values - logits.gather(-1, ids)).masked_fill(~kept, 0.0)
        return Support(ids, noise, kept, torch.zeros_like(ids[..., 0]))

    def perturbed(self, kept_logits: Float[Tensor, "*batch K"], support: Support) -> Float[Tensor, "*batch K"]:
        return kept_logits + support.noise


@dataclass(frozen=True)
class StraightThroughGumbel(GumbelSoftmax):
    """Forward an ordinary sample of π, backward the Jacobian of `softmax((z + g) / τ)`.

    The forward pass is any sampler's: pass its tokens to `draw` and the noise comes from the Gumbel posterior. Biased
    even for rewards that are linear in the token. Source: Jang, Gu and Poole (2017), arXiv:1611.01144, section 2.2.
    """

    name = "st_gumbel"
    feeds_one_hot = True


@dataclass(frozen=True)
class GumbelRao(Relaxation):
    """Straight-through Gumbel with its Jacobian averaged over S posterior draws of the noise: same forward, same bias,
    less variance.

    Keeps the K most probable ids and the sampled one, so that the average is over nothing but the noise.

    Args:
        num_draws: S >= 1.
    Raises:
        ValueError: num_draws < 1, an entropy bound, or smooth truncation.
    Source: Paulus, Maddison and Krause (2021), arXiv:2010.04838.
    """

    num_draws: int = 16

    name = "gumbel_rao"
    feeds_one_hot = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_entropy_bound(self)
        if self.num_draws < 1:
            raise ValueError(f"num_draws must be at least 1, got {self.num_draws}")

    @torch.no_grad()
    def draw(
        self, logits: Float[Tensor, "N V"], random: SequenceRandom, tokens: Int[Tensor, "N"] | None = None
    ) -> Support:
        log_probs = sampler_log_probs(logits, self.truncation, tokens)
        if tokens is None:
            tokens = (log_probs + random.gumbel(logits.shape[-1], logits.dtype)).argmax(-1)
        support = _given(tokens, log_probs, self.truncation.top_k)
        kept_log_probs = log_probs.gather(-1, support.ids)
        clean = logits.gather(-1, support.ids)
        draws = [gumbel_posterior(kept_log_probs, support.choice, random) - clean for _ in range(self.num_draws)]
        return replace(support, draws=torch.stack(draws, -2).masked_fill(~support.kept[:, None], 0.0))

    def weights(self, kept_logits: Float[Tensor, "*batch K"], support: Support) -> Float[Tensor, "*batch K"]:
        assert support.draws is not None
        # Absent ids are filled after the division, so that they leave a learned temperature's gradient alone.
        perturbed = (kept_logits[..., None, :] + support.draws) / self.temperature
        return perturbed.masked_fill(~support.kept[..., None, :], -torch.inf).softmax(-1).mean(-2)


@dataclass(frozen=True)
class ReinMax(StraightThrough):
    """Straight-through with a second-order Jacobian (Heun's method), for a token sampled from the K kept ids.

    With π the sampler on the kept ids, D the sampled one-hot and `π₁ = (softmax(z/τ) + D) / 2`, the Jacobian is
    `2 J(π₁) − J(π)/2`, `J(p) = diag(p) − p pᵀ`. At τ = 1 one step has no bias for rewards that are linear or quadratic
    in the one-hot. The value of p is π.

    Raises:
        ValueError: an entropy bound, smooth truncation, or a learned temperature, which its value does not depend on.
    Source: Liu et al. (2023), arXiv:2304.08612, algorithm 2.
    """

    name = "reinmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_entropy_bound(self)
        if isinstance(self.temperature, Tensor):
            raise ValueError(
                "a learned temperature does not apply to relaxation 'reinmax', whose weights do not depend on it; "
                "give it as a number"
            )

    def weights(self, kept_logits: Float[Tensor, "*batch K"], support: Support) -> Float[Tensor, "*batch K"]:
        absent = ~support.kept
        logits = kept_logits.masked_fill(absent, -torch.inf).detach()
        sampler = logits.softmax(-1)
        second = ((logits / self.temperature).softmax(-1) + self.fed(sampler, support)) / 2
        finite = kept_logits.masked_fill(absent, 0.0)
        first_order = 2 * _with_jacobian_at(second, finite) - 0.5 * _with_jacobian_at(sampler, finite)
        return sampler + first_order - first_order.detach()  # its value is left out: only its derivative is meant


def _with_jacobian_at(
    probs: Float[Tensor, "*batch K"], logits: Float[Tensor, "*batch K"]
) -> Float[Tensor, "*batch K"]:
    """A linear function of the logits whose Jacobian is softmax's where its value is `probs`."""
    return probs * (logits - (probs * logits).sum(-1, keepdim=True))


def _refuse_entropy_bound(relaxation: Relaxation) -> None:
    if relaxation.max_entropy_nats is not None:
        raise ValueError(
            f"max_entropy_nats={relaxation.max_entropy_nats} does not apply to relaxation {relaxation.name!r}, whose "
            "Jacobian is not that of one softmax; use a temperature, or one of the other relaxations"
        )
    if relaxation.smooth is not None:
        raise ValueError(
            f"smooth truncation does not apply to relaxation {relaxation.name!r}, whose Jacobian is not that of one "
            "softmax; use the hard rules of its truncation, or one of the other relaxations"
        )


RELAXATIONS: dict[str, type[Relaxation]] = {
    relaxation.name: relaxation
    for relaxation in (SoftmaxMixture, GumbelSoftmax, StraightThrough, StraightThroughGumbel, GumbelRao, ReinMax)
}


def make_relaxation(
    name: str,
    truncation: Truncation,
    temperature: Setting = 1.0,
    max_entropy_nats: Setting | None = None,
    detach_temperature: bool = False,
    num_draws: int | None = None,
    smooth: SmoothTruncation | None = None,
) -> Relaxation:
    """The relaxation of that name; ValueError lists the names there are. `num_draws` matters to "gumbel_rao" alone."""
    if name not in RELAXATIONS:
        raise ValueError(f"relaxation must be one of {sorted(RELAXATIONS)}, got {name!r}")
    relaxation = RELAXATIONS[name](truncation, temperature, max_entropy_nats, detach_temperature, smooth)
    if isinstance(relaxation, GumbelRao) and num_draws is not None:
        return replace(relaxation, num_draws=num_draws)
    return relaxation
