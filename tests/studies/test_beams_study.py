"""The comparison of searches: its intervals, a run that goes on, what it refuses, and its figure."""

import csv
import json
import math

import numpy as np
import pytest
from helpers import gpt2
from trainers.tiny import word_tokenizer

from softrl.cli import study
from softrl.models.policy import Policy
from softrl.studies import beams
from softrl.studies.beams import METHODS, Bench, Settings, run
from softrl.studies.beams_report import Answers, Item, paired_interval, plot, table_rows, wilson_interval

pytestmark = pytest.mark.slow  # trl, by the trainers' way to read prompts


def bench_of(**settings):
    """A tiny model that has never seen a number: nothing it says is right, and all of it is counted."""
    defaults = {"items": 10, "kinds": ("addition", "reversal"), "num_examples": 1, "top_k": 6}
    policy = Policy(gpt2())
    return Bench(policy, policy, word_tokenizer(), Settings("tiny", **{**defaults, **settings}))


def test_a_run_and_one_that_goes_on(tmp_path, monkeypatch, capsys):
    asked = []
    answer = beams.answer
    monkeypatch.setattr(
        beams, "answer", lambda bench, method, *rest: asked.append(method) or answer(bench, method, *rest)
    )
    rows = run(bench_of(), ["beam", "self-consistency"], [3, 2], 4, tmp_path)
    assert asked == ["greedy", "beam", "beam", "self-consistency", "self-consistency"]
    assert [(row.method, row.width) for row in rows if row.kind == "all"] == [
        ("greedy", 1), ("beam", 2), ("beam", 3), ("self-consistency", 2), ("self-consistency", 3),
    ]  # fmt: skip
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert len(before) == 5
    (tmp_path / "beam-3.json").unlink()
    asked.clear()
    again = run(bench_of(), list(METHODS), [3], 4, tmp_path)
    assert asked == ["greedy soft", "beam", "soft beam", "collapsing beam"]
    kept = {name: (tmp_path / name).read_bytes() for name in before if name != "beam-3.json"}
    assert kept == {name: data for name, data in before.items() if name != "beam-3.json"}
    new, old = (json.loads(data)["items"] for data in ((tmp_path / "beam-3.json").read_bytes(), before["beam-3.json"]))
    assert new == old
    assert not list(tmp_path.glob("*tmp*"))
    with (tmp_path / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [each["method"] for each in read] == [row.method for row in again]
    assert len(again) == 6 * 3  # all questions, and two kinds of them
    assert (tmp_path / "accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "collapsing beam, 3" in capsys.readouterr().out


def test_other_settings_are_refused(tmp_path):
    run(bench_of(), ["greedy"], [2], 5, tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(seed: 0, now 1\); give another --output_dir"):
        run(bench_of(seed=1), ["greedy"], [2], 5, tmp_path)
    with pytest.raises(ValueError, match=r"methods must be of .*got \['best'\]"):
        run(bench_of(), ["best"], [2], 5, tmp_path)
    with pytest.raises(ValueError, match="widths must be 1 or more"):
        run(bench_of(), ["beam"], [0], 5, tmp_path)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        run(bench_of(), ["beam"], [2], 0, tmp_path)


def test_the_command(tmp_path, capsys):
    for name, seed in (("model", 0), ("base", 1)):
        gpt2(seed).save_pretrained(tmp_path / name)
    word_tokenizer().save_pretrained(tmp_path / "model")
    output = tmp_path / "runs" / "beams"
    wanted = ["beams", "--model", str(tmp_path / "model"), "--items", "6", "--digits", "1", "--examples", "1"]
    wanted += ["--widths", "2", "--methods", "soft beam", "--top_k", "5", "--output_dir", str(output)]
    assert study.main(wanted) == 0
    with (output / "rows.csv").open() as file:
        before = list(csv.DictReader(file))
    assert {row["method"] for row in before} == {"greedy", "soft beam"}
    assert {row["kind"] for row in before} == {"all", "addition", "copying", "reversal"}
    assert study.main([*wanted, "--base", str(tmp_path / "base")]) == 1
    assert "made with other settings (base: None, now" in capsys.readouterr().err
    wanted[-1] += "-scored"
    assert study.main([*wanted, "--base", str(tmp_path / "base")]) == 0
    with (tmp_path / "runs" / "beams-scored" / "rows.csv").open() as file:
        scored = list(csv.DictReader(file))
    assert [row["accuracy"] for row in scored] == [row["accuracy"] for row in before]
    assert all(a["nll_nats"] != b["nll_nats"] for a, b in zip(scored, before, strict=True))
    assert study.main(["beams", "--model", str(tmp_path / "none")]) == 1
    assert "--model or --base:" in capsys.readouterr().err


def test_answers_do_not_depend_on_batches_and_prices_are_equal(tmp_path):
    bench = bench_of(items=6)
    told = []
    for method in METHODS:
        together = beams.answer(bench, method, 3, 6, told.append)
        apart = beams.answer(bench, method, 3, 1, told.append)
        assert [item.text for item in apart] == [item.text for item in together]
        assert [item.forward_tokens for item in apart] == [item.forward_tokens for item in together]
        assert [item.nll_nats for item in apart] == pytest.approx([item.nll_nats for item in together], rel=1e-4)
    assert sum(told) == 2 * 6 * len(METHODS)


def test_what_is_right(monkeypatch):
    """Answers are judged by the extractor: a decoder that writes the answers is right about them all."""
    bench = bench_of(items=5)
    asked = []
    read = beams.prompt_batch
    monkeypatch.setattr(beams, "prompt_batch", lambda rows, *rest: asked.append(rows) or read(rows, *rest))
    wrong = bench.questions["answer"][3]
    monkeypatch.setattr(
        beams, "decode", lambda *_: [" 9 no" if r["answer"] == wrong else f" {r['answer']}\nand 7" for r in asked[-1]]
    )
    items = beams.answer(bench, "greedy", 1, 2, lambda count: None)
    assert [item.right for item in items] == [True, True, True, False, True]
    assert [item.kind for item in items] == list(bench.questions["kind"])
    assert [item.text.splitlines()[0].strip() for item in items][:3] == list(bench.questions["answer"])[:3]


@pytest.mark.parametrize(
    ("right", "count", "interval"),
    [
        (0, 10, (0.0, 0.277533)),
        (10, 10, (0.722467, 1.0)),
        (81, 263, (0.255290, 0.366206)),
    ],  # the last: Newcombe (1998)
)
def test_wilson_interval(right, count, interval):
    assert wilson_interval(right, count) == pytest.approx(interval, abs=1e-4)


def test_paired_interval():
    before = [True, False, False, True] * 50
    assert paired_interval(before, before) == (0.0, 0.0, 0.0)
    after = [True, True, False, True] * 50
    mean, low, high = paired_interval(before, after)
    error = np.sqrt(0.25 * 0.75 / 200)
    assert mean == 0.25
    assert (low, high) == pytest.approx((0.25 - 1.96 * error, 0.25 + 1.96 * error), abs=0.01)


def test_rows_and_figure_hold_the_numbers(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    def items(rights, price):
        return Answers([Item(f"kind {i % 2}", "", right, price, 2, 1.0 + i) for i, right in enumerate(rights)], 7.0)

    rows = table_rows({("greedy", 1): items([1, 0, 1, 0], 3), ("beam", 4): items([1, 1, 1, 0], 12)})
    of = {(row.method, row.kind): row for row in rows}
    assert of["beam", "all"].accuracy == 0.75
    assert of["beam", "all"].difference == 0.25
    assert of["beam", "kind 1"].difference == 0.5
    assert of["greedy", "kind 0"].accuracy == 1.0
    assert of["beam", "all"].forward_tokens == 12
    assert of["beam", "all"].nll_nats == (1 + 2 + 3 + 4) / 8
    assert of["beam", "all"].seconds == 7.0
    assert math.isnan(of["beam", "kind 0"].seconds)
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    plot(rows, tmp_path / "figure.png")
    price, change = drawn[0].axes
    assert [line.get_ydata()[0] for line in price.lines if line.get_label().startswith("_")]
    assert [text.get_text() for text in price.get_legend().get_texts()] == ["greedy", "beam"]
    assert [text.get_text() for text in change.get_yticklabels()] == ["beam, 4"]
