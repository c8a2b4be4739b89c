"""The token-linear reward against its formula written out, its two faces, and what it refuses."""

import inspect
import math

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from softrl.rewards.token_linear import TokenLinearReward
from softrl.types import SoftTokens

V, N, T, K = 11, 5, 6, 3


def draw(dtype=torch.float64):
    """Random soft tokens whose last sequence is empty, and a weight per token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(N * T)]).reshape(N, T, K)
    weights = torch.rand(N, T, K, generator=generator, dtype=torch.float64).softmax(-1)
    lengths = torch.tensor([6, 1, 3, 4, 0])
    mask = torch.arange(T) < lengths[:, None]
    token_weights = torch.randn(V, generator=generator, dtype=torch.float64)
    return SoftTokens(ids, weights.to(dtype), mask), token_weights


def by_hand(tokens, token_weights, bias, link, pooling):
    """The formula, one number at a time."""
    results = []
    for row in range(N):
        values = [
            sum(float(tokens.weights[row, t, k]) * float(token_weights[tokens.ids[row, t, k]]) for k in range(K))
            for t in range(T)
            if tokens.mask[row, t]
        ]
        pooled = sum(values) / max(len(values), 1) if pooling == "mean" else sum(values)
        log_odds = bias + pooled
        results.append(1 / (1 + math.exp(-log_odds)) if link == "sigmoid" else log_odds)
    return torch.tensor(results, dtype=torch.float64)


@pytest.mark.parametrize("link", ["sigmoid", "identity"])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_soft_is_the_formula(link, pooling):
    tokens, token_weights = draw()
    reward = TokenLinearReward(token_weights, 0.3, link=link, pooling=pooling)
    result = reward.soft(tokens)
    torch.testing.assert_close(result, by_hand(tokens, token_weights, 0.3, link, pooling), rtol=1e-12, atol=1e-12)
    assert result[-1] == (torch.sigmoid(torch.tensor(0.3, dtype=torch.float64)) if link == "sigmoid" else 0.3)


@pytest.mark.parametrize("link", ["sigmoid", "identity"])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_agrees_with_soft_on_one_hot_tokens(link, pooling, dtype):
    tokens, token_weights = draw(dtype)
    reward = TokenLinearReward(token_weights.to(dtype), -0.2, link=link, pooling=pooling)
    one_hot = torch.nn.functional.one_hot(tokens.weights.argmax(-1), K).to(dtype)
    chosen = tokens.ids.gather(-1, tokens.weights.argmax(-1, keepdim=True)).squeeze(-1)
    hard = reward.hard(chosen, tokens.mask)
    torch.testing.assert_close(reward.soft(tokens.with_weights(one_hot)), hard, rtol=1e-5, atol=1e-5)
    assert len(set(hard.tolist())) == N  # the sequences differ, so agreement says something


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_gradient_against_finite_differences(pooling):
    tokens, token_weights = draw()
    reward = TokenLinearReward(token_weights, 0.3, pooling=pooling)
    leaf = tokens.weights.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda weights: reward.soft(tokens.with_weights(weights)), leaf, atol=1e-8)
    reward.soft(tokens.with_weights(leaf)).sum().backward()
    assert (leaf.grad[~tokens.mask] == 0).all()
    assert (leaf.grad[tokens.mask] != 0).all()


def test_what_the_mask_hides_has_no_influence():
    tokens, token_weights = draw()
    reward = TokenLinearReward(token_weights, 0.3)
    garbage = tokens.ids.masked_fill(~tokens.mask[..., None], -100)
    assert torch.equal(reward.soft(SoftTokens(garbage, tokens.weights, tokens.mask)), reward.soft(tokens))
    assert torch.equal(reward.hard(garbage[..., 0], tokens.mask), reward.hard(tokens.ids[..., 0], tokens.mask))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision(given, expected):
    tokens, token_weights = draw(given)
    reward = TokenLinearReward(token_weights.float(), 0.3)
    result = reward.soft(tokens)
    assert result.dtype == expected
    exact = by_hand(tokens, token_weights.float(), 0.3, "sigmoid", "mean")
    tolerance = 1e-14 if given == torch.float64 else 1e-6
    bias_rounding = 1e-8  # 0.3 in float32
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=tolerance + bias_rounding)


@pytest.mark.parametrize("outside", [V, V + 7, -1])
def test_an_id_outside_the_vocabulary(outside):
    tokens, token_weights = draw()
    reward = TokenLinearReward(token_weights, 0.3)
    ids = tokens.ids.clone()
    ids[0, 0, 1] = outside
    message = f"token id {outside} is outside the {V} ids of reward 'sentiment': the vocabularies .* differ"
    with pytest.raises(ValueError, match=message):
        reward.soft(SoftTokens(ids, tokens.weights, tokens.mask))
    with pytest.raises(ValueError, match=message):
        reward.hard(ids[..., 1], tokens.mask)


def test_check_vocabulary():
    reward = TokenLinearReward(torch.zeros(V), 0.0, name="mood")
    reward.check_vocabulary(V)
    with pytest.raises(ValueError, match=rf"'mood' knows {V} token ids, the policy has 49152.*sentiment_reward"):
        reward.check_vocabulary(49152)


def test_settings_are_checked():
    """Without the type checker of the test run, which users do not have."""
    untyped = inspect.unwrap(TokenLinearReward.__init__)
    for name, wrong in (("link", "tanh"), ("pooling", "max")):
        with pytest.raises(ValueError, match=f"{name} must be one of .* got '{wrong}'"):
            untyped(nn.Module.__new__(TokenLinearReward), torch.zeros(3), 0.0, **{name: wrong})


def test_save_and_load(tmp_path):
    tokens, token_weights = draw()
    reward = TokenLinearReward(token_weights, 0.3, name="mood", link="identity", pooling="sum")
    reward.save(tmp_path / "reward.safetensors")
    loaded = TokenLinearReward.load(tmp_path / "reward.safetensors")
    assert torch.equal(loaded.soft(tokens), reward.soft(tokens))
    assert (loaded.name, loaded.link, loaded.pooling, loaded.vocab_size) == ("mood", "identity", "sum", V)
    assert [path.name for path in tmp_path.iterdir()] == ["reward.safetensors"]


def test_loading_something_else(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is no token-linear reward"):
        TokenLinearReward.load(tmp_path / "other.safetensors")
    (tmp_path / "rewards.py").write_text("def reward(tokens): ...\n")
    with pytest.raises(ValueError, match=r"rewards\.py is no token-linear reward: it is no safetensors file"):
        TokenLinearReward.load(tmp_path / "rewards.py")


def test_as_trl_gives_the_hard_reward():
    _, token_weights = draw()
    reward = TokenLinearReward(token_weights, 0.3, name="mood")
    words = Tokenizer(models.WordLevel({str(number): number for number in range(V)}))
    function = reward.as_trl(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2"))
    assert function.__name__ == "mood"
    result = function(prompts=["", ""], completions=["", ""], completion_ids=[[1, 4, 2], [5]])
    log_odds = [float(token_weights[[1, 4, 2]].mean()) + 0.3, float(token_weights[5]) + 0.3]
    assert result == pytest.approx([1 / (1 + math.exp(-value)) for value in log_odds], abs=1e-7)


def test_it_moves_and_saves_like_a_module():
    reward = TokenLinearReward(torch.zeros(V), 0.0)
    assert set(reward.state_dict()) == {"weight", "bias"}
    assert list(reward.parameters()) == []
    assert reward.to(torch.float64).weight.dtype == torch.float64
