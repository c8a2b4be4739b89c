"""Relaxations: what they keep, feed and differentiate; samples and posterior noise against their distributions."""

from dataclasses import replace

import pytest
import torch
from helpers import ALL_RELAXATIONS

from softrl.tokens.embedding import mixture_embedding
from softrl.tokens.noise import SequenceRandom, gumbel_posterior, sequence_seed
from softrl.tokens.relaxation import RELAXATIONS, GumbelRao, ReinMax, StraightThroughGumbel, make_relaxation
from softrl.tokens.truncation import Truncation, nucleus, sampler_log_probs
from softrl.types import Support

V = 12


def logits_of(rows, seed=0):
    return torch.randn(1, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).repeat(rows, 1) * 1.5


def streams(rows, step=0):
    return SequenceRandom.keyed(3, step, list(range(rows)), 1)


def z_scores(tokens, probs):
    """Of observed frequencies; |z| > 4.4 in one of 12 has a chance of 1e-4 if the sampler is right."""
    counts = torch.bincount(tokens, minlength=V).double()
    expected = len(tokens) * probs
    return (counts - expected) / (expected * (1 - probs)).clamp(min=1e-9).sqrt()


@pytest.mark.parametrize("name", ALL_RELAXATIONS)
def test_weights_sum_to_one_on_the_kept_support(name):
    relaxation = make_relaxation(name, Truncation(5, top_p=0.9, min_p=0.05), 0.7)
    logits = logits_of(50)
    support = relaxation.draw(logits, streams(50))
    p = relaxation.weights(logits.gather(-1, support.ids), support)
    q = relaxation.fed(p, support)
    torch.testing.assert_close(p.sum(-1), torch.ones(50, dtype=torch.float64))
    assert (p[~support.kept] == 0).all()
    assert (nucleus(logits, relaxation.truncation).gather(-1, support.ids) == support.kept).all()
    assert all(len(set(row)) == 5 for row in support.ids.tolist())
    if relaxation.feeds_one_hot:
        assert (q.argmax(-1) == support.choice).all()
        assert ((q == 0) | (q == 1)).all()
    else:
        assert q is p
        assert (p.argmax(-1) == support.choice).all()


@pytest.mark.parametrize("name", ["gumbel_softmax", "st_gumbel", "gumbel_rao"])
def test_hard_choice_is_a_sample_of_the_policy(name):
    draws = 20_000
    relaxation = make_relaxation(name, Truncation(4))
    logits = logits_of(draws)
    tokens = relaxation.draw(logits, streams(draws)).tokens()
    assert z_scores(tokens, logits[0].softmax(-1)).abs().max() < 4.4
    assert z_scores(tokens, logits[0].mul(0.8).softmax(-1)).abs().max() > 4.4, "another temperature would show"


@pytest.mark.parametrize("name", ["straight_through", "reinmax"])
def test_straight_through_samples_its_own_weights(name):
    draws = 20_000
    relaxation = make_relaxation(name, Truncation(4))
    logits = logits_of(draws)
    support = relaxation.draw(logits, streams(draws))
    kept = sampler_log_probs(logits[:1], relaxation.truncation).exp().topk(4)
    expected = torch.zeros(V, dtype=torch.float64).scatter(0, kept.indices[0], kept.values[0] / kept.values.sum())
    assert z_scores(support.tokens(), expected).abs().max() < 4.4


def test_nucleus_matches_transformers_warpers():
    from transformers.generation.logits_process import MinPLogitsWarper, TopPLogitsWarper

    logits = torch.randn(40, V, generator=torch.Generator().manual_seed(2)) * 2
    for ours, theirs in (
        (Truncation(1, top_p=0.8), TopPLogitsWarper(0.8)),
        (Truncation(1, min_p=0.1), MinPLogitsWarper(0.1)),
    ):
        assert (nucleus(logits, ours) == torch.isfinite(theirs(None, logits))).all()


def test_posterior_noise_has_the_joint_law_of_gumbel_noise():
    """Sample the id first, the noise from its posterior: y − log π must be standard Gumbel in every coordinate."""
    draws = 20_000
    log_probs = logits_of(draws).log_softmax(-1)
    tokens = torch.multinomial(log_probs[0].exp(), draws, replacement=True, generator=torch.Generator().manual_seed(0))
    perturbed = gumbel_posterior(log_probs, tokens, streams(draws))
    assert (perturbed.argmax(-1) == tokens).all()
    noise = perturbed - log_probs
    # mean γ and variance π²/6; z-scores of 12 coordinates and all 66 covariances
    standard = (noise - 0.57721566) / (torch.pi / 6**0.5)
    assert (standard.mean(0) * draws**0.5).abs().max() < 4.5
    assert ((standard.square().mean(0) - 1) * (draws / 4.4) ** 0.5).abs().max() < 4.5  # Var of g² = kurtosis 5.4 − 1
    covariance = standard.T @ standard / draws - torch.eye(V)
    covariance.fill_diagonal_(0)
    assert (covariance * draws**0.5).abs().max() < 4.8
    # Without the truncation below the winner the coordinates would not be independent of it
    biased = perturbed.clone()
    biased[:, 0] += 0.1
    assert (((biased - log_probs - 0.57721566) / (torch.pi / 6**0.5)).mean(0) * draws**0.5).abs().max() > 4.5


@pytest.mark.parametrize("name", ALL_RELAXATIONS)
def test_given_tokens_become_the_hard_choice(name):
    relaxation = make_relaxation(name, Truncation(3))
    logits = logits_of(V)
    tokens = torch.arange(V)  # rare ones too, which the top three do not hold
    support = relaxation.draw(logits, streams(V), tokens)
    assert (support.tokens() == tokens).all()
    p = relaxation.weights(logits.gather(-1, support.ids), support)
    assert torch.isfinite(p).all()
    if name in ("gumbel_softmax", "st_gumbel"):
        assert (p.argmax(-1) == support.choice).all()


@pytest.mark.parametrize("name", ALL_RELAXATIONS)
def test_given_tokens_from_beyond_the_nucleus_are_kept(name):
    """A generation engine rounds otherwise, and may draw from just outside what our numbers keep."""
    relaxation = make_relaxation(name, Truncation(V, top_p=0.5))
    logits, tokens = logits_of(V), torch.arange(V)
    assert not nucleus(logits, relaxation.truncation).all()
    support = relaxation.draw(logits, streams(V), tokens)
    kept = support.kept.gather(-1, support.choice[:, None]).squeeze(-1)
    p = relaxation.weights(logits.gather(-1, support.ids), support)
    assert (support.tokens() == tokens).all()
    assert kept.all()
    assert torch.isfinite(p).all()
    assert (p > 0).sum(-1).max() < V  # the rest of what is outside stays outside


def test_posterior_refuses_impossible_tokens_and_large_vocabularies_stay_finite():
    with pytest.raises(ValueError, match="probability zero under log_probs"):
        gumbel_posterior(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]), streams(1))
    log_probs = (torch.randn(2, 50_000) * 20).log_softmax(-1)
    perturbed = gumbel_posterior(log_probs, log_probs.argmin(-1), streams(2))
    assert torch.isfinite(perturbed).all()
    assert (perturbed.argmax(-1) == log_probs.argmin(-1)).all()


def test_linear_reward_has_no_bias_under_straight_through_but_has_one_under_st_gumbel():
    """E[r·J] by draws against the exact gradient of E_π[r]: z under 4.5 for plain ST, far over it for ST-Gumbel."""
    draws = 40_000
    logits = logits_of(1).repeat(draws, 1).requires_grad_()
    values = torch.linspace(-1, 1, V, dtype=torch.float64).roll(5)
    pi = logits[0].detach().softmax(-1)
    exact = pi * (values - (pi * values).sum())
    worst = {}
    for name in ("straight_through", "st_gumbel"):
        relaxation = make_relaxation(name, Truncation(V), 1.0 if name == "straight_through" else 0.5)
        support = relaxation.draw(logits.detach(), streams(draws))
        p = relaxation.weights(logits.gather(-1, support.ids), support)
        (grads,) = torch.autograd.grad((p * values[support.ids]).sum(), logits)
        error = grads.std(0) / draws**0.5
        # plain ST's Jacobian does not depend on the draw: its error is rounding
        worst[name] = ((grads.mean(0) - exact).abs() / error.clamp(min=1e-12)).max().item()
    assert worst["straight_through"] < 4.5
    assert worst["st_gumbel"] > 10


def jacobians(relaxation, kept_logits, support):
    """∂p/∂z of every row, [N, K, K]."""
    function = torch.func.jacrev(lambda logits: relaxation.weights(logits, support).sum(0))
    return function(kept_logits).permute(1, 0, 2)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_reinmax_is_the_second_order_jacobian_at_the_policys_own_weights(temperature):
    """`2 J((softmax(z/τ) + D) / 2) − J(π) / 2`, `J(p) = diag(p) − p pᵀ`, also where a nucleus removed kept ids."""
    relaxation = ReinMax(Truncation(6, min_p=0.1), temperature)
    logits = logits_of(20)
    support = relaxation.draw(logits, streams(20))
    assert not support.kept.all()
    kept_logits = logits.gather(-1, support.ids)
    clean = kept_logits.masked_fill(~support.kept, -torch.inf)
    pi = clean.softmax(-1)
    torch.testing.assert_close(relaxation.weights(kept_logits, support), pi)

    def softmax_jacobian(p):
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]

    middle = ((clean / temperature).softmax(-1) + relaxation.fed(pi, support)) / 2
    expected = 2 * softmax_jacobian(middle) - softmax_jacobian(pi) / 2
    torch.testing.assert_close(jacobians(relaxation, kept_logits, support), expected)


def test_gumbel_rao_is_the_mean_over_its_draws_of_straight_through_gumbel():
    """Weights and Jacobian, from the noises it recorded; each of which makes the sampled id the largest."""
    relaxation, single = (kind(Truncation(6, min_p=0.1), 0.7) for kind in (GumbelRao, StraightThroughGumbel))
    logits = logits_of(20)
    support = relaxation.draw(logits, streams(20))
    kept_logits = logits.gather(-1, support.ids)
    assert support.draws.shape == (20, 16, 6)
    perturbed = (kept_logits[:, None] + support.draws).masked_fill(~support.kept[:, None], -torch.inf)
    assert (perturbed.argmax(-1) == support.choice[:, None]).all()
    each = [replace(support, noise=noise, draws=None) for noise in support.draws.unbind(1)]
    weights = torch.stack([single.weights(kept_logits, one) for one in each]).mean(0)
    torch.testing.assert_close(relaxation.weights(kept_logits, support), weights)
    expected = torch.stack([jacobians(single, kept_logits, one) for one in each]).mean(0)
    torch.testing.assert_close(jacobians(relaxation, kept_logits, support), expected)


def test_gumbel_rao_averages_as_many_draws_as_asked_for_and_records_of_it_keep_them():
    relaxation = make_relaxation("gumbel_rao", Truncation(4), num_draws=3)
    steps = [relaxation.draw(logits_of(5), streams(5, step)) for step in range(2)]
    stacked = Support.stacked(steps)
    assert stacked.draws.shape == (5, 2, 3, 4)
    assert torch.equal(stacked.at(slice(None), 1).draws, steps[1].draws)
    assert stacked.flat().draws.shape == (10, 3, 4)
    assert not torch.equal(steps[0].draws[:, 0], steps[0].draws[:, 1])
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        make_relaxation("gumbel_rao", Truncation(4), num_draws=0)


@pytest.mark.parametrize("name", ["gumbel_rao", "reinmax"])
def test_an_entropy_bound_does_not_fit_jacobians_that_are_not_one_softmax(name):
    with pytest.raises(ValueError, match=rf"max_entropy_nats=0.5 does not apply to relaxation '{name}'"):
        make_relaxation(name, Truncation(4), max_entropy_nats=0.5)


def test_mixture_embedding_norms():
    vectors = torch.randn(5, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one_hot = torch.eye(7, dtype=torch.float64)[torch.arange(5)]
    for correction in ("none", "inverse_l2", "match"):
        torch.testing.assert_close(
            mixture_embedding(one_hot, vectors, correction), vectors[torch.arange(5), torch.arange(5)]
        )
    weights = torch.rand(5, 7, dtype=torch.float64).softmax(-1)
    plain = (weights[..., None] * vectors).sum(1)
    torch.testing.assert_close(mixture_embedding(weights, vectors), plain)
    matched = mixture_embedding(weights, vectors, "match").norm(dim=-1)
    torch.testing.assert_close(matched, (weights * vectors.norm(dim=-1)).sum(-1))
    torch.testing.assert_close(
        mixture_embedding(weights, vectors, "inverse_l2") * weights.norm(dim=-1)[:, None], plain
    )


def test_random_streams_belong_to_sequences_not_to_batches():
    together = SequenceRandom.keyed(1, 5, [10, 11, 12], 2).gumbel(4, torch.float64)
    apart = torch.cat([SequenceRandom.keyed(1, 5, [index], 2).gumbel(4, torch.float64) for index in (10, 11, 12)])
    assert torch.equal(together, apart)
    assert len({sequence_seed(*key) for key in ((0, 1), (1, 0), (0, 1, 0), (10,), (1, 2, 3))}) == 5
    assert not torch.equal(together, SequenceRandom.keyed(1, 6, [10, 11, 12], 2).gumbel(4, torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"truncation": Truncation(4), "temperature": 0.0}, "relaxation temperature must be positive"),
        ({"truncation": Truncation(4), "max_entropy_nats": 1.5}, r"\(0, log K\) = \(0, 1.3863\)"),
        ({"truncation": Truncation(4), "max_entropy_nats": 0.5, "temperature": 0.5}, "leave temperature at 1.0"),
    ],
)
def test_bad_relaxations_are_refused(arguments, message):
    for relaxation in RELAXATIONS.values():
        with pytest.raises(ValueError, match=message):
            relaxation(**arguments)


def test_bad_truncations_are_refused():
    for arguments, message in (
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_k": 2, "top_p": 0.0}, "top_p must lie in"),
        ({"top_k": 2, "min_p": 1.0}, "min_p must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            Truncation(**arguments)
    with pytest.raises(ValueError, match="top_k=50 is larger than the vocabulary, V=23"):
        Truncation(50).check_vocabulary(23)
    with pytest.raises(ValueError, match="relaxation must be one of"):
        make_relaxation("gumbel", Truncation(2))


def test_one_hot_tokens_feed_their_embedding_exactly_under_autocast():
    vectors = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.nn.functional.one_hot(torch.tensor([0, 2, 4]), 5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mixture_embedding(weights, vectors)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, vectors[torch.arange(3), torch.tensor([0, 2, 4])])
