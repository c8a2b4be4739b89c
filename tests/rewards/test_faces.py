"""Every reward: the soft and the hard face agree on one-hot tokens, and the soft one is differentiated rightly."""

import pytest
import torch
from helpers import ALL_REWARDS, V

from softrl.rewards.base import WeightedRewards, checked_hard, checked_soft
from softrl.types import SoftTokens

N, T, K = 6, 5, 4


def soft_tokens():
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(N * T)]).view(N, T, K)
    weights = torch.rand(N, T, K, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([5, 4, 3, 2, 1, 5])
    return SoftTokens(ids, weights / weights.sum(-1, keepdim=True), torch.arange(T) < lengths[:, None])


@pytest.mark.parametrize("name", ALL_REWARDS)
def test_faces_agree_on_one_hot_tokens(name):
    reward, tokens = ALL_REWARDS[name](), soft_tokens()
    choice = tokens.weights.argmax(-1, keepdim=True)
    one_hot = tokens.with_weights(torch.zeros_like(tokens.weights).scatter(-1, choice, 1.0))
    hard = checked_hard(reward, tokens.ids.gather(-1, choice).squeeze(-1), tokens.mask)
    torch.testing.assert_close(checked_soft(reward, one_hot), hard, rtol=1e-5, atol=1e-5)
    assert hard.std() > 1e-3
    assert (checked_soft(reward, tokens) - hard).abs().max() > 1e-3, "mixtures score otherwise, or this shows nothing"


@pytest.mark.parametrize("name", ALL_REWARDS)
def test_soft_face_against_finite_differences_and_blind_after_the_end(name):
    reward, tokens = ALL_REWARDS[name](), soft_tokens()
    weights = tokens.weights.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: checked_soft(reward, tokens.with_weights(w)), weights)
    (grad,) = torch.autograd.grad(checked_soft(reward, tokens.with_weights(weights)).sum(), weights)
    assert grad[~tokens.mask].abs().max() == 0.0
    assert grad[tokens.mask].abs().min() > 0.0


def test_weighted_rewards_are_the_weighted_sum():
    parts, tokens = [ALL_REWARDS["pair"](), ALL_REWARDS["token linear, sum"]()], soft_tokens()
    combined = WeightedRewards(parts, [2.0, -0.5])
    expected = 2.0 * parts[0].soft(tokens) - 0.5 * parts[1].soft(tokens)
    torch.testing.assert_close(combined.soft(tokens), expected)
    assert combined.vocab_size == V
    with pytest.raises(ValueError, match="reward_weights has 1 numbers for 2 rewards"):
        WeightedRewards(parts, [1.0])
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        WeightedRewards([])
