"""`softrl generate` with a latent reasoner against transformers' own `generate`, and what it refuses."""

import json

import pytest
import torch
from helpers import V
from trainers.tiny import word_tokenizer

from softrl.cli import inspect
from softrl.cli.generate import main
from softrl.models.reasoner import ReasonerForCausalLM
from softrl.models.reasoner_config import ReasonerConfig
from softrl.tokens.noise import sequence_seed

pytestmark = pytest.mark.slow
PROMPTS = ["w4 w5 w6", "w9"]
GIVEN = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
TOKENIZER = word_tokenizer()


def made():
    torch.manual_seed(0)
    model = ReasonerForCausalLM(ReasonerConfig(vocab_size=V, eos_token_id=TOKENIZER.eos_token_id, pad_token_id=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # so that other thoughts lead to other tokens
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    made().save_pretrained(place)
    TOKENIZER.save_pretrained(place)
    return str(place)


def written(prompt, index, count=1, seed=0, **settings):
    """Tokens of every sample, until the end of the text."""
    ids = TOKENIZER(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    model, key = made(), sequence_seed(seed, index)
    torch.manual_seed(key)
    rows = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, seed=key, row_ids=list(range(count)),
        num_return_sequences=count, **settings,
    )[:, ids.shape[1] :].tolist()  # fmt: skip
    eos = TOKENIZER.eos_token_id
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def run(folder, *words):
    assert main(["--model", folder, "--max_new_tokens", "12", *map(str, words)]) == 0


def test_greedy_texts_are_the_same_every_time_and_alone(folder, capsys):
    outs = []
    for _ in range(2):
        run(folder, *GIVEN)
        outs.append(capsys.readouterr().out)
    rows = [written(prompt, index, do_sample=False)[0] for index, prompt in enumerate(PROMPTS)]
    shown = [f"{prompt}{TOKENIZER.decode(row, True)}" for prompt, row in zip(PROMPTS, rows, strict=True)]
    assert outs == ["".join(f"{text}\n{'-' * 8}\n" for text in shown)] * 2
    run(folder, "--prompt", PROMPTS[0], "--no_stream")
    assert capsys.readouterr().out == f"{shown[0]}\n"
    run(folder, "--prompt", PROMPTS[0], "--hard")
    assert TOKENIZER.decode(rows[0], True) in capsys.readouterr().out
    run(folder, "--prompt", PROMPTS[0], "--no_stream", "--seed", 3)
    assert capsys.readouterr().out != f"{shown[0]}\n"


def test_draws_have_transformers_settings_and_are_kept(folder, tmp_path, capsys):
    file = tmp_path / "made" / "out.jsonl"
    draws = ["--do_sample", "--temperature", 0.7, "--top_k", 6, "--top_p", 0.9]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run(folder, *GIVEN, *draws, "--num_samples", 3, "--seed", 4, "--output_file", file)
    assert torch.equal(torch.get_rng_state(), state)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 6, "top_p": 0.9}
    expected = [row for index, prompt in enumerate(PROMPTS) for row in written(prompt, index, 3, 4, **settings)]
    assert [line["tokens"] for line in lines] == expected
    assert [(line["index"], line["sample"]) for line in lines] == [(i, s) for i in range(2) for s in range(3)]
    assert {line["text"] for line in lines} == {TOKENIZER.decode(row, True) for row in expected}
    assert capsys.readouterr().out.count("-" * 8) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--relaxation", "softmax"], "--relaxation is not for"),
        (["--thinking"], "--thinking is not for"),
        (["--collapse", "all"], "--collapse is not for"),
        (["--basis_aware", "0.1"], "which thinks in latents and writes hard tokens only"),
        (["--top_k", "3"], "--top_k is of draws; give --do_sample as well"),
        (["--num_samples", "2"], "--num_samples 2 needs draws that differ"),
    ],
)
def test_what_is_not_for_it_is_refused(folder, capsys, words, message):
    assert main(["--model", folder, "--prompt", "w4", *words]) == 2
    assert message in capsys.readouterr().err


def test_texts_longer_than_a_transformer_reads_are_refused_before_any_is_written(tmp_path, capsys):
    config = ReasonerConfig(vocab_size=V, core="transformer", max_position_embeddings=10, n_thought=2, pad_token_id=2)
    ReasonerForCausalLM(config).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    given = ["--model", str(tmp_path / "model"), *GIVEN, "--output_file", str(tmp_path / "out.jsonl")]
    assert main([*given, "--max_new_tokens", "7"]) == 2
    said = capsys.readouterr()
    assert "--max_new_tokens 7 after a prompt of 3 tokens" in said.err
    assert "give at most 6" in said.err
    assert said.out == ""
    assert not (tmp_path / "out.jsonl").exists()
    assert main([*given, "--max_new_tokens", "6"]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_it_has_nothing_to_inspect(folder, capsys):
    assert inspect.main(["--model", folder, "--prompt", "w4"]) != 0
    assert "thinks in latents and makes no soft tokens" in capsys.readouterr().err
