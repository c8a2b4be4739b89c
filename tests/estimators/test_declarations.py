"""Each estimator's declaration `unbiased_for`, measured draw by draw.

"soft": for the noise drawn the estimate is the derivative of J, so over draws it is unbiased for the derivative of the
expected J. The truth is a central difference of J with common noise, the rollout generated anew at displaced
parameters. A planted bias of 5% and every estimator declared None must fail the same bound.
"""

import pytest
import torch
from estimators.looped import looped_objective
from helpers import PairReward, gpt2, prompts, relaxation_of

from softrl.estimators.pathwise import pathwise_estimate, surrogate, unbiased_for
from softrl.estimators.system import AdjointSettings
from softrl.models.policy import Policy
from softrl.objectives.token_terms import DirectTerms
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.noise import SequenceRandom

DRAWS, T, STEP, BOUND = 12, 5, 1e-6, 1e-4
EXACT = AdjointSettings(tol=1e-10)
CASES = {
    "gumbel_softmax": ("gumbel_softmax", EXACT),
    "st_gumbel": ("st_gumbel", EXACT),
    "straight_through": ("straight_through", EXACT),
    "hops 1": ("gumbel_softmax", AdjointSettings(hops=1)),
    "detached": ("gumbel_softmax", AdjointSettings(hops=0)),
    "discounted": ("gumbel_softmax", AdjointSettings(feedback_discount=0.5, tol=1e-10)),
    "clipped": ("gumbel_softmax", AdjointSettings(adjoint_clip=0.02, tol=1e-10)),
}


def relative_error(relaxation_name, settings, planted_bias=0.0):
    """‖estimate − finite difference‖ / ‖finite difference‖ over draws, along a fixed direction of the parameters."""
    relaxation = relaxation_of(relaxation_name, top_k=23, min_p=0.0)
    model = gpt2()
    policy, reward, parameters = Policy(model), PairReward(), list(model.parameters())
    batch = prompts(1).repeated(DRAWS)
    random = SequenceRandom.keyed(11, 0, [0], DRAWS)
    rollout = soft_rollout(policy, batch, relaxation, random, T)
    generator = torch.Generator().manual_seed(4)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    estimate = pathwise_estimate(policy, rollout, relaxation, reward, DirectTerms(), settings)
    values = surrogate(policy, relaxation, estimate, DirectTerms(), settings).value
    along = torch.stack([_derivative(value, parameters, direction) for value in values]) * (1 + planted_bias)

    def moved(step):
        """J of every draw at displaced parameters, with the same noise drawn anew (supports may change)."""
        with torch.no_grad():
            for parameter, change in zip(parameters, direction, strict=True):
                parameter.add_(change, alpha=step)
            displaced = soft_rollout(policy, batch, relaxation, SequenceRandom.keyed(11, 0, [0], DRAWS), T)
            result = reward.soft(displaced.soft_tokens)
            for parameter, change in zip(parameters, direction, strict=True):
                parameter.add_(change, alpha=-step)
        return result

    finite_difference = (moved(STEP) - moved(-STEP)) / (2 * STEP)
    return ((along - finite_difference).norm() / finite_difference.norm().clamp(min=1e-9)).item()


def _derivative(value, parameters, direction):
    grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return sum((g * d).sum() for g, d in zip(grads, direction, strict=True) if g is not None)


@pytest.mark.parametrize("case", CASES)
def test_declaration(case):
    relaxation_name, settings = CASES[case]
    declared = unbiased_for(relaxation_of(relaxation_name), settings)
    assert declared == ("soft" if case == "gumbel_softmax" else None)
    assert (relative_error(relaxation_name, settings) < BOUND) == (declared == "soft")


def test_a_planted_bias_of_five_percent_fails():
    assert relative_error("gumbel_softmax", EXACT, planted_bias=0.05) > BOUND


def test_deterministic_mixture_is_the_derivative_itself():
    """No noise, so no statistics: one draw, to the accuracy of the gradient tests."""
    relaxation = relaxation_of("softmax", top_k=23, min_p=0.0)
    assert unbiased_for(relaxation, EXACT) == "soft"
    model, reward = gpt2(), PairReward()
    policy = Policy(model)
    rollout = soft_rollout(policy, prompts(), relaxation, SequenceRandom.keyed(0, 0, [0, 1, 2], 1), T)
    estimate = pathwise_estimate(policy, rollout, relaxation, reward, DirectTerms(), EXACT)
    value = surrogate(policy, relaxation, estimate, DirectTerms(), EXACT).value.sum()
    parameters = list(model.parameters())
    ours = torch.autograd.grad(value, parameters)
    true = torch.autograd.grad(looped_objective(model, rollout, relaxation, reward), parameters)
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
