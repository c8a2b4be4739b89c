"""`ReinforceTrainer` against gradients written by hand, and what it shares with the other trainers."""

import math

import pytest
import torch
from helpers import PairReward, llama
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from trainers.tiny import dataset, logs_of, make, numbers_of, own_forwards, parameters_of
from transformers import AutoModelForCausalLM

from softrl.rewards.token_linear import TokenLinearReward
from softrl.trainers import ReinforceConfig, ReinforceTrainer
from softrl.trainers.reinforce_config import ESTIMATORS

pytestmark = pytest.mark.slow  # imports trl


def reinforce(tmp_path, tokenizer, estimator="rloo", **settings):
    defaults = {"num_generations": 4, "per_device_train_batch_size": 8}
    return make(tmp_path, tokenizer, method="Reinforce", estimator=estimator, **{**defaults, **settings})


def gradient_and_rollout(trainer, rows):
    """The loss's gradient, by parameter, and the rollout that it was made of."""
    rollouts, original = [], trainer.rollout
    trainer.rollout = lambda batch: rollouts.append(original(batch)) or rollouts[-1]
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, rows).backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return grads, rollouts[-1]


def advantages_by_hand(estimator, returns, values):
    """From the returns [T_i] of each of the four samples of each prompt, token by token."""
    found = []
    for i, own in enumerate(returns):
        others = [returns[j] for j in range(i - i % 4, i - i % 4 + 4) if j != i]
        baseline = torch.zeros_like(own)
        for t in range(len(own)):
            if estimator == "rloo":  # nothing is left to be earned after the end of a shorter one but its reward
                baseline[t] = sum(other[t] if t < len(other) else other[-1] for other in others) / 3
            elif estimator == "reinforce_value":
                baseline[t] = values[i][t]
        found.append(own - baseline)
    return found


@pytest.mark.parametrize("estimator", ["reinforce", "rloo", "reinforce_value"])
def test_the_gradient_is_that_of_a_loss_written_by_hand(tmp_path, tokenizer, estimator):
    trainer = reinforce(tmp_path, tokenizer, estimator, temperature=1.3, max_completion_length=9, vf_coef=0.0)
    trainer.reference.model.load_state_dict(llama(seed=2).state_dict())
    if estimator == "reinforce_value":
        torch.nn.init.normal_(trainer.value_head.linear.weight, std=0.3)
    rows = [trainer.train_dataset[index] for index in (1, 2) for _ in range(4)]
    ours, rollout = gradient_and_rollout(trainer, rows)
    assert len(set(rollout.mask.sum(-1).tolist())) > 1
    rewards = PairReward().hard(rollout.tokens, rollout.mask)
    steps = own_forwards(trainer, rollout)
    direct = [-0.1 * kl + 0.05 * entropy for _, kl, entropy, _ in steps]
    returns, values = [], []
    for reward, terms, (_, _, _, hidden) in zip(rewards, direct, steps, strict=True):
        later = [terms[t + 1 :].sum() for t in range(len(terms))]
        returns.append(reward + torch.stack(later).detach())
        values.append(None if trainer.value_head is None else trainer.value_head(hidden).detach().double())
    advantages = advantages_by_hand(estimator, returns, values)
    total = sum(
        (advantage * taken + terms).sum()
        for advantage, (taken, _, _, _), terms in zip(advantages, steps, direct, strict=True)
    )
    (-total / len(rows)).backward()
    for name, parameter in trainer.model.named_parameters():
        if "value_head" not in name:
            assert (ours[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


def test_the_value_follows_the_returns_and_not_the_policy(tmp_path, tokenizer):
    """Its gradient is that of ½ (V − G)², a mean over tokens and sequences, and leaves the policy's alone."""
    grads = {}
    for coefficient in (0.0, 0.5):
        trainer = reinforce(tmp_path, tokenizer, "reinforce_value", vf_coef=coefficient, beta=0.0, entropy_coef=0.0)
        rows = [trainer.train_dataset[1] for _ in range(8)]
        grads[coefficient], rollout = gradient_and_rollout(trainer, rows)
    for name, grad in grads[0.0].items():
        if "value_head" not in name:
            torch.testing.assert_close(grads[0.5][name], grad)
    rewards = PairReward().hard(rollout.tokens, rollout.mask)
    steps = own_forwards(trainer, rollout)
    losses = [
        (0.5 * (trainer.value_head(hidden.detach()) - reward) ** 2).mean()
        for reward, (_, _, _, hidden) in zip(rewards, steps, strict=True)
    ]
    (0.5 * sum(losses) / 8).backward()
    torch.testing.assert_close(
        grads[0.5]["value_head.linear.weight"], trainer.value_head.linear.weight.grad, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_takes_steps_and_logs(tmp_path, tokenizer, estimator):
    trainer = reinforce(tmp_path, tokenizer, estimator, max_steps=2)
    start = parameters_of(trainer)
    trainer.train()
    assert (parameters_of(trainer) - start).norm() > 1e-3
    wanted = """
        reward reward_std frac_reward_zero_std rewards/pair/mean rewards/pair/std reward/hard kl entropy num_tokens
        completions/mean_length completions/min_length completions/max_length completions/clipped_ratio step_time
        step_time/rollout step_time/surrogate advantages/mean advantages/std grad_norm
    """.split()  # noqa: SIM905
    for row in (row for row in trainer.state.log_history if "loss" in row):
        assert set(wanted) <= set(row)
        assert all(math.isfinite(row[name]) for name in wanted)
    kls = logs_of(trainer, "kl")
    assert kls[0] == pytest.approx(0.0, abs=1e-9)
    assert kls[1] > 1e-6
    assert ("reward/gap" in row) == (estimator == "soft_score")
    assert ("baseline" in row) == estimator.startswith("reinforce_")


def test_methods_that_read_tokens_see_the_same_samples(tmp_path, tokenizer):
    """What is sampled is a matter of the streams alone, so a comparison is one of estimators."""
    rows, tokens = None, {}
    for name, settings in {
        "rloo": {}, "control variate": {"estimator": "pathwise_control_variate"},
        "combined": {"estimator": "combined"}, "reinmax": {"estimator": "combined", "relaxation": "reinmax"},
    }.items():  # fmt: skip
        trainer = reinforce(tmp_path, tokenizer, **settings)
        rows = [trainer.train_dataset[index] for index in (1, 2) for _ in range(4)]
        _, rollout = gradient_and_rollout(trainer, rows)
        mask = rollout.mask if name == "rloo" else rollout.hard.mask
        tokens[name] = rollout.tokens.masked_fill(~mask, -1)
    assert all(torch.equal(tokens["rloo"], other) for other in tokens.values())


@pytest.mark.parametrize("estimator", ["rloo", "reinforce_running_mean", "reinforce_value"])
def test_accumulation_changes_nothing(tmp_path, tokenizer, estimator):
    ends = []
    for batch, accumulation in ((8, 1), (4, 2)):
        trainer = reinforce(
            tmp_path, tokenizer, estimator, shuffle_dataset=False, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        ends.append(parameters_of(trainer))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator", ["reinforce_running_mean", "reinforce_value"])
def test_resuming_gives_the_same_numbers(tmp_path, tokenizer, estimator):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch",
                "learning_rate": 0.01, "value_learning_rate": 0.1}  # fmt: skip
    straight = reinforce(tmp_path / "a", tokenizer, estimator, **settings)
    straight.train()
    assert len(set(logs_of(straight, "baseline"))) == 6
    resumed = reinforce(tmp_path / "b", tokenizer, estimator, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for expected, row in zip(numbers_of(straight)[-3:], numbers_of(resumed)[-3:], strict=True):
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(parameters_of(resumed), parameters_of(straight), rtol=1e-6, atol=1e-9)


def test_the_running_mean_is_that_of_earlier_steps(tmp_path, tokenizer):
    trainer = reinforce(
        tmp_path, tokenizer, "reinforce_running_mean", running_mean_decay=0.5, max_steps=4,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    rewards = logs_of(trainer, "reward")
    for step, baseline in enumerate(logs_of(trainer, "baseline")):
        weights = [0.5 ** (step - 1 - k) for k in range(step)]
        total = sum(weight * reward for weight, reward in zip(weights, rewards, strict=False))
        assert baseline == pytest.approx(total / sum(weights) if step else 0.0, rel=1e-5)


def test_the_value_head_lies_beside_the_model(tmp_path, tokenizer):
    """Model files load in plain transformers and PEFT; the head's own learning rate and clipping are its own."""
    whole = reinforce(
        tmp_path / "whole", tokenizer, "reinforce_value", max_steps=1, save_strategy="steps", save_steps=1,
        value_learning_rate=0.3,
    )  # fmt: skip
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-1"
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    saved = load_file(folder / "value_head.safetensors")
    assert saved["linear.weight"].norm() > 0.0
    torch.testing.assert_close(saved["linear.weight"], whole.value_head.linear.weight.detach())
    assert [group["lr"] for group in whole.optimizer.param_groups] == [0.05, 0.05, 0.3]
    whole.model.save_pretrained(tmp_path / "by_hand")
    assert not any("value_head" in name for name in load_file(tmp_path / "by_hand" / "model.safetensors"))

    adapted = reinforce(
        tmp_path / "peft", tokenizer, "reinforce_value", max_steps=1,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    adapted.train()
    adapted.save_model(str(tmp_path / "peft"))
    assert not any("value_head" in name for name in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    assert (tmp_path / "peft" / "value_head.safetensors").is_file()
    assert isinstance(PeftModel.from_pretrained(llama(), tmp_path / "peft"), PeftModel)

    other = reinforce(tmp_path / "rloo", tokenizer, max_steps=1, save_strategy="steps", save_steps=1)
    other.train()
    with pytest.raises(ValueError, match=r"has no value_head\.safetensors: it is a checkpoint of a trainer without"):
        reinforce(tmp_path / "x", tokenizer, "reinforce_value").train(str(tmp_path / "rloo" / "checkpoint-1"))


def test_the_value_does_not_scale_the_policys_gradient(tmp_path, tokenizer):
    """A head with an enormous loss, and a bound that the policy's gradient exceeds: the steps are of one size."""
    moved = {}
    for coefficient in (0.0, 1e4):
        trainer = reinforce(
            tmp_path, tokenizer, "reinforce_value", vf_coef=coefficient, max_steps=1, max_grad_norm=0.1,
            value_learning_rate=1e-9,
        )  # fmt: skip
        start = parameters_of(trainer)
        trainer.train()
        moved[coefficient] = (parameters_of(trainer) - start).norm().item()
    assert moved[0.0] == pytest.approx(0.05 * 0.1, rel=1e-4)
    assert moved[1e4] == pytest.approx(moved[0.0], rel=1e-4)


class Counting(PairReward):
    calls = 0

    def hard(self, ids, mask, **columns):
        self.calls += 1
        return super().hard(ids, mask, **columns)

    def soft(self, tokens, **columns):
        if tokens.ids.shape[-1] > 1:  # not the hard face's one-hot tokens
            raise AssertionError("the soft face is not wanted")
        return super().soft(tokens, **columns)


def test_the_reward_is_asked_once_a_rollout(tmp_path, tokenizer):
    reward = Counting()
    reinforce(tmp_path, tokenizer, reward=reward, max_steps=3).train()
    assert reward.calls == 3


def test_a_policy_learns_from_a_function_of_texts(tmp_path, tokenizer):
    def words(completions, **kwargs):
        return [sum(word in ("w5", "w9", "w14") for word in text.split()) / 5 for text in completions]

    trainer = reinforce(
        tmp_path, tokenizer, reward=words, beta=0.0, entropy_coef=0.0, max_steps=40, optim="adamw_torch",
        learning_rate=0.01, per_device_train_batch_size=16,
    )  # fmt: skip
    trainer.train()
    rewards = logs_of(trainer, "rewards/words/mean")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    assert trainer.evaluate()["eval_rewards/words/mean"] > 0.4


def words(completions, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_generations": 1}, ValueError, "must be at least 2, got 1; or take estimator='reinforce'"),
        (
            {"estimator": "pathwise_control_variate", "control_variate_coefficient": "regression",
             "num_generations": 2},
            ValueError, "with the regression compares .* at least 3, got 2",
        ),
        ({"estimator": "rlo"}, ValueError, "estimator must be one of .*'rloo'.*got 'rlo'"),
        ({"estimator": "grpo", "loss_type": "luspo"}, ValueError, "loss_type must be one of .*got 'luspo'"),
        ({"estimator": "grpo", "scale_rewards": "std"}, ValueError, "scale_rewards must be one of"),
        ({"estimator": "combined", "pathwise_weight": 1.5}, ValueError, r"weight must lie in \[0, 1\], got 1.5"),
        ({"estimator": "combined", "relaxation": "softmax"}, ValueError, "feeds mixtures"),
        ({"estimator": "soft_score", "top_k": 900}, ValueError, "top_k=900 is larger than the vocabulary"),
        ({"control_variate_coefficient": "ridge"}, ValueError, "must be a number or 'regression', got 'ridge'"),
        ({"running_mean_decay": 1.0}, ValueError, r"decay must lie in \[0, 1\), got 1.0"),
        ({"vf_coef": -1.0}, ValueError, "vf_coef must not be negative"),
        ({"estimator": "combined", "reward": words}, TypeError, "'words' is a function of completions"),
        ({"estimator": "soft_score", "reward": words}, TypeError, "'words' is a function of completions"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_training(tmp_path, tokenizer, change, error, message):
    with pytest.raises(error, match=message):
        reinforce(tmp_path, tokenizer, **change)


def test_a_group_is_asked_for_before_a_model_is_loaded():
    with pytest.raises(ValueError, match="num_generations must be at least 2"):
        ReinforceTrainer("no-such-user/no-such-model", PairReward())
    assert ReinforceConfig("x", estimator="reinforce", report_to=[]).num_generations == 1


def test_a_value_head_of_the_models_own_is_left_alone(tmp_path, tokenizer):
    model = llama()
    model.value_head = torch.nn.Linear(16, 1).double()
    with pytest.raises(ValueError, match=r"has a 'value_head' of its own \(Linear\)"):
        reinforce(tmp_path, tokenizer, "reinforce_value", model=model)


@pytest.mark.parametrize("relaxation", ["gumbel_rao", "reinmax"])
def test_the_new_relaxations_train_by_backpropagation_too(tmp_path, tokenizer, relaxation):
    reward = TokenLinearReward(torch.linspace(-1, 1, 23, dtype=torch.float64), 0.0)
    trainer = make(tmp_path, tokenizer, relaxation=relaxation, gumbel_draws=3, reward=reward, max_steps=2)
    assert getattr(trainer.relaxation, "num_draws", 3) == 3
    start = parameters_of(trainer)
    trainer.train()
    assert (parameters_of(trainer) - start).norm() > 1e-4
    with pytest.raises(ValueError, match="gumbel_draws must be at least 1, got 0"):
        make(tmp_path, tokenizer, relaxation=relaxation, gumbel_draws=0)


def test_truncated_completions_are_left_out(tmp_path, tokenizer):
    data = dataset(2)
    trainer = reinforce(tmp_path, tokenizer, "reinforce", train=data, max_completion_length=12, num_generations=1)
    rows = list(trainer.train_dataset) * 4
    grads, rollout = gradient_and_rollout(trainer, rows)
    trainer.args.mask_truncated_completions = True
    masked, again = gradient_and_rollout(trainer, rows)
    assert torch.equal(rollout.tokens, again.tokens)
    ended = (rollout.tokens == 1).any(-1)
    assert 0 < ended.sum() < len(ended)
    assert (grads["model.embed_tokens.weight"] - masked["model.embed_tokens.weight"]).norm() > 1e-6


def test_schedules_reach_the_estimator(tmp_path, tokenizer):
    seen = []
    for estimator in ("combined", "soft_score", "rloo"):
        trainer = reinforce(tmp_path, tokenizer, estimator, top_k="linear:9->5@2", beta="linear:0.2->0.0@2")
        original = trainer.rollout

        def rollout(batch, trainer=trainer, original=original):
            relaxation = trainer.estimator.relaxation
            seen.append((None if relaxation is None else relaxation.truncation.top_k, trainer.terms.kl_weight))
            return original(batch)

        trainer.rollout = rollout
        trainer.train()
        assert logs_of(trainer, "beta") == pytest.approx([0.2, 0.1, 0.0])
        assert logs_of(trainer, "top_k") == ([] if estimator == "rloo" else [9, 7, 5])
    ks, weights = [9, 7, 5, 9, 7, 5, None, None, None], [0.2, 0.1, 0.0] * 3
    assert [k for k, _ in seen] == ks
    assert [weight for _, weight in seen] == pytest.approx(weights)
