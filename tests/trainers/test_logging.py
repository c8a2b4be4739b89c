"""What a run reports: TRL's metric names with the numbers they stand for, completions, and where both go."""

import sys
import types

import pandas as pd
import pytest
import torch
from helpers import EOS
from trainers.tiny import dataset, logs_of, make

from softrl.trainers.completions import CompletionLog
from softrl.trainers.metrics import MetricLog, named_metrics

pytestmark = pytest.mark.slow  # imports trl


def word_count(texts):
    return torch.tensor([float(len(text.split())) for text in texts])


def test_named_metrics():
    values = {
        "reward/hard": torch.tensor([1.0, 1.0, 2.0, 6.0]), "rewards/a": torch.tensor([0.0, 2.0, 4.0, 2.0]),
        "length": torch.tensor([1.0, 2.0, 3.0, 6.0]), "clipped": torch.tensor([0.0, 0.0, 1.0, 0.0]),
        "kl": torch.tensor([0.5, 0.5, 1.5, 1.5]),
    }  # fmt: skip
    expected = {
        "reward": 2.5, "reward_std": (17 / 3) ** 0.5, "frac_reward_zero_std": 0.5, "reward/hard": 2.5, "kl": 1.0,
        "rewards/a/mean": 2.0, "rewards/a/std": (8 / 3) ** 0.5, "completions/mean_length": 3.0,
        "completions/min_length": 1.0, "completions/max_length": 6.0, "completions/clipped_ratio": 0.25,
    }  # fmt: skip
    assert named_metrics(values, num_samples=2) == pytest.approx(expected)


def test_metrics_are_averaged_over_micro_batches_and_times_over_steps(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0, 20.0, 25.0, 26.0, 30.0] * 2)  # starts, phase starts, phase ends, ends
    monkeypatch.setattr("softrl.trainers.metrics.time.perf_counter", lambda: next(clock))
    log = MetricLog()
    assert not log
    for reward in (1.0, 4.0, 1.0, 4.0):
        with log.timed_step(), log.timed("rollout"):
            log.add({"reward": reward})
    drained = log.drained(micro_batches_per_step=2, last_phase="rest")
    assert drained == {"reward": 2.5, "step_time": 20.0, "step_time/rollout": 3.0, "step_time/rest": 17.0}
    assert not log


class Backend(types.ModuleType):
    """wandb or trackio as far as tables go."""

    def __init__(self, name, run):
        super().__init__(name)
        self.run, self.logged = run, []

    def Table(self, dataframe):
        return dataframe

    def log(self, values):
        self.logged.append(values)


@pytest.mark.parametrize(
    ("report_to", "run", "filled"),
    [
        (["wandb", "trackio"], "a run", ["wandb", "trackio"]),
        (["wandb"], None, []),
        (["trackio"], None, ["trackio"]),
        ([], "a run", []),
    ],
)
def test_tables_go_where_the_run_reports_to(tmp_path, monkeypatch, report_to, run, filled):
    backends = {name: Backend(name, run) for name in ("wandb", "trackio")}
    for name, backend in backends.items():
        # None makes an import of it fail: nothing is imported unless it is reported to
        monkeypatch.setitem(sys.modules, name, backend if name in report_to else None)
    log = CompletionLog(2)
    prompts = [[{"role": "user", "content": text}] for text in "xyz"]
    log.add(prompts, ["a", "b", "c"], {"r": [1.0, 2.0, 3.0]})
    log.report(7, 0, tmp_path, report_to)
    for name, backend in backends.items():
        assert len(backend.logged) == (name in filled)
        if name in filled:
            table = backend.logged[0]["completions"]
            assert table[["step", "completion", "r"]].values.tolist() == [[7, "b", 2.0], [7, "c", 3.0]]
    written = pd.read_parquet(tmp_path / "completions_00007.parquet")
    assert written["completion"].tolist() == ["b", "c"]
    assert [prompt.tolist() for prompt in written["prompt"]] == prompts[1:]
    log.report(8, 0, tmp_path, report_to)  # nothing new, so nothing is written
    assert not (tmp_path / "completions_00008.parquet").exists()


def test_completions_of_the_last_step_are_printed_and_written(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    trainer = make(
        tmp_path, tokenizer, judge=word_count, log_completions=True, num_completions_to_print=3, max_steps=2,
        gradient_accumulation_steps=2, num_generations=2,
    )  # fmt: skip
    trainer.train()
    written = [pd.read_parquet(tmp_path / "completions" / f"completions_0000{step}.parquet") for step in (1, 2)]
    for step, table in enumerate(written, start=1):
        assert table.columns.tolist() == ["step", "prompt", "completion", "pair", "judge"]
        assert table["step"].tolist() == [step] * 8
        assert table["prompt"].tolist()[::2] == table["prompt"].tolist()[1::2]  # a prompt's samples are neighbours
        assert table["pair"].mean() == pytest.approx(logs_of(trainer, "rewards/pair/mean")[step - 1], rel=1e-6)
        assert table["judge"].tolist() == word_count(table["completion"]).tolist()
        spread = sum(table["pair"][part].std() for part in (slice(0, 4), slice(4, 8))) / 2
        assert spread == pytest.approx(logs_of(trainer, "reward_std")[step - 1], rel=1e-5)
    shown = capsys.readouterr().out
    for title in ("Step 1", "Step 2", "Prompt", "Completion", "pair", "judge"):
        assert title in shown
    assert shown.count("├") == 2 * (3 - 1)  # separators of a table with three rows, twice


def test_completions_are_off_by_default(tmp_path, tokenizer, capsys):
    make(tmp_path, tokenizer, max_steps=1).train()
    assert not (tmp_path / "completions").exists()
    assert "Completion" not in capsys.readouterr().out


def test_tensorboard_holds_every_number_of_the_log(tmp_path, tokenizer):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = make(
        tmp_path, tokenizer, judge=word_count, report_to=["tensorboard"], max_steps=2, eval_strategy="steps",
        eval_steps=2, num_generations=2,
    )  # fmt: skip
    trainer.train()
    (folder,) = (tmp_path / "runs").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    wanted = """
        reward reward_std frac_reward_zero_std rewards/pair/mean rewards/pair/std kl entropy num_tokens step_time judge
        completions/mean_length completions/min_length completions/max_length completions/clipped_ratio
    """.split()  # noqa: SIM905
    assert {f"train/{name}" for name in wanted} <= tags
    wanted = ("reward", "reward_std", "rewards/pair/mean", "kl", "judge", "completions/mean_length")
    assert {f"eval/{name}" for name in wanted} <= tags
    for row in trainer.state.log_history:
        for name, value in row.items():
            tag = name.replace("eval_", "eval/", 1) if name.startswith("eval_") else f"train/{name}"
            if name != "step":
                logged = [event.value for event in events.Scalars(tag) if event.step == row["step"]]
                assert pytest.approx(value, rel=1e-5) in logged, tag


def test_tokens_are_counted_once_and_entropy_is_the_samplers(tmp_path, tokenizer, monkeypatch):
    """Prompt and completion tokens as TRL counts them; entropy and lengths from the recorded rollout, by hand."""
    from softrl.trainers import soft_rollout_trainer

    rollouts, original = [], soft_rollout_trainer.soft_rollout

    def recorded(*args, **settings):
        rollouts.append(original(*args, **settings))
        return rollouts[-1]

    monkeypatch.setattr(soft_rollout_trainer, "soft_rollout", recorded)
    trainer = make(
        tmp_path, tokenizer, relaxation="gumbel_softmax", max_steps=2, max_completion_length=9, train=dataset(4)
    )
    trainer.train()
    total = 0
    for step, rollout in enumerate(rollouts):
        ends = (rollout.fed * (rollout.support.ids == EOS)).sum(-1)
        survival = torch.cat([torch.ones(4, 1), (1.0 - ends).cumprod(-1)[:, :-1]], 1) * rollout.mask
        assert ((survival > 0.01) & (survival < 0.99)).any()  # soft: neither there nor not there
        lengths = survival.sum(-1)
        assert logs_of(trainer, "completions/mean_soft_length")[step] == pytest.approx(lengths.mean().item(), rel=1e-6)
        entropy = ((rollout.entropy * survival).sum(-1) / lengths).mean().item()
        assert logs_of(trainer, "entropy")[step] == pytest.approx(entropy, rel=1e-6)
        hard = []
        for row in rollout.tokens.tolist():
            hard.append(row.index(EOS) + 1 if EOS in row else len(row))
        assert logs_of(trainer, "completions/mean_length")[step] == pytest.approx(sum(hard) / 4)
        total += int(rollout.prompts.mask.sum()) + sum(hard)
        assert logs_of(trainer, "num_tokens")[step] == total
