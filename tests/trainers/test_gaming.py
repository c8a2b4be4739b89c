"""Gamed rewards are seen, and stop a run that asks for it."""

import pytest
import torch
from helpers import PairReward
from trainers.tiny import dataset, logs_of, make

from softrl.rewards.function import FunctionReward
from softrl.trainers.evaluation import repetition

pytestmark = pytest.mark.slow  # imports trl


class SoftOnly(PairReward):
    """Pays for weight on two tokens at once, which no text can have."""

    def soft(self, tokens, **columns):
        spread = (tokens.weights * (1.0 - tokens.weights)).sum(-1) * tokens.survival
        return spread.sum(-1)


def test_a_gap_stops_the_run(tmp_path, tokenizer, capsys):
    settings = {"relaxation": "softmax", "max_steps": 8, "reward": SoftOnly(), "beta": 0.0, "entropy_coef": 0.0}
    trainer = make(tmp_path, tokenizer, early_stop_on_gap=0.5, save_strategy="steps", save_steps=100, **settings)
    trainer.train()
    assert trainer.state.global_step == 3, "three logs in a row"
    assert min(logs_of(trainer, "reward/gap")) > 0.5
    assert (tmp_path / "checkpoint-3").is_dir()
    message = (
        "Stopped at step 3: the soft reward has been more than early_stop_on_gap=0.5 above the hard one at 3 logs"
    )
    assert message in capsys.readouterr().out
    trainer = make(tmp_path, tokenizer, early_stop_on_gap=50.0, **settings)
    trainer.train()
    assert trainer.state.global_step == 8


def test_a_falling_judge_stops_the_run(tmp_path, tokenizer):
    scores = iter([0.5, 0.8, 0.75, 0.55, 0.9])

    def judge(texts):
        return torch.full((len(texts),), next(scores) if len(texts) == 3 else 0.0)  # training has four texts a step

    trainer = make(
        tmp_path, tokenizer, judge=judge, eval_strategy="steps", eval_steps=1, early_stop_on_judge_drop=0.2,
        max_steps=5, per_device_eval_batch_size=3,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4
    assert logs_of(trainer, "eval_judge") == pytest.approx([0.5, 0.8, 0.75, 0.55])


def test_settings_that_cannot_stop_anything(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"early_stop_on_gap must be positive.*got -1"):
        make(tmp_path, tokenizer, early_stop_on_gap=-1.0)
    with pytest.raises(ValueError, match=r"early_stop_on_judge_drop=0.1 looks at evaluations, and there are none"):
        make(tmp_path, tokenizer, early_stop_on_judge_drop=0.1)
    with pytest.raises(ValueError, match=r"early_stop_on_judge_drop=0.1 looks at a judge, and there is none"):
        make(tmp_path, tokenizer, early_stop_on_judge_drop=0.1, eval_strategy="steps", eval_steps=1)


def test_repetition_is_logged(tmp_path, tokenizer):
    tokens = torch.tensor([[5, 6, 5, 6, 5], [3, 4, 5, 6, 7]])
    everything = torch.ones_like(tokens, dtype=torch.bool)
    torch.testing.assert_close(repetition(tokens, everything), torch.tensor([2 / 6, 0.0]))
    same = FunctionReward(lambda tokens: (tokens.weights.sum(-1) * tokens.survival).sum(-1))
    trainer = make(tmp_path, tokenizer, reward=same, max_steps=1, evaluation=dataset(3))
    trainer.train()
    assert 0.0 <= logs_of(trainer, "repetition")[0] <= 1.0
    expected = [repetition(torch.tensor([s.tokens]), torch.ones(1, len(s.tokens), dtype=torch.bool)).item()
                for s in (trainer.evaluate(), trainer.last_evaluation)[1]]  # fmt: skip
    assert trainer.evaluate()["eval_repetition"] == pytest.approx(sum(expected) / 3)
