"""The check of softrl maths, section 10: behind a norm W's constraints accept impossible tokens, the norm's do not."""

import pytest
import torch

from softrl.studies.basis_tiny import TinyModel, smallest_tau, sparse_distributions, tiny_check, trained


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_only_the_constraints_before_the_norm_are_sound(norm):
    by_name = {result.constraints: result for result in tiny_check(norm, num_contexts=24, seed=1)}
    output, before, joint = (by_name[name] for name in ("output", "before_norm", "joint"))
    assert output.num_contexts >= 20
    assert all(by_name[name].false == 0 for name in ("before_norm", "input", "joint"))
    assert before.accepted > before.by_threshold + 10  # more than thresholds, all of it true
    if norm == "none":
        assert (output.accepted, output.false) == (before.accepted, 0)
    else:
        assert output.accepted > 1.5 * before.accepted  # deep never accepts more than W
        assert output.false >= 3
    assert abs(joint.accepted - before.accepted) <= 1  # the input's constraints are implied


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
