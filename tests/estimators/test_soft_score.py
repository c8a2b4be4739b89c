"""The density of kept perturbed logits, on one step where thousands of draws cost nothing.

Truth: central differences of the expected reward with common noise, the kept set drawn anew at displaced logits. With
100,000 draws the chance of a false failure of a test is below 1e-4 (|z| < 4.9 in 6 coordinates, both errors counted).
"""

import pytest
import torch
from helpers import relaxation_of

from softrl.estimators.soft_score import SoftScoreFunction, kept_log_density

V, K, DRAWS, STEP, BOUND = 6, 3, 100_000, 0.05, 4.9
LOGITS = torch.tensor([0.8, -0.4, 0.1, 1.2, -1.0, 0.3], dtype=torch.float64)
VALUES = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0], dtype=torch.float64)


def kept(logits, gumbel):
    """Ids of the K largest perturbed log-probabilities, and these."""
    perturbed, ids = (logits.log_softmax(-1) + gumbel).topk(K, -1)
    return ids, perturbed


def rewards(ids, perturbed):
    """Not linear in the soft token."""
    value = (perturbed.softmax(-1) * VALUES[ids]).sum(-1)
    return torch.sin(value) + 0.3 * value.square()


def estimates(with_unkept):
    gumbel = -torch.empty(DRAWS, V, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0)).log()
    ids, perturbed = kept(LOGITS, gumbel)
    leaf = LOGITS.expand(DRAWS, V).clone().requires_grad_()
    log_probs = leaf.log_softmax(-1).gather(-1, ids)
    if not with_unkept:
        log_probs = leaf.gather(-1, ids).log_softmax(-1)  # as if the kept ids were all there is
    density = kept_log_density(log_probs[:, None], perturbed[:, None], torch.ones(DRAWS, 1, K, dtype=torch.bool))[:, 0]
    baseline = rewards(ids, perturbed).mean()  # of so many draws that a draw's own part does not matter
    (grads,) = torch.autograd.grad(((rewards(ids, perturbed) - baseline) * density).sum(), leaf)
    moved = []
    for v in range(V):
        step = STEP * torch.nn.functional.one_hot(torch.tensor(v), V)
        moved.append((rewards(*kept(LOGITS + step, gumbel)) - rewards(*kept(LOGITS - step, gumbel))) / (2 * STEP))
    return grads, torch.stack(moved, 1)


def largest_z(first, second):
    errors = (first.var(0) + second.var(0)) / DRAWS
    return ((first.mean(0) - second.mean(0)) / errors.sqrt()).abs().max().item()


def test_the_density_gives_the_gradient_of_the_expected_reward():
    grads, differences = estimates(with_unkept=True)
    assert largest_z(grads, differences) < BOUND
    assert largest_z(1.05 * grads, differences) > BOUND


def test_leaving_out_the_unkept_ids_is_noticed():
    assert largest_z(*estimates(with_unkept=False)) > 2 * BOUND


def test_only_gumbel_softmax_has_this_density():
    with pytest.raises(TypeError, match="st_gumbel"):
        SoftScoreFunction(relaxation_of("st_gumbel"))
