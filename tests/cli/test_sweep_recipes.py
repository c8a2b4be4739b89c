"""Shipped sweep recipes: their keys are the trainers', they say what they cost, and what they show can be drawn."""

import itertools
import random

import pytest

from softrl.cli.arguments import find_recipe, parse
from softrl.cli.sweep_trial import folder_name, words_of
from softrl.studies.sweep import Trial
from softrl.studies.sweep_question import is_sweep_recipe, load_question
from softrl.studies.sweep_report import write_report
from softrl.studies.sweep_summary import settings

pytestmark = pytest.mark.slow  # imports trl

FOLDER = find_recipe("quickstart").parent / "sweeps"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def question_of(name):
    path = find_recipe(f"sweeps/{name}")
    assert is_sweep_recipe(path)
    return load_question(path)


@pytest.mark.parametrize("name", NAMES)
def test_first_and_last_trials_parse_and_no_key_is_of_another_trainer(name, capsys):
    question = question_of(name)
    recipe = find_recipe(question.recipe)
    search = question.search()
    grid = search.grid()
    for values in [grid[0], grid[-1], *{values.get("arm"): values for values in grid}.values()]:
        given = search.given(values)
        training = parse([*words_of(recipe, given), "--output_dir", "unused"])[1]
        for key, value in given.items():
            if value is not None and hasattr(training, key):
                assert getattr(training, key) == value
    for keys in question.prepare.values():
        parse([*words_of(recipe, keys), "--output_dir", "unused"])
    assert "has no use for" not in capsys.readouterr().out
    assert len({folder_name(values) for values in grid}) == len(grid)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recipe_shows_can_be_drawn(name, tmp_path):
    """Of made-up numbers: every setting but the baselines is compared with one, over all seeds."""
    question, draw = question_of(name), random.Random(0)
    numbers = [question.metric, *question.measures, *question.columns]
    search = question.search()
    trials = [
        Trial(values, of[question.metric], 1.0, of)
        for values in search.grid()
        for of in [{each: draw.random() + 1.0 for each in numbers}]
    ]
    rows = write_report(question, search, trials, tmp_path, f"softrl sweep --config sweeps/{name}")
    assert (tmp_path / "report.html").is_file()
    seeds = {values["seed"] for values in search.grid()}
    baselines = [row for row in rows if all(row.values.get(key) == of for key, of in question.report.baseline.items())]
    assert baselines
    assert all(len(row.metrics) == len(seeds) for row in rows)
    assert {row.pairs for row in rows if row not in baselines} == {len(seeds)}
    assert settings(question, trials) == rows


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_how_it_is_run_and_what_it_costs(name):
    comments = [line for line in find_recipe(f"sweeps/{name}").read_text().splitlines() if line.startswith("#")]
    assert any(f"softrl sweep --config sweeps/{name} --workers 2" in line for line in comments)
    text = " ".join(comments)
    assert "trials" in text
    assert "two workers" in text


def test_sharing_has_all_fifteen_partitions_of_four_modules_and_three_seeds():
    """Independently: a partition is which of the six pairs of modules share; fifteen are transitive."""
    seeds = {}
    for values in question_of("reasoner-sharing").search().grid():
        if values["arm"] == "with a reasoner":
            seeds.setdefault(values["weight_groups"], []).append(values["seed"])
    pairs = list(itertools.combinations(range(4), 2))
    shared = {frozenset(pair for pair in pairs if groups[pair[0]] == groups[pair[1]]) for groups in seeds}
    every = {frozenset(chosen) for count in range(7) for chosen in itertools.combinations(pairs, count)}
    transitive = {
        chosen for chosen in every
        if all(tuple(sorted({*p} ^ {*q})) in chosen for p in chosen for q in chosen if len({*p} & {*q}) == 1)
    }  # fmt: skip
    assert len(transitive) == 15
    assert shared == transitive
    assert set(map(tuple, seeds.values())) == {(7, 8, 9)}


def test_where_the_policys_weight_varies_it_can_act_and_by_one_way():
    """Adam takes a gradient's scale away: a weight acts where losses share weights, or by clipping, apart here."""
    groups = {}
    for values in question_of("reasoner-policy-weight").search().grid():
        given = question_of("reasoner-policy-weight").search().given(values)
        groups.setdefault(values["arm"], []).append(given)
    clipped = {arm: {given["max_grad_norm"] for given in of} for arm, of in groups.items()}
    assert {arm for arm, norms in clipped.items() if norms == {0}} == set(groups) - {"one set, clipped at 1"}
    shared = {arm for arm, of in groups.items() if {given["weight_groups"] for given in of} == {"AAAA"}}
    assert shared == set(groups) - {"separate modules"}
    assert {given["policy_weight"] for given in groups["one set of weights"]} >= {0, 1, 100, 10000}
    assert all({0, 10000} <= {given["policy_weight"] for given in of} for of in groups.values())
    assert {given.get("use_base_lm", True) for of in groups.values() for given in of} == {True, False}
    assert sum(len(of) for of in groups.values()) <= 36
    zero = question_of("reasoner-zero").search()
    assert {zero.given(values).get("policy_weight") for values in zero.grid()} <= {0, 1, None}
