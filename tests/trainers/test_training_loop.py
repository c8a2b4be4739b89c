"""What a run does beside its gradient: masks, columns, soft stopping, the best checkpoint, a run that was killed."""

import pytest
import torch
from datasets import Dataset
from helpers import EOS, V, llama
from peft import LoraConfig
from safetensors.torch import load_file
from trainers.tiny import dataset, logs_of, make, parameters_of
from transformers import TrainerCallback

from softrl.rewards.token_linear import TokenLinearReward
from softrl.trainers import SoftRolloutConfig
from softrl.trainers.sampling import GroupSampler
from softrl.trainers.soft_rollout_trainer import hard_completions
from softrl.types import Prompts, Rollout, Support

pytestmark = pytest.mark.slow  # imports trl


def gradient(trainer, rows):
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, rows).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("masked", [True, False])
def test_truncated_completions_count_in_the_mean_and_not_in_the_sum(tmp_path, tokenizer, monkeypatch, masked):
    """The gradient of a batch against those of its sequences one by one, those without an end left out."""
    trainer = make(tmp_path, tokenizer, max_completion_length=12, soft_stopping=False)
    rows, ended = list(trainer.train_dataset), []
    record = trainer.record
    monkeypatch.setattr(
        trainer, "record", lambda batch, c, values: (ended.append((c.tokens == EOS).any()), record(batch, c, values))
    )
    each = [gradient(trainer, [row]) for row in rows]
    assert 0 < sum(ended) < len(rows)
    expected = sum(g for g, end in zip(each, ended, strict=True) if end or not masked) / len(rows)
    trainer.args.mask_truncated_completions = masked
    assert (gradient(trainer, rows) - expected).norm() < 1e-6 * expected.norm()


class TargetReward:
    """Counts the token that each row's column `target` names."""

    name, vocab_size = "target", V

    def soft(self, tokens, target, **columns):
        wanted = torch.tensor(target)[:, None, None]
        return ((tokens.weights * (tokens.ids == wanted)).sum(-1) * tokens.survival).sum(-1)

    def hard(self, ids, mask, target, **columns):
        return ((ids == torch.tensor(target)[:, None]) & mask).sum(-1).double()


def test_columns_reach_both_faces_of_the_reward(tmp_path, tokenizer):
    """With a target a prompt the policy learns each prompt's own: tokens of other prompts' targets pay nothing."""
    data = Dataset.from_dict({"prompt": ["w3 w4", "w8 w9"], "target": [5, 14]})
    trainer = make(
        tmp_path, tokenizer, reward=TargetReward(), train=data, evaluation=data, beta=0.0, entropy_coef=0.0,
        num_generations=4, per_device_train_batch_size=8, max_steps=40, optim="adamw_torch", learning_rate=0.02,
        relaxation="gumbel_softmax", logging_steps=5,
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    counts = [sample.tokens.count(target) for sample, target in zip(trainer.last_evaluation, (5, 14), strict=True)]
    assert [sample.reward for sample in trainer.last_evaluation] == counts
    assert [sample.rewards for sample in trainer.last_evaluation] == [{"target": float(count)} for count in counts]
    assert metrics["eval_rewards/target/mean"] == pytest.approx(sum(counts) / 2)
    assert min(counts) >= 3  # of five tokens, from 5 / 23 of one; both targets, so columns stay with their prompts
    assert logs_of(trainer, "reward/soft")[-1] > logs_of(trainer, "reward/soft")[0] + 1.0


def test_soft_stopping_changes_the_gradient_and_not_the_sample(tmp_path, tokenizer):
    """A reward that pays for length: with straight-through tokens only survival says that an end costs the rest."""
    assert SoftRolloutConfig(str(tmp_path), report_to=[]).soft_stopping is True
    reward = TokenLinearReward(torch.ones(V, dtype=torch.float64), 0.0, link="identity", pooling="sum")
    logged, ends = {}, {}
    for soft_stopping in (True, False):
        trainer = make(
            tmp_path, tokenizer, reward=reward, beta=0.0, entropy_coef=0.0, soft_stopping=soft_stopping, max_steps=1,
            max_completion_length=8, per_device_train_batch_size=8, top_k=V,
        )  # fmt: skip
        start = parameters_of(trainer)
        trainer.train()
        logged[soft_stopping] = {key: logs_of(trainer, key) for key in ("reward", "completions/mean_length")}
        ends[soft_stopping] = (parameters_of(trainer) - start).norm()
    assert logged[True]["reward"] == pytest.approx(logged[False]["reward"])
    assert logged[True]["completions/mean_length"] == logged[False]["completions/mean_length"]
    assert logged[True]["completions/mean_length"][0] < 8  # some ended
    assert ends[True] > 1e-3
    assert ends[False] < 1e-9  # weights sum to one, so without survival no token's choice changes the sum


def test_hard_completions_of_a_soft_rollout():
    """Hard tokens count through their own end; a sequence that survival cut off has ended without one."""
    tokens = torch.tensor([[4, EOS, 5, 6], [4, 5, 6, 7], [4, 5, 6, 7], [4, 5, 6, EOS]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    one_hot, first = torch.ones(4, 4, 1), torch.zeros(4, 4, dtype=torch.long)
    support = Support(tokens[..., None], 0 * one_hot, one_hot.bool(), first)
    prompts = Prompts(torch.full((4, 1), 3), torch.ones(4, 1, dtype=torch.bool))
    rollout = Rollout(prompts, support, one_hot, one_hot, mask, one_hot[..., 0], (EOS,))
    completions = hard_completions(rollout, (EOS,), max_completion_length=4)
    assert completions.mask.sum(-1).tolist() == [2, 2, 4, 4]
    assert completions.ended.tolist() == [True, True, False, True]
    early = hard_completions(rollout, (EOS,), max_completion_length=5)
    assert early.ended.all(), "a rollout stops before its last step only when every sequence has ended"


def test_mixed_precision_trains_every_parameter_along_the_same_gradient(tmp_path, tokenizer):
    """Under autocast weights are cast and cached; a cast of the rollout, without a graph, must not be used again."""

    def moved(bf16, one_pass):
        trainer = make(
            tmp_path, tokenizer, model=llama().float(), max_steps=1, bf16=bf16, adjoint_tol=1e-3,
            gradient_checkpointing=not one_pass,
        )  # fmt: skip
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        return {name: (p.detach() - before[name]).flatten() for name, p in trainer.model.named_parameters()}

    exact = moved(bf16=False, one_pass=True)
    for one_pass in (True, False):
        rounded = moved(bf16=True, one_pass=one_pass)
        assert all(change.norm() > 0.0 for change in rounded.values())
        assert torch.cosine_similarity(torch.cat([*rounded.values()]), torch.cat([*exact.values()]), 0) > 0.95


class Watch(TrainerCallback):
    def __init__(self):
        self.judged = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.judged.append((state.global_step, metrics["eval_judge"]))


def test_the_best_checkpoint_is_the_judges(tmp_path, tokenizer):
    scores, watch = {2: 0.3, 4: 0.9, 6: 0.1}, Watch()
    trainer = make(
        tmp_path, tokenizer, max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        metric_for_best_model="eval_judge", load_best_model_at_end=True,
        judge=lambda texts: torch.full((len(texts),), scores.get(trainer.state.global_step, 0.0)),
    )  # fmt: skip
    trainer.add_callback(watch)
    trainer.train()
    assert watch.judged == [(step, pytest.approx(score)) for step, score in scores.items()]
    assert trainer.args.greater_is_better is True
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (4, 6))
    name = "model.layers.0.mlp.up_proj.weight"
    kept = dict(trainer.model.named_parameters())[name]
    torch.testing.assert_close(kept, best[name], rtol=0, atol=0)
    assert (kept - last[name]).abs().max() > 1e-6


def test_the_best_model_is_by_default_that_of_the_reward(tmp_path):
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True, "report_to": []}
    args = SoftRolloutConfig(str(tmp_path), **settings)
    assert (args.metric_for_best_model, args.greater_is_better) == ("eval_reward", True)


def test_the_order_of_prompts_is_a_function_of_the_epoch():
    def order(epoch, shuffle=True):
        return list(GroupSampler(9, 2, shuffle, 3, lambda: epoch))

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert sorted(order(1)[::2]) == list(range(9))
    assert order(1)[::2] == order(1)[1::2]  # a prompt's samples side by side
    assert order(5, shuffle=False) == [index for index in range(9) for _ in range(2)]


class Crash(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_a_run_that_died_goes_on_as_if_it_had_not(tmp_path, tokenizer):
    """It dies in step 5, after the checkpoint of step 3 and beyond an epoch's end; every number is logged again."""

    def run(folder):
        return make(
            folder, tokenizer, llama(), max_steps=6, save_strategy="steps", save_steps=3, optim="adamw_torch",
            learning_rate=0.02, lr_scheduler_type="linear", num_generations=2, gradient_accumulation_steps=2,
            peft_config=LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1), train=dataset(6),
            judge=lambda texts: torch.tensor([float(len(text)) for text in texts]),
        )  # fmt: skip

    straight = run(tmp_path / "straight")
    straight.train()
    killed = run(tmp_path / "killed")
    killed.add_callback(Crash())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = run(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    numbers = [
        [
            {key: value for key, value in row.items() if not key.startswith("step_time")}
            for row in trainer.state.log_history
            if "loss" in row
        ]
        for trainer in (straight, resumed)
    ]
    assert [row["step"] for row in numbers[1]] == [1, 2, 3, 4, 5, 6]
    assert {"reward", "kl", "loss", "judge", "grad_norm", "num_tokens", "entropy"} <= set(numbers[0][0])
    for expected, row in zip(*numbers, strict=True):
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert len({row["reward"] for row in numbers[0]}) == 6
    torch.testing.assert_close(parameters_of(resumed), parameters_of(straight), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("method", "settings"), [("SoftRollout", {}), ("Reinforce", {"num_generations": 2})])
def test_all_prompts_may_be_the_same(tmp_path, tokenizer, method, settings):
    """Noise is keyed by the row, so equal prompts do not give equal samples."""
    same = Dataset.from_dict({"prompt": ["w3 w4"] * 8})
    trainer = make(tmp_path, tokenizer, train=same, evaluation=same, method=method, **settings)
    trainer.train()
    assert all(map(torch.isfinite, torch.tensor(logs_of(trainer, "loss"))))
    trainer.evaluate()
    assert len({sample.tokens for sample in trainer.last_evaluation}) > 1
