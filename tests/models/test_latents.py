"""Latents: densities against torch.distributions, draws against their probabilities, and the clamp of log σ."""

import math

import pytest
import torch
from torch.distributions import Categorical, Normal
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from softrl.models.latents import DiscreteLatent, GaussianLatent, SoftLatent, make_latent

GRID = 4000


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniforms(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid():
    """Midpoints of GRID equal cells: what inversion makes of them has its distribution's shares, to 1 / GRID."""
    return ((torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID)[:, None]


# Discrete.


def test_codes_are_drawn_with_their_probabilities():
    latent, outputs = DiscreteLatent(3, 5), 2.0 * numbers(5)
    codes = latent.sample(outputs.expand(GRID, 5), grid())
    shares = torch.bincount(codes, minlength=5) / GRID
    torch.testing.assert_close(shares.double(), outputs.softmax(-1), rtol=0.0, atol=1.5 / GRID)


def test_a_code_without_probability_is_never_drawn():
    latent = DiscreteLatent(3, 4)
    for dtype in (torch.float32, torch.float64):
        outputs = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf], dtype=dtype)
        ends = torch.tensor([[0.0], [math.nextafter(1.0, 0.0)]], dtype=torch.float64)
        assert latent.sample(outputs.expand(2, 4), ends).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_codes_are_drawn_with_their_probabilities_in_every_precision(dtype):
    """512 codes: the shares of a grid of uniform numbers, which sums in 8 bits miss by a total variation of 0.2."""
    log_probs = numbers(512).to(dtype).log_softmax(-1)
    spread = ((torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000)[:, None]
    codes = DiscreteLatent(3, 512).sample(log_probs.expand(40_000, 512), spread)
    shares = torch.bincount(codes, minlength=512).double() / 40_000
    assert (shares - log_probs.double().softmax(-1)).abs().sum() / 2.0 < 0.005


def test_discrete_log_probabilities_and_entropy_are_torchs():
    latent, outputs = DiscreteLatent(3, 5).double(), numbers(2, 7, 5).requires_grad_()
    codes = latent.sample(outputs, uniforms(2, 7, 1))
    theirs = Categorical(logits=outputs)
    for ours, expected in (
        (latent.log_prob(outputs, codes), theirs.log_prob(codes)), (latent.entropy(outputs), theirs.entropy()),
    ):  # fmt: skip
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
        grads = [torch.autograd.grad(each.square().sum(), outputs, retain_graph=True)[0] for each in (ours, expected)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
    assert torch.equal(latent.embed(codes), latent.codebook[codes])


# Gaussian.


def test_gaussian_draws_are_quantiles_and_densities_torchs():
    latent = GaussianLatent(3, 2).double()
    outputs = 0.5 * numbers(4, 4)  # inside the bounds of log σ
    mean, log_sigma = outputs.chunk(2, -1)
    theirs = Normal(mean, log_sigma.exp())
    drawn = uniforms(4, 2)
    values = latent.sample(outputs, drawn)
    torch.testing.assert_close(values, theirs.icdf(drawn), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(latent.log_prob(outputs, values), theirs.log_prob(values).sum(-1), rtol=1e-10, atol=0.0)
    torch.testing.assert_close(latent.entropy(outputs), theirs.entropy().sum(-1), rtol=1e-10, atol=0.0)


def test_gaussian_draws_are_finite_at_the_ends():
    ends = torch.tensor([[0.0], [math.nextafter(1.0, 0.0)]], dtype=torch.float64)
    assert GaussianLatent(3, 1).sample(torch.zeros(2, 2), ends).isfinite().all()


def reparameterised_loss(sigma_of, raw):
    """Of a draw at ε = 0.5, with a quadratic reward, and the entropy."""
    sigma = sigma_of(raw)
    return (0.3 + 0.5 * sigma).square() - 0.1 * sigma.log()


@pytest.mark.parametrize("raw", [100.0, 1000.0])
def test_log_sigma_is_clamped_before_the_exponential(raw):
    """At a large s, exp is infinite: clamped afterwards the loss looks well, and its gradient is 0 · inf."""
    latent = GaussianLatent(3, 1)

    def ours(value):
        return latent.moments(torch.stack([torch.zeros(()), value]))[1].exp()[0]

    wrong = {"after": lambda value: value.exp().clamp(math.exp(-5.0), math.exp(2.0)), "none": torch.exp}
    for name, sigma_of in {"before": ours, **wrong}.items():
        given = torch.tensor(raw, requires_grad=True)
        loss = reparameterised_loss(sigma_of, given)
        (grad,) = torch.autograd.grad(loss, given)
        assert bool(grad.isfinite()) == (name == "before"), name
        assert bool(loss.isfinite()) == (name != "none"), name


@pytest.mark.parametrize("bounds", [(-5.0, 2.0), (-40.0, 40.0)])
@pytest.mark.parametrize("raw", [-1000.0, -100.0, 100.0, 1000.0])
def test_all_of_a_gaussian_latent_is_finite_at_extreme_log_sigmas(raw, bounds):
    """Also between the widest bounds there may be."""
    latent, outputs = GaussianLatent(3, 1, *bounds), torch.tensor([[0.2, raw]], requires_grad=True)
    values = latent.rsample(outputs, torch.tensor([[0.9]], dtype=torch.float64))
    parts = [values.square().sum(), latent.log_prob(outputs, values.detach()).sum(), latent.entropy(outputs).sum()]
    for part in parts:
        assert part.isfinite()
        assert torch.autograd.grad(part, outputs, retain_graph=True)[0].isfinite().all()


def test_reparameterised_gradients_are_finite_differences():
    for latent in (GaussianLatent(3, 2).double(), SoftLatent(3, 4, 0.7, noise=True).double(), SoftLatent(3, 4)):
        latent = latent.double()
        outputs, drawn = numbers(latent.num_outputs), uniforms(latent.num_uniforms)
        direction = numbers(latent.num_outputs, seed=5)

        def value(step, latent=latent, outputs=outputs, drawn=drawn, direction=direction):
            embed = latent.embed(latent.rsample(outputs + step * direction, drawn))
            return (embed * torch.arange(1.0, 4.0, dtype=torch.float64)).sum()

        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(value(step), step)
        assert grad.abs() > 0.01
        torch.testing.assert_close(grad, (value(1e-5) - value(-1e-5)) / 2e-5, rtol=1e-6, atol=0.0)


# Soft.


@pytest.mark.parametrize("temperature", [0.4, 1.5])
def test_soft_density_is_torchs_exp_concrete(temperature):
    latent, outputs = SoftLatent(3, 4, temperature, noise=True).double(), numbers(6, 4).requires_grad_()
    values = latent.sample(outputs, uniforms(6, 4))
    torch.testing.assert_close(values.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    theirs = ExpRelaxedCategorical(torch.tensor(temperature, dtype=torch.float64), logits=outputs).log_prob(values)
    ours = latent.log_prob(outputs, values)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(each.sum(), outputs, retain_graph=True)[0] for each in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_the_largest_share_of_noisy_mixtures_is_a_draw_of_the_codes():
    """20,000 draws: a share lies within 4.5 standard errors but for once in 150,000."""
    latent, outputs, count = SoftLatent(3, 4, 0.7, noise=True), numbers(4), 20_000
    winners = latent.sample(outputs.expand(count, 4), uniforms(count, 4)).argmax(-1)
    probs = outputs.softmax(-1)
    errors = (torch.bincount(winners, minlength=4) / count - probs) / (probs * (1 - probs) / count).sqrt()
    assert errors.abs().max() < 4.5


def test_without_noise_a_mixture_is_the_softmax():
    latent, outputs = SoftLatent(3, 4, 0.5).double(), numbers(2, 4)
    values = latent.sample(outputs, uniforms(2, 0))
    torch.testing.assert_close(values.exp(), (outputs / 0.5).softmax(-1))
    torch.testing.assert_close(latent.embed(values), (outputs / 0.5).softmax(-1) @ latent.codebook)
    assert torch.equal(latent.log_prob(outputs, values), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(latent.rsample(outputs, uniforms(2, 0)), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_soft_latents_are_finite_at_the_ends_of_temperature(temperature, dtype):
    latent = SoftLatent(3, 8, temperature, noise=True).to(dtype)
    outputs = (20.0 * numbers(50, 8)).to(dtype).requires_grad_()
    values = latent.rsample(outputs, uniforms(50, 8))
    for part in (latent.embed(values).sum(), latent.log_prob(outputs, values.detach()).sum()):
        assert part.isfinite()
        assert torch.autograd.grad(part, outputs, retain_graph=True)[0].isfinite().all()


# What is refused.


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"no reparameterised sample.*use 'gaussian' or 'soft'"):
        DiscreteLatent(3, 4).rsample(torch.zeros(1, 4), uniforms(1, 1))
    with pytest.raises(ValueError, match=r"latent_kind must be one of \('discrete', 'gaussian', 'soft'\), got 'hard'"):
        make_latent("hard", 3, 4, 2)
    for match, make in (
        ("num_latents must be at least 2", lambda: DiscreteLatent(3, 1)),
        ("latent_temperature must be positive, from 0.001 to 1000, got 0.0", lambda: SoftLatent(3, 4, 0.0)),
        ("latent_temperature must be positive, from 0.001 to 1000, got 1e-39", lambda: SoftLatent(3, 4, 1e-39)),
        ("max_log_sigma=1000.0 must lie within ±40", lambda: GaussianLatent(3, 1, -5.0, 1000.0)),
        ("latent_size must be at least 1, got 0", lambda: GaussianLatent(3, 0)),
        ("min_log_sigma=2.0 must be below max_log_sigma=2.0", lambda: GaussianLatent(3, 1, 2.0, 2.0)),
    ):
        with pytest.raises(ValueError, match=match):
            make()
