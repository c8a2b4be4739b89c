"""Verdicts of the dual against HiGHS, and every acceptance against an independent checker."""

import numpy as np
import pytest
import torch
from contexts.basis_cases import random_case

from softrl.contexts.basis_certificate import certified_threshold, proves, proves_by_notes_bounds
from softrl.contexts.basis_reference import accepts_by_feasibility, reference_threshold
from softrl.contexts.basis_thresholds import Programs, certified_bound, verdicts

# k, τ, contexts; eight candidates each: 512 cases with V = 1,000 on four seeds a row
GRID = [
    (5, 0.003, 10), (5, 0.01, 10), (10, 0.003, 10), (10, 0.01, 10), (20, 0.003, 8), (20, 0.01, 8), (20, 0.05, 8),
]  # fmt: skip


@pytest.mark.parametrize(("num_directions", "tau", "num_contexts"), GRID)
def test_verdicts_and_thresholds_are_those_of_highs(num_directions, tau, num_contexts):
    accepted = total = 0
    for seed in range(num_contexts):
        case = random_case(seed, 1000, num_directions, tau, 8)
        levels = case.probs[case.tokens].numpy()
        reference = np.array(
            [
                reference_threshold(case.directions.numpy(), case.probs.numpy(), int(token), tau).threshold
                for token in case.tokens
            ]
        )
        found = verdicts(case.programs, case.tokens[None])
        assert (found.accepted[0].numpy() == (reference < levels)).all()
        assert not found.undecided.any()
        exact = verdicts(case.programs, case.tokens[None], exact=True)
        np.testing.assert_allclose(exact.upper[0].numpy(), reference, rtol=1e-6, atol=1e-8 * tau)
        np.testing.assert_allclose(exact.lower[0].numpy(), reference, rtol=1e-6, atol=1e-8 * tau)
        accepted, total = accepted + int(found.accepted.sum()), total + len(levels)
    assert total == 8 * num_contexts
    assert 0.1 * total < accepted < 0.98 * total  # both verdicts are put to the test


def test_the_grid_has_more_than_five_hundred_cases():
    assert 8 * sum(contexts for _, _, contexts in GRID) >= 500


@pytest.mark.parametrize("seed", range(4))
def test_the_vocabulary_beyond_the_first_tokens_counts(seed):
    """With few variables at first, most of the vocabulary enters by groups and by later rounds only."""
    case = random_case(seed, 3000, 8, 0.004, 12)
    levels = case.probs[case.tokens].numpy()
    reference = np.array(
        [
            reference_threshold(case.directions.numpy(), case.probs.numpy(), int(token), case.tau).threshold
            for token in case.tokens
        ]
    )
    found = verdicts(case.programs, case.tokens[None], first_size=48)
    assert (found.accepted[0].numpy() == (reference < levels)).all()
    assert not found.undecided.any()
    exact = verdicts(case.programs, case.tokens[None], first_size=48, exact=True)
    np.testing.assert_allclose(exact.upper[0].numpy(), reference, rtol=1e-6)


def test_contexts_of_a_batch_do_not_see_each_other():
    cases = [random_case(seed, 600, 6, 0.01, 5) for seed in range(3)]
    probs = torch.stack([case.probs for case in cases])
    tokens = torch.stack([case.tokens for case in cases])
    asked = torch.tensor([[True] * 5, [True, False, True, True, False], [True] * 5])
    tau = torch.full((3,), 0.01, dtype=torch.float64)
    together = verdicts(Programs(cases[0].directions, probs, tau), tokens, asked, first_size=100)
    own = torch.stack([case.directions for case in cases])
    separate = verdicts(Programs(own, probs, tau), tokens, asked, first_size=100)
    for row, case in enumerate(cases):
        alone = verdicts(Programs(cases[0].directions, probs[row : row + 1], tau[:1]), case.tokens[None])
        assert (together.accepted[row] == alone.accepted[0] & asked[row]).all()
        alone = verdicts(case.programs, case.tokens[None])
        assert (separate.accepted[row] == alone.accepted[0] & asked[row]).all()


def test_feasibility_and_optimisation_agree_in_highs():
    for seed in range(6):
        case = random_case(seed, 1000, 5, 0.01, 4)
        for token in case.tokens.tolist():
            arrays = (case.directions.numpy(), case.probs.numpy(), token)
            accepted = bool(reference_threshold(*arrays, case.tau).threshold < case.probs[token])
            assert accepts_by_feasibility(*arrays, case.tau) is accepted
            if accepts_by_feasibility(*arrays, None, "notes"):
                assert accepted  # the notes' bounds leave p more room


def test_every_acceptance_is_proved_to_an_independent_checker():
    num_proved = 0
    for seed in range(8):
        case = random_case(seed, 1000, 10, 0.005, 10)
        found = verdicts(case.programs, case.tokens[None], first_size=[1000, 64][seed % 2])
        for position, token in enumerate(case.tokens.tolist()):
            y = found.certificate[0, position].numpy()
            arrays = (case.directions.numpy(), case.probs.numpy(), token, case.tau)
            proved = proves(*arrays, y)
            assert proved == bool(found.accepted[0, position])
            assert certified_threshold(*arrays, y) <= float(found.upper[0, position]) * (1 + 1e-12)
            num_proved += proved
    assert num_proved > 20


def test_the_checker_refuses_what_proves_nothing():
    case = random_case(0, 200, 5, 0.02, 1)
    arrays = (case.directions.numpy(), case.probs.numpy(), int(case.tokens[0]), case.tau)
    assert certified_threshold(*arrays, np.zeros(6)) == np.inf
    y = np.append(-case.directions[case.tokens[0]].numpy(), 0.0)  # a_i < 0
    assert certified_threshold(*arrays, y) == np.inf
    ones = np.append(np.zeros(5), 3.0)
    assert certified_threshold(*arrays, ones) == pytest.approx(case.tau)  # the plain threshold, whatever the scale
    assert not proves(case.directions.numpy(), case.probs.numpy(), int(case.probs.argmax()), case.tau, ones + 1.0,
                      np.eye(5)[:1])  # fmt: skip


def test_a_bound_is_valid_for_any_y():
    """No y gets below HiGHS's optimum, and a random one is far above."""
    case = random_case(1, 500, 6, 0.02, 4)
    generator = torch.Generator().manual_seed(0)
    for token in case.tokens:
        y = torch.randn(20, 7, generator=generator, dtype=torch.float64)
        many = Programs(case.directions, case.probs.expand(20, -1), torch.full((20,), case.tau, dtype=torch.float64))
        bound, scaled = certified_bound(many, token.expand(20), y)
        least = reference_threshold(case.directions.numpy(), case.probs.numpy(), int(token), case.tau).threshold
        assert (bound >= least).all()
        assert torch.isinf(bound).any()
        assert torch.isfinite(bound).any()
        own = many.values(scaled[:, None])[:, 0, token]
        assert torch.allclose(own[torch.isfinite(bound)], torch.ones(()).double())


def test_without_directions_worth_having_the_threshold_is_tau():
    probs = torch.rand(1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probs = probs / probs.sum()
    programs = Programs(torch.zeros(50, 1, dtype=torch.float64), probs, torch.tensor([0.02], dtype=torch.float64))
    tokens = torch.arange(50)[None]
    found = verdicts(programs, tokens)
    assert (found.accepted == (probs > 0.02)).all()


def test_more_directions_accept_more_and_plain_thresholds_least():
    for seed in range(3):
        case = random_case(seed, 400, 24, 0.02, 60)
        tokens = torch.arange(400)[None]
        plain = case.probs > case.tau
        before = plain
        for k in (1, 4, 12, 24):
            programs = Programs(case.directions[:, :k].contiguous(), case.programs.probs, case.programs.tau)
            accepted = verdicts(programs, tokens).accepted[0]
            assert (accepted | ~before).all()  # before ⊆ accepted
            before = accepted
        assert before.sum() > plain.sum() + 10


def test_excluding_a_vector_is_leaving_its_direction_out():
    case = random_case(2, 500, 6, 0.01, 30)
    generator = torch.Generator().manual_seed(3)
    excluded = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(excluded, mode="complete").Q[:, 2:]
    limited = Programs(case.directions, case.probs[None], case.programs.tau, excluded[None])
    explicit = Programs(case.directions @ rotation, case.probs[None], case.programs.tau)
    with_vector = verdicts(limited, case.tokens[None], exact=True)
    without = verdicts(explicit, case.tokens[None], exact=True)
    assert torch.allclose(with_vector.upper, without.upper, rtol=1e-7)
    assert (excluded.T @ with_vector.certificate[0, :, :-1].T).abs().max() < 1e-9
    free = verdicts(case.programs, case.tokens[None], exact=True)
    assert (free.upper <= with_vector.upper * (1 + 1e-9)).all()
    assert (free.upper < 0.95 * with_vector.upper).any()


def test_a_solver_that_gives_up_rejects_and_says_so(monkeypatch):
    case = random_case(0, 300, 5, 0.02, 6)
    import softrl.contexts.basis_thresholds as module

    real = module.solve_dual

    def broken(problem, *arguments):
        solution = real(problem, *arguments, max_iterations=1)
        return solution

    monkeypatch.setattr(module, "solve_dual", broken)
    found = verdicts(case.programs, case.tokens[None])
    assert found.undecided.any()
    assert not (found.undecided & found.accepted).any()


def test_notes_bounds_have_certificates_too():
    """A corner of the hull of W's rows: no average of the other rows is as far out as p̂'s."""
    weight = np.array([[10.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-1.0, 0.0], [-0.5, 0.2]])
    probs = np.array([0.6, 0.1, 0.1, 0.1, 0.1])
    assert accepts_by_feasibility(weight, probs, 0, None, "notes")
    y = np.array([1.0, 0.0, 0.0])
    assert proves_by_notes_bounds(weight, probs, 0, y)
    assert not proves_by_notes_bounds(weight, probs, 1, np.array([0.0, 1.0, 0.0]))
    assert accepts_by_feasibility(weight, probs, 4, None, "notes") is False
