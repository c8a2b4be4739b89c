"""Single-step estimators: exact biases by enumeration, declarations by z-scores, variances, costs.

z-scores are of D independent draws against an exact gradient, coordinate by coordinate. Over all tests here there are
fewer than 200 of them, so |z| > 5.5 (3.8e-8 each) has a chance below 1e-5 if everything is right; seeds are fixed.
"""

import pytest
import torch

from softrl.estimators import single_step
from softrl.estimators.single_step import (
    SINGLE_STEP_ESTIMATORS,
    DrawRandom,
    Rebar,
    Relax,
    conditional_slope,
    make_single_step,
    sampled_categories,
)
from softrl.studies.one_step import categorical, exact_objective, expectation_over_categories
from softrl.tokens.noise import gumbel_posterior

BOUND = 5.5
ROUNDING = 1e-12
UNBIASED = {  # G of a draw: what makes a bias of 5% visible in the draws below
    "reinforce": {"num_samples": 400},
    "reinforce, baseline": {"num_samples": 250, "baseline": 1.5},
    "rloo": {"num_samples": 60},
    "local_expectation": {"num_samples": 4},
    "rebar": {"num_samples": 60},
    "rebar, independent": {"num_samples": 60, "coupled": False},
    "rebar, weak and cold": {"num_samples": 100, "scale": 0.6, "temperature": 0.3},
    "relax": {"num_samples": 60, "fit_steps": 40},
    "relax, independent": {"num_samples": 60, "fit_steps": 40, "coupled": False},
}
BIASED_FOR = {
    "softmax": "quadratic",
    "gumbel_softmax": "linear",
    "straight_through": "quadratic",
    "st_gumbel": "linear",
    "gumbel_rao": "linear",
    "reinmax": "cubic",
}


def two_latents():
    """Logits [2, 3] and a reward that no latent can be scored alone in, cubic in both together."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    first, second, pair = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64)

    def reward(q):
        linear = (q * first).sum((-1, -2))
        return 1.5 + 2 * linear + (q * second).sum((-1, -2)).square() + 2 * (q * pair).sum(-1).prod(-1) * linear

    return logits, reward


def truth_of(logits, reward):
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(exact_objective(leaf, reward), leaf)[0]


def fitted(name, logits, reward):
    estimator = make_single_step(name.split(",")[0], UNBIASED[name])
    return estimator.fit(logits, reward, seed=8) if isinstance(estimator, Relax) else estimator


def worst_z(estimates, truth):
    """The largest |z| of the mean over draws; a draw that never varies is compared to rounding."""
    error = estimates.std(0) / len(estimates) ** 0.5
    return ((estimates.mean(0) - truth).abs() / error.clamp(min=ROUNDING)).max().item()


@pytest.mark.parametrize("num_categories", [2, 3, 6, 11])
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_bias(num_categories, seed):
    """Linear: none for straight-through; quadratic: none for ReinMax, but for straight-through; cubic: both."""

    def bias(name, kind, **settings):
        problem = categorical(kind, num_categories, seed)
        truth = problem.truth()
        return ((problem.exact_mean(name, settings) - truth).norm() / truth.norm()).item()

    assert bias("straight_through", "linear") < ROUNDING
    assert bias("reinmax", "linear") < ROUNDING
    assert bias("reinmax", "quadratic") < ROUNDING
    assert bias("straight_through", "quadratic") > 0.05
    assert bias("reinmax", "cubic") > 0.01
    assert bias("reinmax", "linear", temperature=2.0) > 0.02
    for exact in ("reinforce", "local_expectation"):
        assert bias(exact, "cubic") < ROUNDING


def test_every_estimator_is_either_here_or_there():
    unbiased = {name for name in SINGLE_STEP_ESTIMATORS if make_single_step(name).unbiased_for == "hard"}
    assert unbiased == {name.split(",")[0] for name in UNBIASED}
    assert set(SINGLE_STEP_ESTIMATORS) - unbiased == set(BIASED_FOR)


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_ones_and_the_bound_sees_five_percent(name):
    logits, reward = two_latents()
    estimates = fitted(name, logits, reward).gradients(logits, reward, 5, range(4000))
    truth = truth_of(logits, reward)
    assert worst_z(estimates, truth) < BOUND
    assert worst_z(estimates + 0.05 * truth, truth) > BOUND


@pytest.mark.parametrize("name", BIASED_FOR)
def test_biased_ones_fail_the_bound(name):
    problem = categorical(BIASED_FOR[name])
    estimates = problem.draw(name, {"num_samples": 8}, 0, 2000).gradients
    assert worst_z(estimates, problem.truth()) > BOUND


def test_one_latent_makes_local_expectations_exact():
    problem = categorical("cubic")
    estimates = problem.draw("local_expectation", {}, 0, 20).gradients
    assert ((estimates - problem.truth()).norm(dim=-1) / problem.truth().norm()).max() < ROUNDING


def test_score_functions_by_hand_and_what_baselines_and_scales_are():
    """None of these changes a mean, so that z-scores cannot see them."""
    logits, reward = two_latents()

    def estimates(name, function=reward, **settings):
        return make_single_step(name, {"num_samples": 3} | settings).gradients(logits, function, 2, range(6))

    tokens = torch.tensor([[[2, 0]]])
    sampled = torch.eye(3, dtype=torch.float64)[tokens[0, 0]]
    single = make_single_step("reinforce").gradients(logits, reward, 0, range(1), tokens)
    torch.testing.assert_close(single[0], reward(sampled) * (sampled - logits.softmax(-1)))
    torch.testing.assert_close(estimates("reinforce", baseline=0.7), estimates("reinforce", lambda q: reward(q) - 0.7))
    torch.testing.assert_close(estimates("rloo"), estimates("rloo", lambda q: reward(q) + 11.0))
    for coupled in (True, False):
        weak, none, full = (estimates("rebar", scale=scale, coupled=coupled) for scale in (0.6, 0.0, 1.0))
        torch.testing.assert_close(none, estimates("reinforce"))
        torch.testing.assert_close(weak, 0.4 * none + 0.6 * full)
        assert not torch.allclose(full, none)


def test_local_expectation_by_hand():
    """Against its definition, one latent and one value at a time."""
    logits, reward = two_latents()
    tokens = torch.tensor([[[2, 0]], [[1, 1]]])
    estimates = make_single_step("local_expectation").gradients(logits, reward, 0, range(2), tokens)
    eye, probs = torch.eye(3, dtype=torch.float64), logits.softmax(-1)
    for draw in range(2):
        for latent in range(2):
            values = []
            for value in range(3):
                chosen = tokens[draw, 0].clone()
                chosen[latent] = value
                values.append(reward(eye[chosen]))
            values = torch.stack(values)
            expected = probs[latent] * (values - (probs[latent] * values).sum())
            torch.testing.assert_close(estimates[draw, latent], expected)


def test_gumbel_rao_has_the_mean_of_st_gumbel_and_less_variance():
    problem = categorical("quadratic")
    plain = problem.draw("st_gumbel", {"temperature": 0.5}, 0, 20_000).gradients
    averaged = problem.draw(
        "gumbel_rao", {"temperature": 0.5, "num_draws": 8}, 20_000, 10_000
    ).gradients  # other draws
    error = (plain.var(0) / len(plain) + averaged.var(0) / len(averaged)).sqrt()
    assert ((plain.mean(0) - averaged.mean(0)).abs() / error).max() < BOUND
    assert averaged.var(0).sum() < 0.8 * plain.var(0).sum()
    more = problem.draw("gumbel_rao", {"temperature": 0.5, "num_draws": 32}, 0, 4_000).gradients
    assert more.var(0).sum() < averaged.var(0).sum()


def test_variances_fall_from_reinforce_to_rebar_to_relax():
    problem = categorical("quadratic")
    variances = [
        problem.draw(name, settings, 0, 8000).gradients.var(0).sum().item()
        for name, settings in (("reinforce", {}), ("rebar", {}), ("relax", {"fit_steps": 150}))
    ]
    assert variances[1] < 0.7 * variances[0]
    assert variances[2] < 0.9 * variances[1]


def test_conditional_slope_is_the_samplers_derivative():
    """Against autograd through `−log(E_v/π_v + exp(−y_winner))`, with the exponentials of the draw held fixed."""
    logits, _ = two_latents()
    random = DrawRandom(0, range(50), 2)
    tokens = sampled_categories(logits, random)
    log_probs = logits.log_softmax(-1).expand(50, 1, 2, 3)
    y = gumbel_posterior(log_probs.flatten(0, 2), tokens.flatten(), random).reshape(log_probs.shape)
    winner = y.gather(-1, tokens[..., None])
    exponentials = log_probs.exp() * ((-y).exp() - (-winner).exp())  # what the draw was made of; 0 for the winner
    leaf = log_probs.clone().requires_grad_()
    others = -(exponentials / leaf.exp() + (-winner).exp()).log()
    torch.testing.assert_close(others.detach(), y)
    (expected,) = torch.autograd.grad(others.sum(), leaf)
    torch.testing.assert_close(conditional_slope(y, tokens), expected)


def test_posterior_noise_as_a_constant_would_bias_rebar(monkeypatch):
    logits, reward = two_latents()
    monkeypatch.setattr(single_step, "conditional_slope", lambda perturbed, tokens: torch.ones_like(perturbed))
    estimates = Rebar(60, coupled=False).gradients(logits, reward, 5, range(4000))
    assert worst_z(estimates, truth_of(logits, reward)) > BOUND


@pytest.mark.parametrize("name", [*UNBIASED, *BIASED_FOR])
def test_draws_do_not_depend_on_how_they_are_batched_and_rewards_are_counted(name):
    logits, reward = two_latents()
    estimator = fitted(name, logits, reward) if name in UNBIASED else make_single_step(name, {"num_samples": 3})
    calls = 0

    def counting(q):
        nonlocal calls
        calls += q.shape[:-2].numel()
        return reward(q)

    together = estimator.gradients(logits, counting, 4, range(7))
    assert calls == 7 * estimator.cost(2, 3).reward_calls
    apart = torch.cat([estimator.gradients(logits, reward, 4, part) for part in (range(3), range(3, 4), range(4, 7))])
    torch.testing.assert_close(apart, together, rtol=1e-12, atol=1e-14)
    if name != "softmax":
        assert not torch.allclose(estimator.gradients(logits, reward, 6, range(7)), together)


def test_fit_is_reproducible_and_touches_no_global_generator():
    logits, reward = two_latents()
    state = torch.get_rng_state()
    first, second = (Relax(fit_steps=3).fit(logits, reward, seed=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.surrogate.parameters(), second.surrogate.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
    unfitted = Relax(fit_steps=0).fit(logits, reward, seed=2)
    torch.testing.assert_close(
        unfitted.gradients(logits, reward, 1, range(5)), Rebar().gradients(logits, reward, 1, range(5))
    )
    assert not torch.allclose(
        first.gradients(logits, reward, 1, range(5)), Rebar().gradients(logits, reward, 1, range(5))
    )


def test_what_is_refused():
    logits, reward = two_latents()
    with pytest.raises(ValueError, match=r"relax has no surrogate yet; call its fit"):
        Relax().gradients(logits, reward, 0, range(2))
    with pytest.raises(ValueError, match="num_samples must be at least 2 here, got 1"):
        make_single_step("rloo", {"num_samples": 1})
    with pytest.raises(ValueError, match="temperature must be positive"):
        make_single_step("rebar", {"temperature": 0.0})
    with pytest.raises(ValueError, match="temperature must be positive"):
        make_single_step("reinmax", {"temperature": -1.0})
    with pytest.raises(ValueError, match="estimator must be one of"):
        make_single_step("gumbel")
    with pytest.raises(
        ValueError, match=r"reinforce takes the settings \['baseline', 'num_samples'\], got \['scale'\]"
    ):
        make_single_step("reinforce", {"scale": 1.0})
    for name in ("rloo", "st_gumbel", "rebar"):
        with pytest.raises(ValueError, match="depends on other noise"):
            expectation_over_categories(make_single_step(name), logits, reward)
