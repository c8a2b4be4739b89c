"""`softrl train --trainer quietstar` on tiny models: the run, its evaluation, going on, generation, hostile input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import llama
from safetensors.torch import load_file
from trainers.tiny import word_tokenizer

from softrl.cli import evaluate, thoughts
from softrl.cli.train import main

pytestmark = pytest.mark.slow  # imports trl

TEXTS = [" ".join(f"w{3 + (i * 7 + j * j) % 20}" for j in range(6 + i % 5)) for i in range(24)]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Arguments of a run on a tiny model and a file of texts, in a folder of its own."""
    llama().float().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    monkeypatch.chdir(tmp_path)
    settings = {
        "trainer": "quietstar", "model_name_or_path": "model", "dtype": "float32", "dataset_name": "texts.jsonl",
        "num_eval_prompts": 4, "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 0.01,
        "n_thought": 2, "n_talk": 2, "sigmoid_mixing": "true", "output_dir": "run", "report_to": "none",
        "logging_steps": 1, "use_cpu": "true", "disable_tqdm": "true", "save_strategy": "no",
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


@pytest.mark.parametrize("extra", [[], ["--use_peft", "true", "--lora_target_modules", "all-linear"]])
def test_it_trains_is_evaluated_and_thinks(tiny, capsys, extra):
    argv = [*tiny, *extra, "--estimator", "rloo", "--start_text", "w3 w4"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "Model saved to run." in out
    assert "loss/policy" in out
    assert "Figure: run/curves.png" in out
    assert evaluate.main(argv) == 0
    out = capsys.readouterr().out
    assert "4 held-out texts, nats a token" in out
    assert "base_nll" in out
    generated = ["generate", "--model", "run", "--prompt", "w3 w4", "--max_new_tokens", "3", "--show_thoughts"]
    assert thoughts.main(generated) == 0
    assert "<|thought|>" in capsys.readouterr().out


def test_a_text_file_has_a_text_a_line(tiny):
    assert main([*tiny, "--dataset_name", "texts.txt", "--max_steps", "1"]) == 0


@pytest.mark.parametrize("estimator", ["reinforce", "soft"])
def test_it_goes_on_from_its_checkpoint_to_the_same_parameters(tiny, estimator):
    saving = [*tiny, "--estimator", estimator, "--top_k", "8", "--save_strategy", "steps", "--save_steps", "2"]
    assert main([*saving, "--output_dir", "whole"]) == 0
    assert main([*saving, "--output_dir", "parts", "--max_steps", "2"]) == 0
    assert main([*saving, "--output_dir", "parts", "--resume_from_checkpoint", "latest"]) == 0
    for name in ("model.safetensors", "thinking.safetensors"):
        whole, parts = (load_file(Path(folder) / name) for folder in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(bool((whole[key] == parts[key]).all()) for key in whole)


def test_two_launched_processes_give_the_parameters_of_one(tiny, tmp_path):
    """On texts of one length: a loss is a mean over what a process has of a step."""
    rows = [" ".join(text.split()[:6]) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    assert main([*tiny, "--output_dir", "alone"]) == 0
    command = [sys.executable, "-m", "softrl", "train", *tiny, "--output_dir", "both"]
    done = subprocess.run(
        [*command, "--per_device_train_batch_size", "2", "--accelerate_config", "ddp_cpu"],
        capture_output=True, text=True, timeout=450, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Model saved to both.") == 1
    for name in ("model.safetensors", "thinking.safetensors"):
        alone, both = (load_file(tmp_path / folder / name) for folder in ("alone", "both"))
        assert alone.keys() == both.keys()
        assert max(float((alone[key] - both[key]).abs().max()) for key in alone) < 1e-5


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--reward_funcs", "sentiment"], "learns from the data set alone and calls no reward_funcs"),
        (["--judge", "sentiment"], "calls no judge"),
        (["--estimator", "rloo", "--num_thoughts", "1", "--n_talk", "0"], "n_talk must be at least 1, got 0"),
        (["--gradient_checkpointing", "true"], "transformers then drops the keys that thoughts share"),
        (["--think_at", "given"], "train_dataset has no column 'anchors'"),
        (["--start_share", "2"], "start_share is a share, from 0 to 1, got 2.0"),
        (["--n_thought", "linear:two->0"], "n_thought='linear:two->0'"),
        (["--max_length", "1"], "max_length must leave a token to predict"),
    ],
)
def test_mistakes_are_named_before_a_step(tiny, capsys, extra, message):
    assert main([*tiny, *extra]) == 2
    assert message in capsys.readouterr().err
    assert not Path("run").exists()
