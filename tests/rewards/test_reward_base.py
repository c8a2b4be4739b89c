"""What is checked of a reward's result, and the function for TRL's trainers."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import PreTrainedTokenizerFast

from softrl.rewards.base import Reward, as_trl, checked_hard, checked_soft
from softrl.types import SoftTokens


class Given:
    """A reward that returns what it is told to, and remembers what it got."""

    name = "given"
    vocab_size = None

    def __init__(self, result):
        self.result = result

    def soft(self, tokens, **columns):
        return self.result(tokens) if callable(self.result) else self.result

    def hard(self, ids, mask, **columns):
        self.got = (ids, mask, columns)
        self.had_grad = torch.is_grad_enabled()
        return self.result(ids) if callable(self.result) else self.result


def tokenizer(**special_tokens):
    """A tokenizer of ten words with these special tokens."""
    vocabulary = {str(number): number for number in range(10)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), **special_tokens)


def soft_tokens(requires_grad=False):
    weights = torch.full((8, 4, 2), 0.5, requires_grad=requires_grad)
    return SoftTokens(torch.zeros(8, 4, 2, dtype=torch.long), weights, torch.ones(8, 4, dtype=torch.bool))


HARD = (torch.zeros(8, 4, dtype=torch.long), torch.ones(8, 4, dtype=torch.bool))
ODD = torch.tensor([0.0, float("nan"), 1.0, float("inf"), float("nan"), float("nan"), float("nan"), -float("inf")])


def test_a_reward_is_recognised_by_its_faces():
    assert isinstance(Given(None), Reward)
    assert not isinstance(SimpleNamespace(name="half", vocab_size=None, hard=None), Reward)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(8, 1), r"reward 'given' returned shape \(8, 1\), expected \(8,\): one number per sequence"),
        (torch.zeros(()), r"returned shape \(\), expected \(8,\)"),
        (torch.zeros(4), r"returned shape \(4,\), expected \(8,\)"),
        ([0.0] * 8, "returned a list, expected a tensor of floats"),
        (torch.zeros(8, dtype=torch.long), "returned torch.int64, expected a floating-point tensor"),
        (ODD, r"'given' is NaN or infinite for the sequences \[1, 3, 4, 5, 6\] and 1 more"),
        (ODD[[0, 2, 0, 1, 0, 0, 0, 0]], r"NaN or infinite for the sequences \[3\]$"),
    ],
)
def test_wrong_results_are_reported_by_the_rewards_name(result, message):
    with pytest.raises(ValueError, match=message):
        checked_soft(Given(result), soft_tokens())
    with pytest.raises(ValueError, match=message):
        checked_hard(Given(result), *HARD)


def test_right_results_pass_unchanged():
    values = torch.arange(8.0)
    assert checked_hard(Given(values), *HARD) is values
    assert checked_soft(Given(values), soft_tokens()) is values


def test_columns_are_passed_on():
    reward = Given(torch.zeros(8))
    checked_hard(reward, *HARD, prompt=["p"] * 8)
    assert reward.got[2] == {"prompt": ["p"] * 8}


head = nn.Linear(4, 1)


@pytest.mark.parametrize(
    "cut",
    [
        lambda tokens: tokens.weights.detach().sum((1, 2)),
        lambda tokens: tokens.weights.argmax(-1).double().sum(-1),
        lambda tokens: head(tokens.weights.detach().sum(-1)).squeeze(-1),  # has a graph, but not to the weights
    ],
)
def test_a_reward_without_a_path_to_the_weights_is_found(cut):
    with pytest.raises(ValueError, match=r"'given' is not differentiable in the weights.*ReinforceTrainer"):
        checked_soft(Given(cut), soft_tokens(requires_grad=True))
    checked_soft(Given(cut), soft_tokens(requires_grad=False))
    with torch.no_grad():
        checked_soft(Given(cut), soft_tokens(requires_grad=True))


@pytest.mark.parametrize("leaf", [True, False])
def test_a_path_to_the_weights_is_found(leaf):
    tokens = soft_tokens(requires_grad=True)
    if not leaf:
        tokens = tokens.with_weights(tokens.weights * 1.0)
    values = checked_soft(Given(lambda tokens: head(tokens.weights.sum(-1).exp()).squeeze(-1)), tokens)
    assert values.requires_grad


def test_as_trl_pads_and_calls_the_hard_face_without_gradient():
    reward = Given(lambda ids: ids.double().sum(-1))
    function = as_trl(reward, tokenizer(pad_token="9", eos_token="2"))
    assert function.__name__ == "given"
    result = function(
        prompts=["a", "b", "c"],
        completions=["x", "y", ""],
        completion_ids=[[1, 2], [3], []],
        answer=["u", "v", "w"],
        trainer_state=object(),
        log_extra=print,
        log_metric=print,
    )
    assert result == [3.0, 12.0, 18.0]
    ids, mask, columns = reward.got
    assert ids.tolist() == [[1, 2], [3, 9], [9, 9]]
    assert mask.tolist() == [[True, True], [True, False], [False, False]]
    assert columns == {"prompt": ["a", "b", "c"], "answer": ["u", "v", "w"]}
    assert not reward.had_grad


def test_as_trl_without_a_pad_token():
    reward = Given(lambda ids: ids.double().sum(-1))
    for special_tokens, expected in (({"eos_token": "7"}, [[1, 2], [3, 7]]), ({}, [[1, 2], [3, 0]])):
        as_trl(reward, tokenizer(**special_tokens))(["", ""], ["", ""], [[1, 2], [3]])
        assert reward.got[0].tolist() == expected
