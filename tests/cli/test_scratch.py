"""`softrl train --trainer reasoner` from nothing: corpora, tokenizers and models that are made, and trained on."""

import os
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from softrl.cli import evaluate, generate
from softrl.cli.arguments import SHAKESPEARE_CORPUS
from softrl.cli.scratch import spread
from softrl.cli.train import build_trainer, main, parse
from softrl.data.characters import shakespeare
from softrl.data.corpus import corpus_blocks

pytestmark = pytest.mark.slow  # imports trl

LINES = [f"line {i} of {i * i} says: to be, or not to be\n" for i in range(60)]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Arguments of a run on a text file, in a folder and with a cache of its own."""
    (tmp_path / "lines.txt").write_text("".join(LINES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOFTRL_CACHE", str(tmp_path / "cache"))
    settings = {
        "trainer": "reasoner", "dataset_name": "lines.txt", "block_length_tokens": 16, "num_eval_prompts": 4,
        "base_lm_size": 8, "reasoner_size": 8, "interpreter_size": 8, "per_device_train_batch_size": 4, "max_steps": 3,
        "num_thoughts": 2, "output_dir": "run", "report_to": "none", "logging_steps": 1, "use_cpu": "true",
        "disable_tqdm": "true", "save_strategy": "no",
    }  # fmt: skip
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


def built(*argv):
    return build_trainer(*parse(list(argv)))


@pytest.mark.parametrize("tokenizer", ["characters", "300"])
def test_what_was_made_loads_by_auto_classes_and_trains_on(tiny, tmp_path, capsys, tokenizer):
    argv = [*tiny, "--tokenizer", tokenizer]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "Model saved to run." in out
    assert "Figure: run/curves.png" in out
    assert evaluate.main(argv) == 0
    out = capsys.readouterr().out
    assert "4 held-out texts, nats a token" in out
    assert "interpreter_nll" in out
    model, words = (each.from_pretrained("run") for each in (AutoModelForCausalLM, AutoTokenizer))
    assert words.decode(words("or not\n").input_ids) == "or not\n"
    given = words("to be", return_tensors="pt")
    generated = model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape == (1, len(words("to be").input_ids) + 3)
    wide = ["--interpreter_size", "12", "--checkpoint", "run"]
    assert evaluate.main([*argv, *wide]) == 2
    err = capsys.readouterr().err
    assert "run holds another model than the recipe makes" in err
    assert "state_dict" not in err
    assert generate.main(["--model", "run", "--prompt", "to be", "--max_new_tokens", "3", "--no_stream"]) == 0
    assert capsys.readouterr().out.startswith("to be")
    further = [*tiny, "--model_name_or_path", "run", "--output_dir", "further"]
    before = built(*further).evaluate()["eval_nll"]
    assert before == pytest.approx(built(*argv, "--model_name_or_path", "run").evaluate()["eval_nll"])
    assert main(further) == 0
    assert AutoTokenizer.from_pretrained("further").get_vocab() == words.get_vocab()


def test_a_corpus_of_one_split_is_held_out_at_its_end(tiny):
    trainer = built(*tiny, "--num_eval_prompts", "1000")
    words, rows = trainer.processing_class, [*trainer.train_dataset, *trainer.eval_dataset]
    text = "".join(LINES)
    assert "".join(words.decode(row["input_ids"]) for row in rows) == text[: len(text) // 16 * 16]
    assert len(trainer.eval_dataset) == len(rows) // 10


def test_two_splits_are_read_as_they_are(tiny):
    parts = {"train": ["ab cd", "ef" * 20], "test": ["z" * 40]}
    DatasetDict({name: Dataset.from_dict({"text": rows}) for name, rows in parts.items()}).save_to_disk("parts")
    trainer = built(*tiny, "--dataset_name", "parts")
    words = trainer.processing_class
    assert words.decode(trainer.train_dataset[0]["input_ids"]) == "ab cd\nefefefefef"
    assert [words.decode(ids) for ids in trainer.eval_dataset["input_ids"]] == ["z" * 16] * 2


def test_shakespeare_is_the_default_and_its_held_out_blocks_are_spread(tiny, monkeypatch):
    monkeypatch.delenv("SOFTRL_CACHE")
    place = tiny.index("--dataset_name")
    trainer = built(*tiny[:place], *tiny[place + 2 :], "--block_length_tokens", "128")
    assert parse(["--trainer", "reasoner", "--output_dir", "x"])[0].dataset_name == SHAKESPEARE_CORPUS
    assert len(trainer.train_dataset) == len(shakespeare("train")) // 128
    blocks = corpus_blocks(shakespeare("test"), trainer.processing_class, 128)["input_ids"]
    expected = [blocks[index * len(blocks) // 4] for index in range(4)]
    assert [row["input_ids"] for row in trainer.eval_dataset] == [list(row) for row in expected]


def test_blocks_are_spread_evenly():
    rows = Dataset.from_dict({"input_ids": [[i] for i in range(10)]})
    assert [row[0] for row in spread(rows, 4)["input_ids"]] == [0, 2, 5, 7]
    assert spread(rows, 10) is rows


def test_pointer_chasing_counts_its_answers_alone(tiny):
    trainer = built(*tiny, "--dataset_name", "pointer-chasing", "--num_train_prompts", "8")
    assert len(trainer.train_dataset) == 8
    assert {sum(row["completion_mask"]) for row in trainer.train_dataset} == {1}
    assert trainer.model.config.vocab_size == len(trainer.processing_class)
    trainer.train()


def test_the_seed_decides_on_the_weights(tiny):
    first, same, other = (built(*tiny, "--seed", seed).model.state_dict() for seed in ("1", "1", "2"))
    assert all(bool((first[name] == same[name]).all()) for name in first)
    assert any(bool((first[name] != other[name]).any()) for name in first)


def test_two_launched_processes_make_one_tokenizer_and_the_parameters_of_one(tiny, tmp_path):
    argv = [*tiny, "--tokenizer", "280"]
    command = [sys.executable, "-m", "softrl", "train", *argv, "--output_dir", "both"]
    done = subprocess.run(
        [*command, "--per_device_train_batch_size", "2", "--accelerate_config", "ddp_cpu"],
        capture_output=True, text=True, timeout=450, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    made = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(made) == 2  # a tokenizer, and the text's tokens
    assert main([*argv, "--output_dir", "alone"]) == 0
    alone, both = (load_file(tmp_path / folder / "model.safetensors") for folder in ("alone", "both"))
    assert alone.keys() == both.keys()
    assert max(float((alone[key] - both[key]).abs().max()) for key in alone) < 1e-5


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--dataset_name", "/nowhere.txt"], "dataset_name='/nowhere.txt' cannot be read"),
        (["--dataset_name", "prompts.jsonl"], "needs a column `text`; it has ['prompt']"),
        (["--block_length_tokens", "2000"], "has one block of block_length_tokens=2000; it needs two"),
        (["--block_length_tokens", "20000"], "text must have block_length_tokens=20000 tokens or more"),
        (["--tokenizer", "words"], "must be 'characters' or the size of a vocabulary of byte pairs"),
        (["--prompt_prefix", "x"], "prompt_prefix='x' is put before prompts, and a corpus has none"),
        (["--num_eval_prompts", "0"], "num_eval_prompts must be at least 1, got 0"),
        (["--weight_groups", "AAAA", "--reasoner_size", "16"], "make the sizes equal"),
        (["--model_name_or_path", "nothing"], "model_name_or_path='nothing' cannot be loaded"),
        (["--reward_funcs", "sentiment"], "learns from the data set alone and calls no reward_funcs"),
        (["--use_peft", "true"], "ReasonerTrainer trains a small model whole"),
    ],
)
def test_mistakes_are_named_before_a_step(tiny, tmp_path, capsys, extra, message):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert main([*tiny, *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
