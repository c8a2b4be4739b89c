"""Jacobians of the logits at any representation, against finite differences, autograd and the closed form."""

import pytest
import torch
from helpers import gpt2, gru, llama, with_float64_norms

from softrl.contexts.basis_directions import svd_directions
from softrl.contexts.basis_jacobians import LogitJacobian, jacobian_directions, representation_jacobian
from softrl.contexts.basis_thresholds import Programs, verdicts
from softrl.contexts.final_norm import find_final_norm
from softrl.models.policy import Policy

IDS = torch.tensor([3, 5, 7, 4, 9])
BUILDS = {"gpt2": gpt2, "llama": lambda: with_float64_norms(llama())}


def _drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _logits_with_added(policy, layer, position, added):
    """Logits of the last position with `added` put onto a layer's state, by a hook of its own."""
    embeds = policy.embed(IDS[None]).detach().clone()
    handle = None
    if layer == 0:
        embeds[0, position] += added
    else:

        def hook(_, __, output):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, position] += added
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        layers = policy.decoder.h if hasattr(policy.decoder, "h") else policy.decoder.layers
        handle = layers[layer - 1].register_forward_hook(hook)
    with torch.no_grad():
        logits = policy.causal_lm(inputs_embeds=embeds).logits[0, -1]
    if handle is not None:
        handle.remove()
    return logits


@pytest.mark.parametrize("name", sorted(BUILDS))
@pytest.mark.parametrize(("layer", "position"), [(0, -1), (0, 1), (1, -1), (1, 2), (2, -1)])
def test_products_are_finite_differences(name, layer, position):
    policy = Policy(BUILDS[name]())
    jacobian = representation_jacobian(policy, IDS, layer, (position,))
    tangent = _drawn(16, seed=layer + 10)
    step = 1e-5
    expected = (
        _logits_with_added(policy, layer, position, step * tangent)
        - _logits_with_added(policy, layer, position, -step * tangent)
    ) / (2 * step)
    torch.testing.assert_close(jacobian.times(tangent[None])[:, 0], expected, rtol=1e-6, atol=1e-8)
    assert expected.abs().max() > 1e-3
    cotangent = _drawn(23, seed=3)
    assert float(jacobian.transposed(cotangent[None])[0] @ tangent) == pytest.approx(float(cotangent @ expected))
    torch.testing.assert_close(jacobian.logits, _logits_with_added(policy, layer, position, 0.0))
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_several_positions_are_side_by_side():
    policy = Policy(gpt2())
    both = representation_jacobian(policy, IDS, 1, (1, -1)).times(torch.eye(32, dtype=torch.float64))
    for number, position in enumerate((1, -1)):
        one = representation_jacobian(policy, IDS, 1, (position,)).times(torch.eye(16, dtype=torch.float64))
        torch.testing.assert_close(both[:, 16 * number : 16 * (number + 1)], one)


def test_after_the_last_block_it_is_the_norms_closed_form():
    policy = Policy(gpt2())
    jacobian = representation_jacobian(policy, IDS, 2)
    norm = find_final_norm(policy)
    weight = policy.causal_lm.get_output_embeddings().weight.detach()
    expected = weight @ norm.jacobian(jacobian.state.detach()[0])
    torch.testing.assert_close(jacobian.times(torch.eye(16, dtype=torch.float64)), expected, rtol=1e-8, atol=1e-10)


def test_directions_are_the_leading_ones():
    matrix = _drawn(40, 12) @ torch.diag(2.0 ** -torch.arange(12).double())
    offset = _drawn(40, seed=4)
    jacobian = LogitJacobian(lambda state: matrix @ state + offset, torch.zeros(12, dtype=torch.float64))
    columns, tangents = jacobian_directions(jacobian, 3)
    probs = offset.softmax(-1)
    centred = matrix - probs @ matrix
    _, strengths, right = torch.linalg.svd(centred * probs.sqrt()[:, None])
    torch.testing.assert_close((tangents @ right[:3].T).abs(), torch.eye(3, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(columns, matrix @ tangents.T)
    moved = (columns - probs @ columns) * probs.sqrt()[:, None]
    torch.testing.assert_close(moved.norm(dim=0), strengths[:3], rtol=1e-4, atol=0.0)
    with pytest.raises(ValueError, match="12 numbers, got 13"):
        jacobian_directions(jacobian, 13)


def test_deep_constraints_accept_no_more_than_all_of_w():
    """The same position's Jacobian is W A; earlier tokens' states act through it too."""
    policy = Policy(gpt2())
    weight = policy.causal_lm.get_output_embeddings().weight.detach()
    tokens = torch.arange(23)[None]
    for layer, positions in ((2, (-1,)), (1, (-1,)), (1, (0, 1, 2)), (0, (-1,))):
        jacobian = representation_jacobian(policy, IDS, layer, positions)
        probs, tau = jacobian.logits.detach().softmax(-1)[None], torch.tensor([0.3], dtype=torch.float64)
        columns, _ = jacobian_directions(jacobian, 12)
        deep = verdicts(Programs(columns[None], probs, tau), tokens, exact=True)
        whole = verdicts(Programs(svd_directions(weight, 16).columns, probs, tau), tokens, exact=True)
        assert (whole.upper <= deep.upper + 1e-7).all()
        assert (whole.accepted | ~deep.accepted).all()


def test_layers_and_positions_that_are_not_there():
    policy = Policy(gpt2())
    with pytest.raises(ValueError, match=r"between 0 .* and 2, got 3"):
        representation_jacobian(policy, IDS, 3)
    with pytest.raises(ValueError, match="outside the context of 5"):
        representation_jacobian(policy, IDS, 1, (5,))


def test_a_recurrent_model_has_them_too():
    jacobian = representation_jacobian(Policy(gru()), IDS, 0, (1,))
    tangent = _drawn(12, seed=2)
    assert jacobian.times(tangent[None]).abs().max() > 1e-6
