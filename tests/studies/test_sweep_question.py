"""Sweep recipes and what is made of them: mistakes, narrowed grids, and tables against numbers made by hand."""

import csv
import math
import re

import pytest

from softrl.studies.sweep import Axis, Search, Trial
from softrl.studies.sweep_figures import _layout, plot_question
from softrl.studies.sweep_question import Question, ReportSpec, is_sweep_recipe, load_question
from softrl.studies.sweep_report import shared_lines, write_report
from softrl.studies.sweep_summary import cells, findings, header, settings, write_summary

RECIPE = """
title: Sizes
question: Does size matter?
recipe: quickstart
set: {max_steps: 3}
grid: {size: [2, 4], seed: [7, 8, 9]}
arms:
  with: {thinks: true, weight: [0, 10]}
  without: {thinks: false}
  alone: {size: null, is_alone: true}
metric: nll
columns: [parameters]
report: {x: size, scale: log, baseline: {arm: without}}
"""


def question(tmp_path, text=RECIPE):
    path = tmp_path / "sizes.yaml"
    path.write_text(text)
    assert is_sweep_recipe(path)
    return load_question(path)


def test_a_recipe_is_read(tmp_path):
    asked = question(tmp_path)
    search = asked.search()
    assert search.keys == ["arm", "size", "weight", "seed"]
    assert len(search.grid()) == 3 * (4 + 2 + 1)
    of_seed = [values for values in search.grid() if values["seed"] == 7]
    assert of_seed == search.grid()[:7]
    assert search.given(of_seed[0]) == {"max_steps": 3, "thinks": True, "size": 2, "weight": 0, "seed": 7}
    assert search.given(of_seed[-1]) == {"max_steps": 3, "is_alone": True, "size": None, "seed": 7}
    assert asked.columns == {"parameters": "parameters"}
    assert "max_steps: 3" in shared_lines(asked)


def test_the_command_line_narrows_and_replaces(tmp_path):
    asked = question(tmp_path).with_grid([Axis("seed", (7,)), Axis("weight", (5, 6)), Axis("rate", (0.1, 0.2))])
    assert {values["seed"] for values in asked.search().grid()} == {7}
    assert {values.get("weight") for values in asked.search().grid()} == {5, 6, None}
    assert len(asked.search().grid()) == 2 * (4 + 2 + 1)
    fixed = question(tmp_path).with_grid([], [Axis("max_steps", (1,)), Axis("size", (8,))])
    assert fixed.set == {"max_steps": 1}
    assert fixed.search("grid", None, 0, ["without"]).grid() == [
        {"arm": "without", "size": 8, "seed": seed} for seed in (7, 8, 9)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title:", "titel:"), "unknown key 'titel'; did you mean one of ['title'"),
        (("metric: nll", ""), "['metric'] must be given"),
        (("x: size", "x: sise"), "report names ['sise'], which nothing varies"),
        (("scale: log", "scale: logs"), "report.scale must be one of"),
        (("x: size", "xx: size"), "report: unknown key 'xx'"),
        (("[2, 4]", "[2, 2]"), "grid: size: values must be different"),
        (("{max_steps: 3}", "{size: 3}"), "set and grid both have ['size']"),
        (("{max_steps: 3}", "3"), "set must be a mapping"),
        (("metric: nll", "metric: nll\ndirection: down"), "direction must be one of"),
        (("{max_steps: 3}", "{arm: 3}"), "['arm'] is not a key of a run"),
        (("metric: nll", "metric: nll\nmeasures: {loss: a loss}"), "metric 'nll' must be one of the measures"),
        (
            ("[2, 4]", "[2, wide]"),
            "report.scale 'log' needs numbers of at least 0, but size has the values [2, 'wide']",
        ),
        (("[2, 4]", "[2, -4]"), "report.scale 'log' needs numbers of at least 0, but size has the values [2, -4]"),
        (("[2, 4]", "[2, true]"), "report.scale 'log' needs numbers"),
        (("x: size, scale: log", "x: arm, scale: linear"), "report.scale 'linear' needs numbers, but arm has"),
        (("{max_steps: 3}", "{width: 3}\ntogether: {size: [width]}"), "'size' sets 'width'"),
    ],
)
def test_mistakes_name_the_key(tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        question(tmp_path, RECIPE.replace(*change))


def trial(metric, seconds=2.0, parameters=10.0, **values):
    return Trial(values, metric, seconds, {} if metric is None else {"nll": metric, "parameters": parameters})


def by_hand():
    """Differences with: -1, -3, -2 at size 2 (mean -2, standard error 1/sqrt 3); one seed failed at size 4."""
    without = [trial(metric, arm="without", size=2, seed=seed) for seed, metric in ((7, 5.0), (8, 6.0), (9, 7.0))]
    with_it = [trial(m, arm="with", size=2, weight=0, seed=seed) for seed, m in ((9, 5.0), (7, 4.0), (8, 3.0))]
    other = [trial(3.0, arm="without", size=4, seed=7), trial(None, arm="without", size=4, seed=8)]
    alone = [trial(2.5, 4.0, 30.0, arm="alone", size=None, seed=7)]
    return with_it + other + without + alone


def test_seeds_are_folded_and_settings_compared_seed_by_seed(tmp_path):
    rows = settings(question(tmp_path), by_hand())
    assert [(row.values["arm"], row.values["size"]) for row in rows] == [
        ("with", 2), ("without", 2), ("without", 4), ("alone", None),
    ]  # fmt: skip
    first, plain, larger, alone = rows
    assert first.metric == pytest.approx((4.0, 1.0 / math.sqrt(3.0)))
    assert first.difference == pytest.approx((-2.0, 1.0 / math.sqrt(3.0)))
    assert (first.pairs, first.better) == (3, 3)
    assert plain.metric == pytest.approx((6.0, 1.0 / math.sqrt(3.0)))
    assert plain.pairs == larger.pairs == alone.pairs == 0
    assert (len(larger.metrics), larger.failed) == (1, 1)
    assert alone.columns["parameters"][0] == 30.0
    assert alone.seconds == 4.0
    assert findings(question(tmp_path), rows) == [
        "arm=with, size=2, weight=0: better than the baseline by 2.000 ± 0.577 (3 of 3 seeds better)."
    ]


def test_one_seed_says_nothing_of_chance(tmp_path):
    one = [each for each in by_hand() if each.values["seed"] == 7]
    assert findings(question(tmp_path), settings(question(tmp_path), one)) == [
        "With one seed there is no standard error by which to tell a difference from chance."
    ]


def test_a_baseline_that_lacks_a_key_serves_all_of_its_values(tmp_path):
    asked = question(tmp_path, RECIPE.replace("{arm: without}", "{arm: alone}"))
    rows = settings(asked, by_hand())
    assert rows[0].difference[0] == 1.5
    assert rows[0].better == 0
    assert rows[1].difference[0] == 2.5


def test_a_key_stands_for_several(tmp_path):
    asked = question(tmp_path, RECIPE + "together: {size: [width, height], max_steps: [steps]}\n")
    search = asked.search()
    assert search.given(search.grid()[0]) == {
        "steps": 3, "thinks": True, "width": 2, "height": 2, "weight": 0, "seed": 7,
    }  # fmt: skip
    assert "size: width, height together" in shared_lines(asked)


def test_several_numbers_of_a_run_are_compared_with_each_other(tmp_path):
    """Differences by hand: 10 - 4 twice, 10 - 2 once, of the three seeds of one setting; mean 20/3."""
    text = RECIPE.replace("baseline: {arm: without}", "baseline: {measure: NLL}")
    asked = question(tmp_path, text + "measures: {nll: NLL, parameters: size}\n")
    rows = settings(asked, [trial(m, arm="with", size=2, weight=0, seed=s) for s, m in ((7, 4.0), (8, 4.0), (9, 2.0))])
    assert [row.values["measure"] for row in rows] == ["NLL", "size"]
    assert rows[1].metric == (10.0, 0.0)
    assert rows[1].difference == pytest.approx((20 / 3, 2 / 3))
    assert header(asked)[:4] == ["arm", "size", "weight", "measure"]


def test_more_is_better_where_a_recipe_says_so(tmp_path):
    asked = question(tmp_path, RECIPE + "direction: maximize\n")
    rows = settings(asked, by_hand())
    assert rows[0].better == 0
    assert "worse than the baseline" in findings(asked, rows)[0]


def test_tables(tmp_path):
    asked = question(tmp_path)
    rows = settings(asked, by_hand())
    assert header(asked) == [
        "arm", "size", "weight", "n", "nll", "difference to without", "better", "parameters", "seconds",
    ]  # fmt: skip
    assert cells(asked, rows[0]) == [
        "with", "2", "0", "3", "4.000 ± 0.577", "-2.000 ± 0.577", "3 of 3", "10", "2.00",
    ]  # fmt: skip
    assert cells(asked, rows[2])[3:6] == ["1 (1 failed)", "3.000", "\u2013"]
    write_summary(asked, rows, tmp_path)
    with open(tmp_path / "summary.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert float(table[0]["difference_se"]) == pytest.approx(0.5773503, abs=1e-7)
    assert (table[1]["difference"], table[1]["pairs"], table[2]["failed"]) == ("", "0", "1")
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {10}


def test_where_values_lie():
    rows = settings(asked := Question("t", "q", "r", "m", grid={"w": [0, 10, 100], "k": ["b", "a"]}), [
        Trial({"w": w, "k": k}, {"a": 1.0, "b": 2.0}[k], 1.0) for w in (0, 10, 100) for k in ("b", "a")
    ])  # fmt: skip
    layout = _layout(asked, rows)
    assert (layout.x, layout.series, layout.scale, layout.values) == ("w", ("k",), "linear", [0, 10, 100])
    logs = Question(**{**vars(asked), "report": ReportSpec(x="w", scale="log")})
    assert [_layout(logs, rows).place(value) for value in (0, 10, 100)] == [0.0, 1.0, 2.0]
    words = Question(**{**vars(asked), "report": ReportSpec(x="k", sort=True)})
    assert _layout(words, rows).values == ["a", "b"]
    assert _layout(words, rows).series == ("w",)
    with pytest.raises(ValueError, match="needs numbers"):
        Question(**{**vars(asked), "report": ReportSpec(x="k", scale="log")})


def test_values_that_only_earlier_commands_ran_do_not_stop_the_report(tmp_path):
    asked = Question("t", "q", "r", "m", grid={"w": [1, 10]}, report=ReportSpec(x="w", scale="log"))
    for earlier, scale in (("soft", "categories"), (-1, "linear"), (100, "log")):
        trials = [Trial({"w": w}, 1.0, 1.0) for w in (1, 10, earlier)]
        assert _layout(asked, settings(asked, trials)).scale == scale
        write_report(asked, asked.search(), trials, tmp_path, "softrl sweep")


def test_numbers_of_a_recipe_are_those_of_python(tmp_path):
    text = RECIPE.replace("[2, 4]", "[1e1, 1e-3, 0]").replace("{arm: without}", "{size: 1e1}")
    asked = question(tmp_path, text.replace("max_steps: 3", "rate: 1e-4, tokenizer: '512'"))
    assert asked.grid["size"] == [10.0, 0.001, 0]
    assert asked.set == {"rate": 0.0001, "tokenizer": "512"}
    assert asked.report.baseline == {"size": 10.0}
    assert asked.with_grid([Axis.parsed("size=1e3,2e3")]).grid["size"] == [1000.0, 2000.0]
    with pytest.raises(ValueError, match=r"report.scale 'log' needs .* but size has the values \['small'\]"):
        asked.with_grid([Axis.parsed("size=small")])


@pytest.mark.parametrize("x", ["size", "arm"])
def test_the_page_holds_all(tmp_path, x):
    asked = question(tmp_path, RECIPE.replace("x: size, scale: log", f"x: {x}"))
    search = asked.search()
    write_report(asked, search, by_hand(), tmp_path / "out", "softrl sweep --config sizes")
    page = (tmp_path / "out" / "report.html").read_text()
    for text in (
        "Does size matter?",
        "softrl sweep --config sizes",
        "data:image/png;base64",
        "3 of 3",
        "Trials that failed",
    ):
        assert text in page
    none = write_report(asked, search, [trial(None, arm="with", size=2, weight=0, seed=7)], tmp_path / "none", "")
    assert [(row.failed, row.metrics) for row in none] == [(1, {})]
    assert sorted(path.name for path in (tmp_path / "none").iterdir()) == ["results.csv"]


def test_a_figure_of_seeds_alone(tmp_path):
    asked = Question("t", "q", "r", "m", grid={"seed": [1, 2]})
    trials = [Trial({"seed": seed}, float(seed), 1.0) for seed in (1, 2)]
    rows = settings(asked, trials)
    assert rows[0].metric == (1.5, 0.5)
    plot_question(asked, rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()
    assert Search((Axis("seed", (1, 2)),), "m").keys == ["seed"]
