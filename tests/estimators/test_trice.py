"""The chain of `trice`: visits against walks through all outcomes, transition matrices and the posterior."""

from dataclasses import replace

import pytest
import torch
from estimators.thought_problem import H, Problem, all_sets, apart, expected

from softrl.estimators.thought_rules import make_thought_rule, visit_shares


def walked_shares(log_weights):
    """Expected visits of one row of proposals: both outcomes of every step, followed with their probabilities."""
    visits = torch.zeros_like(log_weights)

    def follow(step, position, probability):
        visits[position] += probability
        if step + 1 == len(log_weights):
            return
        accept = min(1.0, float((log_weights[step + 1] - log_weights[position]).exp()))
        for moved, chance in ((step + 1, accept), (position, 1.0 - accept)):
            if chance > 0.0:
                follow(step + 1, moved, probability * chance)

    follow(0, 0, 1.0)
    return visits / len(log_weights)


@pytest.mark.parametrize("off_policy", [False, True], ids=["own", "proposal"])
def test_visits_against_a_walk_through_all_outcomes(off_policy):
    """10^5 chains of each of 4 sets of 4: 32 z-scores; |z| > 5 has a chance below 2e-5 in all of them."""
    problem = Problem()
    scored = problem.scored(torch.tensor([[0, 1, 2, 3], [3, 1, 1, 0], [2, 2, 0, 1], [1, 3, 0, 2]]), off_policy)
    log_weights = scored.used_rewards() + scored.log_importance()
    generator = torch.Generator().manual_seed(5)
    for row in log_weights:
        many = row.expand(100_000, -1)
        shares = visit_shares(many, torch.rand(many.shape, generator=generator, dtype=torch.float64))
        assert torch.equal(shares.sum(-1), torch.ones(len(shares), dtype=torch.float64))
        error = shares.std(0).clamp(min=1e-12) / len(shares) ** 0.5
        assert ((shares.mean(0) - walked_shares(row)).abs() / error).max() < 5.0


def chain_shares(log_weights, proposal, length):
    """Expected share of time of the chain at every thought, by powers of its transition matrix."""
    moves = proposal * (log_weights[None, :] - log_weights[:, None]).clamp(max=0.0).exp()
    moves = moves + torch.diag(1.0 - moves.sum(-1))
    state, total = proposal, torch.zeros_like(proposal)
    for _ in range(length):
        total, state = total + state, state @ moves
    return total / length


def test_visits_near_the_posterior():
    """Shares of 4,000 chains of 10 and of 400 proposals, against the chain's exact ones: 8 z-scores, |z| > 5 has a
    chance below 5e-6. The exact ones are within 0.03 of p(h | x, y) at 400, and 10 times nearer than at 10."""
    problem, generator = Problem(), torch.Generator().manual_seed(6)
    posterior = (problem.log_policy() + problem.rewards()).softmax(0).detach()
    proposal = problem.log_proposal.exp()
    sets = torch.multinomial(proposal.expand(4000, -1), 400, True, generator=generator)
    uniforms = torch.rand(sets.shape, generator=generator, dtype=torch.float64)
    rule, distance = make_thought_rule("trice"), {}
    for length in (10, 400):
        kept = sets[:, :length]
        weights = rule.talk_weights(problem.scored(kept, True, uniforms=uniforms[:, :length]))
        shares = torch.stack([(weights * (kept == thought)).sum(-1) for thought in range(H)], -1)
        exact = chain_shares(posterior.log() - proposal.log(), proposal, length)
        assert ((shares.mean(0) - exact).abs() / (shares.std(0) / len(sets) ** 0.5)).max() < 5.0
        distance[length] = float((exact - posterior).abs().max())
    assert distance[400] < 0.03
    assert distance[400] < distance[10] / 10
    assert (proposal - posterior).abs().max() > 0.1, "a proposal at its target shows nothing"


@pytest.mark.parametrize("off_policy", [False, True], ids=["own", "proposal"])
def test_trices_control_variate_changes_no_expectation(off_policy):
    """By enumeration at fixed uniforms: the acceptances are then a function of the set."""
    plain = expected(make_thought_rule("trice", {"control": 0.0}), 3, off_policy)
    for control in (1.0, 0.4, "leave_one_out"):
        varied = expected(make_thought_rule("trice", {"control": control}), 3, off_policy)
        assert apart(varied, plain) < 1e-10


def test_trice_has_no_noise_where_thoughts_do_not_matter():
    problem, sets = Problem(), all_sets(3)
    flat = replace(problem.scored(sets), rewards=torch.full(sets.shape, -1.0, dtype=torch.float64))
    for control in (1.0, "leave_one_out"):
        coefficients = make_thought_rule("trice", {"control": control}).coefficients(flat)
        assert coefficients.abs().max() < 1e-12
    assert make_thought_rule("trice", {"control": 0.0}).coefficients(flat).min() > 0.3
