"""Sweeps: only what is missing is run, failed trials are tried again, keys that nothing has are refused."""

import csv
import json

import pytest

from softrl.cli import sweep as command
from softrl.studies.sweep import Axis, Search, TrialError, best, sweep
from softrl.studies.sweep_recipes import with_values
from softrl.studies.variance_config import ProblemSpec, VarianceConfig

AXES = (Axis("a", (1, 2, 3)), Axis("b", ("x", None)))
RECIPE = """
question: Which?
output_dir: unused
draws: 8
problems:
  - name: t
    kind: tiny_lm
    settings: {reward: additive, vocab_size: 4, steps: 1, num_samples: 4}
    estimators: [rloo, {name: st_gumbel, temperature: 1.0, label: st}]
"""


def cost(values):
    return values["a"] ** 2 + (values["b"] is None)


def test_axes_are_read_as_yaml():
    assert Axis.parsed("hops=0,1,null") == Axis("hops", (0, 1, None))
    assert Axis.parsed("lr=1.0e-3,0.5,true,soft") == Axis("lr", (1e-3, 0.5, True, "soft"))
    for text in ("hops", "hops=", "=1", "hops=1,1", "hops=[1]"):
        with pytest.raises(ValueError, match="--grid"):
            Axis.parsed(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "best"}, "--sampler must be one of"),
        ({"sampler": "tpe"}, "needs --trials"),
        ({"trials": 0}, "--trials must be at least 1"),
        ({"axes": (AXES[0], AXES[0])}, "different keys"),
    ],
)
def test_searches_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Search(**({"axes": AXES, "metric": "m"} | changes))


def test_a_rerun_does_only_what_is_missing_and_what_failed(tmp_path):
    called = []

    def objective(values, fails=None, stops=None):
        called.append(dict(values))
        if values == fails:
            raise TrialError("no")
        if values == stops:
            raise KeyboardInterrupt
        return cost(values)

    search = Search(AXES, "m")
    failing, stopping = {"a": 2, "b": "x"}, {"a": 3, "b": "x"}
    with pytest.raises(KeyboardInterrupt):
        sweep(search, lambda values: objective(values, failing, stopping), tmp_path)
    assert len(called) == 5
    trials = sweep(search, objective, tmp_path)
    assert called[5:]
    assert {json.dumps(v) for v in called[5:]} == {json.dumps(v) for v in (failing, stopping, {"a": 3, "b": None})}
    assert {json.dumps(t.values): t.metric for t in trials} == {json.dumps(v): cost(v) for v in search.grid()}
    before = len(called)
    assert len(sweep(search, objective, tmp_path)) == 6
    assert len(called) == before
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(row["a"], row["b"]): float(row["m"]) for row in rows} == {
        (str(v["a"]), v["b"] or "null"): cost(v) for v in search.grid()
    }
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert best(search, trials).values == {"a": 1, "b": "x"}
    assert best(Search(AXES, "m", maximize=True), trials).values == {"a": 3, "b": None}
    with pytest.raises(ValueError, match="holds a sweep with"):
        sweep(Search(AXES, "other"), objective, tmp_path)


def test_failed_trials_are_in_the_table(tmp_path):
    def objective(values):
        raise TrialError("no")

    trials = sweep(Search(AXES[:1], "m"), objective, tmp_path)
    assert [trial.metric for trial in trials] == [None] * 3
    assert best(Search(AXES[:1], "m"), trials) is None
    assert (tmp_path / "results.csv").read_text().count("failed") == 3


def test_a_random_search_counts_earlier_trials(tmp_path):
    called = []
    for wanted in (3, 5):
        sweep(Search(AXES, "m", sampler="random", trials=wanted), lambda v: called.append(v) or 1.0, tmp_path)
        assert len(called) == wanted


def test_keys_reach_settings_and_estimators():
    spec = ProblemSpec("t", "tiny_lm", ["rloo", {"name": "st_gumbel", "hops": 0}], {"steps": 2})
    config = VarianceConfig("?", "out", [spec], draws=8)
    assert with_values(config, {"hops": 2}).problems[0].estimators[1]["hops"] == 2
    assert with_values(config, {"steps": 3}).problems[0].settings["steps"] == 3
    assert with_values(config, {"draws": 9}).draws == 9
    assert with_values(config, {"problems.0.settings.kl": 0.1}).problems[0].settings["kl"] == 0.1
    assert with_values(config, {"problems.0.estimators.1.hops": 5}).problems[0].estimators[1]["hops"] == 5
    assert with_values(config, {"problems.0.draws": 7}).problems[0].draws == 7
    assert config.problems[0] == ProblemSpec("t", "tiny_lm", ["rloo", {"name": "st_gumbel", "hops": 0}], {"steps": 2})
    for key in ("hop", "problems.1.settings.steps", "problems.0.estimators.0.hops", "question.x", "problems.0.drws"):
        with pytest.raises(ValueError, match="unknown key"):
            with_values(config, {key: 1})


def test_the_command_sweeps_a_variance_recipe(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    words = ["--config", str(recipe), "--grid", "temperature=0.5,1.0", "--grid", "steps=1,2"]
    assert command.main([*words, "--output_dir", str(tmp_path / "out"), "--minimize", "st:variance"]) == 0
    with open(tmp_path / "out" / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(row["temperature"], row["steps"]) for row in rows} == {(t, s) for t in ("0.5", "1.0") for s in "12"}
    assert len({row["st:variance"] for row in rows}) == 4
    capsys.readouterr()
    for more, message in (
        (["--grid", "temprature=1"], "unknown key 'temprature'"),
        (["--grid", "steps=1", "--minimize", "msee"], "unknown metric 'msee'"),
        (["--grid", "steps=1", "--minimize", "ppo:mse"], "no estimator 'ppo'"),
    ):
        assert command.main(["--config", str(recipe), *more, "--output_dir", str(tmp_path / message[:9])]) == 2
        assert message in capsys.readouterr().err


def test_the_command_runs_training_in_processes_of_their_own(tmp_path, capsys, monkeypatch):
    """With a stub instead of `softrl train`: it fails at beta 0.3 once, and is asked for what is missing only."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 1\n")
    stub = (
        "import json, os, sys; w = sys.argv[1:]; v = dict(zip(w[::2], w[1::2])); d = v['--output_dir'];"
        "open(d + '/ran', 'a').write('x');"
        "sys.exit(3) if v['--beta'] == '0.3' and len(open(d + '/ran').read()) == 1 else None;"
        "json.dump({'eval_reward': 1 - float(v['--beta'])}, open(d + '/metrics.json', 'w'))"
    )
    monkeypatch.setattr(command, "_RUN", stub)
    monkeypatch.setattr(command, "check_keys", lambda recipe, values: None)
    words = ["--config", str(recipe), "--grid", "beta=0.1,0.3", "--output_dir", str(tmp_path / "out")]
    assert command.main(words) == 1
    assert "status 3" in capsys.readouterr().err
    assert command.main(words) == 0
    assert command.main(words) == 0
    trials = tmp_path / "out" / "trials"
    assert {path.name: (path / "ran").read_text() for path in trials.iterdir()} == {"beta=0.1": "x", "beta=0.3": "xx"}
    assert (tmp_path / "out" / "results.csv").read_text().splitlines()[0] == "beta,eval_reward,seconds,state"


def test_words_of_a_training_trial(tmp_path):
    words = command.words_of(tmp_path / "r.yaml", {"hops": 2, "relaxation": "softmax", "beta": None})
    assert words == ["--config", str(tmp_path / "r.yaml"), "--hops", "2", "--relaxation", "softmax"]
    assert command.resuming(tmp_path) == []
    (tmp_path / "checkpoint-3").mkdir()
    assert command.resuming(tmp_path) == ["--resume_from_checkpoint", "latest"]
