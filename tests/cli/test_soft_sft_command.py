"""`softrl train --trainer soft_sft` on tiny models: every format, its evaluation, going on, what follows it."""

import json
from pathlib import Path

import pytest
from helpers import llama
from safetensors.torch import load_file
from trainers.soft_sft import words
from trainers.tiny import word_tokenizer
from transformers import AutoModelForCausalLM

from softrl.cli import evaluate
from softrl.cli.train import build_trainer, main, parse

pytestmark = pytest.mark.slow  # imports trl

ROWS = {
    "texts": [{"text": words(i, 4 + i % 5)} for i in range(24)],
    "completions": [{"prompt": words(i, 2), "completion": f" {words(i + 1, 2 + i % 3)}"} for i in range(24)],
    "references": [{"prompt": words(i, 2), "reference": [f" {words(i + 1, 2 + i % 3)}", "w3"]} for i in range(24)],
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Arguments of a run on a tiny model and files of texts, in a folder of its own."""
    llama().float().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.txt").write_text("\n".join(row["text"] for row in ROWS["texts"]))
    monkeypatch.chdir(tmp_path)
    settings = {
        "trainer": "soft_sft", "model_name_or_path": "model", "dtype": "float32", "dataset_name": "texts.jsonl",
        "num_eval_prompts": 4, "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 0.01, "top_k": 5,
        "guidance_alpha": "linear:1.0->0.0", "output_dir": "run", "report_to": "none", "logging_steps": 1,
        "use_cpu": "true", "disable_tqdm": "true", "save_strategy": "no", "lr_scheduler_type": "constant",
    }  # fmt: skip
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


@pytest.mark.parametrize("extra", [[], ["--use_peft", "true", "--lora_target_modules", "all-linear"]])
def test_it_trains_and_is_evaluated(tiny, capsys, extra):
    argv = [*tiny, *extra, "--guidance", "floor", "--max_entropy_nats", "0.8"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "Model saved to run." in out
    assert "guided_nll" in out
    assert "Figure: run/curves.png" in out
    assert evaluate.main(argv) == 0
    out = capsys.readouterr().out
    assert "4 held-out texts, nats a token" in out
    assert "soft_nll" in out


@pytest.mark.parametrize("name", ["texts.txt", "completions.jsonl", "references.jsonl"])
def test_other_formats(tiny, name):
    assert main([*tiny, "--dataset_name", name, "--max_steps", "1", "--hops", "0"]) == 0


def test_a_reference_is_the_completion_whose_tokens_count(tiny):
    trainer = build_trainer(*parse([*tiny, "--dataset_name", "references.jsonl"]))
    row = trainer.train_dataset[0]
    counted = [token for token in row["labels"] if token != -100]
    assert row["labels"][:2] == [-100, -100]
    assert row["input_ids"][2:] == counted
    assert counted[-1] == trainer.processing_class.eos_token_id
    assert len(counted) > 2


def test_it_goes_on_from_its_checkpoint_to_the_same_parameters(tiny):
    saving = [*tiny, "--guidance_alpha", "linear:1.0->0.0@4", "--save_strategy", "steps", "--save_steps", "2"]
    assert main([*saving, "--output_dir", "whole"]) == 0
    assert main([*saving, "--output_dir", "parts", "--max_steps", "2"]) == 0
    assert main([*saving, "--output_dir", "parts", "--resume_from_checkpoint", "latest"]) == 0
    whole, parts = (load_file(Path(folder) / "model.safetensors") for folder in ("whole", "parts"))
    assert all(bool((whole[key] == parts[key]).all()) for key in whole)
    assert AutoModelForCausalLM.from_pretrained("whole").config.vocab_size == 23


def test_rewards_have_no_place_in_it(tiny, capsys):
    assert main([*tiny, "--reward_funcs", "sentiment"]) == 2
    assert "learns from the data set alone and calls no reward_funcs" in capsys.readouterr().err
