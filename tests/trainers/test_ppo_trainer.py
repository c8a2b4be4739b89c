"""`PPOTrainer`: its first step by hand, the cycle of steps on one rollout, resuming, and that it learns."""

import pytest
import torch
from helpers import PairReward, llama
from peft import LoraConfig
from safetensors.torch import load_file
from trainers.tiny import dataset, logs_of, make, numbers_of, own_forwards, parameters_of

from softrl.rewards.token_linear import TokenLinearReward
from softrl.trainers.sampling import GroupSampler

pytestmark = pytest.mark.slow  # imports trl


def ppo(tmp_path, tokenizer, **settings):
    return make(tmp_path, tokenizer, method="PPO", **{"num_ppo_epochs": 2, **settings})


def gae_by_hand(reward, direct, values, discount, gae_lambda):
    """Term by term, as the sum over later temporal-difference errors; direct[t] is earned by the token before."""
    length = len(direct)
    earned = [*direct[1:], 0.0]
    earned[-1] = earned[-1] + reward
    following = [*values[1:], 0.0]
    deltas = [earned[t] + discount * following[t] - values[t] for t in range(length)]
    return [
        sum((discount * gae_lambda) ** (later - t) * deltas[later] for later in range(t, length))
        for t in range(length)
    ]


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_the_first_step_is_the_score_function_with_generalized_advantages(tmp_path, tokenizer, kl_in):
    trainer = ppo(
        tmp_path, tokenizer, gamma=0.9, lam=0.7, kl_in=kl_in, vf_coef=0.3, temperature=1.3, max_completion_length=9
    )
    trainer.reference.model.load_state_dict(llama(seed=2).state_dict())
    torch.nn.init.normal_(trainer.value_head.linear.weight, std=0.3)
    rows = [trainer.train_dataset[index] for index in (1, 2, 3, 4)]
    trainer.compute_loss(trainer.model, rows).backward()
    ours = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    (collected,) = trainer._collected.values()
    rollout = collected.estimate.rollout
    assert len(set(rollout.mask.sum(-1).tolist())) > 1
    total = 0.0
    rewards = PairReward().hard(rollout.tokens, rollout.mask)
    for reward, (taken, kl, entropy, hidden) in zip(rewards, own_forwards(trainer, rollout), strict=True):
        direct = -0.1 * kl + 0.05 * entropy
        values = trainer.value_head(hidden.detach()).double()
        counted = direct if kl_in == "reward" else torch.zeros_like(direct)
        numbers = (reward.item(), counted.tolist(), values.tolist())
        advantages = torch.tensor(gae_by_hand(*numbers, 0.9, 0.7), dtype=torch.float64)
        returns = advantages + values.detach()
        total = total + (advantages * taken + direct).sum() - 0.3 * (0.5 * (values - returns) ** 2).mean()
    (-total / 4).backward()
    for name, parameter in trainer.model.named_parameters():
        assert (ours[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


class Counting(PairReward):
    def __init__(self):
        super().__init__()
        self.seen = []

    def hard(self, ids, mask, prompt=(), **columns):
        self.seen.append(tuple(prompt))
        return super().hard(ids, mask)


def test_a_cycle_is_so_many_steps_on_one_rollout(tmp_path, tokenizer):
    """Six steps an epoch of 8 prompts, 4 a rollout: two rollouts an epoch, of all prompts once; ratios move off 1."""
    reward = Counting()
    trainer = ppo(
        tmp_path, tokenizer, reward=reward, num_ppo_epochs=3, max_steps=12, per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.epoch == pytest.approx(2.0)
    assert len(reward.seen) == 4 * 2  # rollouts, micro-batches
    everything = sorted(dataset()["prompt"])
    for epoch in (reward.seen[:4], reward.seen[4:]):
        assert sorted(prompt for batch in epoch for prompt in batch) == everything
    rows = numbers_of(trainer)
    assert [row["step"] for row in rows if "reward" in row] == [1, 4, 7, 10]
    assert [row["approx_kl"] > 1e-12 for row in rows] == [False, True, True] * 4
    tokens = logs_of(trainer, "num_tokens")
    assert tokens[0] == tokens[1] == tokens[2] < tokens[3]
    assert {"kl", "entropy", "advantages/std", "baseline", "completions/mean_length"} <= set(rows[0])
    assert all(
        {"clip_ratio/low_mean", "clip_ratio/high_mean", "value_loss", "loss", "grad_norm"} <= set(r) for r in rows
    )


def test_mini_batches_are_parts_of_the_whole(tmp_path, tokenizer):
    trainer = ppo(tmp_path, tokenizer, num_mini_batches=2, per_device_train_batch_size=8)
    parts = []
    for step in range(4):
        trainer.state.global_step = step
        parts.append(trainer._rows(8, 0).tolist())
    assert sorted(parts[0] + parts[1]) == sorted(parts[2] + parts[3]) == list(range(8))
    assert sorted(parts[0]) != sorted(parts[2])  # another order in each epoch
    trainer.state.global_step = 0
    trainer.max_steps = 2
    trainer.train()
    assert trainer.state.global_step == 3


def test_blocks_of_prompts_are_repeated_whole():
    order = list(GroupSampler(7, 2, True, 3, lambda: 0, block=3, repeats=2))
    assert len(order) == len(GroupSampler(7, 2, True, 3, lambda: 0, block=3, repeats=2)) == 6 * 2 * 2
    assert order[:6] == order[6:12]
    assert order[12:18] == order[18:]
    assert len(set(order)) == 6
    assert order[:6:2] == order[1:6:2]


def test_accumulation_changes_nothing(tmp_path, tokenizer):
    ends = []
    for batch, accumulation in ((4, 1), (2, 2)):
        trainer = ppo(
            tmp_path, tokenizer, shuffle_dataset=False, per_device_train_batch_size=batch, max_steps=5,
            gradient_accumulation_steps=accumulation, learning_rate=0.01,
        )  # fmt: skip
        trainer.train()
        ends.append(parameters_of(trainer))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-7)


def test_resuming_at_the_end_of_a_cycle_gives_the_same_numbers(tmp_path, tokenizer):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "optim": "adamw_torch",
                "learning_rate": 0.01, "value_learning_rate": 0.05}  # fmt: skip
    straight = ppo(tmp_path / "a", tokenizer, **settings)
    straight.train()
    resumed = ppo(tmp_path / "b", tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for expected, row in zip(numbers_of(straight)[-4:], numbers_of(resumed)[-4:], strict=True):
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert logs_of(straight, "baseline")[-1] != 0.0
    torch.testing.assert_close(parameters_of(resumed), parameters_of(straight), rtol=1e-6, atol=1e-9)


def test_resuming_inside_a_cycle_samples_anew(tmp_path, tokenizer):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "num_ppo_epochs": 4}
    reward = Counting()
    straight = ppo(tmp_path / "a", tokenizer, **settings, reward=reward)
    straight.train()
    again = Counting()
    resumed = ppo(tmp_path / "b", tokenizer, **settings, reward=again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert again.seen == reward.seen  # the same prompts, asked for once
    assert numbers_of(resumed)[-2]["approx_kl"] == pytest.approx(0.0, abs=1e-12)
    assert numbers_of(straight)[-2]["approx_kl"] > 1e-12


@pytest.mark.parametrize("whiten", [False, True])
def test_a_policy_learns_the_reward(tmp_path, tokenizer, whiten):
    weight = torch.zeros(23, dtype=torch.float64)
    weight[[5, 9, 14]] = 4.0
    trainer = ppo(
        tmp_path, tokenizer, reward=TokenLinearReward(weight, -2.0), beta=0.0, entropy_coef=0.0, max_steps=48,
        optim="adamw_torch", learning_rate=0.01, per_device_train_batch_size=16, num_generations=4,
        num_ppo_epochs=2, num_mini_batches=2, value_learning_rate=0.05, whiten_advantages=whiten,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    rewards, values = logs_of(trainer, "reward"), logs_of(trainer, "baseline")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    assert values[0] == 0.0
    assert abs(values[-1] - rewards[-1]) < 0.4 * rewards[-1]  # the value has followed
    trainer.save_model(str(tmp_path))
    assert not any("value_head" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ppo_epochs": 0}, "num_ppo_epochs must be at least 1, got 0"),
        ({"num_mini_batches": 3}, "per_device_train_batch_size=4 must be divisible by num_mini_batches=3"),
        ({"cliprange": 0.0}, "cliprange must be positive, got 0.0"),
        ({"cliprange_value": -0.1}, "cliprange_value must be positive"),
        ({"lam": 1.1}, r"lam must lie in \[0, 1\], got 1.1"),
        ({"gamma": -0.1}, r"gamma must lie in \[0, 1\]"),
        ({"vf_coef": -1.0}, "vf_coef must not be negative"),
        ({"kl_in": "both"}, "kl_in must be 'reward' or 'loss', got 'both'"),
    ],
)
def test_bad_arguments_are_refused_before_training(tmp_path, tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        ppo(tmp_path, tokenizer, **change)


def test_a_rollout_needs_enough_prompts(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="train_dataset has 3 prompts, a rollout takes 4"):
        ppo(tmp_path, tokenizer, train=dataset(3)).train()
