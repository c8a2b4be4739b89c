"""`softrl generate` writes what `soft_generate` does, from all places that prompts and settings come from."""

import io
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from generation.soft_texts import byte_model, byte_tokenizer
from helpers import EOS, gru, llama
from peft import LoraConfig, get_peft_model
from trainers.tiny import CHAT_TEMPLATE, word_tokenizer
from transformers import AutoModelForCausalLM

from softrl.cli.generate import decoding_of, main, make_parser
from softrl.contexts.basis_aware import basis_aware
from softrl.generation.next_token import NextToken
from softrl.generation.soft_arguments import decoding_from
from softrl.generation.soft_generate import soft_generate
from softrl.generation.soft_settings import Phase, SoftDecoding, save_soft_decoding
from softrl.models.policy import Policy
from softrl.tokens.relaxation import GumbelSoftmax, SoftmaxMixture
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts

pytestmark = pytest.mark.slow
PROMPTS = ["w4 w5 w6", "w9"]
GIVEN = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
IDS = Prompts(torch.tensor([[4, 5, 6], [2, 2, 9]]), torch.tensor([[True] * 3, [False, False, True]]))
TOKENIZER = word_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in float32, with its tokenizer."""
    place = tmp_path_factory.mktemp("model")
    llama().float().save_pretrained(place)
    word_tokenizer(CHAT_TEMPLATE).save_pretrained(place)
    return str(place)


def written(folder, decoding, prompts=IDS, steps=8, **settings):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return soft_generate(Policy(model), prompts, steps, decoding, eos_ids=(EOS,), pad_id=2, **settings)


def texts(record):
    return [
        TOKENIZER.decode(row[keep], skip_special_tokens=True)
        for row, keep in zip(record.tokens, record.mask, strict=True)
    ]


def run(*words):
    assert main([str(word) for word in words]) == 0


def blocks(prompts, record, per_prompt=1):
    return "".join(f"{prompts[row // per_prompt]}{text}\n{'-' * 8}\n" for row, text in enumerate(texts(record)))


def test_texts_and_the_file_of_them(folder, tmp_path, capsys):
    file = tmp_path / "made" / "out.jsonl"
    words = shlex.split("--max_new_tokens 8 --num_samples 2 --seed 4 --relaxation gumbel_softmax --soft_top_k 5")
    run("--model", folder, *GIVEN, *words, "--output_file", file)
    decoding = decoding_from({"relaxation": "gumbel_softmax", "soft_top_k": 5})
    assert isinstance(decoding.thinking.relaxation, GumbelSoftmax)
    record = written(folder, decoding, num_samples=2, seed=4)
    assert capsys.readouterr().out == blocks(PROMPTS, record, 2)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 4
    for row, line in enumerate(lines):
        real = record.mask[row]
        assert (line["prompt"], line["sample"], line["index"]) == (PROMPTS[row // 2], row % 2, row // 2)
        assert line["text"] == texts(record)[row]
        for name in ("tokens", "is_soft", "likeliest", "nearest"):
            assert line[name] == getattr(record, name)[row][real].tolist()
        for name in ("entropy", "fed_entropy", "distance"):
            assert line[name] == pytest.approx(getattr(record, name)[row][real].tolist(), abs=2e-5)
        for step, kept in enumerate(line["kept"]):
            weights = record.weights[row, step]
            assert [each[0] for each in kept] == record.ids[row, step][weights > 0].tolist()
            assert [each[1] for each in kept] == pytest.approx(weights[weights > 0].tolist(), abs=2e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_prompts_from_everywhere_and_in_any_batch(folder, tmp_path, capsys, monkeypatch, batch_size):
    words = ["--model", folder, "--max_new_tokens", 6, "--seed", 3, "--relaxation", "gumbel_softmax"]
    words += ["--batch_size", batch_size]
    run(*words, *GIVEN)
    shown = capsys.readouterr()
    assert shown.out == blocks(
        PROMPTS, written(folder, decoding_from({"relaxation": "gumbel_softmax"}), steps=6, seed=3)
    )
    assert ("prompts 1 to 1 of 2" in shown.err) == (batch_size == 1)
    (tmp_path / "prompts.txt").write_text("w4 w5 w6\n\nw9\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w4 w5 w6", "more": 1}\n{"prompt": "w9"}\n')
    for name in ("prompts.txt", "prompts.jsonl"):
        run(*words, "--prompts_file", tmp_path / name)
        assert capsys.readouterr().out == shown.out
    for more in ([], ["--prompt", "-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("w4 w5 w6\n\nw9\n"))
        run(*words, *more)
        assert capsys.readouterr().out == shown.out


def test_conversations_go_through_the_template(folder, tmp_path, capsys):
    ids = Prompts(torch.tensor([[21, 4, 5, 1, 22]]), torch.ones(1, 5, dtype=torch.bool))
    expected = texts(written(folder, decoding_from({}), ids, 5))[0]
    messages = [{"role": "user", "content": "w4 w5"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": messages}))
    words = ["--model", folder, "--max_new_tokens", 5, "--no_stream"]
    run(*words, "--prompts_file", tmp_path / "prompts.jsonl")
    assert capsys.readouterr().out == f"user: w4 w5{expected}\n"
    run(*words, "--prompt", "w4 w5", "--chat")
    assert capsys.readouterr().out == f"user: w4 w5{expected}\n"


def test_one_text_streams(folder, capsys):
    words = ["--model", folder, "--prompt", "w4 w5 w6", "--max_new_tokens", 8]
    run(*words)
    streamed = capsys.readouterr().out
    run(*words, "--no_stream")
    whole = capsys.readouterr().out
    assert streamed.split() == [
        "w4",
        "w5",
        "w6",
        *texts(written(folder, decoding_from({}), Prompts(IDS.ids[:1], IDS.mask[:1])))[0].split(),
    ]
    assert whole.startswith("w4 w5 w6")


def test_hard_tokens_are_transformers_own(folder, capsys):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = model.generate(IDS.ids, attention_mask=IDS.mask.long(), max_new_tokens=8, do_sample=False)[:, 3:]
    run("--model", folder, *GIVEN, "--max_new_tokens", 8, "--hard")
    expected = [TOKENIZER.decode(row, skip_special_tokens=True) for row in theirs]
    assert capsys.readouterr().out == "".join(f"{p}{t}\n{'-' * 8}\n" for p, t in zip(PROMPTS, expected, strict=True))
    run("--model", folder, *GIVEN, "--max_new_tokens", 8, "--hard", "--do_sample", "--temperature", 0.7, "--top_k", 6)
    drawn = SoftDecoding(Phase(None, NextToken(False, 0.7, 6)))
    assert capsys.readouterr().out == blocks(PROMPTS, written(folder, drawn))


def test_thinking_is_soft_and_the_answer_hard(folder, tmp_path, capsys):
    file = tmp_path / "out.jsonl"
    words = shlex.split(
        "--thinking --think_start w7 --think_end w8 --force_thinking --max_thinking_tokens 3 --soft_top_k 4"
    )
    run("--model", folder, *GIVEN, "--max_new_tokens", 7, *words, "--output_file", file)
    for line in map(json.loads, file.read_text().splitlines()):
        assert line["tokens"][0] == 7
        assert 8 in line["tokens"][1:5]
        assert line["is_soft"][:2] == [False, True]
        assert not any(line["is_soft"][line["tokens"].index(8, 1) :])


def test_what_lies_beside_the_model_is_the_default(folder, tmp_path, capsys):
    saved = SoftDecoding(Phase(SoftmaxMixture(Truncation(3), 2.0)), max_thinking_tokens=4)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    save_soft_decoding(saved, tmp_path)
    run("--model", tmp_path, *GIVEN, "--max_new_tokens", 8)
    assert capsys.readouterr().out == blocks(PROMPTS, written(folder, saved))
    run("--model", tmp_path, *GIVEN, "--max_new_tokens", 8, "--soft_top_k", 6)
    changed = decoding_from({"soft_top_k": 6}, saved)
    assert capsys.readouterr().out == blocks(PROMPTS, written(folder, changed))


def test_adapters(folder, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    record = soft_generate(Policy(adapted), IDS, 6, decoding_from({}), eos_ids=(EOS,))
    run("--model", tmp_path / "adapter", *GIVEN, "--max_new_tokens", 6)
    assert capsys.readouterr().out == blocks(PROMPTS, record)


def test_architectures_of_ours_in_a_process_of_their_own(tmp_path):
    """Without the hook that checks types, too."""
    model, prompts = gru().float(), Prompts(IDS.ids[:1], IDS.mask[:1])
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    record = soft_generate(Policy(model), prompts, 6, decoding_from({}), eos_ids=(EOS,))
    words = ["--model", str(tmp_path), "--prompt", PROMPTS[0], "--max_new_tokens", "6", "--no_stream"]
    done = subprocess.run(
        [sys.executable, "-m", "softrl", "generate", *words], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{PROMPTS[0]}{texts(record)[0]}\n"


def test_basis_aware_truncation(folder, capsys):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rule = basis_aware(Policy(model), 0.3, "tau", 4, max_candidates=5)
    options = ["--basis_aware", 0.3, "--basis_aware_rule", "tau", "--basis_aware_directions", 4]
    drawn = SoftDecoding(Phase(None, NextToken(support=replace(rule, max_candidates=None))))
    record = written(folder, drawn)
    run("--model", folder, *GIVEN, "--hard", "--do_sample", "--max_new_tokens", 8, *options)
    captured = capsys.readouterr()
    assert captured.out == blocks(PROMPTS, record)
    assert f"basis-aware truncation: {rule.counts}" in captured.err
    assert rule.counts.asked > 0
    assert texts(record) != texts(written(folder, SoftDecoding(Phase(None, NextToken()))))
    soft = SoftDecoding(Phase(SoftmaxMixture(Truncation(10, support=rule), 1.0, 0.5)))
    run("--model", folder, *GIVEN, "--max_new_tokens", 8, *options, "--basis_aware_candidates", 5)
    assert capsys.readouterr().out == blocks(PROMPTS, written(folder, soft))


def test_stop_strings(folder, tmp_path, capsys):
    model, tokenizer = byte_model().float(), byte_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = Prompts(tokenizer("xyz", return_tensors="pt").input_ids, torch.ones(1, 3, dtype=torch.bool))
    whole = soft_generate(Policy(model), prompts, 9, decoding_from({}))
    stop = tokenizer.decode(whole.tokens[0, 3:5])
    stopped = soft_generate(Policy(model), prompts, 9, decoding_from({}), stop=stop, tokenizer=tokenizer)
    assert stopped.mask.sum() <= 5
    run("--model", tmp_path, "--prompt", "xyz", "--max_new_tokens", 9, "--stop", stop, "--no_stream")
    text = tokenizer.decode(stopped.tokens[0, : int(stopped.mask.sum())])
    assert capsys.readouterr().out == f"xyz{text}\n"
    assert main(["--model", folder, *GIVEN, "--max_new_tokens", "9", "--stop", "w4"]) == 2
    assert "cannot find strings among the tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top_k", "3"], "--top_k is of draws of hard tokens; give --do_sample"),
        (["--hard", "--soft_top_k", "3"], "--hard makes no soft tokens; leave out --soft_top_k"),
        (["--hard", "--thinking"], "leave out --thinking"),
        (["--hard", "--temperature", "0.5"], "--temperature is of draws"),
        (["--soft_top_k", "99"], "K=99 kept tokens a step"),
        (["--relaxation", "max"], "relaxation must be one of"),
        (["--norm_correction", "l3"], "norm_correction must be one of"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--max_new_tokens", "0"], "at least 1"),
        (["--prompts_file", "x"], "--prompt and --prompts_file are given"),
        (["--model", "/nowhere"], "nowhere"),
        (["--max_entropy_nats", "7"], "max_entropy_nats must lie in (0, log K)"),
        (["--soft_top_k", "many"], "invalid int value"),
        (["--basis_aware", "2", "--basis_aware_directions", "4"], "epsilon must lie in (0, 1), got 2.0"),
        (["--basis_aware", "0.1", "--soft_min_p", "0.1"], "in the place of --soft_min_p; leave one of them out"),
        (["--basis_aware", "0.1", "--hard"], "with --hard give --do_sample"),
        (
            ["--basis_aware", "0.1", "--basis_aware_directions", "4", "--temperature", "0.7"],
            "the sampling temperature is 0.7",
        ),
        (["--basis_aware", "0.1", "--basis_aware_directions", "99"], "num_directions must lie between 1 and"),
        (["--basis_aware_rule", "tau"], "give --basis_aware EPSILON as well"),
    ],
)
def test_mistakes_are_said_and_end_with_two(folder, capsys, words, message):
    try:
        status = main(["--model", folder, "--prompt", "w4", *words])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_files_that_hold_no_prompts(folder, tmp_path, capsys, monkeypatch):
    file = tmp_path / "prompts.jsonl"
    for text, message in (("", "there is no prompt"), ("{", "line 1: not JSON"), ('{"text": 1}', "with a `prompt`")):
        file.write_text(text)
        assert main(["--model", folder, "--prompts_file", str(file)]) == 2
        assert message in capsys.readouterr().err
    file.write_text('{"prompt": 3}')
    assert main(["--model", folder, "--prompts_file", str(file)]) == 2
    assert "a prompt is text or a list of messages" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["--model", folder]) == 2
    assert "there is no prompt" in capsys.readouterr().err


def test_help_needs_no_torch_and_names_every_setting():
    from softrl.generation.soft_arguments import HARD_ARGUMENTS, SOFT_ARGUMENTS

    code = "import sys; from softrl.cli.generate import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 119
    for name in (*SOFT_ARGUMENTS, *HARD_ARGUMENTS):
        assert f"--{name}" in done.stdout


def test_forcing_the_thinking_needs_no_other_option(tmp_path):
    tokenizer = byte_tokenizer()
    given = make_parser().parse_args(["--model", str(tmp_path), "--prompt", "x", "--force_thinking"])
    decoding = decoding_of(given, len(tokenizer), tokenizer)
    assert decoding.force_thinking
    assert tokenizer.decode(decoding.think_start) == "<think>"
    save_soft_decoding(replace(decoding, think_start=(7,), think_end=(8,)), tmp_path)
    assert decoding_of(given, len(tokenizer), tokenizer).think_start == (7,)  # the model's own delimiters stay
