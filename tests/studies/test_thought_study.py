"""`softrl thoughts compare`: recipes, runs that are kept, tables against numbers made by hand, and the page."""

import json
import math

import pytest
import yaml

from softrl.cli.arguments import find_study
from softrl.cli.thoughts import main
from softrl.studies.thought_config import load_config
from softrl.studies.thought_tables import first_below, group_rows, mean_curve, method_rows

pytestmark = pytest.mark.slow  # imports trl

RECIPE = {
    "question": "Does it run?", "output_dir": "out", "task": "pointer_chasing",
    "task_settings": {"num_symbols": 5, "hops": [2], "num_rows": 80, "num_eval_rows": 12},
    "model": {"width": 16, "layers": 1, "heads": 2, "context_length": 32},
    "pretrain": {"max_steps": 3, "per_device_train_batch_size": 4}, "max_seconds": 0.3, "evaluate_every_seconds": 0.1,
    "seeds": [0, 1], "target_nll": 100.0,
    "common": {
        "think_at": "given", "n_thought": 1, "n_talk": 1, "num_thoughts": 2, "per_device_train_batch_size": 4,
        "sigmoid_mixing": True, "learning_rate": 1e-2,
    },
    "methods": [
        {"name": "no thoughts", "control": True, "thoughts": "none"}, {"name": "REINFORCE", "estimator": "reinforce"},
        {"name": "soft", "estimator": "soft", "num_thoughts": 1, "top_k": 8},
    ],
}  # fmt: skip


def recipe(tmp_path, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(tmp_path / "out"), **changes}))
    return path


def test_a_study_runs_is_kept_and_reported(tmp_path, capsys):
    argv = ["compare", "--config", str(recipe(tmp_path))]
    assert main(argv) == 0
    runs = sorted((tmp_path / "out" / "runs").glob("*.json"))
    assert len(runs) == 6
    before = {path: path.stat().st_mtime_ns for path in runs}
    records = [json.loads(path.read_text()) for path in runs]
    assert all(record["status"] == "done" and record["seconds"] >= 0.3 for record in records)
    assert len({record["points"][0]["base_nll"] for record in records}) == 2  # the methods of a seed start alike
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(text in page for text in ("REINFORCE", "2 hops", "Thoughts of", "data:image/png", "First below 100"))
    capsys.readouterr()
    assert main(argv) == 0  # nothing is run again
    assert "min to go" not in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in runs} == before
    assert main(["report", "--config", argv[-1]]) == 0


def test_a_report_without_runs_says_what_makes_them(tmp_path, capsys):
    assert main(["report", "--config", str(recipe(tmp_path))]) == 2
    assert "holds no finished run of the recipe; softrl thoughts compare makes them" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["thoughts-pointer", "thoughts-shakespeare"])
def test_shipped_recipes_are_read(name):
    config = load_config(find_study(name))
    assert len(config.seeds) == 3
    assert any(method.is_control for method in config.methods)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chess"}, "task must be one of"),
        ({"max_seconds": 0}, "max_seconds must be a positive number of seconds, got 0"),
        ({"seeds": []}, "seeds must be a list of at least one"),
        ({"colour": 1}, "unknown keys .'colour'."),
        ({"reference": "nobody"}, "reference must be one of the methods"),
        ({"pretrain": {}}, "pretrain: max_steps must be a positive integer, got None"),
        ({"common": {"seed": 3}}, "common: .'seed'. are set by the study"),
        ({"common": {"thougts": "none"}}, "common: unknown keys .'thougts'."),
        ({"methods": [{"estimator": "rloo"}]}, "`name` is None; every method needs one of its own"),
        ({"methods": [{"name": "a"}, {"name": "A!"}]}, "every method needs one of its own"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path, capsys, changes, message):
    path = recipe(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_config(path)
    assert main(["compare", "--config", str(path)]) == 2
    assert capsys.readouterr().err.startswith("softrl thoughts compare: ")


def test_a_method_s_mistake_is_found_before_the_first_run(tmp_path, capsys):
    path = recipe(tmp_path, methods=[*RECIPE["methods"], {"name": "odd", "proposal": "mixture", "num_thoughts": 3}])
    assert main(["compare", "--config", str(path)]) == 2
    assert "method 'odd': proposal='mixture' draws half" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["compare", "--config", str(recipe(tmp_path)), "--methods", "nobody"]) == 2
    assert "--methods: ['nobody'] are not in the recipe" in capsys.readouterr().err


def point(seconds, nll, **others):
    group = {"nll": nll, "accuracy": 0.5}
    return {
        "seconds": seconds, "thoughts": 10 * seconds, "step": seconds, "nll": nll, "base_nll": 2.0, "accuracy": 0.5,
        "mixing": 0.25, "groups": {"1 hop": group}, **others,
    }  # fmt: skip


def record(method, seed, nlls, control=False, status="done"):
    points = [point(index, nll) for index, nll in enumerate(nlls)]
    return {"method": method, "seed": seed, "control": control, "status": status, "points": points}


RECORDS = [
    record("plain", 0, [2.0, 1.5, 1.0], control=True), record("think", 0, [2.0, 1.0, 0.5]),
    record("plain", 1, [2.0, 1.6, 1.4], control=True), record("think", 1, [2.0, 1.2, 0.7]),
    record("think", 2, [2.0, 0.1, 0.1], status="ValueError: no"), record("never", 0, [2.0, 2.0, 2.0]),
]  # fmt: skip


def test_rows_are_means_over_seeds_and_differences_seed_by_seed():
    plain, think, never = method_rows(RECORDS, "plain", target_nll=1.1)
    assert think.nll == pytest.approx((0.6, 0.1))
    assert think.against == pytest.approx((-0.6, 0.1))  # -0.5 and -0.7
    assert (think.seeds, think.failed, think.reached) == (2, 1, 2)
    assert (think.seconds_to_target, think.thoughts_to_target) == (1.5, 15.0)
    assert plain.is_control
    assert plain.reached == 1
    assert plain.seconds_to_target is None  # one of two seeds never gets there: their median is infinite
    assert never.seconds_to_target is None
    assert math.isnan(never.nll[1])
    assert never.against[0] == pytest.approx(1.0)


def test_curves_go_as_far_as_all_runs_do():
    runs = [record("a", 0, [3.0, 2.0, 1.0]), record("a", 1, [3.0, 1.0])]
    x, mean, error = mean_curve(runs, lambda p: p["seconds"], lambda p: p["nll"])
    assert (x, mean) == ([0.0, 1.0], [3.0, 1.5])
    assert error == pytest.approx([0.0, 0.5])


def test_targets_and_groups():
    assert first_below(RECORDS[0], 1.2)["seconds"] == 2
    assert first_below(RECORDS[0], 0.5) is None
    assert first_below(RECORDS[0], None) is None
    assert group_rows(RECORDS[:2]) == [
        ("plain", "1 hop", pytest.approx((1.0, math.nan), nan_ok=True), pytest.approx((0.5, math.nan), nan_ok=True)),
        ("think", "1 hop", pytest.approx((0.5, math.nan), nan_ok=True), pytest.approx((0.5, math.nan), nan_ok=True)),
    ]
