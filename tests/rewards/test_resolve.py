"""Everything that `reward_funcs` may hold, and what is said of the rest."""

from functools import partial

import pytest
import torch
from classifiers import V, llama, tokenizer
from safetensors.torch import save_file
from torch import nn

from softrl.rewards import resolve
from softrl.rewards.aligned_reward_model import AlignedClassifierReward
from softrl.rewards.base import checked_soft
from softrl.rewards.function import FunctionReward
from softrl.rewards.length import LengthReward
from softrl.rewards.resolve import resolve_rewards
from softrl.rewards.reward_model import SequenceClassifierReward
from softrl.rewards.token_linear import TokenLinearReward
from softrl.types import SoftTokens

MODULE = '''
"""Rewards of a user."""

from softrl.rewards.length import LengthReward

length = LengthReward()
saved = "{saved}"
number = 3


class Mine(LengthReward):
    pass


def make(target=4.0):
    return LengthReward(target=target, name="made")


def first_weight(tokens):
    return tokens.weights[..., 0].sum(-1)


def black_box(completions, **kwargs):
    return [len(completion) for completion in completions]
'''


def resolved(*items, **settings):
    return resolve_rewards(list(items), tokenizer(), "policy", **settings)


def soft_tokens(requires_grad=True):
    weights = torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]]], requires_grad=requires_grad)
    return SoftTokens(torch.tensor([[[3, 4]], [[5, 6]]]), weights, torch.ones(2, 1, dtype=torch.bool))


def first_weight(tokens, answer):
    return tokens.weights[..., 0].sum(-1) * torch.tensor(answer)


def test_overlap_rewards_by_name():
    """References are cut by the policy's tokenizer."""
    bleu, *rouge = resolved("bleu", "rouge1", "rouge2", "rougeL")
    assert [reward.name for reward in (bleu, *rouge)] == ["bleu", "rouge1", "rouge2", "rougeL"]
    text = tokenizer().decode([5, 6, 7, 8, 9])
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    for reward in (bleu, *rouge):
        hard = reward.hard(ids, torch.ones_like(ids, dtype=torch.bool), prompt=["x"], reference=[text])
        torch.testing.assert_close(hard, torch.ones(1))


def test_a_saved_classifier_with_another_tokenizer_is_aligned(tmp_path):
    llama(num_labels=1).save_pretrained(tmp_path)
    tokenizer(shift=5).save_pretrained(tmp_path)
    (reward,) = resolved(str(tmp_path), vocab_size=V)
    assert isinstance(reward, AlignedClassifierReward)
    assert reward.coverage.one_piece == 1.0
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    everything = torch.ones_like(ids, dtype=torch.bool)
    aligned = reward.hard(ids, everything, prompt=["w3"])
    there = tokenizer(shift=5).convert_tokens_to_ids(tokenizer().convert_ids_to_tokens(ids[0].tolist()))
    plain = SequenceClassifierReward(llama(num_labels=1), tokenizer(shift=5))
    torch.testing.assert_close(aligned, plain.hard(torch.tensor([there]), everything, prompt=["w3"]))


class Black:
    def __call__(self, prompts, **kwargs):
        return [0.0] * len(prompts)


class Half(nn.Module):
    name = "half"

    def soft(self, tokens, **columns):
        return tokens.weights.sum((-2, -1))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module `users_rewards` in the working directory, and a saved reward."""
    TokenLinearReward(torch.zeros(V), 0.5, name="mood").save(tmp_path / "mood.safetensors")
    (tmp_path / "users_rewards.py").write_text(MODULE.format(saved=tmp_path / "mood.safetensors"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["elsewhere"])
    monkeypatch.delitem(__import__("sys").modules, "users_rewards", raising=False)
    return tmp_path


def test_reward_objects_stay_what_they_are():
    one, two = LengthReward(), TokenLinearReward(torch.zeros(V), 0.0)
    assert resolved(one, two) == [one, two]
    assert resolve_rewards(one, tokenizer(), "policy") == [one]
    assert resolve_rewards((one, two), tokenizer(), "policy") == [one, two]
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        resolved()


def test_sentiment_is_fitted_for_the_policy(monkeypatch):
    asked = []
    reward = TokenLinearReward(torch.zeros(V), 0.0)
    monkeypatch.setattr(resolve, "sentiment_reward", lambda name: asked.append(name) or reward)
    assert resolved("sentiment") == [reward]
    assert asked == ["policy"]
    monkeypatch.setattr(resolve, "sentiment_reward", lambda tokenizer, vocab_size: asked.append(vocab_size) or reward)
    assert resolve_rewards("sentiment", tokenizer(), None, vocab_size=V) == [reward]
    assert asked == ["policy", V]


def test_dotted_paths_in_the_working_directory(user_module):
    names = ["users_rewards." + name for name in ("length", "Mine", "make", "first_weight", "saved")]
    length, mine, made, function, saved = resolved(*names)
    assert isinstance(length, LengthReward)
    assert type(mine).__name__ == "Mine"
    assert (made.name, made.target) == ("made", 4.0)
    assert isinstance(function, FunctionReward)
    assert isinstance(saved, TokenLinearReward)
    assert (saved.name, float(saved.bias)) == ("mood", 0.5)
    assert __import__("sys").path == ["", "elsewhere"]
    with pytest.raises(TypeError, match="'black_box' is a function of completions"):
        resolved("users_rewards.black_box")
    with pytest.raises(
        ValueError, match=r"cannot import 'users_rewards\.missing' .*check the spelling and the folder"
    ):
        resolved("users_rewards.missing")
    with pytest.raises(ValueError, match=r"cannot import 'no_such_module\.reward'"):
        resolved("no_such_module.reward")
    with pytest.raises(TypeError, match="has a int; pass a reward object"):
        resolved("users_rewards.number")


def test_files_and_folders(tmp_path, user_module):
    (reward,) = resolved(str(user_module / "mood.safetensors"))
    assert reward.name == "mood"
    save_file({"weight": torch.zeros(3)}, user_module / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is no token-linear reward"):
        resolved(str(user_module / "other.safetensors"))
    llama().save_pretrained(tmp_path / "reward.model")
    (reward,) = resolved("reward.model", vocab_size=V)  # a folder, though it looks like a dotted path
    assert isinstance(reward, SequenceClassifierReward)
    assert reward.name == "reward.model"
    assert reward.include_prompt


@pytest.mark.parametrize("name", ["sentimnt", "no-such-user/no-such-model", "Qwen2.5-0.5B"])
def test_names_that_mean_nothing(name):
    with pytest.raises(ValueError, match=rf"'{name}' is neither 'sentiment', 'bleu', .*, a file .*cannot be loaded"):
        resolved(name)


def test_sequence_classifiers_need_the_policys_vocabulary():
    (reward,) = resolved(llama(), vocab_size=V)
    assert isinstance(reward, SequenceClassifierReward)
    message = rf"knows {V} token ids, the policy has 49152: .*needs the policy's tokenizer"
    with pytest.raises(ValueError, match=message):
        resolved(llama(), vocab_size=49152)
    larger = tokenizer()
    larger.add_tokens(["new"])
    with pytest.raises(ValueError, match=rf"knows {V} token ids, the policy has {V + 1}"):
        resolve_rewards(llama(), larger, "policy")


def test_functions_of_soft_tokens():
    (reward,) = resolved(first_weight)
    assert reward.name == "first_weight"
    tokens = soft_tokens()
    values = checked_soft(reward, tokens, answer=[1.0, 2.0], prompt=["a", "b"])
    assert values.tolist() == [0.75, 1.0]
    (grad,) = torch.autograd.grad(values.sum(), tokens.weights)
    assert grad[..., 0].flatten().tolist() == [1.0, 2.0]
    hard = reward.hard(torch.tensor([[3], [5]]), torch.ones(2, 1, dtype=torch.bool), answer=[1.0, 2.0])
    assert hard.tolist() == [1.0, 2.0]


def test_columns_of_functions():
    seen = FunctionReward(lambda tokens, **columns: torch.full((2,), float(len(columns))))
    assert seen.soft(soft_tokens(), prompt=["a", "b"], answer=["c", "d"]).tolist() == [2.0, 2.0]
    assert seen.name == "lambda"
    assert FunctionReward(partial(first_weight, answer=1.0)).name == "first_weight"
    assert FunctionReward(first_weight, name="mine").name == "mine"


def test_a_function_without_gradient_is_sent_to_the_score_function_trainer():
    (reward,) = resolved(lambda tokens: tokens.weights.argmax(-1).sum(-1).float())
    with pytest.raises(ValueError, match=r"'lambda' is not differentiable.*ReinforceTrainer"):
        checked_soft(reward, soft_tokens())


@pytest.mark.parametrize(
    ("item", "name", "parameter"),
    [
        (lambda completions, **kwargs: [0.0], "lambda", "completions"),
        (Black(), "Black", "prompts"),
        (partial(lambda scale, completion_ids: [0.0], 2.0), "lambda", "completion_ids"),
    ],
)
def test_functions_of_texts_are_black_boxes(item, name, parameter):
    message = rf"'{name}' is a function of {parameter}: its value cannot be differentiated.*ReinforceTrainer"
    with pytest.raises(TypeError, match=message):
        resolved(item)


def test_what_is_no_reward():
    with pytest.raises(TypeError, match=r"has a Linear, which is no reward: it lacks name, vocab_size, soft, hard"):
        resolved(nn.Linear(2, 1))
    with pytest.raises(TypeError, match=r"has a Half, .*lacks vocab_size, hard\. Implement .*Reward"):
        resolved(Half())
    with pytest.raises(TypeError, match=r"has the class LengthReward; pass an object of it: LengthReward\(\.\.\.\)"):
        resolved(LengthReward)
    with pytest.raises(TypeError, match=r"has a NoneType; pass a reward object"):
        resolved(None)


def test_equal_names_get_numbers():
    one, mood = LengthReward(), TokenLinearReward(torch.zeros(V), 0.0, name="mood")
    rewards = resolved(one, mood, LengthReward(target=3.0), LengthReward(name="length_2"), one, mood)
    assert [reward.name for reward in rewards] == ["length", "mood", "length_2", "length_2_2", "length_3", "mood_2"]
    assert (one.name, mood.name) == ("length", "mood")
    assert rewards[4].target is None
    rewards[5].double()
    assert mood.weight.dtype == torch.float64, "the copy shares its tensors"
