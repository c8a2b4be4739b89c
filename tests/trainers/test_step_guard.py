"""Steps with gradients that are not finite, or rewards that jump, are left out, reported, and end a run in the end."""

import math

import pytest
import torch
from helpers import PairReward
from trainers.tiny import logs_of, make, numbers_of, parameters_of
from transformers import TrainerCallback

from softrl.trainers import SoftRolloutConfig
from softrl.trainers.step_guard import RewardHistory

METHODS = [("SoftRollout", {}), ("Reinforce", {"num_generations": 2}), ("PPO", {"num_generations": 2})]


class Poison(torch.autograd.Function):
    """The identity, with a gradient that is not a number."""

    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.nan


class Parameters(TrainerCallback):
    """Parameters and optimizer states after every step; the model's output is poisoned in the steps named."""

    def __init__(self, poisoned):
        self.poisoned, self.seen, self.trainer = poisoned, [], None

    def on_step_begin(self, args, state, control, **kwargs):
        self.hook = None
        if state.global_step + 1 in self.poisoned:
            norm = self.trainer.model.model.norm
            self.hook = norm.register_forward_hook(lambda module, inputs, output: Poison.apply(output))

    def on_step_end(self, args, state, control, **kwargs):
        if self.hook is not None:
            self.hook.remove()
        self.seen.append(parameters_of(self.trainer).clone())


def run(folder, tokenizer, poisoned, method="SoftRollout", **settings):
    trainer, callback = None, Parameters(poisoned)
    trainer = make(folder, tokenizer, method=method, optim="adamw_torch", learning_rate=1e-2, **settings)
    callback.trainer = trainer
    trainer.add_callback(callback)
    return trainer, callback


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), METHODS)
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_without_a_finite_gradient_is_not_taken(tmp_path, tokenizer, method, settings, max_grad_norm, capsys):
    trainer, callback = run(tmp_path, tokenizer, {2}, method, max_steps=4, max_grad_norm=max_grad_norm, **settings)
    start = parameters_of(trainer).clone()
    trainer.train()
    first, second, third, _ = callback.seen
    assert torch.equal(first, second)  # not even by the optimizer's momentum
    assert not torch.equal(start, first)
    assert not torch.equal(second, third)
    assert torch.isfinite(parameters_of(trainer)).all()
    assert "Step 2 is not taken: its gradient norm is nan (1 in a row)" in capsys.readouterr().out
    assert logs_of(trainer, "skipped_steps") == [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_a_value_head_without_a_finite_gradient_is_enough(tmp_path, tokenizer):
    trainer, _ = run(tmp_path, tokenizer, set(), "PPO", num_generations=2, max_steps=1, num_ppo_epochs=1)
    start = parameters_of(trainer).clone()
    next(trainer.value_head.parameters()).register_hook(lambda gradient: gradient * torch.nan)
    trainer.train()
    assert torch.equal(parameters_of(trainer), start)
    assert logs_of(trainer, "skipped_steps") == [1.0]


@pytest.mark.slow
def test_many_in_a_row_end_the_run_with_a_checkpoint_of_what_was_good(tmp_path, tokenizer):
    settings = {"max_steps": 9, "max_skipped_steps": 3, "save_strategy": "steps", "save_steps": 50}
    trainer, callback = run(tmp_path, tokenizer, {2, 4, 5, 6}, **settings)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row had gradients .* last one step 6"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert torch.equal(callback.seen[2], callback.seen[-1])
    resumed, _ = run(tmp_path, tokenizer, set(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert logs_of(resumed, "skipped_steps")[-1] == 4.0


class Jumping(PairReward):
    """One rollout's rewards are a thousand times too large."""

    def __init__(self, call):
        super().__init__()
        self.call, self.calls = call, 0

    def hard(self, ids, mask, **columns):
        self.calls += 1
        return super().hard(ids, mask) + (1000.0 if self.calls == self.call else 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_a_reward_that_jumps_is_not_learned_from(tmp_path, tokenizer, method, settings, capsys):
    settings = {**settings, "max_steps": 14, "max_reward_jump": 6.0, "num_ppo_epochs": 1, "num_mini_batches": 1}
    if method != "PPO":
        settings = {
            name: value for name, value in settings.items() if name not in ("num_ppo_epochs", "num_mini_batches")
        }
    trainer, callback = run(tmp_path, tokenizer, set(), method, reward=Jumping(12), **settings)
    trainer.train()
    taken = [not torch.equal(one, other) for one, other in zip(callback.seen, callback.seen[1:], strict=False)]
    assert taken == [step != 12 for step in range(2, 15)]
    assert "Step 12: the mean reward jumped to" in capsys.readouterr().out
    assert len(numbers_of(trainer)) == 14


def test_the_history_of_rewards():
    history = RewardHistory()
    rewards = [0.1, 0.3] * 6
    assert not any(history.jumps(reward, 4.0) for reward in rewards)
    assert history.mean == pytest.approx(sum(rewards) / len(rewards), abs=0.02)
    assert math.sqrt(history.variance) == pytest.approx(0.1, abs=0.02)
    before = history.mean
    assert history.jumps(0.9, 4.0)
    assert history.jumps(-0.5, 4.0)
    assert history.mean == before  # what jumped is not remembered
    constant = RewardHistory(mean=1.0, variance=0.0, count=20)
    assert not constant.jumps(1.0005, 4.0)
    assert constant.jumps(1.1, 4.0)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{"max_skipped_steps": 0}, {"max_reward_jump": 0.0}, {"max_reward_jump": -1.0}])
def test_settings_out_of_range_are_named(tmp_path, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SoftRolloutConfig(str(tmp_path), **setting, report_to=[])


@pytest.mark.slow
def test_a_poisoned_kl_leaves_the_controller_alone(tmp_path, tokenizer):
    trainer, _ = run(tmp_path, tokenizer, set(), max_steps=2, target_kl=0.1)
    trainer.train()
    weight = trainer.kl_control.weight
    trainer._step_kl = [math.nan]
    trainer._adapt_kl_weight()
    assert trainer.kl_control.weight == weight
