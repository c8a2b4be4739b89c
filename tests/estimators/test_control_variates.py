"""The pathwise control variate against its equation written out, sample by sample, over the whole vocabulary."""

import pytest
import torch
from helpers import EOS, PairReward, V, gpt2, prompts, relaxation_of

from softrl.estimators.base import Problem
from softrl.estimators.combined import Combined, combination_weight
from softrl.estimators.control_variates import PathwiseControlVariate, regressed_coefficients
from softrl.estimators.pathwise import Pathwise
from softrl.estimators.score_function import RLOO
from softrl.estimators.system import AdjointSettings
from softrl.models.policy import Policy
from softrl.objectives.token_terms import DirectTerms
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.truncation import Truncation

G, T = 4, 5
SETTINGS = AdjointSettings(hops=1)


def setting(top_k=9, kl=0.1):
    model = gpt2()
    policy, relaxation = Policy(model), relaxation_of("st_gumbel", top_k=top_k, min_p=0.0)
    terms = DirectTerms(kl, 0.0, Policy(gpt2(seed=3)))
    problem = Problem(policy, PairReward(), terms, Truncation(V), G)
    rollout = soft_rollout(
        policy, prompts(2), relaxation, SequenceRandom.keyed(3, 0, [0, 1], G), T, G, (EOS,), soft_stopping=True
    )
    hard = rollout.hard
    return model, problem, relaxation, rollout, problem.reward.hard(hard.tokens, hard.mask)


def log_probs_of(model, rollout):
    """log π over the vocabulary at every step, [N, T, V], from transformers' own forward pass."""
    hard = rollout.hard
    ids = torch.cat([hard.prompts.ids, hard.tokens], 1)
    mask = torch.cat([hard.prompts.mask, torch.ones_like(hard.mask)], 1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return logits[:, hard.prompts.ids.shape[1] - 1 : -1].log_softmax(-1)


def by_hand(model, problem, relaxation, rollout, rewards, coefficients):
    """`Σ_i S_i` of the equation, without chunks, kept ids or groups of tensors."""
    hard, log_probs = rollout.hard, log_probs_of(model, rollout)
    reference = log_probs_of(problem.terms.reference.model, rollout).detach()
    kl = ((log_probs.exp() * (log_probs - reference)).sum(-1) * hard.mask) * problem.terms.kl_weight
    a = Pathwise(relaxation, SETTINGS).estimate(problem, rollout).cotangents.weights
    a = a - (rollout.weights * a).sum(-1, keepdim=True)
    dense = torch.zeros_like(log_probs).scatter_add(-1, rollout.support.ids, a) * hard.mask[..., None]
    total = 0.0
    for i in range(len(rewards)):
        group = [j for j in range(i - i % G, i - i % G + G) if j != i]
        c, eta = dense[group].mean(0), coefficients[i]
        for t in range(hard.mask.shape[1]):
            if not hard.mask[i, t]:
                continue
            later = [rewards[j] - kl[j, t + 1 :].sum().detach() for j in (i, *group)]
            advantage = later[0] - sum(later[1:]) / len(group)
            token = hard.tokens[i, t]
            total = total + (advantage - eta * c[t, token]) * log_probs[i, t, token] - kl[i, t]
            total = total + eta * (c[t] * log_probs[i, t].exp()).sum()
    return total


@pytest.mark.parametrize("top_k", [9, V])
def test_gradient_is_the_equations(top_k):
    model, *rest = setting(top_k)
    problem, relaxation, rollout, rewards = rest
    estimator = PathwiseControlVariate(relaxation, SETTINGS, coefficient=0.7)
    value = estimator.surrogate(problem, estimator.estimate(problem, rollout, rewards)).sum()
    parameters = list(model.parameters())
    ours = torch.autograd.grad(value, parameters)
    true = torch.autograd.grad(by_hand(model, *rest, [0.7] * len(rewards)), parameters)
    for mine, theirs in zip(ours, true, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_coefficient_zero_is_rloo():
    _, problem, relaxation, rollout, rewards = setting()
    estimator = PathwiseControlVariate(relaxation, SETTINGS, coefficient=0.0)
    value = estimator.surrogate(problem, estimator.estimate(problem, rollout, rewards))
    torch.testing.assert_close(value, RLOO.surrogate(problem, RLOO.estimate(problem, rollout.hard, rewards)))


def test_regression_uses_neither_the_sample_nor_the_one_it_is_for():
    generator = torch.Generator().manual_seed(0)
    returns = torch.randn(2, G, generator=generator, dtype=torch.float64)
    values = torch.randn(2, G, G, generator=generator, dtype=torch.float64)
    found = regressed_coefficients(returns, values)
    for b in range(2):
        for i in range(G):
            others = [j for j in range(G) if j != i]
            f = {j: sum(values[b, j, k] for k in others if k != j) / (G - 2) for j in others}
            mean = sum(returns[b, j] for j in others) / (G - 1)
            slope = sum((returns[b, j] - mean) * f[j] for j in others) / sum(f[j] ** 2 for j in others)
            torch.testing.assert_close(found[b, i], slope)


def test_what_cannot_be_controlled_is_refused():
    _, problem, relaxation, rollout, rewards = setting()
    with pytest.raises(ValueError, match="straight-through relaxation"):
        PathwiseControlVariate(relaxation_of("gumbel_softmax"))
    two = Problem(problem.policy, problem.reward, problem.terms, problem.truncation, num_samples=2)
    with pytest.raises(ValueError, match="needs 3 samples"):
        PathwiseControlVariate(relaxation, SETTINGS, "regression").estimate(two, rollout, rewards)


def test_combination_is_the_least_error_of_two():
    """g_p = g + bias + noise, g_u = g + noise': the weight that minimises the error of many draws."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    unbiased = 2.0 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64) + common
    pathwise = 0.5 * common + torch.tensor([0.6, 0.0, -0.3], dtype=torch.float64)
    weight = combination_weight(pathwise, unbiased)
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)
    errors = [(w * pathwise + (1 - w) * unbiased).square().sum(-1).mean() for w in grid]
    assert abs(weight - grid[torch.stack(errors).argmin()].item()) < 0.01


def test_combined_is_a_mean_of_both():
    _, problem, relaxation, rollout, rewards = setting()
    combined = Combined(Pathwise(relaxation, SETTINGS), RLOO, 0.25)
    value = combined.surrogate(problem, combined.estimate(problem, rollout, rewards))
    pathwise = Pathwise(relaxation, SETTINGS)
    first = pathwise.surrogate(problem, pathwise.estimate(problem, rollout))
    second = RLOO.surrogate(problem, RLOO.estimate(problem, rollout.hard, rewards))
    torch.testing.assert_close(value, 0.25 * first + 0.75 * second)
    for weight in (-0.1, 1.5):
        with pytest.raises(ValueError, match=str(weight)):
            Combined(pathwise, RLOO, weight)
