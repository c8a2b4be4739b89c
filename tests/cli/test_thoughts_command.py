"""`softrl thoughts generate`: saved models think again in another process, and what is wrong is said."""

import os
import shlex
import subprocess
import sys

import pytest
import torch
from generation.thinkers import thinker
from helpers import EOS, gru, llama
from peft import LoraConfig, get_peft_model
from trainers.tiny import word_tokenizer

from softrl.cli.thoughts import main
from softrl.generation.next_token import NextToken
from softrl.generation.record import as_text
from softrl.generation.thoughts import Thinking, generate_with_thoughts
from softrl.types import Prompts

PROMPTS = ["w4 w5 w6", "w9"]
GIVEN = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
IDS = Prompts(torch.tensor([[4, 5, 6], [2, 2, 9]]), torch.tensor([[True] * 3, [False, False, True]]))


def saved(folder, kind="llama"):
    """A model that thinks, in float32, in a folder with its tokenizer."""
    lm = gru().float() if kind == "gru" else llama().float()
    if kind == "lora":
        lm.save_pretrained(folder.parent / "base")
        lm = type(lm).from_pretrained(folder.parent / "base")
        lm = get_peft_model(lm, LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian"))
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    model = thinker(lm=lm, mixing="log_probs")
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gru", "lora"])
def test_a_saved_model_thinks_the_same_in_another_process(tmp_path, kind):
    model = saved(tmp_path / "model", kind)
    thinking, draws = Thinking(every=2), NextToken(temperature=0.9, top_k=9)
    record = generate_with_thoughts(model, IDS, 8, thinking, draws, num_samples=2, eos_ids=(EOS,), seed=4)
    words = shlex.split("--max_new_tokens 8 --num_samples 2 --seed 4 --think_every 2 --temperature 0.9 --top_k 9")
    command = [sys.executable, "-m", "softrl", "thoughts", "generate", "--model", str(tmp_path / "model"), *GIVEN]
    done = subprocess.run(
        [*command, *words, "--show_thoughts"], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == as_text(record, word_tokenizer(), show=True)
    assert "<|thought|>" in done.stdout
    assert len(set(done.stdout.splitlines())) > 2


@pytest.mark.slow
def test_every_way_to_think(tmp_path, capsys):
    model, folder = saved(tmp_path / "model"), str(tmp_path / "model")
    found = {}
    for words in (
        "", "--think_steps", "--think_steps 0 2", "--think_above 2.2", "--n_thought 0", "--thoughts pause", "--soft",
        "--soft --relaxation softmax --soft_top_k 5", "--attention naive",
    ):  # fmt: skip
        assert main(["generate", "--model", folder, *GIVEN, "--greedy", "--show_thoughts", *shlex.split(words)]) == 0
        found[words] = capsys.readouterr().out
    record = generate_with_thoughts(model, IDS, 32, next_token=NextToken(greedy=True), eos_ids=(EOS,))
    assert found[""].splitlines() == as_text(record, word_tokenizer(), show=True)
    assert found["--attention naive"] == found[""]
    assert "<|thought|>" not in found["--think_steps"]
    assert [line.count("<|thought|>") for line in found["--think_steps 0 2"].splitlines()] == [2, 2]
    assert "<|thought|> </thought|>" in found["--n_thought 0"]
    assert "… … …" in found["--thoughts pause"]
    assert len(set(found.values())) == len(found) - 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model {empty} --prompt w4", "holds no model that thinks"),
        ("--model {nowhere} --prompt w4", "holds no model that thinks"),
        ("--model {model} --prompt w4 --max_new_tokens 0", "at least 1"),
        ("--model {model} --prompt w4 --max_new_tokens 80", "exceed the model's context"),
        ("--model {model} --prompt w4 --think_every 0", "every must be at least 1"),
        ("--model {model} --prompt w4 --soft --relaxation none", "relaxation must be one of"),
        ("--model {model} --prompt w4 --soft --thoughts pause", "has no soft thoughts"),
        ("--model {model} --prompt w4 --top_p 0", "top_p must lie in"),
        ("--model {model} --prompt ''", "the prompt is empty"),
        ("--model {model} --prompt w4 --num_samples 0", "num_samples must be at least 1"),
        ("--model {broken} --prompt w4", "thinking.safetensors"),
        ("--model {untokenised} --prompt w4", "holds no tokenizer"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_named(tmp_path, capsys, words, message):
    saved(tmp_path / "model")
    folders = {name: tmp_path / name for name in ("empty", "nowhere", "model", "broken", "untokenised")}
    folders["empty"].mkdir()
    for name in ("broken", "untokenised"):
        subprocess.run(["cp", "-r", str(folders["model"]), str(folders[name])], check=True)
    (folders["broken"] / "thinking.safetensors").write_bytes(b"nothing")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folders["untokenised"] / name).unlink()
    assert main(["generate", *shlex.split(words.format(**folders))]) == 2
    assert message in capsys.readouterr().err
