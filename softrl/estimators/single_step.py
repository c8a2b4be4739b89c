"""Gradient estimators of single-step problems: L independent categorical latents whose logits are the parameters.

`J(θ) = E f(X)`, X the one-hots of a draw of every softmax(θ_l), is maximised; f takes [..., L, V], differentiable.
Axes: D independent draws of an estimate, G samples averaged in a draw, L latents, V categories. Draw d of a seed gives
the same numbers with whichever other draws it is computed, and all estimators see the same samples.
Left out: learned temperatures and scales of REBAR and RELAX; combinations (`combined`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softrl.estimators.base import Cost, UnbiasedFor
from softrl.tokens.noise import SequenceRandom, gumbel_posterior, sequence_seed
from softrl.tokens.relaxation import RELAXATIONS, make_relaxation
from softrl.tokens.truncation import Truncation

RewardFunction = Callable[[Tensor], Tensor]  # [..., L, V] -> [...]

HIDDEN_UNITS, PILOT_DRAWS, SURROGATE_LEARNING_RATE = 32, 64, 0.01  # RELAX's surrogate; ours, found to be enough here


class DrawRandom(SequenceRandom):
    """One random stream a draw, shared by the rows of that draw.

    Args:
        seed: of all draws.
        draws: indices of the draws; a draw's numbers depend on (seed, index) alone.
        num_rows: rows of numbers a draw, G * L.
    """

    def __init__(self, seed: int, draws: Sequence[int], num_rows: int):
        super().__init__([sequence_seed(seed, draw) for draw in draws], rows=num_rows)


def value_and_gradient(
    function: RewardFunction, points: Float[Tensor, "*batch L V"], create_graph: bool = False
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch L V"]]:
    """f and ∂f/∂q at every point; `create_graph` for gradients of the gradient with respect to f's parameters."""
    with torch.enable_grad():
        leaf = points.detach().requires_grad_()
        values = function(leaf)
        (gradient,) = torch.autograd.grad(values.sum(), leaf, create_graph=create_graph)
    return values, gradient


def through_log_softmax(
    cotangents: Float[Tensor, "*batch L V"], probs: Float[Tensor, "L V"]
) -> Float[Tensor, "*batch L V"]:
    """Cotangents of log π as those of the logits: `c − π Σ_v c_v`."""
    return cotangents - probs * cotangents.sum(-1, keepdim=True)


@dataclass(frozen=True)
class SingleStepEstimator(ABC):
    """Common part of the estimators.

    Args:
        num_samples: G >= 1, samples averaged in a draw.
    Raises:
        ValueError: fewer samples than the estimator needs.
    """

    num_samples: int = 1

    unbiased_for: ClassVar[UnbiasedFor] = "hard"  # None: not unbiased for every f
    least_samples: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.num_samples < self.least_samples:
            raise ValueError(f"num_samples must be at least {self.least_samples} here, got {self.num_samples}")

    @property
    def noise_free(self) -> bool:
        """Whether an estimate is a function of the sampled categories alone, so that its mean can be enumerated."""
        return False

    @abstractmethod
    def cost(self, num_latents: int, num_categories: int) -> Cost:
        """Work of one draw: G samples together. A reward call scores one X."""

    @abstractmethod
    def per_sample(
        self, logits: Float[Tensor, "L V"], reward: RewardFunction, tokens: Int[Tensor, "D G L"], random: DrawRandom
    ) -> Float[Tensor, "D G L V"]:
        """The gradients whose mean over G is the estimate, given the sampled categories."""

    def gradients(
        self,
        logits: Float[Tensor, "L V"],
        reward: RewardFunction,
        seed: int,
        draws: Sequence[int],
        tokens: Int[Tensor, "D G L"] | None = None,
    ) -> Float[Tensor, "D L V"]:
        """Independent estimates of ∂J/∂θ.

        Args:
            logits: θ, nats.
            reward: f; called on any number of X at once, differentiated where the estimator needs it.
            seed, draws: key of every draw.
            tokens: sampled categories; left out, they are drawn from softmax(θ).
        """
        logits = logits.detach()
        random = DrawRandom(seed, draws, self.num_samples * len(logits))
        if tokens is None:
            tokens = sampled_categories(logits, random)
        return self.per_sample(logits, reward, tokens, random).mean(1).detach()


def sampled_categories(logits: Float[Tensor, "L V"], random: DrawRandom) -> Int[Tensor, "D G L"]:
    """Draws of softmax(θ_l), by the Gumbel-max trick."""
    race = random.gumbel(logits.shape[1], logits.dtype)
    return (logits + race.unflatten(0, (len(random), -1, len(logits)))).argmax(-1)


def _cost(reward_calls: int, gradient_calls: int = 0) -> Cost:
    return Cost(float(reward_calls), forwards=1.0, backwards=1.0, gradient_calls=float(gradient_calls))


def one_hots(tokens: Int[Tensor, "D G L"], logits: Float[Tensor, "L V"]) -> Float[Tensor, "D G L V"]:
    """X of the sampled categories."""
    return nn.functional.one_hot(tokens, logits.shape[-1]).to(logits.dtype)


@dataclass(frozen=True)
class Reinforce(SingleStepEstimator):
    """`(f(X) − b) ∇ log π(X)`, `∇ log π(X) = X − π`.

    Args:
        baseline: b, a constant.
    Source: Williams (1992).
    """

    baseline: float = 0.0

    noise_free = True

    def cost(self, num_latents: int, num_categories: int) -> Cost:
        return _cost(self.num_samples)

    def per_sample(
        self, logits: Float[Tensor, "L V"], reward: RewardFunction, tokens: Int[Tensor, "D G L"], random: DrawRandom
    ) -> Float[Tensor, "D G L V"]:
        sampled = one_hots(tokens, logits)
        return self.advantages(reward(sampled))[..., None, None] * (sampled - logits.softmax(-1))

    def advantages(self, values: Float[Tensor, "D G"]) -> Float[Tensor, "D G"]:
        """What multiplies ∇ log π."""
        return values - self.baseline


@dataclass(frozen=True)
class LeaveOneOut(Reinforce):
    """REINFORCE whose baseline is the mean reward of the other samples of the draw (RLOO); G >= 2, and then b = 0.

    Source: Kool, van Hoof and Welling (2019).
    """

    num_samples: int = 2

    least_samples = 2
    noise_free = False  # it depends on the other samples

    def advantages(self, values: Float[Tensor, "D G"]) -> Float[Tensor, "D G"]:
        others = (values.sum(1, keepdim=True) - values) / (self.num_samples - 1)
        return values - others - self.baseline


@dataclass(frozen=True)
class LocalExpectation(SingleStepEstimator):
    """All actions: `Σ_v f(X with latent l set to v) ∇π_l(v)` for every latent, the others as sampled.

    With one latent it is the exact gradient. Costs L·V reward calls a sample.
    Source: Titsias and Lázaro-Gredilla (2015), arXiv:1503.01494.
    """

    noise_free = True

    def cost(self, num_latents: int, num_categories: int) -> Cost:
        return _cost(self.num_samples * num_latents * num_categories)

    def per_sample(
        self, logits: Float[Tensor, "L V"], reward: RewardFunction, tokens: Int[Tensor, "D G L"], random: DrawRandom
    ) -> Float[Tensor, "D G L V"]:
        num_latents, num_categories = logits.shape
        sampled = one_hots(tokens, logits)[:, :, None, None]
        changed = sampled.repeat(1, 1, num_latents, num_categories, 1, 1)  # [D, G, l, v, L, V]
        latents = torch.arange(num_latents)
        changed[:, :, latents, :, latents] = torch.eye(num_categories, dtype=logits.dtype)
        return through_log_softmax(logits.softmax(-1) * reward(changed), logits.softmax(-1))


@dataclass(frozen=True)
class Relaxed(SingleStepEstimator):
    """The gradient of f at a relaxation's q, pulled back through its p: what pathwise estimators do a step.

    Args:
        name: of a relaxation in `softrl.tokens.relaxation.RELAXATIONS`.
        temperature: τ of the relaxation.
        num_draws: S of "gumbel_rao".
    Raises:
        ValueError: no such relaxation, or one that its settings do not fit.
    """

    name: str = "straight_through"
    temperature: float = 1.0
    num_draws: int = 16

    unbiased_for = None

    def __post_init__(self) -> None:
        super().__post_init__()
        make_relaxation(self.name, Truncation(1), self.temperature, num_draws=self.num_draws)

    @property
    def noise_free(self) -> bool:
        return self.name in ("softmax", "straight_through", "reinmax")

    def cost(self, num_latents: int, num_categories: int) -> Cost:
        return _cost(self.num_samples, self.num_samples)

    def per_sample(
        self, logits: Float[Tensor, "L V"], reward: RewardFunction, tokens: Int[Tensor, "D G L"], random: DrawRandom
    ) -> Float[Tensor, "D G L V"]:
        everything = Truncation(logits.shape[-1])
        relaxation = make_relaxation(self.name, everything, self.temperature, num_draws=self.num_draws)
        rows = logits.expand(*tokens.shape[:2], *logits.shape).flatten(0, 2)  # one a latent of a sample
        support = relaxation.draw(rows, random, tokens.flatten())
        with torch.enable_grad():
            leaf = rows.clone().requires_grad_()
            weights = relaxation.weights(leaf.gather(-1, support.ids), support)
        fed = relaxation.fed(weights.detach(), support)
        q = torch.zeros_like(rows).scatter(-1, support.ids, fed).reshape(*tokens.shape, -1)
        _, cotangents = value_and_gradient(reward, q)
        (pulled,) = torch.autograd.grad(weights, leaf, cotangents.flatten(0, 2).gather(-1, support.ids))
        return pulled.reshape(q.shape)


def conditional_slope(
    perturbed: Float[Tensor, "*batch L V"], tokens: Int[Tensor, "*batch L"]
) -> Float[Tensor, "*batch L V"]:
    """`∂ỹ_v / ∂ log π_v` of the conditional sampler `ỹ_v = −log(E_v/π_v + exp(−ỹ_winner))`, E held fixed.

    It is `1 − exp(ỹ_v − ỹ_winner)`, zero for the winner.
    """
    winner = perturbed.gather(-1, tokens[..., None])
    return 1.0 - (perturbed - winner).exp()


@dataclass(frozen=True)
class Rebar(SingleStepEstimator):
    """REINFORCE less a control variate made of the relaxed reward, `c(z) = η f(softmax(z / τ))`:

    `(f(X) − c(z̃)) ∇ log π(X) + ∇c(z) − ∇c(z̃)`, `z = log π + g` with argmax X, z̃ a draw of z given X.

    Args:
        temperature: τ, fixed.
        scale: η, fixed.
        coupled: z̃ has the value of z (common random numbers) and only its derivative differs. Each term keeps its
            law, so this is unbiased as well; one reward call less, and about the same variance where we measured it.
    Raises:
        ValueError: temperature <= 0.
    Source: Tucker et al. (2017), arXiv:1703.07370, for binary latents; its appendix has categorical ones.
    """

    temperature: float = 0.5
    scale: float = 1.0
    coupled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def cost(self, num_latents: int, num_categories: int) -> Cost:
        soft_calls = self.num_samples if self.coupled else 2 * self.num_samples
        return _cost(self.num_samples + soft_calls, soft_calls)

    def control(self, reward: RewardFunction, perturbed: Float[Tensor, "*batch L V"]) -> Float[Tensor, "*batch"]:
        """c of perturbed log-probabilities."""
        return self.scale * reward((perturbed / self.temperature).softmax(-1))

    def per_sample(
        self,
        logits: Float[Tensor, "L V"],
        reward: RewardFunction,
        tokens: Int[Tensor, "D G L"],
        random: DrawRandom,
        create_graph: bool = False,
    ) -> Float[Tensor, "D G L V"]:
        """`create_graph` keeps the graph to the parameters of c."""
        sampled, probs = one_hots(tokens, logits), logits.softmax(-1)
        rows = logits.log_softmax(-1).expand(*tokens.shape[:2], *logits.shape).flatten(0, 2)
        z = gumbel_posterior(rows, tokens.flatten(), random).reshape(sampled.shape)
        control = partial(self.control, reward)
        value, slope = value_and_gradient(control, z, create_graph)
        z_given, value_given, slope_given = z, value, slope
        if not self.coupled:
            z_given = gumbel_posterior(rows, tokens.flatten(), random).reshape(sampled.shape)
            value_given, slope_given = value_and_gradient(control, z_given, create_graph)
        # Elsewhere posterior noise is a constant of the sample. Here ∇c(z̃) has to be the derivative of E[c(z̃) | X],
        # for which z̃ moves with θ while the exponentials it is made of stay: `conditional_slope`.
        moved = slope - conditional_slope(z_given, tokens) * slope_given
        residual = reward(sampled) - value_given
        return residual[..., None, None] * (sampled - probs) + through_log_softmax(moved, probs)


@dataclass(frozen=True)
class Relax(Rebar):
    """REBAR with a learned surrogate in its control variate: `c(z) = η f(softmax(z / τ)) + r_φ(z)`.

    `fit` trains φ; estimates are unbiased whatever φ is, as long as it does not depend on their own draws.

    Args:
        fit_steps: steps of Adam, 64 fresh pilot draws each.
        surrogate: r_φ of [..., L·V]; None until fitted.
    Source: Grathwohl et al. (2018), arXiv:1711.00123.
    """

    fit_steps: int = 300
    surrogate: nn.Module | None = None

    def control(self, reward: RewardFunction, perturbed: Float[Tensor, "*batch L V"]) -> Float[Tensor, "*batch"]:
        if self.surrogate is None:
            raise ValueError("relax has no surrogate yet; call its fit(logits, reward, seed) first")
        return super().control(reward, perturbed) + self.surrogate(perturbed.flatten(-2)).squeeze(-1)

    def fit(self, logits: Float[Tensor, "L V"], reward: RewardFunction, seed: int) -> "Relax":
        """The same estimator with a surrogate trained on pilot draws, then frozen.

        The mean does not depend on φ, so the gradient of the mean square is that of the variance.

        Args:
            seed: its pilot draws are other ones than the draws of `gradients` at that seed.
        """
        logits, seed = logits.detach(), sequence_seed(seed, 0, 0)
        surrogate = _surrogate(logits, seed)
        fitted = replace(self, surrogate=surrogate)
        optimizer = torch.optim.Adam(surrogate.parameters(), lr=SURROGATE_LEARNING_RATE)
        for step in range(self.fit_steps):
            draws = range(step * PILOT_DRAWS, (step + 1) * PILOT_DRAWS)
            random = DrawRandom(seed, draws, self.num_samples * len(logits))
            tokens = sampled_categories(logits, random)
            gradients = fitted.per_sample(logits, reward, tokens, random, create_graph=True)
            optimizer.zero_grad()
            gradients.square().sum((-1, -2)).mean().backward()
            optimizer.step()
        surrogate.requires_grad_(False)
        return fitted


def _surrogate(logits: Float[Tensor, "L V"], seed: int) -> nn.Module:
    """One hidden layer; its last layer is zero, so that an untrained RELAX is REBAR."""
    # Without PyTorch's own initialisation, which would draw from the global generator.
    first = nn.utils.skip_init(nn.Linear, logits.numel(), HIDDEN_UNITS, dtype=logits.dtype)
    last = nn.utils.skip_init(nn.Linear, HIDDEN_UNITS, 1, bias=False, dtype=logits.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        first.weight.normal_(0.0, logits.numel() ** -0.5, generator=generator)
        first.bias.zero_()
        last.weight.zero_()
    return nn.Sequential(first, nn.Tanh(), last)


SINGLE_STEP_ESTIMATORS: dict[str, Callable[..., SingleStepEstimator]] = {
    "reinforce": Reinforce,
    "rloo": LeaveOneOut,
    "local_expectation": LocalExpectation,
    "rebar": Rebar,
    "relax": Relax,
    **{name: partial(Relaxed, name=name) for name in RELAXATIONS},
}


def make_single_step(name: str, settings: dict[str, Any] | None = None) -> SingleStepEstimator:
    """The estimator of that name with those settings.

    Raises:
        ValueError: an unknown name, or settings that it does not have; the message lists those there are.
    """
    if name not in SINGLE_STEP_ESTIMATORS:
        raise ValueError(f"estimator must be one of {sorted(SINGLE_STEP_ESTIMATORS)}, got {name!r}")
    chosen, settings = SINGLE_STEP_ESTIMATORS[name], settings or {}
    known = {field.name for field in fields(chosen())} - {"name", "surrogate"}
    if unknown := set(settings) - known:
        raise ValueError(f"{name} takes the settings {sorted(known)}, got {sorted(unknown)} as well")
    return chosen(**settings)
