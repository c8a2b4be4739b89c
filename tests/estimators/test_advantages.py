"""Returns, baselines and GAE by hand, and what they reduce to at the ends of their ranges."""

import torch

from softrl.estimators.advantages import (
    generalized_advantages,
    group_mean,
    group_std,
    leave_one_out,
    returns_to_go,
    token_rewards,
    whitened,
)

REWARDS = torch.tensor([1.0, 4.0])
DIRECT = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, 99.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_a_return_holds_the_terms_of_later_contexts_only():
    expected = torch.tensor([[1 - 2 - 4, 1 - 4, 1], [4 - 16, 4, 4]], dtype=torch.float32)
    torch.testing.assert_close(returns_to_go(REWARDS, DIRECT, MASK), expected)


def test_token_rewards_add_up_to_returns():
    earned = token_rewards(REWARDS, DIRECT, MASK)
    torch.testing.assert_close(earned, torch.tensor([[-2.0, -4.0, 1.0], [-16.0, 4.0, 0.0]]))
    sums = earned.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(sums[MASK], returns_to_go(REWARDS, DIRECT, MASK)[MASK])


def test_baselines_of_a_group():
    values = torch.tensor([[1.0], [2.0], [6.0], [5.0], [5.0], [5.0]])
    torch.testing.assert_close(leave_one_out(values, 3).squeeze(), torch.tensor([4.0, 3.5, 1.5, 5.0, 5.0, 5.0]))
    torch.testing.assert_close(group_mean(values, 3).squeeze(), torch.tensor([3.0, 3.0, 3.0, 5.0, 5.0, 5.0]))
    spread = torch.tensor([1.0, 2.0, 6.0]).std().item()
    torch.testing.assert_close(group_std(values.squeeze(), 3), torch.tensor([spread] * 3 + [0.0] * 3))
    # The group mean is leave-one-out times (G - 1)/G.
    torch.testing.assert_close(values - group_mean(values, 3), 2 / 3 * (values - leave_one_out(values, 3)))


def test_gae_between_one_step_and_the_whole_return():
    earned, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, -1.0, 2.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    whole = generalized_advantages(earned, values, mask, 1.0, 1.0)
    torch.testing.assert_close(whole, torch.tensor([[6.0 - 0.5, 5.0 + 1.0, 3.0 - 2.0]]))
    one_step = generalized_advantages(earned, values, mask, 0.9, 0.0)
    torch.testing.assert_close(one_step, torch.tensor([[1 + 0.9 * -1 - 0.5, 2 + 0.9 * 2 + 1, 3 - 2.0]]))
    between = generalized_advantages(earned, values, mask, 0.9, 0.5)
    last, middle = 1.0, 4.8 + 0.45 * 1.0
    torch.testing.assert_close(between, torch.tensor([[-0.4 + 0.45 * middle, middle, last]]))


def test_nothing_comes_from_behind_the_end():
    earned, values = torch.tensor([[1.0, 2.0, 50.0]]), torch.tensor([[0.0, 0.0, 70.0]])
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(generalized_advantages(earned, values, mask), torch.tensor([[1 + 0.95 * 2, 2.0, 0.0]]))


def test_whitening_looks_at_real_tokens():
    white = whitened(torch.tensor([[1.0, 3.0, 1e6]]), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(white, torch.tensor([[-1.0, 1.0, 0.0]]) / 2**0.5)
