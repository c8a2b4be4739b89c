"""The discriminator: what it sees, its loss and its slope penalty against their definitions."""

import math

import pytest
import torch
from helpers import ALL_REWARDS, V, reward_columns
from torch import nn

from softrl.rewards.base import one_hot_tokens
from softrl.rewards.discriminator import Discriminator, discriminator_loss, gradient_penalty


def made(**settings):
    torch.manual_seed(1)
    return Discriminator(nn.Embedding(V, 6), width=4, **settings).double()


def test_a_batch_scores_each_text_as_alone():
    reward, columns = ALL_REWARDS["discriminator"](), reward_columns(3)
    ids = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor([[7], [3], [1]])
    together = reward.hard(ids, mask, **columns)
    alone = [
        reward.hard(ids[[row], :length], mask[[row], :length], prompt=[columns["prompt"][row]])
        for row, length in enumerate((7, 3, 1))
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    assert together.std() > 1e-3


def test_prompts_are_read_where_there_is_a_tokenizer():
    with_prompts = ALL_REWARDS["discriminator"]()
    ids, mask = torch.full((2, 3), 9), torch.ones(2, 3, dtype=torch.bool)
    first, second = with_prompts.hard(ids, mask, prompt=["w3 w4", "w5"]).tolist()
    assert abs(first - second) > 1e-4
    with pytest.raises(ValueError, match="no column 'prompt'"):
        with_prompts.hard(ids, mask)
    assert made().hard(ids, mask).std() == 0.0
    assert torch.isfinite(made().hard(ids, mask & False)).all()  # nothing was written


def test_the_order_of_words_matters_and_the_embedding_is_not_trained():
    discriminator = made()
    one = one_hot_tokens(torch.tensor([[3, 4, 5, 6]]), torch.ones(1, 4, dtype=torch.bool))
    other = one_hot_tokens(torch.tensor([[6, 5, 4, 3]]), torch.ones(1, 4, dtype=torch.bool))
    assert (discriminator.soft(one) - discriminator.soft(other)).abs() > 1e-4
    assert discriminator.embedding.weight not in set(discriminator.trainable())


def test_loss_is_the_cross_entropy_with_smoothed_labels():
    real, generated = torch.tensor([0.3, 2.0]).double(), torch.tensor([-1.0, 0.5]).double()
    p, q = real.sigmoid(), generated.sigmoid()
    expected = -(0.9 * p.log() + 0.1 * (1 - p).log()).mean() / 2 - (1 - q).log().mean() / 2
    torch.testing.assert_close(discriminator_loss(real, generated, 0.1), expected)
    # Without smoothing, log-odds of the true ratio are where its expectation is least: p = 1/2 where both are alike.
    even = torch.zeros(4).double()
    assert float(discriminator_loss(even, even)) == pytest.approx(math.log(2))


def test_penalty_is_the_squared_norm_of_the_slope_by_finite_differences():
    discriminator, generator = made(), torch.Generator().manual_seed(3)
    real, generated = (
        (torch.randn(2, 5, 6, generator=generator).double(), torch.ones(2, 5).double()) for _ in range(2)
    )
    shares = torch.tensor([0.25, 1.0]).double()
    found = gradient_penalty(discriminator, real, generated, shares)
    point = shares[:, None, None] * real[0] + (1 - shares[:, None, None]) * generated[0]
    step, squares = 1e-6, 0.0
    for index in range(point[0].numel()):
        shift = torch.zeros(2, 30).double()
        shift[:, index] = step
        ahead, behind = (
            discriminator.log_odds(point + sign * shift.view_as(point), real[1]).detach() for sign in (1, -1)
        )
        squares = squares + ((ahead - behind) / (2 * step)).square()
    torch.testing.assert_close(found.detach(), squares.mean(), rtol=1e-5, atol=0.0)
    # It is differentiated in the weights, or it would penalise nothing.
    found.backward()
    assert discriminator.head.weight.grad.abs().max() > 0


def test_bad_width_is_named():
    with pytest.raises(ValueError, match="width must be 1 or more, got 0"):
        Discriminator(nn.Embedding(V, 6), width=0)
