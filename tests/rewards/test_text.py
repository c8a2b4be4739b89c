"""TRL's functions of texts as rewards: what they are given, and what is said of what they return."""

import pytest
import torch
from classifiers import tokenizer

from softrl.rewards.base import as_trl, checked_hard
from softrl.rewards.length import LengthReward
from softrl.rewards.resolve import resolve_rewards
from softrl.rewards.text import TextReward
from softrl.types import SoftTokens

IDS = torch.tensor([[5, 6, 7], [8, 9, 2]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def reward(function, differentiates=False):
    (found,) = resolve_rewards(function, tokenizer(), None, differentiates=differentiates)
    return found


def test_a_function_gets_texts_ids_and_columns():
    seen = {}

    def function(prompts, completions, completion_ids, answer, **kwargs):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, others=set(kwargs))
        return [1, 2.5]

    found = reward(function)
    assert isinstance(found, TextReward)
    values = checked_hard(found, IDS, MASK, prompt=["a", "b"], answer=["x", "y"])
    assert values.tolist() == [1.0, 2.5]
    rows = [[5, 6, 7], [8, 9]]
    assert seen["ids"] == rows
    assert seen["completions"] == tokenizer().batch_decode(rows)
    assert (seen["prompts"], seen["answer"]) == (["a", "b"], ["x", "y"])
    assert seen["others"] == {"log_extra", "log_metric"}
    assert as_trl(found, tokenizer())(["a", "b"], ["?", "?"], rows, answer=["x", "y"]) == [1.0, 2.5]


def test_conversations_get_conversations():
    def function(completions, log_metric):
        log_metric("seen", 1.0)
        return [len(completion[0]["content"]) + (completion[0]["role"] == "assistant") for completion in completions]

    texts = tokenizer().batch_decode([[5, 6, 7], [8, 9]])
    values = reward(function).hard(IDS, MASK, prompt=[[{"role": "user", "content": "hi"}]] * 2, answer=["x", "y"])
    assert values.tolist() == [len(text) + 1 for text in texts]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, **kwargs: [1.0], "'lambda' returned 1 rewards for 2 completions"),
        (lambda completions, **kwargs: [1.0, None], r"'lambda' returned None for the sequences \[1\]"),
        (lambda completions, **kwargs: [1.0, float("nan")], r"'lambda' is NaN or infinite for the sequences \[1\]"),
    ],
)
def test_what_it_returns_is_checked(function, message):
    with pytest.raises(ValueError, match=message):
        checked_hard(reward(function), IDS, MASK, prompt=["a", "b"])


def test_asynchronous_functions_are_refused():
    async def function(completions, **kwargs):
        return [0.0, 0.0]

    with pytest.raises(TypeError, match="'function' is asynchronous"):
        reward(function)


def test_there_is_no_soft_face():
    def function(completions, **kwargs):
        return [0.0, 0.0]

    found = reward(function)
    tokens = SoftTokens(IDS[..., None], torch.ones(2, 3, 1), MASK)
    with pytest.raises(TypeError, match="'function' is a function of texts: its value cannot be differentiated"):
        found.soft(tokens)
    with pytest.raises(TypeError, match=r"'function' is a function of texts.*ReinforceTrainer"):
        reward(found, differentiates=True)
    several = resolve_rewards([function, LengthReward(), function], tokenizer(), None, differentiates=False)
    assert [one.name for one in several] == ["function", "length", "function_2"]
