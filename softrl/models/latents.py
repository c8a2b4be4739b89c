"""Latents: what a reasoner thinks in. A latent is a code of a codebook, a Gaussian vector, or a mixture of the codes.

A `Latent` knows the distribution that a reasoner's state gives (`outputs`, numbers of a linear map) and the embedding
that is fed on. Draws are functions of uniform random numbers that the caller makes, by inversion: who keeps one
generator a text has draws that depend on no other text. Left out: densities of the embedding itself, which is a
function of the latent.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softrl.tokens.divergences import entropy
from softrl.tokens.relaxation import GumbelSoftmax, SoftmaxMixture
from softrl.tokens.truncation import Truncation
from softrl.types import Support

LatentKind = Literal["discrete", "gaussian", "soft"]
LARGEST_LOG_SIGMA = 40.0  # of densities in float32: the square of e^40 is 5e34, that of e^45 is infinite
TEMPERATURES = (1e-3, 1e3)  # at the ends a mixture is one code, or all alike; far beyond, numbers overflow


def check_log_sigma_bounds(least: float, most: float) -> None:
    """Raise ValueError where a clamp of log σ to these bounds would keep nothing finite."""
    if not least < most:
        raise ValueError(f"min_log_sigma={least} must be below max_log_sigma={most}")
    if not -LARGEST_LOG_SIGMA <= least < most <= LARGEST_LOG_SIGMA:
        raise ValueError(
            f"min_log_sigma={least} and max_log_sigma={most} must lie within ±{LARGEST_LOG_SIGMA:g}: beyond, "
            "densities overflow and gradients are not numbers, which bounds are there to prevent; -5 and 2 are usual"
        )


def check_temperature(temperature: float) -> None:
    """Raise ValueError for a temperature of soft latents that numbers cannot follow."""
    if not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
        raise ValueError(
            f"latent_temperature must be positive, from {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}, got "
            f"{temperature}; 1 is usual, and for one code there is latent_kind='discrete'"
        )


class Latent(nn.Module, ABC):
    """One latent of a thought: a distribution and an embedding of width D.

    Attributes:
        num_outputs: numbers P that a distribution is given by.
        num_uniforms: random numbers of a draw.
        value_shape: axes of a value behind those of the batch.
        reparameterises: whether `rsample` has a gradient.
    """

    reparameterises: ClassVar[bool] = True
    num_outputs: int
    num_uniforms: int
    value_shape: tuple[int, ...]

    @torch.no_grad()
    def sample(self, outputs: Float[Tensor, "*batch P"], uniforms: Float[Tensor, "*batch U"]) -> Tensor:
        """A draw without a graph.

        Args:
            outputs: see above.
            uniforms: of [0, 1), in float64, independent.
        """
        return self._draw(outputs, uniforms)

    def rsample(self, outputs: Float[Tensor, "*batch P"], uniforms: Float[Tensor, "*batch U"]) -> Tensor:
        """The same draw as a differentiable function of the outputs.

        Raises:
            ValueError: there is none for a discrete latent.
        """
        if not self.reparameterises:
            raise ValueError(
                "latent_kind 'discrete' has no reparameterised sample: a code does not change continuously; use "
                "'gaussian' or 'soft', or an objective that weights log-probabilities"
            )
        return self._draw(outputs, uniforms)

    @abstractmethod
    def _draw(self, outputs: Tensor, uniforms: Tensor) -> Tensor: ...

    @abstractmethod
    def log_prob(self, outputs: Float[Tensor, "*batch P"], values: Tensor) -> Float[Tensor, "*batch"]:
        """Log-probability of a code, or log-density of a vector, nats; differentiable in the outputs."""

    @abstractmethod
    def entropy(self, outputs: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch"]:
        """Entropy, exact and differentiable, nats."""

    @abstractmethod
    def embed(self, values: Tensor) -> Float[Tensor, "*batch D"]:
        """What cores are fed; differentiable in continuous values."""


class CodebookLatent(Latent):
    """Common part of latents that choose among K embeddings, rows of `codebook`."""

    def __init__(self, width: int, num_latents: int):
        super().__init__()
        if num_latents < 2:
            raise ValueError(f"num_latents must be at least 2, or there is nothing to choose, got {num_latents}")
        self.num_outputs = num_latents
        self.codebook = nn.Parameter(torch.randn(num_latents, width))

    def entropy(self, outputs: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch"]:
        """Of softmax(outputs); for a soft latent that of the codes mixed, and not of the mixture's density."""
        return entropy(outputs.log_softmax(-1).flatten(0, -2)).view(outputs.shape[:-1])


def categorical_draw(log_probs: Float[Tensor, "*batch K"], uniforms: Float[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """Codes by inversion.

    Args:
        log_probs: up to a constant, nats.
        uniforms: of [0, 1), in float64.
    """
    # Sums of many codes are not those of 8 bits: bfloat16 would draw others than log_probs says.
    exact = torch.float32 if log_probs.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    below = log_probs.to(exact).softmax(-1).cumsum(-1)
    # Strictly below the total, so that a code without probability is never drawn, not even by rounding.
    share = uniforms.to(exact).clamp(max=1.0 - torch.finfo(exact).eps)
    return (below <= share[..., None] * below[..., -1:]).sum(-1)


def gaussian_draw(
    mean: Float[Tensor, "*batch"], sigma: Float[Tensor, "*batch"], uniforms: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Normal numbers by inversion, differentiable in mean and σ; `uniforms` as above."""
    finfo = torch.finfo(torch.float64)
    normal = torch.special.ndtri(uniforms.clamp(finfo.tiny, 1.0 - finfo.eps))
    return mean + sigma * normal.to(mean.dtype)


class DiscreteLatent(CodebookLatent):
    """One of K codes, `π = softmax(outputs)`.

    Args:
        width: D.
        num_latents: K.
    """

    reparameterises = False
    num_uniforms = 1
    value_shape = ()

    def _draw(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        return categorical_draw(outputs, uniforms[..., 0])

    def log_prob(self, outputs: Float[Tensor, "*batch P"], values: Tensor) -> Float[Tensor, "*batch"]:
        return outputs.log_softmax(-1).gather(-1, values[..., None]).squeeze(-1)

    def embed(self, values: Tensor) -> Float[Tensor, "*batch D"]:
        return nn.functional.embedding(values, self.codebook)


class SoftLatent(CodebookLatent):
    """A mixture of K codes, `q = softmax((outputs + g)/τ)` with Gumbel noise g, or g = 0; values are log q.

    With noise it is the concrete distribution, and the density is that of log q; without, one value, whose log-density
    counts as 0: nothing can be learned from it but through `rsample`.

    Args:
        width: D.
        num_latents: K.
        temperature: τ, from 0.001 to 1000.
        noise: whether there is any.
    Source: Maddison et al. (2017), arXiv:1611.00712, appendix (ExpConcrete); the noise is `softrl.tokens`'.
    """

    def __init__(self, width: int, num_latents: int, temperature: float = 1.0, noise: bool = False):
        super().__init__(width, num_latents)
        check_temperature(temperature)
        self.temperature, self.noise = temperature, noise
        self.num_uniforms = num_latents if noise else 0
        self.value_shape = (num_latents,)
        self.relaxation = (GumbelSoftmax if noise else SoftmaxMixture)(Truncation(num_latents), temperature)

    def _draw(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        tiny = torch.finfo(torch.float64).tiny
        drawn = -(-uniforms.clamp(min=tiny).log()).log() if self.noise else torch.zeros_like(outputs)
        ids = torch.arange(self.num_outputs, device=outputs.device).expand(outputs.shape)
        noise = drawn.to(outputs.dtype)
        support = Support(ids, noise, torch.ones_like(ids, dtype=torch.bool), (outputs + noise).argmax(-1))
        return (self.relaxation.perturbed(outputs, support) / self.temperature).log_softmax(-1)

    def log_prob(self, outputs: Float[Tensor, "*batch P"], values: Tensor) -> Float[Tensor, "*batch"]:
        if not self.noise:
            return torch.zeros_like(outputs[..., 0])
        count, terms = self.num_outputs, outputs - self.temperature * values
        constant = math.lgamma(count) + (count - 1) * math.log(self.temperature)
        return constant + terms.sum(-1) - count * terms.logsumexp(-1)

    def embed(self, values: Tensor) -> Float[Tensor, "*batch D"]:
        return values.exp() @ self.codebook


class GaussianLatent(Latent):
    """`N(μ, diag σ²)` with `outputs = [μ; s]`, `log σ = clamp(s)`; its embedding is a linear map.

    The clamp comes before the exponential. After it, exp(s) would be infinite at a large s already, and its derivative
    times the clamp's, 0 · inf, not a number.

    Args:
        width: D.
        latent_size: of the vector.
        min_log_sigma, max_log_sigma: bounds of log σ, within ±40; outside of them s has no gradient.
    """

    def __init__(self, width: int, latent_size: int, min_log_sigma: float = -5.0, max_log_sigma: float = 2.0):
        super().__init__()
        if latent_size < 1:
            raise ValueError(f"latent_size must be at least 1, got {latent_size}")
        check_log_sigma_bounds(min_log_sigma, max_log_sigma)
        self.bounds = (min_log_sigma, max_log_sigma)
        self.num_outputs, self.num_uniforms, self.value_shape = 2 * latent_size, latent_size, (latent_size,)
        self.linear = nn.Linear(latent_size, width)

    def moments(
        self, outputs: Float[Tensor, "*batch P"]
    ) -> tuple[Float[Tensor, "*batch E"], Float[Tensor, "*batch E"]]:
        """μ and log σ."""
        mean, log_sigma = outputs.chunk(2, -1)
        return mean, log_sigma.clamp(*self.bounds)

    def _draw(self, outputs: Tensor, uniforms: Tensor) -> Tensor:
        mean, log_sigma = self.moments(outputs)
        return gaussian_draw(mean, log_sigma.exp(), uniforms)

    def log_prob(self, outputs: Float[Tensor, "*batch P"], values: Tensor) -> Float[Tensor, "*batch"]:
        mean, log_sigma = self.moments(outputs)
        squares = ((values - mean) * (-log_sigma).exp()).square()
        return -(0.5 * squares + log_sigma + 0.5 * math.log(2.0 * math.pi)).sum(-1)

    def entropy(self, outputs: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch"]:
        return (self.moments(outputs)[1] + 0.5 * math.log(2.0 * math.pi * math.e)).sum(-1)

    def embed(self, values: Tensor) -> Float[Tensor, "*batch D"]:
        return self.linear(values)


def make_latent(
    kind: str,
    width: int,
    num_latents: int,
    latent_size: int,
    temperature: float = 1.0,
    noise: bool = False,
    log_sigma_bounds: tuple[float, float] = (-5.0, 2.0),
) -> Latent:
    """The latent of that kind; ValueError lists the kinds there are. Settings of other kinds are not read."""
    if kind == "discrete":
        return DiscreteLatent(width, num_latents)
    if kind == "soft":
        return SoftLatent(width, num_latents, temperature, noise)
    if kind == "gaussian":
        return GaussianLatent(width, latent_size, *log_sigma_bounds)
    raise ValueError(f"latent_kind must be one of {get_args(LatentKind)}, got {kind!r}")
