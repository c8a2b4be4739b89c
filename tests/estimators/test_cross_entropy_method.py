"""The cross-entropy method: a round by hand, searches with known answers, and searches after every token of a text."""

import itertools

import pytest
import torch

from softrl.estimators.cross_entropy_method import (
    DiscreteProposal,
    GaussianProposal,
    SearchSettings,
    cross_entropy_search,
    elites_of,
)
from softrl.estimators.latent_thoughts import searched_thoughts
from softrl.models.reasoner import ReasonerForCausalLM
from softrl.models.reasoner_config import ReasonerConfig


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def uniforms_of(*shape, seed=0):
    """Random numbers of every round, by its index."""
    return lambda index: torch.rand(
        *shape, generator=torch.Generator().manual_seed(1000 * seed + index), dtype=torch.float64
    )


# A round by hand.


def test_elites_are_the_best_and_of_equals_the_first():
    values = torch.tensor([[[3], [1], [4], [1]], [[0], [2], [2], [9]]])
    elites, rewards = elites_of(values, doubles([0.1, 0.7, 0.3, 0.7], [5.0, 5.0, 6.0, 5.0]), 2)
    assert elites.tolist() == [[[1], [1]], [[2], [0]]]
    torch.testing.assert_close(rewards, doubles([0.7, 0.7], [6.0, 5.0]))
    marked = torch.arange(4).expand(2, 4)
    assert elites_of(marked, doubles([0.1, 0.7, 0.3, 0.7], [5.0, 5.0, 6.0, 5.0]), 3)[0].tolist() == [
        [1, 3, 2], [2, 0, 1],
    ]  # fmt: skip


def test_codes_move_to_the_elites_shares():
    proposal = DiscreteProposal(doubles([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]))  # one search of two parts
    elites = torch.tensor([[[0, 2], [0, 1], [2, 2], [0, 2]]])
    moved = proposal.updated(elites, 0.8)
    expected = doubles([[0.8 * 0.75 + 0.1, 0.06, 0.8 * 0.25 + 0.04], [0.04, 0.8 * 0.25 + 0.04, 0.8 * 0.75 + 0.12]])
    torch.testing.assert_close(moved.probs, expected)
    torch.testing.assert_close(proposal.updated(elites, 1.0).probs, doubles([[0.75, 0.0, 0.25], [0.0, 0.25, 0.75]]))


def test_vectors_move_to_the_elites_moments():
    """Maximum likelihood: the variance is the mean square and not Bessel's."""
    proposal = GaussianProposal(doubles([[1.0]]), doubles([[2.0]]))
    moved = proposal.updated(doubles([[[3.0]], [[7.0]]]).view(1, 2, 1, 1), 0.5)
    torch.testing.assert_close(moved.mean, doubles([[0.5 * 5.0 + 0.5]]))
    torch.testing.assert_close(moved.std, doubles([[0.5 * 2.0 + 1.0]]))


def test_a_round_draws_chooses_and_fits():
    """Quantiles 1/8, 3/8, 5/8, 7/8 of four equal codes are these four; with reward −|code − 2| the elites are 2, 1."""
    quarters = doubles([0.125, 0.375, 0.625, 0.875]).view(1, 4, 1, 1)
    settings = SearchSettings(1, 4, 2, 0.5)
    found = cross_entropy_search(
        DiscreteProposal.uniform(1, 1, 4), lambda codes: -(codes[..., 0] - 2.0).abs().double(), lambda _: quarters,
        settings,
    )  # fmt: skip
    assert found.elites.flatten().tolist() == [2, 1]
    assert found.rewards.tolist() == [[0.0, -1.0]]
    torch.testing.assert_close(found.proposal.probs, doubles([[0.125, 0.375, 0.375, 0.125]]))


# Searches.


@pytest.mark.parametrize("seed", [0, 1])
def test_it_finds_the_best_of_all_codes(seed):
    """Six searches over 6³ combinations, whose neighbouring parts interact."""
    tables = torch.randn(2, 6, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def score(codes):
        which = torch.arange(6)[:, None]
        pairs = tables[0][which, codes[..., 0], codes[..., 1]] + tables[1][which, codes[..., 1], codes[..., 2]]
        return 0.5 * pairs + codes[..., 0] - codes[..., 1] + codes[..., 2]

    every = torch.tensor(list(itertools.product(range(6), repeat=3))).expand(6, -1, -1)
    best = score(every).max(-1).values
    settings = SearchSettings(num_rounds=20, num_samples=100, num_elites=20, smoothing=0.3)
    found = cross_entropy_search(
        DiscreteProposal.uniform(6, 3, 6), score, uniforms_of(6, 100, 3, 1, seed=seed), settings
    )
    torch.testing.assert_close(found.rewards[:, 0], best)
    torch.testing.assert_close(score(found.elites), found.rewards)
    drawn_once = (
        score(DiscreteProposal.uniform(6, 3, 6).sample(uniforms_of(6, 100, 3, 1, seed=seed)(0))).max(-1).values
    )
    assert (drawn_once < best).any(), "one round would do"


def test_it_finds_the_maximum_of_a_quadratic():
    peaks = doubles([[0.7, -1.5]], [[2.0, 0.1]])

    def score(values):
        return -(values - peaks[:, None]).square().sum((-1, -2))

    settings = SearchSettings(num_rounds=40, num_samples=50, num_elites=8, smoothing=0.7)
    found = cross_entropy_search(GaussianProposal.standard(2, 1, 2), score, uniforms_of(2, 50, 1, 2), settings)
    torch.testing.assert_close(found.proposal.mean, peaks, rtol=0.0, atol=1e-3)
    assert found.proposal.std.max() < 1e-3
    moved = peaks + 0.1
    assert (found.proposal.mean - moved).abs().min() > 0.05, "another peak would not do"


def test_it_escapes_a_local_maximum_that_a_gradient_stays_in():
    """Two bumps: the lower one at the start, the higher one 3 standard deviations away."""

    def reward(values):
        return (-values.square()).exp() + 2.0 * (-(values - 3.0).square()).exp()

    settings = SearchSettings(num_rounds=30, num_samples=400, num_elites=2, smoothing=1.0)
    found = cross_entropy_search(
        GaussianProposal.standard(1, 1, 1),
        lambda values: reward(values)[..., 0, 0],
        uniforms_of(1, 400, 1, 1),
        settings,
    )
    assert float(found.proposal.mean) == pytest.approx(3.0, abs=0.01)
    value = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        (grad,) = torch.autograd.grad(reward(value), value)
        value = (value + 0.1 * grad).detach().requires_grad_()
    assert value.detach().abs() < 0.1


# After every token of a text.


@pytest.mark.parametrize("kind", ["discrete", "gaussian"])
def test_searches_after_tokens_find_what_enumeration_finds(kind):
    torch.manual_seed(0)
    model = ReasonerForCausalLM(
        ReasonerConfig(
            vocab_size=7, base_lm_size=6, reasoner_size=6, interpreter_size=6, latent_kind=kind, num_latents=4,
            latent_size=1, n_thought=2 if kind == "discrete" else 1,
        )
    ).double()  # fmt: skip
    ids = torch.randint(0, 7, (2, 4), generator=torch.Generator().manual_seed(1))
    targets = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    settings = SearchSettings(num_rounds=6, num_samples=40, num_elites=4, smoothing=0.8)
    found = searched_thoughts(model, ids, None, targets, settings, seed=3)
    if kind == "discrete":
        every = torch.tensor(list(itertools.product(range(4), repeat=2)))
    else:
        every = torch.linspace(-3.0, 3.0, 601, dtype=torch.float64)[:, None, None]
    values = every.expand(2, 4, *every.shape)
    with torch.no_grad():
        talk = model(ids, values=values).talk_log_probs
        again = model(ids, values=found.values).talk_log_probs
    every_reward = talk.gather(-1, targets[:, :, None, None].expand(*talk.shape[:3], 1))[..., 0]
    best, spread = every_reward.max(-1).values, every_reward.max(-1).values - every_reward.mean(-1)
    if kind == "discrete":
        torch.testing.assert_close(found.rewards[..., 0], best)
    else:  # a peak may lie outside of where the search begins
        assert ((best - found.rewards[..., 0]) < 0.3 * spread).all()
    rewards = again.gather(-1, targets[:, :, None, None].expand(*again.shape[:3], 1))[..., 0]
    torch.testing.assert_close(found.rewards, rewards)
    if kind == "discrete":  # with the prediction's entropy in the reward, others are best
        entropy = -(talk.exp() * talk).sum(-1)
        many = SearchSettings(num_rounds=1, num_samples=200, num_elites=1)  # 16 thoughts
        scored = searched_thoughts(model, ids, None, targets, many, seed=3, beta=20.0)
        torch.testing.assert_close(scored.rewards[..., 0], (every_reward + 20.0 * entropy).max(-1).values)
        chosen = (every_reward + 20.0 * entropy).argmax(-1)
        assert torch.equal(scored.values[:, :, 0], every[chosen])
        assert not torch.equal(chosen, every_reward.argmax(-1))
    alone = searched_thoughts(model, ids[1:], None, targets[1:], settings, seed=3, row_ids=[1])
    assert torch.equal(alone.values[0], found.values[1]), "a row's search is its own"


# What is refused.


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"num_elites must be at least 1 and below num_samples=4, .* got 4"):
        SearchSettings(num_samples=4, num_elites=4)
    with pytest.raises(ValueError, match=r"smoothing must lie in \(0, 1\], got 0.0"):
        SearchSettings(smoothing=0.0)
    with pytest.raises(ValueError, match="num_rounds must be at least 1, got 0"):
        SearchSettings(num_rounds=0)
    with pytest.raises(ValueError, match="a reward of round 0 is not finite"):
        cross_entropy_search(
            DiscreteProposal.uniform(1, 1, 3), lambda codes: codes[..., 0].double() / 0.0, uniforms_of(1, 8, 1, 1),
            SearchSettings(1, 8, 2),
        )  # fmt: skip
    model = ReasonerForCausalLM(ReasonerConfig(vocab_size=7, latent_kind="soft"))
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"needs discrete or Gaussian latents, got .*latent_kind='soft'"):
        searched_thoughts(model, ids, None, ids, SearchSettings(), 0)
