"""`softrl inspect`: what it looks at is what was generated or recorded, and what is wrong is said."""

import json
import re
import shlex

import pytest
from helpers import llama
from trainers.tiny import word_tokenizer

from softrl.cli import generate
from softrl.cli.inspect import main

pytestmark = pytest.mark.slow
PROMPT = ("--prompt", "w4 w5 w6")
GENERATION = shlex.split("--max_new_tokens 9 --relaxation gumbel_softmax --soft_top_k 7 --max_entropy_nats 0.9")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny models and one with other tokens."""
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two", "others")):
        llama(seed).float().save_pretrained(place / name)
        word_tokenizer(vocab_size=23 if name != "others" else 21).save_pretrained(place / name)
    return place


@pytest.fixture
def shown(monkeypatch):
    """What the command would write on a page."""
    found = []
    monkeypatch.setattr("softrl.studies.inspect_page.write_page", lambda *values: found.append(values))
    return found


def run(*words):
    assert main([str(word) for word in words]) == 0


def test_what_generate_writes_is_what_inspect_shows(models, shown, tmp_path):
    record = tmp_path / "soft.jsonl"
    model = ("--model", models / "one")
    assert generate.main([str(w) for w in (*model, *PROMPT, *GENERATION, "--seed", 3, "--output_file", record)]) == 0
    run(*model, *PROMPT, *GENERATION, "--seed", 3)
    run(*model, "--record", record, "--max_entropy_nats", 0.9)
    (_, generated, hard, drawn, command), (_, recorded, nothing, _, _) = shown
    line = json.loads(record.read_text())
    assert generated.ids == recorded.ids == line["tokens"]
    assert generated.bound_nats == recorded.bound_nats == 0.9
    assert all(step.is_soft and step.fed_entropy < 0.9 + 1e-5 for step in generated.steps)
    for step, pairs in zip(generated.steps, line["kept"], strict=True):
        fed = [(part.token.id, round(part.weight, 6)) for part in step.kept if part.weight > 0.0]
        assert [pair for pair in fed if pair[1] > 0.0] == [tuple(pair) for pair in pairs if pair[1] > 0.0]
        assert all(0.0 <= part.prob <= 1.0 for part in step.kept)
    assert generated.settings == {"relaxation": "gumbel_softmax", "kept tokens": "7", "entropy bound": "0.9 nats"}
    assert nothing is None
    assert len(drawn) == 4
    assert command.startswith("softrl inspect --model ")
    assert [step.is_soft for step in hard.steps] == [False] * len(hard.steps)
    assert [step.likeliest.id for step in hard.steps] == hard.ids
    assert hard.prompt == generated.prompt == "w4 w5 w6"


def test_two_models_and_two_records(models, shown, tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    for name, path in (("one", first), ("two", second)):
        words = ("--model", models / name, *PROMPT, *GENERATION, "--output_file", path)
        assert generate.main([str(word) for word in words]) == 0
    run("--model", models / "one", *PROMPT, *GENERATION, "--compare_model", models / "two")
    run("--model", models / "one", "--record", first, "--compare_record", second, "--readings", 0)
    run("--model", models / "one", *PROMPT, *GENERATION, "--compare_record", second)
    run("--model", models / "one", *PROMPT, *GENERATION, "--no_compare")
    assert [(one.ids, other and other.ids) for _, one, other, _, _ in shown[:3]] == [
        (json.loads(first.read_text())["tokens"], json.loads(second.read_text())["tokens"])
    ] * 3
    assert [other and other.name for _, _, other, _, _ in shown] == [
        "run of two",
        "run of second",
        "run of second",
        None,
    ]
    assert [len(drawn) for _, _, _, drawn, _ in shown] == [4, 0, 4, 4]


def test_the_page_and_the_terminal(models, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    words = ("--model", models / "one", *PROMPT, *GENERATION)
    run(*words, "--output_file", page)
    assert "Where two runs part" in page.read_text(encoding="utf-8")
    assert str(page) in capsys.readouterr().out
    run(*words, "--terminal")
    out = capsys.readouterr().out
    assert re.search(r"^ +9 ", out, re.M)
    assert "Written" not in out
    assert [each.name for each in tmp_path.rglob("*.html")] == ["page.html"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model {one} --prompt w4 --max_new_tokens 0", "at least 1"),
        ("--model {one} --prompt w4 --max_new_tokens 4 --compare_model {others}", "have different tokens"),
        ("--model {one} --prompt w4 --num_samples 2", "a page is of one text"),
        ("--model {one} --prompt w4 --readings -1", "--readings must not be negative"),
        ("--model {one} --prompt ''", "the prompt is empty"),
        ("--model {one} --record {nowhere}", "No such file"),
        ("--model {one} --record {record} --index 1", "has 1 lines"),
        ("--model {one} --record {record} --compare_model {two}", "--compare_record"),
        ("--model {nowhere} --record {record}", "has no tokenizer"),
        ("--model {one} --record {empty}", "no tokens"),
    ],
)
def test_mistakes_are_named(models, tmp_path, capsys, words, message):
    record, empty = tmp_path / "record.jsonl", tmp_path / "empty.jsonl"
    record.write_text('{"tokens": [4], "kept": [[[4, 1.0]]]}\n')
    empty.write_text('{"tokens": [], "kept": []}\n')
    places = {name: models / name for name in ("one", "two", "others", "nowhere")} | {"record": record, "empty": empty}
    assert main(shlex.split(words.format(**places))) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", ["", "--prompt a --record b", "--record b --top_q 3", "--prompt a --top_q 3"])
def test_words_that_no_command_has(words):
    with pytest.raises(SystemExit):
        main(shlex.split(words))
