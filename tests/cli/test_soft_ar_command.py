"""`softrl train --trainer soft_ar` from a text alone: the run, its evaluation, writing on, and a reward after it."""

import json
import re

import pytest
import torch
from helpers import llama
from peft import PromptTuningConfig, get_peft_model
from trainers.tiny import word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from softrl.cli import evaluate, generate
from softrl.cli.scratch import _soft_ar as from_scratch
from softrl.cli.train import main, parse
from softrl.contexts.collapse import selective
from softrl.contexts.soft_ar import SoftARForCausalLM
from softrl.contexts.window import WindowLayout
from softrl.data.characters import character_tokenizer, shakespeare
from softrl.generation.soft_ar import SoftWriting, learned, soft_ar_generate
from softrl.trainers.soft_ar_trainer import soft_ar_model
from softrl.types import Prompts

pytestmark = pytest.mark.slow  # imports trl

LINES = [
    f"The {'king' if i % 3 else 'queen'} of {'France' if i % 2 else 'Spain'} has {i % 7} ships." for i in range(90)
]


def arguments(**settings):
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


QUICK = {
    "report_to": "none", "logging_steps": 1, "use_cpu": "true", "disable_tqdm": "true", "save_strategy": "no",
    "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Arguments of a run on a text, in a folder of its own."""
    (tmp_path / "corpus.txt").write_text("\n".join(LINES))
    monkeypatch.chdir(tmp_path)
    return arguments(
        trainer="soft_ar", dataset_name="corpus.txt", num_eval_prompts=3, block_length_tokens=48, hidden_size=16,
        num_layers=1, num_heads=2, num_segments=1, segment_tokens=6, num_hard=8, num_soft=4, soft_share=0.5,
        collapse_head_weight=1.0,
        per_device_train_batch_size=4, max_steps=4, output_dir="run", **QUICK,
    )  # fmt: skip


@pytest.mark.parametrize(
    "extra", [[], ["--output", "embedding", "--core", "gru", "--tokenizer", "300", "--block_length_tokens", "20"]]
)
def test_from_a_text_to_a_rewarded_policy(tiny, capsys, extra):
    assert main([*tiny, *extra]) == 0
    out = capsys.readouterr().out
    assert "Model saved to run." in out
    model, tokenizer = AutoModelForCausalLM.from_pretrained("run"), AutoTokenizer.from_pretrained("run")
    assert type(model) is SoftARForCausalLM
    assert model.model.layout.stride == 4
    assert model.config.vocab_size == len(tokenizer)
    assert evaluate.main([*tiny, *extra]) == 0
    out = capsys.readouterr().out
    assert "3 held-out texts, nats a token" in out
    for row in ("nll_beyond", "nll_truncated_beyond", "nll_permuted_beyond", "nll_soft_beyond"):
        assert row in out
    # Past the window of twelve, by all that softrl can do with a model: hard and soft.
    for way in (["--hard"], ["--relaxation", "softmax", "--max_entropy_nats", "0.5"]):
        command = ["--model", "run", "--prompt", LINES[1], "--max_new_tokens", "30", "--no_stream"]
        assert generate.main([*command, *way, "--output_file", "texts.jsonl"]) == 0
        with open("texts.jsonl") as file:
            assert len(json.loads(file.read())["kept"]) == 30
    capsys.readouterr()
    ids = tokenizer(LINES[1], return_tensors="pt").input_ids
    prompt = Prompts(ids, torch.ones_like(ids).bool())
    for collapse, writing in (
        ("all", SoftWriting()),
        ("distance:0.01", SoftWriting(which=selective("distance", 0.01))),
        ("learned", SoftWriting(learned(model.collapse_head))),
    ):
        assert generate.main([*command, "--collapse", collapse]) == 0
        text = soft_ar_generate(model.eval(), prompt, 30, soft=writing, eos_ids=(tokenizer.eos_token_id,))
        expected = tokenizer.decode(text.tokens[0][text.mask[0]], skip_special_tokens=True)
        assert capsys.readouterr().out == f"{LINES[1]}{expected}\n"
    rewarded = arguments(
        trainer="soft_rollout", model_name_or_path="run", dataset_name="prompts.txt", judge="none",
        reward_funcs="cli.test_soft_ar_command.vowels", num_train_prompts=8, num_eval_prompts=2, max_steps=2,
        max_completion_length=6, per_device_train_batch_size=4, output_dir="rewarded", top_k=8, **QUICK,
    )  # fmt: skip
    with open("prompts.txt", "w") as file:
        file.write("\n".join(LINES[:10]))
    assert main(rewarded) == 0
    assert "Model saved to rewarded." in capsys.readouterr().out
    assert type(AutoModelForCausalLM.from_pretrained("rewarded")) is SoftARForCausalLM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--collapse", "some"], "or entropy:LEAST with a number, 0 or more, got 'some'"),
        (["--collapse", "distance:near"], "got 'distance:near'"),
        (["--collapse", "all", "--hard"], "own soft outputs and no record of them; leave out --hard"),
        (["--collapse", "all", "--thinking"], "leave out --thinking"),
        (["--collapse", "all", "--soft_temperature", "0.5"], "leave out --soft_temperature"),
        (["--collapse", "all", "--max_entropy_nats", "0"], "leave out --max_entropy_nats"),
        (["--collapse", "all", "--temperature", "0.5"], "--temperature is of draws; give --do_sample as well"),
        (["--collapse", "all", "--basis_aware", "0.01"], "with --collapse give --do_sample as well"),
        (["--collapse", "all", "--num_samples", "0"], "--num_samples must be at least 1, got 0"),
        (["--collapse", "all", "--num_samples", "-1", "--do_sample"], "--num_samples must be at least 1, got -1"),
        (["--collapse", "all", "--num_samples", "2"], "--num_samples 2 would be copies of one text"),
        (["--collapse", "all", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
        (["--collapse", "all"], "needs a window that moves on, and plain has none"),
    ],
)
def test_collapse_is_of_softar_models(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    llama().float().save_pretrained("plain")
    word_tokenizer().save_pretrained("plain")
    assert generate.main(["--model", "plain", "--prompt", "w3 w4", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_has_the_size_of_nanogpt_and_the_window_of_the_notes():
    _, training, _ = parse(["--config", "soft_ar/nanogpt"])
    assert training.layout == WindowLayout.notes(256)
    tokenizer = character_tokenizer(shakespeare("train"))
    model = soft_ar_model(from_scratch(training, tokenizer), training)
    # Its own, with the same characters, is said to have 10.65M; here place types come on top.
    assert model.num_parameters() == pytest.approx(10.65e6, rel=0.01)


def test_a_window_without_what_a_collapse_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for layout, options, message in (
        (WindowLayout(1, 3, 4, 0), "all", "--collapse writes soft tokens, and the window of run has num_soft=0"),
        (WindowLayout(1, 3, 3, 2), "learned", "--collapse learned needs a model with a head for it"),
    ):
        SoftARForCausalLM.from_backbone(llama().float(), layout).save_pretrained("run")
        word_tokenizer().save_pretrained("run")
        assert generate.main(["--model", "run", "--prompt", "w3 w4", "--collapse", options]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A model with more hard places than the prompts have tokens, saved as run."""
    monkeypatch.chdir(tmp_path)
    SoftARForCausalLM.from_backbone(llama().float(), WindowLayout(1, 3, 6, 2)).save_pretrained("run")
    word_tokenizer().save_pretrained("run")
    return ["--model", "run", "--collapse", "all", "--max_new_tokens", "5"]


def test_draws_do_not_depend_on_the_batch(saved, capsys):
    command = [*saved, "--prompt", "w3 w4", "--prompt", "w3 w4", "--do_sample", "--temperature", "3"]
    assert generate.main(command) == 0
    together = capsys.readouterr().out
    assert generate.main([*command, "--batch_size", "1"]) == 0
    assert capsys.readouterr().out == together
    texts = [line for line in together.splitlines() if line]
    assert texts[0] != texts[-1]  # two prompts of the same words have draws of their own


def test_it_is_said_where_nothing_is_drawn(saved, capsys):
    long = "w3 w4 w5 w6 w7 w8"
    command = [
        *saved,
        "--prompt",
        "w3 w4",
        "--prompt",
        long,
        "--do_sample",
        "--temperature",
        "3",
        "--num_samples",
        "2",
    ]
    assert generate.main(command) == 0
    out, err = capsys.readouterr()
    assert "--do_sample does nothing for prompt 2: soft tokens are not drawn, and behind a prompt of 6 tokens" in err
    assert generate.main([*saved, "--prompt", "w3 w4", "--prompt", long]) == 0
    assert "--do_sample does nothing" not in capsys.readouterr().err
    first, second, third, fourth = (line for line in out.splitlines() if line.startswith("w3"))
    assert first != second
    assert third == fourth


def test_virtual_tokens_are_read(saved, capsys):
    """Collapsing where nothing is soft is the model's own greedy writing, behind the virtual tokens."""
    sizes = {"num_virtual_tokens": 1, "num_layers": 2, "token_dim": 16, "num_attention_heads": 4}
    model = SoftARForCausalLM.from_pretrained("run")
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", **sizes))
    tuned.prompt_encoder["default"].embedding.weight.data.normal_(0.0, 3.0, generator=torch.manual_seed(0))
    tuned.save_pretrained("tuned")
    said = []
    for name in ("tuned", "run"):
        for way in (["--collapse", "all"], ["--hard", "--no_stream"]):
            assert generate.main(["--model", name, "--prompt", "w3 w4", "--max_new_tokens", "3", *way]) == 0
            said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2] == said[3]


def vowels(tokens):
    """A differentiable reward of soft tokens: how often ids are even."""
    return ((tokens.weights * (tokens.ids % 2 == 0)).sum(-1) * tokens.survival).sum(-1)


def test_what_does_not_go_is_said(tiny, capsys):
    assert main([*tiny, "--use_peft", "true"]) == 2
    assert "trains a model whole" in capsys.readouterr().err
    assert main([*tiny, "--block_length_tokens", "8"]) == 2
    assert "window has 14 places, and the language model max_position_embeddings=8" in capsys.readouterr().err
    assert main([*tiny, "--reward_funcs", "sentiment"]) == 2
    assert re.search("learns from the data set alone and calls no reward_funcs", capsys.readouterr().err)
