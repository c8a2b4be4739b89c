"""The naive ways to the gradient give the same gradient, so that the benchmark compares like with like."""

import pytest
import torch
from helpers import PairReward, llama, prompts, random_for, relaxation_of

from softrl.estimators.pathwise import pathwise_estimate, surrogate
from softrl.estimators.system import AdjointSettings
from softrl.models.policy import Policy
from softrl.objectives.token_terms import DirectTerms
from softrl.rollouts.soft import soft_rollout
from softrl.studies.blocks import compare, solvers
from softrl.studies.naive import full_prefix_step, transformers_cache_step

T = 6


def gradient_of(policy):
    gradient = torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])
    policy.model.zero_grad()
    return gradient


@pytest.mark.parametrize("step", [transformers_cache_step, full_prefix_step])
@pytest.mark.parametrize("relaxation_name", ["st_gumbel", "gumbel_softmax"])
def test_same_gradient_as_ours(step, relaxation_name):
    policy, relaxation, reward = Policy(llama(), 1.3), relaxation_of(relaxation_name), PairReward()
    rollout = soft_rollout(policy, prompts(), relaxation, random_for(3), T)
    settings = AdjointSettings("sequential")
    estimate = pathwise_estimate(policy, rollout, relaxation, reward, DirectTerms(), settings)
    surrogate(policy, relaxation, estimate, DirectTerms(), settings).value.mean().neg().backward()
    ours = gradient_of(policy)
    seconds = step(policy, prompts(), relaxation, random_for(3), T, reward)
    assert all(value > 0.0 for value in seconds.values())
    assert ((gradient_of(policy) - ours).norm() / ours.norm()).item() < 1e-6


def test_solvers_are_compared_with_the_exact_one():
    policy = Policy(llama().requires_grad_(False), 1.3)
    relaxation = relaxation_of("gumbel_softmax", max_entropy_nats=0.7)
    settings = solvers(1e-6, [2, 4], 12)
    rows = list(compare(policy, prompts(), relaxation, "bounded", 12, settings, PairReward()))
    assert [row.solver for row in rows] == ["sequential", "blocked, 2", "blocked, 4", "parallel"]
    assert rows[0].relative_error == 0.0
    assert all(row.relative_error < 1e-5 for row in rows[1:])
    assert rows[1].sweeps <= 2.0
    assert rows[2].sweeps <= 4.0
    assert rows[3].sweeps > 4.0
