"""Logged gradient statistics against gradients kept whole, micro-batch by micro-batch, for our trainers and TRL's."""

import pytest
import torch
from helpers import PairReward, llama
from trainers.tiny import dataset, logs_of, make
from trl import RLOOConfig, RLOOTrainer

from softrl.rewards.base import as_trl
from softrl.trainers.gradient_statistics import GradientStatisticsCallback, gradient_statistics

pytestmark = pytest.mark.slow  # imports trl

KEYS = ("grad/norm2", "grad/variance", "grad/snr")


def test_unbiased_for_the_norm_and_the_variance():
    """20,000 steps of four draws with a known mean and spread; 4 standard errors fail once in 16,000 runs."""
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.tensor([0.3, -0.2, 0.1]).double(), torch.tensor([1.0, 0.5, 2.0]).double()
    steps = [
        gradient_statistics((mean + spread * torch.randn(4, 3, generator=generator, dtype=torch.float64)) / 4)
        for _ in range(20_000)
    ]
    for key, truth in (("grad/norm2", mean.square().sum()), ("grad/variance", spread.square().sum())):
        values = torch.tensor([step[key] for step in steps])
        assert abs(values.mean() - truth) < 4 * values.std() / len(values) ** 0.5
        naive = values + torch.tensor([step["grad/variance"] / 4 for step in steps])  # the norm of the mean alone
        assert abs(naive.mean() - truth) > 10 * values.std() / len(values) ** 0.5


def watched(trainer):
    """Gradients after every micro-batch, kept whole, and the statistics that follow from them."""
    kept, step = [], trainer.training_step

    def training_step(*args, **kwargs):
        loss = step(*args, **kwargs)
        kept.append(torch.cat([p.grad.detach().flatten().double() for p in trainer.model.parameters()]).clone())
        return loss

    trainer.training_step = training_step
    return kept


def by_hand(kept, accumulation):
    found = []
    for start in range(0, len(kept), accumulation):
        sums = torch.stack([torch.zeros_like(kept[0]), *kept[start : start + accumulation]])
        each = accumulation * (sums[1:] - sums[:-1])
        variance = each.var(0).sum()
        found.append(((each.mean(0).square().sum() - variance / accumulation).item(), variance.item()))
    return found


def theirs(tmp_path, tokenizer, train, **settings):
    args = RLOOConfig(
        str(tmp_path), num_generations=2, max_completion_length=4, report_to=[], use_cpu=True, bf16=False,
        logging_steps=1, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, beta=0.0, **settings,
    )  # fmt: skip
    reward = as_trl(PairReward(), tokenizer)
    return RLOOTrainer(llama(), reward, args, train, processing_class=tokenizer)


@pytest.mark.parametrize("maker", [make, theirs])
def test_logged_numbers_are_those_of_the_gradients_before_clipping(tmp_path, tokenizer, maker):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 2}
    trainer = maker(tmp_path, tokenizer, train=dataset(12), **settings, max_grad_norm=1e-3)
    callback, kept = GradientStatisticsCallback(size=2**18), watched(trainer)
    callback.add_to(trainer)
    trainer.train()
    assert len(kept) == 6
    logged = list(zip(*(logs_of(trainer, key) for key in KEYS), strict=True))
    for (norm2, variance, snr), (wanted_norm2, wanted_variance) in zip(logged, by_hand(kept, 3), strict=True):
        assert variance == pytest.approx(wanted_variance, rel=0.03)
        assert norm2 == pytest.approx(wanted_norm2, abs=0.03 * wanted_variance)
        assert snr == pytest.approx(norm2 / variance)
    assert not callback._handles


def test_steps_of_one_log_are_averaged(tmp_path, tokenizer):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    each, pairs = (make(tmp_path, tokenizer, **settings, logging_steps=steps) for steps in (1, 2))
    for trainer in (each, pairs):
        GradientStatisticsCallback().add_to(trainer)
        trainer.train()
    one, two = (torch.tensor([logs_of(trainer, key) for key in KEYS[:2]]) for trainer in (each, pairs))
    torch.testing.assert_close(two, one.unflatten(1, (2, 2)).mean(-1))
    assert logs_of(pairs, "grad/snr") == pytest.approx((two[0] / two[1]).tolist())


def test_one_micro_batch_a_step_warns_once_and_logs_nothing(tmp_path, tokenizer, monkeypatch):
    from softrl.trainers import gradient_statistics as module

    said = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    trainer = make(tmp_path, tokenizer, max_steps=2)
    GradientStatisticsCallback().add_to(trainer)
    trainer.train()
    assert len(said) == 1
    assert "gradient_accumulation_steps" in said[0]
    assert not any(key in row for row in trainer.state.log_history for key in KEYS)


def test_a_value_heads_gradient_is_left_out(tmp_path, tokenizer):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    logged = []
    for coefficient in (0.0, 100.0):
        trainer = make(
            tmp_path, tokenizer, method="Reinforce", estimator="reinforce_value", vf_coef=coefficient, **settings
        )
        GradientStatisticsCallback().add_to(trainer)
        trainer.train()
        logged += logs_of(trainer, "grad/variance")
    assert logged[0] == pytest.approx(logged[1], rel=1e-6)
