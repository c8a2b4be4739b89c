"""Every reward: the soft and the hard face agree on one-hot tokens, and the soft one is differentiated rightly.

With hard stopping, where the mask says how long a text is, and with soft stopping, where the weights do.
"""

import pytest
import torch
from helpers import ALL_REWARDS, REWARDS_OF_FEW_WEIGHTS, REWARDS_OF_SURVIVAL_ALONE, V, reward_columns

from softrl.masking import mask_through_eos
from softrl.rewards.base import WeightedRewards, checked_hard, checked_soft
from softrl.types import SoftTokens

N, T, K = 6, 5, 4
EOS_IDS = (4, 7, 13)
COLUMNS = reward_columns(N)

HARD_STOPPING = [(name, ()) for name in ALL_REWARDS if name not in REWARDS_OF_SURVIVAL_ALONE]
SOFT_STOPPING = [(name, EOS_IDS) for name in ALL_REWARDS]


def soft_tokens(eos_ids=()):
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(N * T)]).view(N, T, K)
    weights = torch.rand(N, T, K, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([5, 4, 3, 2, 1, 5])
    return SoftTokens(ids, weights / weights.sum(-1, keepdim=True), torch.arange(T) < lengths[:, None], eos_ids)


@pytest.mark.parametrize(("name", "eos_ids"), HARD_STOPPING + SOFT_STOPPING)
def test_faces_agree_on_one_hot_tokens(name, eos_ids):
    reward, tokens = ALL_REWARDS[name](), soft_tokens(eos_ids)
    choice = tokens.weights.argmax(-1, keepdim=True)
    one_hot = tokens.with_weights(torch.zeros_like(tokens.weights).scatter(-1, choice, 1.0))
    ids = tokens.ids.gather(-1, choice).squeeze(-1)
    mask = tokens.mask & mask_through_eos(ids, eos_ids)
    assert (mask.sum() < tokens.mask.sum()) == bool(eos_ids), "some texts have to end by themselves"
    hard = checked_hard(reward, ids, mask, **COLUMNS)
    torch.testing.assert_close(checked_soft(reward, one_hot, **COLUMNS), hard, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert hard.std() > 1e-3
    assert (checked_soft(reward, tokens, **COLUMNS) - hard).abs().max() > 1e-3, (
        "mixtures score otherwise, or this shows nothing"
    )


@pytest.mark.parametrize(("name", "eos_ids"), HARD_STOPPING + SOFT_STOPPING)
def test_soft_face_against_finite_differences_and_blind_after_the_end(name, eos_ids):
    reward, tokens = ALL_REWARDS[name](), soft_tokens(eos_ids)
    weights = tokens.weights.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: checked_soft(reward, tokens.with_weights(w), **COLUMNS), weights, fast_mode=True
    )
    (grad,) = torch.autograd.grad(checked_soft(reward, tokens.with_weights(weights), **COLUMNS).sum(), weights)
    assert grad[~tokens.mask].abs().max() == 0.0
    seen = grad[tokens.mask].abs()
    assert (seen.max() if name in REWARDS_OF_FEW_WEIGHTS else seen.min()) > 0.0


@pytest.mark.parametrize("name", ALL_REWARDS)
def test_survival_matters(name):
    """A reward that read the mask alone would not see that a text has probably ended."""
    reward, tokens = ALL_REWARDS[name](), soft_tokens(EOS_IDS)
    assert (reward.soft(tokens, **COLUMNS) - reward.soft(soft_tokens(), **COLUMNS)).abs().max() > 1e-3


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


WITHOUT_PROMPTS = ("sequence classifier, last token", "sequence classifier, mean")
OF_THE_TESTS = ("pair", "weighted")  # with a mean over nothing


@pytest.mark.parametrize("name", [name for name in ALL_REWARDS if name not in (*WITHOUT_PROMPTS, *OF_THE_TESTS)])
def test_an_empty_text_has_a_finite_reward_and_no_gradient_that_is_not(name):
    """The first row wrote nothing: a hard rollout cannot make one, a user's own data can."""
    reward, tokens = ALL_REWARDS[name](), soft_tokens(EOS_IDS)
    mask = tokens.mask.clone()
    mask[0] = False
    empty = SoftTokens(tokens.ids, tokens.weights.clone().requires_grad_(), mask, EOS_IDS)
    values = reward.soft(empty, **COLUMNS)
    assert torch.isfinite(values).all()
    (grad,) = torch.autograd.grad(values.sum(), empty.weights)
    assert torch.isfinite(grad).all()
    assert grad[0].abs().max() == 0.0
    ids = tokens.ids[..., 0]
    torch.testing.assert_close(reward.hard(ids, mask, **COLUMNS)[0], values[0].detach(), check_dtype=False)


@pytest.mark.parametrize("name", WITHOUT_PROMPTS)
def test_a_classifier_without_prompts_refuses_an_empty_text(name):
    ids = torch.full((2, 3), 5)
    mask = torch.tensor([[True] * 3, [False] * 3])
    with pytest.raises(ValueError, match="got an empty text: sequence 1"):
        ALL_REWARDS[name]().hard(ids, mask)
