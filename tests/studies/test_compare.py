"""`softrl compare` on a tiny random model: budgets, clocks, resuming, failures, and recipes that are refused."""

import dataclasses
import json
from types import SimpleNamespace

import helpers
import pandas as pd
import pytest
import torch
import yaml
from datasets import load_from_disk
from trainers.tiny import word_tokenizer
from transformers import TrainerControl, TrainerState

from softrl.cli import compare as command
from softrl.cli import train as train_command
from softrl.cli.train import build_trainer, find_recipe, load_judge, load_prompts, parse
from softrl.studies import compare_run
from softrl.studies.compare import Study, Tools, tuning_score
from softrl.studies.compare_config import load_config
from softrl.studies.compare_run import Cycle, EvaluationPoints, PolicyEvaluator

pytestmark = pytest.mark.slow  # imports trl

HELD_OUT, SAMPLES, EVERY = 5, 16, 8
METHODS = [
    {"name": "soft tokens", "trainer": "soft_rollout", "hops": 2},
    {"name": "PPO", "trainer": "ppo", "num_ppo_epochs": 2, "num_mini_batches": 2},
    {"name": "TRL's RLOO", "trainer": "trl_rloo", "num_iterations": 2},
    {"name": "broken", "learning_rate": 1e30},
]
TOOLS = Tools(lambda words: parse(words, "softrl compare"), build_trainer, load_prompts, load_judge)


def judge(texts):
    return torch.tensor([float(len(text.split())) for text in texts])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, prompts, a base recipe and a study of four methods."""
    folder = tmp_path_factory.mktemp("compare")
    helpers.llama().float().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("".join(f"w{3 + i} w{3 + i * 7 % 17}\n" for i in range(17)))
    base = {
        "model_name_or_path": f"{folder}/model", "dtype": "float32", "dataset_name": f"{folder}/prompts.txt",
        "num_eval_prompts": HELD_OUT, "reward_funcs": ["helpers.PairReward"], "judge": "studies.test_compare.judge",
        "trainer": "reinforce", "estimator": "rloo", "num_generations": 4, "per_device_train_batch_size": 8,
        "max_completion_length": 5, "top_k": 7, "learning_rate": 0.01, "use_cpu": True, "output_dir": "runs/base",
        "dataloader_pin_memory": False, "per_device_eval_batch_size": 3, "max_steps": 99, "save_strategy": "no",
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    write_study(folder)
    return folder


def write_study(folder, name="study.yaml", **changes):
    study = {
        "question": "Which <method>?", "output_dir": str(folder / "out"), "base": str(folder / "base.yaml"),
        "seeds": [0], "betas": [0.0], "max_samples": SAMPLES, "evaluate_every_samples": EVERY, "methods": METHODS,
        "notes": "", **changes,
    }  # fmt: skip
    given = {key: value for key, value in study.items() if value is not None}
    (folder / name).write_text(yaml.safe_dump(given))
    return folder / name


@pytest.fixture(scope="module")
def ran(folder):
    """The study, run and reported: records by method, and how many completions the reward has seen."""
    scored = []
    hard = helpers.PairReward.hard

    def counted(self, ids, mask, **columns):
        scored.append(len(ids))
        return hard(self, ids, mask, **columns)

    study = Study(load_config(folder / "study.yaml", find_recipe), TOOLS)
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers.PairReward, "hard", counted)
        for method in study.config.methods:
            scored.clear()
            study.train([method], None, [0])
            seen[method.name] = sum(scored)
    assert command.main(["--config", str(folder / "study.yaml")]) == 0  # the report; all has been run
    records = {record["method"]: record for record in study.records()}
    return SimpleNamespace(records=records, seen=seen, out=folder / "out")


WORKING = [method["name"] for method in METHODS if method["name"] != "broken"]


@pytest.mark.parametrize("name", WORKING)
def test_equal_samples_are_equal(ran, name):
    points = ran.records[name]["points"]
    assert ran.records[name]["status"] == "done"
    assert [point["samples"] for point in points] == [0, 8, 16]
    steps_a_rollout = {"soft tokens": 1, "PPO": 4, "TRL's RLOO": 2}[name]
    assert [point["step"] for point in points] == [0, steps_a_rollout, 2 * steps_a_rollout]
    # What the reward really saw: the samples, and an evaluation a point; the start's is shared after the first method.
    evaluations = 3 if name == "soft tokens" else 2
    assert ran.seen[name] == SAMPLES + evaluations * HELD_OUT


def test_all_methods_start_from_the_same_evaluation_and_move(ran):
    starts = [ran.records[name]["points"][0] for name in WORKING]
    assert all(start["rewards_by_prompt"] == starts[0]["rewards_by_prompt"] for start in starts)
    assert all(start["kl_completion"] == pytest.approx(0.0, abs=1e-5) for start in starts)
    assert len(starts[0]["judge_by_prompt"]) == HELD_OUT
    ends = [ran.records[name]["points"][-1] for name in WORKING]
    assert all(end["kl_completion"] > 1e-4 for end in ends)  # without a KL weight there is a reference nevertheless
    assert all(len(ran.records[name]["completions"]) == HELD_OUT for name in WORKING)


def test_prompts_are_made_once_and_are_those_of_the_base(ran, folder):
    (saved,) = ran.out.glob("prompts-*")
    arguments, _, _ = parse(["--config", str(folder / "base.yaml")])
    train, test = load_prompts(arguments, None)
    kept = load_from_disk(str(saved))
    assert (kept["train"]["prompt"], kept["test"]["prompt"]) == (train["prompt"], test["prompt"])
    prompts = [sample["prompt"] for sample in ran.records["PPO"]["completions"]]
    assert prompts == test["prompt"][:]


def test_a_run_that_breaks_is_a_failed_row(ran):
    record = ran.records["broken"]
    assert record["status"] != "done"
    assert record["points"][0]["samples"] == 0  # what it had measured is kept
    rows = (ran.out / "rows.csv").read_text()
    assert "broken,reinforce" in rows
    page = (ran.out / "report.html").read_text()
    assert "all 1 runs failed" in page
    assert record["status"].split(":")[0] in page


def test_the_page_holds_everything(ran):
    page = (ran.out / "report.html").read_text()
    assert "Which &lt;method&gt;?" in page
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 3
    assert "http" not in page.replace("data:image", "")
    assert "<script" not in page
    assert "Differences from soft tokens" in page
    table = pd.read_parquet(ran.out / "rows.parquet")
    assert len(table) == len((ran.out / "rows.csv").read_text().splitlines()) - 1
    assert set(table.method) == {method["name"] for method in METHODS}


def test_finished_runs_are_not_run_again(ran, folder, monkeypatch, capsys):
    def never(*arguments):
        raise AssertionError("a finished run was built again")

    monkeypatch.setattr(train_command, "build_trainer", never)
    before = {path: path.stat().st_mtime_ns for path in (ran.out / "runs").iterdir()}
    study = Study(load_config(folder / "study.yaml", find_recipe), dataclasses.replace(TOOLS, build_trainer=never))
    study.train(study.config.methods, None, [0])
    assert {path: path.stat().st_mtime_ns for path in (ran.out / "runs").iterdir()} == before
    more = write_study(folder, "longer.yaml", max_samples=2 * SAMPLES)
    with pytest.raises(AssertionError, match="built again"):
        command.main(["--config", str(more)])

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "build_trainer", interrupted)
    assert command.main(["--config", str(more)]) == 130
    assert "Finished runs are kept" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (ran.out / "runs").iterdir()} == before


def test_evaluation_is_the_trainers_own(folder):
    config = load_config(folder / "study.yaml", find_recipe)
    study = Study(config, TOOLS)
    arguments, args, model_args = study.parsed(config.run(config.methods[0], 0.1, 3, None))
    trainer = build_trainer(arguments, args, model_args)
    trainer.evaluate()
    samples = PolicyEvaluator(trainer, arguments, model_args, judge).samples()
    assert [sample.tokens for sample in samples] == [sample.tokens for sample in trainer.last_evaluation]
    assert [sample.reward for sample in samples] == [sample.reward for sample in trainer.last_evaluation]


# The clock


class _Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def _stepped(callback, clock, steps, seconds_a_step):
    """Drive a callback as the trainer does; returns the steps taken until it stops."""
    state, control = TrainerState(), TrainerControl()
    for step in range(1, steps + 1):
        callback.on_step_begin(None, state, control)
        clock.now += seconds_a_step
        state.global_step = step
        callback.on_step_end(None, state, control)
        clock.now += 0.25  # logging, loading data
        if control.should_training_stop:
            return step
    return steps


def test_seconds_exclude_evaluation_and_end_a_run(monkeypatch):
    clock, seen = _Clock(), []
    monkeypatch.setattr(compare_run, "_now", clock)

    def evaluate(step, seconds):
        seen.append((step, seconds))
        clock.now += 100.0

    assert _stepped(EvaluationPoints(evaluate, 2), clock, 6, 1.0) == 6
    assert seen == [(2, 2.0), (4, 4.0), (6, 6.0)]
    seen.clear()
    assert _stepped(EvaluationPoints(evaluate, 4, max_seconds=2.5), clock, 6, 1.0) == 3
    assert seen == [(3, 3.0)]  # evaluated where it stopped, though no point was due


def test_a_cycle_counts_rollouts():
    cycle = Cycle(samples=16, steps=4)
    assert [cycle.samples_after(step) for step in (0, 1, 4, 5)] == [0, 16, 16, 32]
    assert cycle.steps_for(48, "max_samples") == 12
    with pytest.raises(ValueError, match="max_samples=40 is not a multiple of the 16 samples"):
        cycle.steps_for(40, "max_samples")


# Tuning


TUNING = {"learning_rates": [0.01, 0.02], "max_samples": 8, "seed": 100}
SOUND = METHODS[:1]


def _record(rewards, kls, status="done", beta=0.1):
    points = [{"reward": reward, "kl_completion": kl} for reward, kl in zip(rewards, kls, strict=True)]
    return {"status": status, "points": points, "beta": beta}


def test_the_criterion_of_tuning(folder):
    record = _record([9.0, 0.5, 0.7], [0.0, 1.0, 4.0])  # the start does not count

    def score(**changes):
        path = write_study(folder, "tuned.yaml", methods=SOUND, tuning={**TUNING, **changes})
        return tuning_score(load_config(path, find_recipe), record)

    assert score() == 0.7
    assert score(criterion="objective") == pytest.approx(0.4)
    assert score(max_kl_nats=2.0) == 0.5
    assert score(max_kl_nats=0.5) == -float("inf")
    record = _record([9.0, 0.5], [0.0, 1.0], status="loss is not finite")
    assert score() == -float("inf")


def test_the_best_rate_is_used_once_all_have_been_tried(folder, monkeypatch):
    config = load_config(
        write_study(folder, "tuned.yaml", methods=SOUND, tuning=TUNING, betas=[0.0, 0.3]), find_recipe
    )
    study, method = Study(config, TOOLS), config.methods[0]
    assert [run.settings["learning_rate"] for run in config.tuning_runs(method)] == [0.01, 0.02]
    assert {(run.seed, run.beta, run.max_samples) for run in config.tuning_runs(method)} == {(100, 0.3, 8)}
    scores = {0.01: 0.4}

    def record(run):
        rate = run.settings["learning_rate"]
        return _record([0.0, scores[rate]], [0.0, 1.0]) if rate in scores and run.stage == "tuning" else None

    monkeypatch.setattr(study, "record", record)
    assert study.learning_rate(method) is None
    assert study.main_runs(config.methods, None, [0]) == []
    scores[0.02] = 0.5
    assert study.learning_rate(method) == 0.02
    runs = study.main_runs(config.methods, [0.3], [0])
    assert [(run.beta, run.settings["learning_rate"]) for run in runs] == [(0.3, 0.02)]


def test_a_seed_s_runs_come_before_the_next_seed_s(folder):
    methods = [{"name": "a"}, {"name": "b", "betas": [0.3]}]
    path = write_study(folder, "order.yaml", methods=methods, seeds=[0, 1], betas=[0.0, 0.3])
    config = load_config(path, find_recipe)
    runs = Study(config, TOOLS).main_runs(config.methods, None, config.seeds)
    order = [(run.seed, run.beta, run.method) for run in runs]
    assert order == [(s, b, m) for s in (0, 1) for b, m in ((0.0, "a"), (0.3, "a"), (0.3, "b"))]


# Recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_sample": 3}, r"unknown keys \['max_sample'\]; the keys are .*'max_samples'"),
        ({"question": None}, r"missing keys \['question'\]"),
        ({"betas": []}, "betas must be a list of at least one"),
        ({"base": "no/such"}, "no recipe 'no/such'"),
        ({"common": {"seed": 1}}, r"common: \['seed'\] are set by the study"),
        ({"methods": [{"trainer": "ppo"}]}, "method 1: `name` is None; every method needs one of its own"),
        ({"methods": [{"name": "A"}, {"name": "a"}]}, "method 2: `name` is 'a'; every method needs one of its own"),
        ({"methods": [{"name": "a", "beta": 0.1}]}, r"method 'a': \['beta'\] are set by the study"),
        ({"max_samples": 12}, "max_samples=12 is not a multiple of evaluate_every_samples=8"),
        ({"max_samples": "many"}, "max_samples must be a positive integer, got 'many'"),
        ({"max_seconds": 0}, "max_seconds must be positive"),
        ({"reference": "x"}, r"reference must be one of the methods \['soft tokens'.*got 'x'"),
        ({"tuning": {"learning_rates": [1.0]}}, r"tuning: missing keys \['max_samples'\]"),
        ({"tuning": {**TUNING, "criterion": "judge"}}, "tuning: criterion must be one of"),
        ({"tuning": {**TUNING, "seed": 0}}, r"tuning: seed 0 is one of the study's seeds \[0\]"),
        ({"tuning": TUNING}, "method 'broken': `learning_rate` is given, but `tuning` chooses it"),
        ({"tuning": TUNING, "methods": [{"name": "a", "learning_rates": [1.0]}]}, "`learning_rates` replaces those"),
    ],
)
def test_recipes_that_are_refused(folder, capsys, changes, message):
    path = write_study(folder, "wrong.yaml", **changes)
    with pytest.raises(ValueError, match=message):
        load_config(path, find_recipe)
    assert command.main(["--config", str(path)]) == 2
    assert capsys.readouterr().err.startswith("softrl compare: ")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"learnng_rate": 1.0}, "method 'a': unknown key 'learnng_rate'.*did you mean 'learning_rate'"),
        ({"trainer": "ppo", "hops": 2}, r"method 'a': trainer 'ppo' has no use for \['hops'\]"),
        ({"trainer": "pppo"}, "method 'a': trainer must be one of"),
        ({"trainer": "listwise", "betas": [0.1]}, "method 'a': ranked completions are read, not sampled"),
        ({"per_device_train_batch_size": 12}, "method 'a': evaluate_every_samples=8 is not a multiple of the 12"),
    ],
)
def test_methods_that_are_refused_before_anything_is_trained(folder, method, message):
    config = load_config(write_study(folder, "wrong.yaml", methods=[{"name": "a", **method}]), find_recipe)
    with pytest.raises(ValueError, match=message):
        Study(config, TOOLS).check(config.methods)


def test_the_command_names_what_is_not_there(folder, tmp_path, capsys):
    path = str(folder / "study.yaml")
    for words, message in (
        (["--config", "nothing"], "no recipe 'studies/nothing'"),
        (["--config", path, "--methods", "RLO"], r"--methods: ['RLO'] are not in the recipe"),
        (["--config", path, "--betas", "0.5"], "--betas: [0.5] are not in the recipe"),
        (["--config", path, "--output_dir", str(tmp_path), "--only_report"], "no run of this recipe is finished"),
    ):
        assert command.main(words) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["compare-quick", "compare-reviews"])
def test_shipped_recipes_make_a_study(name):
    config = load_config(find_recipe(f"studies/{name}"), find_recipe)
    Study(config, TOOLS).check(config.methods)
    assert config.reference == "RLOO"


def test_settings_become_words_and_names(folder):
    config = load_config(folder / "study.yaml", find_recipe)
    run = config.run(config.methods[0], 0.1, 2, 0.5)
    assert {"output_dir", "max_steps"}.isdisjoint(run.settings)  # the base's own
    settings = {"a": True, "b": None, "c": [1, "x"], "d": {"k": 1}, "e": "no"}
    words = dataclasses.replace(run, settings=settings).words
    assert words == ["--a", "true", "--c", "1", "x", "--d", json.dumps({"k": 1}), "--e", "no"]
    assert run.path("out").name.startswith("soft-tokens-beta0.1-seed2-")
    assert run.path("out") != dataclasses.replace(run, max_samples=8).path("out")
    assert run.path("out") == dataclasses.replace(run, stage="tuning").path("out")
