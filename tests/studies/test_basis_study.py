"""`softrl study basis-aware`: real programs as HiGHS ends them, samples, sizes, and a run that goes on."""

import csv
import math
from dataclasses import replace

import pytest
import torch
from helpers import llama

from softrl.cli.study import main
from softrl.models.policy import Policy
from softrl.studies import basis_aware
from softrl.studies.basis_aware import PARTS, Settings, run
from softrl.studies.basis_bench import Bench, whole_prompts
from softrl.studies.basis_real import Cost, Program
from softrl.studies.basis_report import summary_lines, write_report
from softrl.studies.basis_rules import Contexts, Rule
from softrl.studies.basis_samples import HUMAN, MEASURES, Difference, Written, differences, of_groups, text_nll
from softrl.studies.basis_scaling import scaled_weight, scaling
from softrl.studies.basis_tiny import tiny_check

pytestmark = pytest.mark.slow


def _rows(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_real_programs_end_as_highs_says(tmp_path, capsys):
    arguments = ["--texts", "1", "--tokens", "16", "--programs", "2", "--cost_directions", "5"]
    assert main(["basis-aware", "--parts", "cost", *arguments, "--output_dir", str(tmp_path)]) == 0
    assert "same verdict 2 of 2" in capsys.readouterr().out
    for row in _rows(tmp_path / "programs.csv"):
        level, tau, ours, highs, certified = (
            float(row[name]) for name in ("level", "tau", "ours", "highs", "certified")
        )
        assert abs(ours - highs) < 1e-5 * tau  # HiGHS stops at 1e-7, per equation
        assert (row["accepted"] == "True") == (highs < level) == (certified < level)
    basis, fewer, top_p = _rows(tmp_path / "cost.csv")
    assert (basis["num_directions"], fewer["num_directions"], top_p["rule"]) == ("20", "5", "top-p 0.9")
    for row in (basis, fewer):
        assert int(row["tokens"]) == 16
        assert int(row["failed"]) == 0
        assert float(row["solved_per_token"]) <= float(row["asked_per_token"])
    assert float(basis["solved_per_token"]) >= 2 / 16  # there were programs to give to HiGHS
    assert (tmp_path / "cost.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_rules_and_samples_of_a_real_model(tmp_path):
    settings = Settings(texts=1, tokens=4, samples=2)
    run(settings, ["rules", "samples"], tmp_path, "the command")
    rules = {row["rule"]: row for row in _rows(tmp_path / "rules.csv")}
    basis = rules["basis-aware eta"]
    for name in ("eta", "top-p"):
        assert float(rules[name]["entropy_nats"]) == pytest.approx(float(basis["entropy_nats"]), abs=0.05)
    assert float(rules["eta, same epsilon"]["kept"]) < float(basis["kept"])
    for row in _rows(tmp_path / "examples.csv"):
        assert float(row["certified_bound"]) < float(row["probability"]) <= float(row["tau"])
    assert len(_rows(tmp_path / "contexts.csv")) == 4
    written = {row["rule"]: row for row in _rows(tmp_path / "samples.csv")}
    assert list(written) == [HUMAN, "basis-aware eta", "eta", "top-p", "no truncation"]
    assert float(written[HUMAN]["nll_gap"]) == 0.0
    for name in ("eta", "top-p", "basis-aware eta"):
        assert written[name]["entropy_nats"] == rules[name]["entropy_nats"]
    assert float(written["no truncation"]["entropy_nats"]) > float(basis["entropy_nats"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "the command" in page
    assert page.count("<img") == 2
    assert str(tmp_path) not in page


def test_sizes_of_vocabulary_and_directions():
    settings = Settings(
        texts=1, tokens=8, num_directions=4, vocab_sizes=(256, 60_000), scaled_directions=(2, 6), scaled_programs=2,
        highs_programs=1, epsilon=0.01, time_limit_seconds=0.01,
    )  # fmt: skip
    rows = scaling(Bench(settings))
    by_size = {(row.vocab_size, row.num_directions, row.solver): row for row in rows}
    sizes = [(256, 2), (256, 4), (256, 6), (60_000, 4)]  # 256 is the largest that the model has itself
    assert sorted(by_size) == sorted((*size, solver) for size in sizes for solver in ("ours", "HiGHS"))
    for row in rows:
        assert row.low <= row.seconds <= row.high
        assert row.programs == (2 if row.solver == "ours" else 1)
    assert by_size[60_000, 4, "HiGHS"].timeouts == 1  # of ten milliseconds
    assert by_size[60_000, 4, "ours"].timeouts == 0


def test_scaled_weights_are_rows_and_beyond_them_rows_with_noise():
    weight = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    few, many = scaled_weight(weight, 20), scaled_weight(weight, 5050)
    assert len({tuple(row) for row in few.tolist()} & {tuple(row) for row in weight.tolist()}) == 20
    distances = torch.cdist(many[50:], weight)
    assert distances.min() > 0.0  # no row twice, which would make programs degenerate
    assert many[50:].std(0).tolist() == pytest.approx((1.01**0.5 * weight.std(0)).tolist(), rel=0.05)


def test_text_nll_is_the_models_own():
    model = llama()
    given, tokens = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([[9, 10, 11], [12, 13, 14]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = text_nll(Policy(model), given, tokens, mask)
    log_probs = model(torch.cat([given, tokens], 1)).logits.detach().log_softmax(-1)[:, 2:-1]
    each = -log_probs.gather(-1, tokens[..., None])[..., 0]
    assert found.tolist() == pytest.approx([float(each[0].mean()), float(each[1, :2].mean())])


def test_measures_of_groups():
    texts = ["a b", "a c", "d e f", "d e f", "left out"]
    sequences = [(1, 2), (1, 3), (4, 5, 6), (4, 5, 6), (7, 8)]
    values = of_groups(texts, sequences, texts, size=2)
    assert values["distinct_1"] == [3 / 4, 3 / 6]
    assert values["distinct_2"] == [1.0, 2 / 4]
    assert values["distinct_3"] == [0.0, 1 / 2]
    assert values["self_bleu"][1] == pytest.approx(100.0)
    assert values["self_bleu"][0] < 50.0
    assert values["frechet"] == pytest.approx([0.0, 0.0], abs=1e-6)  # to themselves


def test_differences_are_paired():
    def written(*values):
        return Written(["", ""], [(), ()], {name: list(values) for name in MEASURES})

    rows = differences({HUMAN: written(0.0, 0.0), "b": written(1.0, 5.0), "other": written(2.0, 9.0)}, "b")
    clear = {"b": written(*range(9)), "other": written(*(i + 1.0 + 0.1 * (i % 2) for i in range(9)))}
    assert all(row.differs for row in differences(clear, "b"))
    found = {(row.rule, row.measure): row for row in rows}
    row = found["other", "nll_nats"]
    assert (row.difference, row.error, row.differs) == (2.5, 1.5, False)  # 1 and 4
    # Student's t of one degree of freedom is Cauchy's: its quantiles are tangents
    assert row.errors_needed == pytest.approx(math.tan(math.pi * (0.5 - 0.05 / (2 * len(rows)))))
    assert len(rows) == 2 * len(MEASURES) - 1
    assert (HUMAN, "nll_nats") in found
    assert (HUMAN, "frechet") not in found
    assert not any(row.rule == "b" for row in rows)


def test_sentences_say_what_differs():
    def difference(measure, mean, rule="eta"):
        return Difference(rule, measure, mean, 0.1, 3.0, abs(mean) > 0.3)

    few = [difference("nll_nats", 0.29), difference("self_bleu", 0.2), difference("nll_nats", 9.0, HUMAN)]
    (line,) = summary_lines({"differences": few})
    assert line.endswith("no difference seen in 2 measures")
    (line,) = summary_lines({"differences": [difference("nll_nats", -0.31), difference("self_bleu", 0.2)]})
    assert line.endswith("NLL a token -0.310 ± 0.100")
    basis = Rule("basis-aware eta", 0.003, 1000, 2.0, 50.0, 0.9, 0.9, 0.0, 0.0, 3.0, 4.0, 1.0, 0.0)
    same = replace(basis, rule="eta", true_gained=0.009, true_lost=0.004)
    other = replace(basis, rule="top-p", true_gained=0.020, true_lost=0.004)
    lines = summary_lines({"rules": [basis, same, other]})
    assert lines[1].endswith("9 only it keeps, 4 only basis-aware eta: no difference seen")
    assert lines[2].endswith("20 only it keeps, 4 only basis-aware eta: they differ")
    cost = Cost("basis-aware eta", 20, 10, 0.01, 0.03, 0.5, 0.25, 0.6, 0)
    program = Program(0.002, 0.003, 0.0018, 0.0019, True, True, 0.0018, 0.02, 4.0)
    late = replace(program, highs=math.nan, highs_accepts=False, certified=0.0021, highs_seconds=8.0)
    lines = summary_lines({"cost": [cost], "programs": [program, late]})
    assert "programs: 2, of which HiGHS ended 1 in time; same verdict 1 of 1; largest distance" in lines[1]
    assert lines[2].endswith("1 of 2")
    assert "HiGHS amortised 1.500 s a token" in lines[3]


def test_a_run_goes_on_and_refuses_other_settings(tmp_path, monkeypatch):
    asked = []

    def tiny(bench):
        asked.append(bench.settings.seeds)
        results, nested = tiny_check("layer", num_contexts=6, seed=1)
        return {"tiny": results, "nested": nested}

    monkeypatch.setitem(basis_aware._PARTS, "tiny", (tiny, ("seeds",)))
    settings = Settings(seeds=2)
    lines = run(settings, ["tiny"], tmp_path)
    assert lines[-1].startswith("Nested as theory says: 0 violations among ")
    assert run(replace(settings, samples=5), ["tiny"], tmp_path) == lines  # which the part does not depend on
    assert asked == [2]
    with pytest.raises(
        ValueError, match=r"other settings \(seeds: 2, now 3\); give another --output_dir or delete it"
    ):
        run(replace(settings, seeds=3), ["tiny"], tmp_path)
    (tmp_path / "parts" / "tiny.json").unlink()
    run(replace(settings, seeds=3), ["tiny"], tmp_path)
    assert asked == [2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {
        "nested.csv", "parts", "report.html", "tiny.csv", "tiny.png",
    }  # fmt: skip


def test_human_contexts_and_their_tails():
    ids = torch.arange(12).view(2, 6)
    contexts = Contexts(ids, 2, torch.zeros(8, 3))
    assert contexts.true_tokens.tolist() == [2, 3, 4, 5, 8, 9, 10, 11]
    assert contexts.tail(0, 9) == [0, 1]
    assert contexts.tail(6, 2) == [8, 9]
    assert whole_prompts(ids).mask.all()


def test_what_is_refused(tmp_path, capsys):
    assert main(["basis-aware", "--parts", "speed", "--output_dir", str(tmp_path)]) == 1
    assert "parts must be among" in capsys.readouterr().err
    assert PARTS == ("tiny", "scaling", "cost", "rules", "samples")
    assert main(["basis-aware", "--parts", "tiny", "--seeds", "0", "--output_dir", str(tmp_path)]) == 1
    assert "seeds must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="samples must be at least 2, got 1"):
        Settings(samples=1)
    assert write_report({}, "", tmp_path).is_file()
