"""The discriminator: what it sees, its loss and its slope penalty against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import ALL_REWARDS, EOS, V, gpt2, llama, reward_columns

from softrl.rewards.base import one_hot_tokens
from softrl.rewards.discriminator import Discriminator, discriminator_loss, gradient_penalty
from softrl.types import SoftTokens


def made(**settings):
    torch.manual_seed(1)
    return Discriminator(gpt2(), width=4, **settings)


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


def test_it_reads_what_the_first_layers_of_the_model_give():
    """Against transformers' own forward of the whole model, and a mean by hand."""
    for model in (gpt2(), llama()):
        discriminator = Discriminator(model, width=4, num_layers=1)
        ids = torch.tensor([[3, 4, 5, 6]])
        (states, presence) = discriminator.states(one_hot_tokens(ids, ids > 0), {})
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(states, F.layer_norm(expected, expected.shape[-1:]), rtol=1e-6, atol=1e-6)
        by_hand = discriminator.head(states)[0, :, 0].mean()
        torch.testing.assert_close(discriminator.hard(ids, ids > 0)[0], by_hand)
        assert presence.tolist() == [[1.0] * 4]


def test_a_token_counts_by_its_survival_and_the_last_of_the_prompt_once():
    reward = ALL_REWARDS["discriminator"]()
    ids = torch.tensor([[[EOS, 7], [9, 8], [5, 6]]])
    weights = torch.tensor([[[0.25, 0.75], [1.0, 0.0], [1.0, 0.0]]]).double()
    tokens = SoftTokens(ids, weights, torch.ones(1, 3, dtype=torch.bool), (EOS,))
    (states, presence) = reward.states(tokens, {"prompt": ["w3 w4"]})
    assert presence.tolist() == [[0.0, 1.0, 1.0, 0.75, 0.75]]
    by_hand = (reward.head(states)[0, :, 0] * presence[0]).sum() / 3.5
    torch.testing.assert_close(reward.soft(tokens, prompt=["w3 w4"])[0], by_hand)


def test_the_order_of_words_matters_and_the_copy_is_neither_trained_nor_the_model():
    model = gpt2()
    torch.manual_seed(1)
    discriminator = Discriminator(model, width=4)
    one, other = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[6, 5, 4, 3]])
    before = discriminator.hard(one, one > 0)
    assert (before - discriminator.hard(other, other > 0)).abs() > 1e-5
    assert not any(parameter.requires_grad for parameter in discriminator.layers.parameters())
    assert not any(module.training for module in discriminator.train().layers.modules())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(discriminator.hard(one, one > 0), before, rtol=0.0, atol=0.0)
    assert model.config.num_hidden_layers == len(model.transformer.h) == 2


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
    width = discriminator.head[0].in_features
    real, generated = (
        (torch.randn(2, 3, width, generator=generator).double(), torch.ones(2, 3).double()) for _ in range(2)
    )
    shares = torch.tensor([0.25, 1.0]).double()
    found = gradient_penalty(discriminator, real, generated, shares)
    point = shares[:, None, None] * real[0] + (1 - shares[:, None, None]) * generated[0]
    step, squares = 1e-6, 0.0
    for index in range(point[0].numel()):
        shift = torch.zeros(2, 3 * width).double()
        shift[:, index] = step
        ahead, behind = (
            discriminator.log_odds(point + sign * shift.view_as(point), real[1]).detach() for sign in (1, -1)
        )
        squares = squares + ((ahead - behind) / (2 * step)).square()
    torch.testing.assert_close(found.detach(), squares.mean(), rtol=1e-5, atol=0.0)
    # It is differentiated in the weights, or it would penalise nothing.
    found.backward()
    assert discriminator.head[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width must be 1 or more, got 0"),
        ({"num_layers": 3}, "num_layers must be from 0 to the model's 2 layers, got 3"),
    ],
)
def test_what_is_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Discriminator(gpt2(), **settings)
