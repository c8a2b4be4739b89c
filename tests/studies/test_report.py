"""What a run shows: the numbers in the table are those of the samples."""

import math

import pytest
from rich.console import Console

from softrl.studies.report import (
    before_after_table,
    completions_table,
    load_samples,
    paired_change,
    plot_training,
    save_samples,
)
from softrl.trainers.evaluation import Sample, distinct_n, summary

pytestmark = pytest.mark.slow  # imports trl


def sample(index, reward, judge=0.5, tokens=(4, 5, 6), kl=0.3, nll=6.0):
    return Sample(index, f"prompt {index}", f"text [{index}]", tokens, False, reward, judge, kl, nll)


def test_distinct_n_counts_ngrams_over_the_whole_set():
    assert distinct_n([(1, 2, 1, 2), (1, 2)], 1) == pytest.approx(2 / 6)
    assert distinct_n([(1, 2, 1, 2), (1, 2)], 2) == pytest.approx(2 / 4)
    assert distinct_n([(1,)], 2) == 0.0


def test_summary_weighs_tokens_for_perplexity_and_kl():
    samples = [
        sample(0, 0.2, tokens=(4, 4), kl=1.0, nll=2.0),
        sample(1, 0.6, tokens=(4, 5, 6, 7, 8, 9), kl=3.0, nll=10.0),
    ]
    metrics = summary(samples)
    assert metrics["reward"] == pytest.approx(0.4)
    assert metrics["reward_se"] == pytest.approx(math.sqrt(0.08) / math.sqrt(2))
    assert metrics["kl"] == pytest.approx(4.0 / 8)
    assert metrics["kl_completion"] == pytest.approx(2.0)
    assert metrics["base_perplexity"] == pytest.approx(math.exp(12 / 8))
    assert metrics["completions/mean_length"] == 4.0
    assert metrics["completions/clipped_ratio"] == 1.0


def test_paired_change_is_that_of_the_differences():
    mean, error = paired_change([0.1, 0.2, 0.9], [0.3, 0.2, 1.0])
    assert mean == pytest.approx(0.1)
    assert error == pytest.approx(math.sqrt(0.01) / math.sqrt(3))
    assert math.isnan(paired_change([0.1], [0.2])[1])


def test_tables_show_the_numbers_and_the_texts():
    before = [sample(i, 0.2 + 0.1 * i) for i in range(4)]
    after = [sample(i, 0.5 + 0.1 * i) for i in range(4)]
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(before_after_table(before, after))
    console.print(completions_table(before, after, 2))
    text = console.export_text()
    assert "0.350 ± 0.065" in text
    assert "+0.300 ± 0.000" in text
    assert "4 held-out prompts" in text
    assert "text [1] [0.60]" in text
    assert "text [2]" not in text


def test_samples_survive_a_round_trip(tmp_path):
    samples = [sample(0, 0.25), sample(1, 0.5, judge=None, kl=None, nll=None)]
    save_samples(samples, tmp_path / "samples.json")
    assert load_samples(tmp_path / "samples.json") == samples


def test_curves_are_a_png(tmp_path):
    rows = [
        {"step": i, "reward/hard": 0.1 * i, "reward/soft": 0.1 * i, "reward/gap": 0.0, "kl": 0.0} for i in range(3)
    ]
    plot_training([*rows, {"step": 3, "train_loss": 0.0}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_a_run_leaves_its_figures(tmp_path):
    from softrl.studies.report import adjoint_norms, plot_run

    logs = [
        {"step": 1, "reward/hard": 0.1, "adjoint/norm_at/0": 2.0, "adjoint/norm_at/7": 0.5, "adjoint/norm": 1.0},
        {"step": 2, "reward/hard": 0.2, "adjoint/norm_at/0": 1.0, "adjoint/norm_at/7": 0.25},
        {"step": 2, "train_runtime": 3.0},
    ]
    assert adjoint_norms(logs) == [(1, {0: 2.0, 7: 0.5}), (2, {0: 1.0, 7: 0.25})]
    assert plot_run(logs, tmp_path) == [tmp_path / "curves.png", tmp_path / "adjoint.png"]
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    assert plot_run([{"step": 2, "train_runtime": 3.0}], tmp_path / "none") == []
    windows = [{"step": 1, "nll": 2.0}, {"step": 1, "eval_nll_beyond": 2.0, "eval_nll_truncated_beyond": 2.1}]
    assert plot_run(windows, tmp_path) == [tmp_path / "curves.png"]
