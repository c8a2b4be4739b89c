"""Directions against autograd: the norms' Jacobians, the state read off the logits, and what is left out."""

import pytest
import torch
from helpers import gpt2, gru, llama, mamba, with_float64_norms
from torch import nn

from softrl.contexts.basis_directions import svd_directions, weighted_directions
from softrl.contexts.final_norm import FinalNorm, find_final_norm
from softrl.models.policy import Policy


def _drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("centres", [False, True])
def test_norm_jacobian_is_autograds(centres):
    width, hidden = 7, 3.0 * _drawn(7) + 1.0
    module = nn.LayerNorm(width, eps=1e-3) if centres else nn.RMSNorm(width, eps=1e-3)
    module = module.double()
    with torch.no_grad():
        module.weight.copy_(_drawn(width, seed=1))
    norm = FinalNorm(centres, module.weight.detach(), None, 1e-3)
    expected = torch.autograd.functional.jacobian(module, hidden)
    torch.testing.assert_close(norm.jacobian(hidden), expected, rtol=1e-10, atol=1e-12)
    if centres:
        assert (expected @ torch.ones(width).double()).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("build", "centres"), [(lambda: with_float64_norms(llama()), False), (gpt2, True), (mamba, False)]
)
def test_final_norm_is_found_by_what_it_computes(build, centres):
    policy = Policy(build())
    norm = find_final_norm(policy)
    assert norm is not None
    assert norm.centres is centres
    prompt = torch.tensor([[3, 5, 7]])
    seen = {}
    module = {"Llama": "norm", "GPT2L": "ln_f", "Mamba": "norm_f"}[type(policy.causal_lm).__name__[:5]]
    handle = getattr(policy.decoder, module).register_forward_hook(lambda _, i, o: seen.update(i=i[0], o=o))
    policy.decoder(inputs_embeds=policy.embed(prompt))
    handle.remove()
    ours = norm.normalised(seen["i"]) * norm.weight + (0.0 if norm.bias is None else norm.bias)
    torch.testing.assert_close(ours, seen["o"], rtol=1e-5, atol=1e-6)


def test_a_model_without_a_norm_has_none():
    assert find_final_norm(Policy(gru())) is None


@pytest.mark.parametrize("build", [lambda: with_float64_norms(llama()), gpt2])
def test_allowed_columns_are_those_of_the_jacobian_before_the_norm(build):
    """With all directions: the columns that `excluded` leaves span exactly the Jacobian's, from logits alone."""
    policy = Policy(build())
    norm = find_final_norm(policy)
    weight = policy.causal_lm.get_output_embeddings().weight.detach()
    width = weight.shape[1] - (1 if norm.centres else 0)
    directions = svd_directions(weight, width, norm)
    hidden = 2.0 * _drawn(weight.shape[1], seed=5)
    bias = 0.0 if norm.bias is None else norm.bias
    logits = weight @ (norm.normalised(hidden) * norm.weight + bias) + 17.0  # up to a constant
    excluded = directions.excluded(logits[None])[0]
    normalised = norm.normalised(hidden)
    torch.testing.assert_close(excluded[:, 0], directions.map.T @ normalised, rtol=1e-6, atol=1e-7)
    rest = torch.linalg.qr(excluded, mode="complete").Q[:, 1:]
    allowed = directions.columns @ rest
    jacobian = weight @ norm.jacobian(hidden)
    jacobian = jacobian - jacobian.mean(0)
    rank = int(torch.linalg.matrix_rank(jacobian, rtol=1e-4))
    assert rank == allowed.shape[1]
    basis = torch.linalg.svd(allowed, full_matrices=False).U
    assert (jacobian - basis @ (basis.T @ jacobian)).norm() < 1e-4 * jacobian.norm()
    bare = torch.linalg.svd(weight - weight.mean(0), full_matrices=False).U
    assert (allowed - bare @ (bare.T @ allowed)).norm() < 1e-9 * allowed.norm()  # implied by W's constraints


def test_svd_directions_are_the_best_of_their_number():
    weight = _drawn(60, 8) @ torch.diag(torch.tensor([9.0, 7, 5, 3, 1, 0.5, 0.2, 0.1]).double()) + 4.0
    directions = svd_directions(weight, 3)
    centred = weight - weight.mean(0)
    left, strengths, right = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(directions.strengths, strengths[:3] ** 2, rtol=1e-9, atol=0.0)
    best = left[:, :3] * strengths[:3] @ right[:3]
    torch.testing.assert_close(directions.columns @ directions.map.T, best, rtol=1e-8, atol=1e-8)


def test_lifted_certificates_combine_the_rows_alike():
    weight, y = _drawn(30, 6), _drawn(4, seed=9)
    directions = svd_directions(weight, 3)
    lifted = directions.lifted(y)
    torch.testing.assert_close(weight @ lifted[:-1] + lifted[-1], directions.columns @ y[:-1] + y[-1])


def test_weighted_directions_diagonalise_the_covariance_under_p():
    weight, probs = _drawn(40, 6), _drawn(2, 40, seed=2).mul(2).softmax(-1)
    columns, maps = weighted_directions(weight, probs, 4)
    for own, column, mapping in zip(probs, columns, maps, strict=True):
        rows = weight - own @ weight
        covariance = rows.T @ (rows * own[:, None])
        torch.testing.assert_close(column, rows @ mapping)
        within = column.T @ (column * own[:, None])
        torch.testing.assert_close(within, torch.diag(torch.linalg.eigvalsh(covariance).flip(0)[:4]))


@pytest.mark.parametrize("number", [0, 7])
def test_more_directions_than_the_width_are_refused(number):
    with pytest.raises(ValueError, match=r"width of the output embedding, 6 here"):
        svd_directions(_drawn(30, 6), number)
    with pytest.raises(ValueError, match=r"width of the output embedding, 6 here"):
        weighted_directions(_drawn(30, 6), _drawn(1, 30).softmax(-1), number)
    norm = FinalNorm(True, torch.ones(6).double())
    with pytest.raises(ValueError, match="5 here"):
        svd_directions(_drawn(30, 6), 6, norm)
