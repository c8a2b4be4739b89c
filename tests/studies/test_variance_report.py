"""The page of a variance study: everything is on it, nothing is fetched, numbers are readable, names are escaped."""

import csv
import json
import re
from dataclasses import replace

import pytest

from softrl.cli import variance as command
from softrl.studies.variance import Row, run
from softrl.studies.variance_config import ProblemSpec, VarianceConfig
from softrl.studies.variance_figures import Figure, sweeps_of_estimators, sweeps_of_problems
from softrl.studies.variance_report import COLUMNS, contradictions, number, summary, table, winner, write_report
from softrl.studies.variance_style import styles

TINY = {"reward": "additive", "vocab_size": 4, "steps": [1, 2], "num_samples": 4}
ESTIMATORS = ["rloo", "softmax", {"name": "st_gumbel", "hops": [0, 1]}, {"name": "grpo", "label": "<b>&GRPO"}]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    problems = [
        ProblemSpec("tiny <i>", "tiny_lm", ESTIMATORS, TINY),
    ]
    config = VarianceConfig("Which <script>?", str(tmp_path_factory.mktemp("study")), problems, draws=16)
    rows, descriptions = run(config, lambda words: None)
    return config, rows, write_report(config, rows, descriptions, "softrl variance --config x").read_text()


def test_every_estimator_and_problem_is_on_the_page(study):
    config, _, page = study
    for name in ("tiny &lt;i&gt;, steps 1", "tiny &lt;i&gt;, steps 2"):
        assert f">{name}</h2>" in page
    for name in ("rloo", "softmax", "st_gumbel, hops 0", "st_gumbel, hops 1", "&lt;b&gt;&amp;GRPO"):
        assert page.count(f">{name}</td>") >= 2
    assert all(column.title in page for column in COLUMNS)
    assert "softrl variance --config x" in page
    assert f"<dt>seed</dt><dd>{config.seed}</dd>" in page
    assert page.count("<figure>") == 1 + 2 * 3  # steps; a plane, seconds and hops of each problem


def test_the_page_needs_nothing_else(study):
    page = study[2]
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert len(sources) == 7 + 2  # figures, and problems in the first table
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "<script" not in page
    assert "<b>&GRPO" not in page
    assert not re.search(r"@import|url\(", page)
    anchors = {source[1:] for source in sources if source.startswith("#")}
    assert anchors == set(re.findall(r'<h2 id="([^"]*)"', page))


def test_rows_are_written_as_csv_and_parquet(study):
    import pandas

    config, rows, _ = study
    with open(f"{config.output_dir}/rows.csv", newline="", encoding="utf-8") as file:
        from_csv = list(csv.DictReader(file))
    from_parquet = pandas.read_parquet(f"{config.output_dir}/rows.parquet")
    assert [row["estimator"] for row in from_csv] == list(from_parquet["estimator"]) == [r.estimator for r in rows]
    assert [float(row["mse"]) for row in from_csv] == pytest.approx([row.mse for row in rows], rel=1e-12)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (1.0, "1.00"), (123.4, "123"), (12345.0, "12300"), (1e-16, "0"), (-2e-30, "0"),
     (0.00012345, "1.23e-4"), (9.996, "10.0"), (1.5e7, "1.50e7"), (float("inf"), "∞"), (float("nan"), "n/a"),
     (-0.5, "-0.500")],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes most of a report's time; one test has real pictures."""
    for name in ("plane", "budgets"):
        made = Figure(name, "", b"a picture")
        monkeypatch.setattr(f"softrl.studies.variance_report.{name}", lambda *_, made=made: made)


def row_of(estimator="a", **changes):
    ends = {f"{name}{end}": 0.0 for name in ("bias2", "variance", "mse", "scaled_mse", "snr", "cosine")
            for end in ("", "_low", "_high")}  # fmt: skip
    settings = json.dumps({"problem": {}, "estimator": {"name": estimator, "settings": {}}})
    known = {
        "problem": "p", "estimator": estimator, "unbiased_for": "hard", "group": "all", "draws": 9,
        "mean_cosine": 1.0, "bias_z": 0.0, "truth_noise": 0.0, "reward_calls": 4.0, "seconds": 1.0,
        "mse_at_equal_calls": 1.0, "mse_at_equal_seconds": 1.0, "settings": settings,
    }  # fmt: skip
    return Row(**(ends | known | changes))


def test_tables_are_sorted_and_mark_the_best():
    rows = [
        row_of("a", mse=3.0, variance=3.0, cosine=0.9),
        row_of("b", mse=2.0, variance=1.0, bias2=1.0, bias2_low=0.5),
    ]
    cells = table(rows)
    assert [row[0].text for row in cells] == ["b", "a"]
    place = {column.title: index for index, column in enumerate(COLUMNS)}
    marked = {title: [row[place[title]].best for row in cells] for title in ("bias²", "mse", "cosine of a draw")}
    assert marked == {"bias²": [False, True], "mse": [True, False], "cosine of a draw": [False, True]}
    assert winner(rows, lambda row: row.mse) == "b (2.00)"
    assert "b (2.00)" in " ".join(summary(rows))


def test_a_contradicted_declaration_is_loud(tmp_path, no_figures):
    wrong = row_of("liar", bias_z=-4.2, bias2=0.3, variance=1.0)
    fine = [row_of("b", bias_z=3.9, variance=1.0), row_of("c", bias_z=50.0, unbiased_for="none", variance=1.0)]
    assert contradictions([wrong, *fine]) == [wrong]
    config = VarianceConfig("Which?", str(tmp_path), [])
    page = write_report(config, [wrong, *fine], {"p": "made"}, "x").read_text()
    assert page.count("Contradiction") == 2
    page = write_report(config, [replace(wrong, bias_z=1.0), *fine], {"p": "made"}, "x").read_text()
    assert "Contradiction" not in page


def test_numbers_that_differ_become_curves(study):
    config, rows, _ = study
    whole = [row for row in rows if row.group == "all"]
    (steps,) = sweeps_of_problems(config, whole)
    assert steps.key == "steps"
    assert {label: [x for x, _ in points] for label, points in steps.curves.items()}["rloo"] == [1, 2]
    (hops,) = sweeps_of_estimators([row for row in whole if row.problem.endswith("steps 2")])
    assert (hops.key, [x for x, _ in hops.curves["st_gumbel"]]) == ("hops", [0, 1])


def test_colours_and_markers_tell_estimators_apart():
    looks = styles([f"e{index}" for index in range(60)])
    assert len({(look.colour, look.marker) for look in looks.values()}) == 60


def test_the_command_writes_a_page_resumes_and_starts_afresh(tmp_path, capsys, no_figures):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "question: Which?\noutput_dir: nowhere\ndraws: 50\nproblems:\n"
        "  - {name: c, kind: categorical_linear, estimators: [rloo, softmax]}\n"
    )
    words = ["--config", str(recipe), "--output_dir", str(tmp_path / "out"), "--draws", "8", "--seed", "3"]
    assert command.main(words) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "out" / "report.html") in out
    assert "rloo" in out
    saved = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "draws").iterdir()}
    assert command.main(words) == 0
    assert saved == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "draws").iterdir()}
    assert command.main([*words, "--fresh"]) == 0
    assert saved != {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "draws").iterdir()}
    capsys.readouterr()
    assert command.main(["--config", "no/such"]) == 2
    assert capsys.readouterr().err.startswith("softrl variance: no recipe 'no/such'")


def test_an_interrupted_command_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "question: Which?\noutput_dir: out\nproblems:\n  - {name: c, kind: categorical_linear, estimators: [rloo]}\n"
    )

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("softrl.studies.variance.run", interrupted)
    assert command.main(["--config", str(recipe)]) == 130
    assert f"to go on: softrl variance --config {recipe}" in capsys.readouterr().err
