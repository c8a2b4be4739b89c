"""`softrl sweep`: variance recipes here, training in processes of its own, Ctrl-C, jobs, and mistakes."""

import _thread
import csv
import json
import signal
import sys
import threading
import time

import pytest
from torch import nn

from softrl.cli import sweep as command
from softrl.cli import sweep_trial
from softrl.studies.sweep_launch import Processes

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


# Instead of `softrl train`. It leaves what it was told, fails where a file `fail` lies beside its folder, and writes
# the metric.
STUB = """
import json, os, sys
words = sys.argv[1:]
given = dict(zip(words[::2], words[1::2]))
folder = given['--output_dir']
with open(folder + '/ran', 'a') as file:
    file.write(json.dumps(given) + '\\n')
print('about to fail' if os.path.exists(folder + '/../fail') else 'well')
sys.exit(3) if os.path.exists(folder + '/../fail') and given['--beta'] == '0.3' else None
json.dump({'eval_reward': 1 - float(given['--beta']), 'size': 10 * int(given.get('--seed', 0)),
           'threads': int(os.environ.get('OMP_NUM_THREADS', 0))}, open(folder + '/metrics.json', 'w'))
"""
# Runs until SIGTERM, of which it leaves a checkpoint; goes on from there.
WAITING = """
import json, os, signal, sys, time
words = sys.argv[1:]
folder = words[words.index('--output_dir') + 1]
def stop(*_):
    os.mkdir(folder + '/checkpoint-1')
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
open(folder + '/begun', 'w').close()
if '--resume_from_checkpoint' not in words:
    time.sleep(60)
json.dump({'eval_reward': 1.0}, open(folder + '/metrics.json', 'w'))
"""
QUESTION = """
title: What beta does
question: Does it?
recipe: RECIPE
set: {max_steps: 5}
grid: {beta: [0.1, 0.3], seed: [1, 2]}
arms: {one: {hops: 0}, two: {hops: 1}}
metric: eval_reward
direction: maximize
columns: {size: parameters}
report: {x: beta, series: arm, baseline: {arm: one}}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe of one run, and trials that are stubs."""
    path = tmp_path / "recipe.yaml"
    path.write_text("max_steps: 1\n")
    monkeypatch.setattr(sweep_trial, "_RUN", STUB)
    monkeypatch.setattr(sweep_trial, "check_keys", lambda recipe, given: None)
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_runs_in_processes_of_its_own_and_what_failed_is_tried_again(tmp_path, capsys, recipe):
    words = ["--config", str(recipe), "--grid", "beta=0.1,0.3", "--output_dir", str(tmp_path / "out")]
    trials = tmp_path / "out" / "trials"
    trials.mkdir(parents=True)
    (trials / "fail").touch()
    assert command.main(words) == 1
    printed = capsys.readouterr()
    assert "status 3" in printed.err
    assert "about to fail" in printed.err
    assert "(1 failed)" in printed.out
    assert "status 3" in (tmp_path / "out" / "report.html").read_text()
    (trials / "fail").unlink()
    assert command.main(words) == 0
    assert command.main(words) == 0
    assert [len(lines_of(trials / f"beta={beta}" / "ran")) for beta in ("0.1", "0.3")] == [1, 2]
    assert (tmp_path / "out" / "results.csv").read_text().splitlines()[0] == "beta,eval_reward,seconds,state"


def test_a_sweep_recipe_answers_its_question(tmp_path, capsys, recipe):
    question, out = tmp_path / "what-beta-does.yaml", tmp_path / "out"
    question.write_text(QUESTION.replace("RECIPE", str(recipe)))
    words = ["--config", str(question), "--output_dir", str(out)]
    assert command.main([*words, "--grid", "seed=2", "--arms", "one", "--set", "max_steps=5", "--workers", "2"]) == 0
    assert len(list((out / "trials").iterdir())) == 2
    assert command.main([*words, "--workers", "2"]) == 0
    assert "parameters" in capsys.readouterr().out
    told = [line for path in (out / "trials").iterdir() for line in lines_of(path / "ran")]
    assert len(told) == 8
    assert {(each["--hops"], each["--beta"], each["--seed"]) for each in told} == {
        (hops, beta, seed) for hops in "01" for beta in ("0.1", "0.3") for seed in "12"
    }
    assert {each["--max_steps"] for each in told} == {"5"}
    assert {json.loads((path / "metrics.json").read_text())["threads"] for path in (out / "trials").iterdir()} == {1}
    with open(out / "summary.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["beta"], row["n"], row["size"]) for row in rows] == [
        ("one", "0.1", "2", "15"), ("one", "0.3", "2", "15"), ("two", "0.1", "2", "15"), ("two", "0.3", "2", "15"),
    ]  # fmt: skip
    assert [(row["difference"], row["pairs"]) for row in rows] == [("", "0"), ("", "0"), ("0", "2"), ("0", "2")]
    assert "Does it?" in (out / "report.html").read_text()
    for name in ("summary.csv", "summary.md", "sweep.png", "report.html", "results.csv"):
        (out / name).unlink()
    assert command.main([*words, "--only_report"]) == 0
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "only_report" not in (out / "report.html").read_text(), "the command that made it"
    assert len(told) == sum(len(lines_of(path / "ran")) for path in (out / "trials").iterdir())
    with pytest.raises(ValueError, match="holds a sweep"):
        command._run(command._parser().parse_args([*words, "--set", "max_steps=6"]), "")


def test_what_trials_need_is_made_first_and_once(tmp_path, capsys, recipe, monkeypatch):
    question, out = tmp_path / "q.yaml", tmp_path / "out"
    text = QUESTION.replace("RECIPE", str(recipe)).replace("{hops: 1}", "{proxy_model: '{prepared}/proxy'}")
    question.write_text(text + "prepare: {proxy: {max_steps: 7, beta: 0.5}}\n")
    monkeypatch.setattr(sweep_trial, "_MAKE", "import sys; sys.exit(4)")
    words = ["--config", str(question), "--output_dir", str(out), "--grid", "seed=1"]
    assert command.main(words) == 2
    assert "was not made, status 4" in capsys.readouterr().err
    monkeypatch.setattr(sweep_trial, "_MAKE", STUB)
    assert command.main(words) == 0
    assert command.main(words) == 0
    (made,) = lines_of(out / "prepared" / "proxy" / "ran")
    assert (made["--max_steps"], made["--beta"]) == ("7", "0.5")
    (told,) = lines_of(out / "trials" / "arm=two,beta=0.1,seed=1" / "ran")
    assert told["--proxy_model"] == str(out / "prepared" / "proxy")


def changed(text, old, new):
    assert old in text
    return text.replace(old, new)


def test_a_changed_recipe_is_noticed_and_what_has_no_effect_is_not(tmp_path, capsys, recipe):
    question, out = tmp_path / "q.yaml", tmp_path / "out"
    recipe.write_text("max_steps: 1\nlearning_rate: 0.1\noutput_dir: here\nsizes: [1, 2]\n")
    question.write_text(text := QUESTION.replace("RECIPE", str(recipe)))
    words = ["--config", str(question), "--output_dir", str(out), "--grid", "seed=1"]
    assert command.main(words) == 0
    recipe.write_text("learning_rate: 1e-1\nmax_steps: 9\noutput_dir: there\nsizes: [1, 2]\n")  # max_steps is set
    question.write_text(changed(text, "two: {hops: 1}", "two: {hops: 1}, three: {hops: 2}"))
    assert command.main([*words[:-1], "seed=1,2"]) == 0
    count = sum(len(lines_of(path)) for path in out.glob("trials/*/ran"))
    assert count == 12
    capsys.readouterr()
    recipe.write_text("learning_rate: 0.2\nsizes: [1, 3]\n")
    assert command.main([*words[:-1], "seed=3"]) == 2
    error = capsys.readouterr().err
    assert "(learning_rate: 0.1 → 0.2; sizes.1: 2 → 3); choose another --output_dir" in error
    assert sum(len(lines_of(path)) for path in out.glob("trials/*/ran")) == count
    recipe.write_text("learning_rate: 0.1\nsizes: [1, 2]\n")
    other = recipe.rename(tmp_path / "other.yaml")
    question.write_text(changed(text, str(recipe), str(other)))
    assert command.main(words) == 2
    assert "(recipe: recipe → other)" in capsys.readouterr().err


def without_records(folder):
    """As a folder was before there were any."""
    log = folder / "trials.log"
    lines = log.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "source" not in json.loads(line).get("user_attr", {})]
    assert len(kept) < len(lines)
    log.write_text("".join(kept))
    for marker in folder.glob("prepared/*/made"):
        assert marker.stat().st_size > 0
        marker.write_text("")


def test_a_folder_of_before_there_were_records_goes_on_and_gets_one(tmp_path, capsys, recipe, monkeypatch):
    question, out = tmp_path / "q.yaml", tmp_path / "out"
    question.write_text(QUESTION.replace("RECIPE", str(recipe)) + "prepare: {proxy: {max_steps: 7, beta: 0.5}}\n")
    monkeypatch.setattr(sweep_trial, "_MAKE", STUB)
    words = ["--config", str(question), "--output_dir", str(out), "--grid", "seed=1", "--arms", "one"]
    assert command.main(words) == 0
    without_records(out)
    recipe.write_text("learning_rate: 0.3\n")
    assert command.main([*words[:-1], "two"]) == 0
    assert len(lines_of(out / "prepared" / "proxy" / "ran")) == 1
    recipe.write_text("learning_rate: 0.4\n")
    capsys.readouterr()
    assert command.main(words) == 2
    assert "(learning_rate: 0.3 → 0.4)" in capsys.readouterr().err


def test_changed_keys_of_what_trials_need_are_noticed(tmp_path, capsys, recipe, monkeypatch):
    question, out = tmp_path / "q.yaml", tmp_path / "out"
    text = QUESTION.replace("RECIPE", str(recipe)) + "prepare: {proxy: {max_steps: 7, beta: 0.5}}\n"
    question.write_text(text)
    monkeypatch.setattr(sweep_trial, "_MAKE", STUB)
    words = ["--config", str(question), "--output_dir", str(out), "--grid", "seed=1", "--arms", "one"]
    assert command.main(words) == 0
    recipe.write_text("max_steps: 2\n")  # set by the trials and by the model that is made
    question.write_text(changed(text, "7, beta: 0.5}}", "7, beta: 0.5}, second: {beta: 0.6}}"))
    assert command.main(words) == 0
    assert (out / "prepared" / "second" / "made").is_file()
    question.write_text(changed(text, "max_steps: 7", "max_steps: 8"))
    assert command.main(words) == 2
    assert "(prepare.proxy.max_steps: 7 → 8); choose another --output_dir" in capsys.readouterr().err
    assert len(lines_of(out / "prepared" / "proxy" / "ran")) == 1


def test_a_model_is_not_taken_for_one_of_other_keys(tmp_path, recipe, monkeypatch):
    """Made, or begun: one that was stopped would go on from its checkpoint."""
    processes = Processes(1, 1)
    make = lambda keys: sweep_trial.prepare(recipe, {"proxy": keys}, tmp_path, processes)  # noqa: E731
    monkeypatch.setattr(sweep_trial, "_MAKE", "import sys; sys.exit(4)")
    for steps in (6, 7):  # nothing to go on from
        with pytest.raises(ValueError, match="was not made"):
            make({"max_steps": steps, "beta": 0.5})
    (tmp_path / "prepared" / "proxy" / "checkpoint-1").mkdir()
    monkeypatch.setattr(sweep_trial, "_MAKE", STUB)
    with pytest.raises(ValueError, match="max_steps: 7 → 8"):
        make({"max_steps": 8, "beta": 0.5})
    make({"max_steps": 7, "beta": 0.5})
    make({"max_steps": 7, "beta": "0.5"})
    recipe.write_text("max_steps: 1\nlearning_rate: 0.3\n")
    with pytest.raises(ValueError, match=r"\(learning_rate: not set → 0.3\); choose another --output_dir"):
        make({"max_steps": 7, "beta": 0.5})
    assert len(lines_of(tmp_path / "prepared" / "proxy" / "ran")) == 1


def test_a_key_that_another_one_sets_is_refused_and_not_ignored(tmp_path, capsys):
    words = ["--config", "sweeps/reasoner-shared-size", "--output_dir", str(tmp_path / "out")]
    assert command.main([*words, "--set", "interpreter_size=64"]) == 2
    assert "'size' sets 'interpreter_size'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_scale_is_checked_before_the_first_trial(tmp_path, capsys):
    words = ["--config", "sweeps/reasoner-shared-size", "--output_dir", str(tmp_path / "out")]
    assert command.main([*words, "--grid", "size=2,wide"]) == 2
    assert "report.scale 'log' needs numbers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_lets_all_trials_save_and_the_same_command_goes_on(tmp_path, capsys, recipe, monkeypatch):
    monkeypatch.setattr(sweep_trial, "_RUN", WAITING)
    words = ["--config", str(recipe), "--grid", "beta=0.1,0.3,0.5", "--output_dir", str(tmp_path / "out")]
    trials = tmp_path / "out" / "trials"

    def interrupt():
        until = time.monotonic() + 60.0
        while len(list(trials.glob("*/begun"))) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        _thread.interrupt_main()

    waiting = threading.Thread(target=interrupt)
    # A shell starts what runs in the background with SIGINT ignored, and pytest may be part of that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        waiting.start()
        assert command.main([*words, "--workers", "2"]) == 130
        waiting.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert "To go on: softrl sweep --config" in capsys.readouterr().err
    assert sorted(path.parent.name for path in trials.glob("*/checkpoint-1")) == ["beta=0.1", "beta=0.3"]
    assert not list(trials.glob("*/metrics.json"))
    monkeypatch.setattr(sweep_trial, "_RUN", WAITING.replace("sleep(60)", "sleep(0)"))
    assert command.main([*words, "--workers", "2"]) == 0
    assert len(list(trials.glob("*/metrics.json"))) == 3


def test_trials_are_jobs_of_submitit(tmp_path, capsys, recipe):
    """Its local executor, which runs a job as a process: the same code as on a cluster, but for sbatch."""
    words = ["--config", str(recipe), "--grid", "beta=0.1,0.3", "--output_dir", str(tmp_path / "out")]
    trials = tmp_path / "out" / "trials"
    trials.mkdir(parents=True)
    (trials / "fail").touch()
    assert command.main([*words, "--launcher", "submitit_local", "--workers", "2"]) == 1
    assert "the run ended with status 3" in capsys.readouterr().err
    assert list((tmp_path / "out" / "submitit").glob("*_result.pkl"))
    told = lines_of(trials / "beta=0.1" / "ran")
    assert len(told) == 1
    assert json.loads((trials / "beta=0.1" / "metrics.json").read_text())["threads"] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--launcher", "slurm"], "--launcher slurm: Could not detect"),
        (["--launcher", "submitit_local", "--slurm", "partition"], "expected key=value"),
        (["--launcher", "submitit_local", "--slurm", "partion=cpu"], "--launcher local"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--threads", "-1"], "--threads must be at least 1"),
        (["--set", "hops=1,2"], "--set takes one value"),
        (["--arms", "one"], "--arms: there is no ['one']"),
        (["--only_report"], "holds no sweep"),
    ],
)
def test_mistakes_are_one_message_and_exit_2(tmp_path, capsys, recipe, more, message):
    words = ["--config", str(recipe), "--grid", "beta=0.1,0.3", "--output_dir", str(tmp_path / "out")]
    assert command.main([*words, *more]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_of_one_run_needs_a_grid_and_a_folder(tmp_path, capsys, recipe):
    assert command.main(["--config", str(recipe), "--output_dir", str(tmp_path)]) == 2
    assert "--grid KEY=V,V and --output_dir are needed" in capsys.readouterr().err


def test_slurm_without_submitit_says_what_to_install(tmp_path, capsys, recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    words = ["--config", str(recipe), "--grid", "beta=0.1", "--output_dir", str(tmp_path / "out")]
    assert command.main([*words, "--launcher", "slurm"]) == 2
    assert "pip install 'softrl[slurm]'" in capsys.readouterr().err


def test_words_of_a_training_trial(tmp_path):
    words = sweep_trial.words_of(tmp_path / "r.yaml", {"hops": 2, "relaxation": "softmax", "beta": None})
    assert words == ["--config", str(tmp_path / "r.yaml"), "--hops", "2", "--relaxation", "softmax"]
    assert sweep_trial.resuming(tmp_path) == []
    (tmp_path / "checkpoint-3").mkdir()
    assert sweep_trial.resuming(tmp_path) == ["--resume_from_checkpoint", "latest"]


def test_parameters_that_modules_share_count_once():
    inner, embedding = nn.Linear(3, 4), nn.Embedding(5, 3)
    head = nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    embedding.requires_grad_(False)
    counts = sweep_trial.parameter_counts(nn.ModuleList([inner, inner, embedding, head]))
    assert counts == {
        "num_parameters": 16 + 15, "num_parameters_without_embeddings": 16, "num_trained_parameters": 16,
    }  # fmt: skip


SMALL = """
trainer: TRAINER
dataset_name: shakespeare
max_steps: 2
block_length_tokens: 16
num_train_prompts: 64
num_eval_prompts: 4
per_device_train_batch_size: 4
save_strategy: "no"
report_to: none
output_dir: unused
"""


@pytest.mark.slow
def test_small_models_are_trained_two_at_a_time(tmp_path):
    """End to end: `softrl train` in processes, its numbers in the table; resuming finds nothing left to do."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(SMALL.replace("TRAINER", "reasoner"))
    words = ["--config", str(recipe), "--grid", "weight_groups=AAAA,ABCD", "--minimize", "eval_nll"]
    words += ["--output_dir", str(out), "--workers", "2"]
    assert command.main(words) == 0
    trials = sorted((out / "trials").iterdir())
    metrics = {path.name: json.loads((path / "metrics.json").read_text()) for path in trials}
    shared, own = metrics["weight_groups=AAAA"], metrics["weight_groups=ABCD"]
    assert shared["num_parameters"] < own["num_parameters"] == own["eval_num_parameters"]
    assert own["step"] == 2
    with open(out / "summary.csv", newline="", encoding="utf-8") as file:
        rows = {row["weight_groups"]: float(row["eval_nll"]) for row in csv.DictReader(file)}
    assert rows == pytest.approx({"AAAA": shared["eval_nll"], "ABCD": own["eval_nll"]}, rel=1e-5)
    written = [(path / "metrics.json").stat().st_mtime_ns for path in trials]
    assert command.main(words) == 0
    assert [(path / "metrics.json").stat().st_mtime_ns for path in trials] == written
