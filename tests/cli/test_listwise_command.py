"""`softrl train --trainer listwise` on tiny models: the run, its evaluation, going on, two processes, hostile data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import llama
from safetensors.torch import load_file
from trainers.tiny import ranked_dataset, word_tokenizer

from softrl.cli import evaluate
from softrl.cli.arguments import parse
from softrl.cli.measured_step import measure_here
from softrl.cli.train import load_prompts, main

pytestmark = pytest.mark.slow  # imports trl

TESTS = Path(__file__).parent.parent
ROWS = [dict(row) for row in ranked_dataset(12)]
# The order of what is held out can be learned from the rest: a set's best completion has a `w9`, its worst a `w10`.
LEARNABLE = [
    {"prompt": f"w{3 + i % 5}", "completions": [f"w10 w{11 + i % 7}", f"w{4 + i % 3}", f"w{12 + i % 6} w9"],
     "rewards": [0.0, 0.5, 1.0]}
    for i in range(60)
]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Arguments of a run on a tiny model and a file of sets, in a folder of its own."""
    llama().float().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    write(tmp_path / "sets.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    settings = {
        "trainer": "listwise", "model_name_or_path": "model", "dtype": "float32", "dataset_name": "sets.jsonl",
        "num_eval_prompts": 4, "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 0.01, "beta": 0.5,
        "output_dir": "run", "report_to": "none", "logging_steps": 1, "use_cpu": "true", "disable_tqdm": "true",
        "save_strategy": "no", "lr_scheduler_type": "constant",
    }  # fmt: skip
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


@pytest.mark.parametrize("peft", [True, False])
def test_it_learns_an_order_and_is_evaluated_on_sets_that_were_held_out(tiny, capsys, peft):
    write(Path("sets.jsonl"), LEARNABLE)
    argv = [*tiny, "--max_steps", "30", "--num_eval_prompts", "16", "--prompt_prefix", "w3 ", "--gradient_statistics"]
    argv += [
        "true",
        "--gradient_accumulation_steps",
        "2",
        "--use_peft",
        str(peft),
        "--lora_target_modules",
        "all-linear",
    ]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "Model saved to run." in out
    assert "Figure: run/curves.png" in out
    assert "grad/snr" in out
    assert evaluate.main(argv) == 0
    out = capsys.readouterr().out
    assert "16 held-out sets of ranked completions" in out
    assert "0.500 ± 0.000" in out  # as training began, policy and reference are one
    before, after = (json.loads(Path(f"run/{name}.json").read_text()) for name in ("before", "after"))
    accuracies = [[row["accuracy"] for row in rows] for rows in (before, after)]
    assert accuracies[0] == [0.5] * 16
    assert sum(accuracies[1]) / 16 > 0.9
    assert all(row["margin"] == 0.0 for row in before)
    assert sum(row["loss"] for row in after) < sum(row["loss"] for row in before)
    assert sum(row["policy_accuracy"] for row in after) > sum(row["policy_accuracy"] for row in before)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_it_goes_on_from_the_newest_checkpoint_that_is_whole(tiny, capsys):
    argv = [*tiny, "--save_strategy", "steps", "--save_steps", "1"]
    assert main(argv) == 0
    whole, start = weights("run"), weights("model")
    assert difference(whole, start) > 1e-3
    for name in ("run/checkpoint-4", "run/checkpoint-3"):
        file = Path(name) / "optimizer.pt"
        file.write_bytes(file.read_bytes()[:-10])
    assert main([*argv, "--resume_from_checkpoint", "latest"]) == 0
    assert "optimizer.pt has" in capsys.readouterr().err
    assert difference(weights("run"), whole) == 0.0
    states = [json.loads(Path(f"run/checkpoint-{step}/trainer_state.json").read_text()) for step in (2, 4)]
    assert [row["step"] for row in states[1]["log_history"]] == [1, 2, 3, 4]
    assert main([*argv, "--resume_from_checkpoint", "latest", "--per_device_train_batch_size", "2"]) == 2
    assert "was written by a run of 4 sequences a step" in capsys.readouterr().err


def test_two_processes_are_launched_and_do_what_one_does(tiny):
    argv = [*tiny, "--optim", "sgd", "--max_steps", "2"]
    assert main([*argv, "--output_dir", "alone"]) == 0
    words = [*argv, "--per_device_train_batch_size", "2", "--accelerate_config", "ddp_cpu"]
    # This checkout's softrl, whichever one is installed.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "softrl", "train", *words], env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert difference(weights("run"), weights("alone")) < 1e-6
    assert difference(weights("run"), weights("model")) > 1e-4


def changed(index, **changes):
    return [{**row, **(changes if number == index else {})} for number, row in enumerate(ROWS)]


RANKED = [{"prompt": row["prompt"], "completions": row["completions"], "ranking": [-r for r in row["rewards"]]}
          for row in ROWS]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "extra", "message"),
    [
        (ROWS, ["--reward_funcs", "sentiment"], "alone and calls no reward_funcs: got ['sentiment']"),
        (ROWS, ["--judge", "sentiment"], "calls no judge: got 'sentiment'"),
        (ROWS, ["--config", "quickstart"], "calls no reward_funcs: got ['sentiment']"),
        (ROWS, ["--loss_type", "dpo"], "loss_type must be one of plackett_luce, listwise, one_winner, nca, partition"),
        (ROWS, ["--los_type", "nca"], "unknown key 'los_type' on the command line: did you mean 'loss_type'"),
        (ROWS, ["--max_length", "3"], "max_length=3 leaves no room for its completions"),
        (ROWS, ["--num_train_prompts", "0"], "the data set has no rows"),
        (ROWS, ["--resume_from_checkpoint", "latest"], "run holds no checkpoint to resume from"),
        (RANKED, ["--loss_type", "nca"], "loss_type='nca' needs the column 'rewards', and row 0 has a ranking alone"),
        ([{"prompt": "w4"}] * 4, [], "row 0 has no 'completions'; it has ['prompt']"),
        ([{"text": "w4"}] * 4, [], "row 0 has no 'prompt'; it has ['text']"),
        ([{"prompt": "w4", "completions": ["w5", "w6"]}] * 4, [], "has neither 'rewards' nor 'ranking'"),
        ([{"prompt": "w4", "completions": "w5", "rewards": 1.0}] * 4, [], "must be a list of two or more, got 'w5'"),
        ([{"prompt": "w4", "completions": ["w5", "w6"], "rewards": 1.0}] * 4, [], "a list of numbers, got 1.0"),
        ([{"prompt": 4, "completions": ["w5", "w6"], "ranking": [1, 2]}] * 4, [], "a list of messages, got 4"),
        ([{"prompt": "w4", "completions": [5, 6], "ranking": [1, 2]}] * 4, [], "a completion is text, or"),
        (changed(7, completions=ROWS[7]["completions"][:1]), [], "completions must be a list of two or more, got ['"),
        (changed(7, rewards=[1.0]), [], "completions and 1 rewards"),
        (changed(7, prompt=""), [], "the prompt is empty"),
        (changed(7, rewards=None), [], "has neither 'rewards' nor 'ranking'"),
        (changed(7, rewards=[None] * len(ROWS[7]["rewards"])), [], "rewards must be finite numbers, got [None"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_a_step(tiny, capsys, rows, extra, message):
    write(Path("sets.jsonl"), rows)
    assert main([*tiny, *extra]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # bars of reading the file may stand before it
    assert error.startswith("softrl train: ")
    assert message in error
    assert not Path("run").exists()


def test_its_own_data_and_no_rewards_are_the_default_and_others_keys_are_named(capsys):
    arguments, training, _ = parse(["--trainer", "listwise", "--num_generations", "4", "--loss_type", "nca"])
    assert (arguments.dataset_name, arguments.reward_funcs, arguments.judge) == ("review-rankings", [], "none")
    assert training.loss_type == "nca"
    assert capsys.readouterr().out == "softrl train: trainer='listwise' has no use for num_generations\n"
    assert parse([])[0].reward_funcs == ["sentiment"]


def test_embedded_sets_are_scored_by_the_token_linear_classifier(monkeypatch):
    monkeypatch.setattr("softrl.rewards.fit.token_linear_judge", lambda: "the classifier")
    monkeypatch.setattr("softrl.data.rankings.review_rankings", lambda *arguments: arguments)
    arguments, _, _ = parse(["--trainer", "listwise", "--num_eval_prompts", "3", "--reference_length_tokens", "9"])
    train, test = load_prompts(arguments, "tokenizer")
    assert train == ("tokenizer", 1024, "the classifier", 9, "train")
    assert test == ("tokenizer", 3, "the classifier", 9, "test")


def test_its_memory_is_measured_where_it_is_not_estimated(tiny):
    step = measure_here(tiny)
    assert step.peak >= step.resident
    assert step.seconds > 0.0
