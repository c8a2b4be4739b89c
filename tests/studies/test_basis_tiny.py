"""The check of softrl maths, section 10: behind a norm W's constraints accept impossible tokens, the norm's do not."""

import pytest
import torch

from softrl.contexts.basis_reference import reference_threshold
from softrl.contexts.basis_thresholds import Programs
from softrl.studies.basis_tiny import (
    TinyModel,
    _nested,
    accepted_tokens,
    smallest_tau,
    sparse_distributions,
    tiny_check,
    trained,
)


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_only_the_constraints_before_the_norm_are_sound(norm):
    results, nested = tiny_check(norm, num_contexts=24, seed=1)
    by_name = {result.constraints: result for result in results}
    output, before, joint = (by_name[name] for name in ("output", "before_norm", "joint"))
    assert output.num_contexts >= 20
    assert all(by_name[name].false == 0 for name in ("before_norm", "input", "joint"))
    assert before.accepted > before.by_threshold + 10  # more than thresholds, all of it true
    if norm == "none":
        assert (output.accepted, output.false) == (before.accepted, 0)
    else:
        assert output.accepted > 1.5 * before.accepted  # deep never accepts more than W
        assert output.false >= 3
    assert joint.accepted == before.accepted  # the input's constraints are implied
    assert [row.violations for row in nested] == [0] * len(nested)
    assert {("threshold", "output, k=1"), ("output, k=4", "output"), ("before_norm", "output")} <= {
        (row.smaller, row.larger) for row in nested
    }
    counts = [row.tokens_larger for row in nested if row.larger.startswith("output")][:5]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == output.accepted  # k = 1 to 5


def _random_programs(tau):
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(6, 16, generator=generator, dtype=torch.float64).softmax(-1)
    columns = [torch.randn(6, 16, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [Programs(each, probs, torch.full((6,), tau, dtype=torch.float64)) for each in columns]


@pytest.mark.parametrize(("tau", "num_accepted", "needs_highs"), [(0.3, 20, False), (0.9999, 2, True)])
def test_accepted_tokens_are_those_of_highs_where_our_solver_gives_up_too(tau, num_accepted, needs_highs):
    programs = _random_programs(tau)[0]
    accepted, settled = accepted_tokens(programs)
    for context in range(6):
        columns, probs = programs.directions[context].numpy(), programs.probs[context].numpy()
        for token in range(16):
            found = reference_threshold(columns, probs, token, tau)
            assert bool(accepted[context, token]) == (found.threshold < probs[token])
    assert int(accepted.sum()) == num_accepted
    assert (settled > 0) == needs_highs


def test_what_is_not_nested_is_counted():
    """Two sets of constraints that have nothing to do with each other."""
    sets = {name: accepted_tokens(each)[0] for name, each in zip("ab", _random_programs(0.3), strict=True)}
    row = _nested("none", 0, sets, "a", "b")
    expected = sum(bool(sets["a"][n, i]) and not bool(sets["b"][n, i]) for n in range(6) for i in range(16))
    assert row.violations == expected > 0
    assert row.tokens_smaller == 20


def test_training_ends_where_the_theorem_begins():
    true_probs = sparse_distributions(6, 10, 0)
    model = TinyModel(true_probs, 3, "layer", 0)
    gradients = trained(model, num_joint=50)
    assert (gradients < 1e-12).sum() >= 4
    probs = model.probs()
    for context in torch.nonzero(gradients < 1e-12)[:, 0].tolist():
        deep = model.jacobian(context, "before_norm")
        assert (deep.T @ (true_probs[context] - probs[context])).abs().max() < 1e-10
        bare = model.jacobian(context, "output")
        assert (bare.T @ (true_probs[context] - probs[context])).abs().max() > 1e-3
    tau = smallest_tau(true_probs, probs)
    assert (true_probs <= probs / (1 - tau[:, None])).all()
    assert (true_probs > probs / (1 - tau[:, None]) * (1 - 1e-3)).any(-1).all()
