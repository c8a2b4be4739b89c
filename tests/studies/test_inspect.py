"""What `softrl inspect` shows: tokens as people can see them, a record's steps, where runs part, page and table."""

import json
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from studies.inspected import BOUND_NATS, PIECES, byte_tokenizer, record_of
from tokenizers import Tokenizer, decoders, models
from trainers.tiny import word_tokenizer
from transformers import PreTrainedTokenizerFast

from softrl.studies.inspect_page import choices, percent, plots, step_labels, summary, write_page
from softrl.studies.inspect_run import line_of, parting, read_lines, readings, run_of
from softrl.studies.inspect_terminal import show
from softrl.studies.inspect_text import TokenTexts, visible


@pytest.fixture(scope="module")
def texts():
    return TokenTexts(byte_tokenizer())


@pytest.fixture(scope="module")
def record():
    return record_of(hard_from=18, eos_ids=())


@pytest.fixture(scope="module")
def run(record, texts):
    return run_of(
        line_of(record, 0, "the cat <b>sat</b> {{7*7}}"), texts, "soft run", BOUND_NATS, {"kept tokens": "6"}
    )


@pytest.fixture(scope="module")
def other(record, texts):
    return run_of(line_of(record, 1, "the cat <b>sat</b> {{7*7}}"), texts, "hard decode")


def test_a_tokenizer_of_bytes_loses_nothing(texts):
    expected = {
        4: "␣the", 5: "↵", 6: "␣", 7: "\\xF0\\x9F", 8: "\\x98\\x80", 9: "␣国", 13: "⇥", 14: "⟨U+200B⟩", 15: "◌́",
        21: "â", 3: "<script>alert(1)</script>", 1: "<eos>", 99: "⟨id 99⟩",
    }  # fmt: skip
    assert {token: texts.label(token) for token in expected} == expected
    assert [texts.is_special(token) for token in (0, 1, 2, 3)] == [True, True, True, False]


def test_a_character_of_several_tokens_stands_at_its_last(texts):
    assert texts.texts([4, 7, 8, 6, 5, 16]) == [" the", "\\xF0\\x9F", "😀", " ", "↵\n", " cat"]
    assert texts.texts([7, 4]) == ["\\xF0\\x9F", " the"]  # the second half never comes
    assert texts.texts([8, 99]) == ["\\x98\\x80", "⟨id 99⟩"]


def test_texts_of_a_real_vocabulary_are_what_decoding_gives(texts):
    ids = torch.randint(3, 23, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [token for token in ids if token not in (5, 7, 8, 13, 14, 15)]  # those that are shown as something else
    assert "".join(texts.texts(ids)) == byte_tokenizer().decode(ids, clean_up_tokenization_spaces=False)


def test_words_and_pieces():
    words = TokenTexts(word_tokenizer())
    assert "".join(words.texts([4, 5, 1])) == word_tokenizer().decode([4, 5, 1])
    assert (words.label(4), words.label(77)) == ("w4", "⟨id 77⟩")
    backend = Tokenizer(models.WordLevel({"▁a": 0, "b▁c": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4}, unk_token="▁a"))
    backend.decoder = decoders.Metaspace()
    pieces = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert [pieces.label(token) for token in range(3)] == ["␣a", "b␣c", "\\xE2"]
    assert pieces.texts([0, 2, 3, 4, 1]) == [" a", "\\xE2", "\\x82", "€", "b c"]


def test_nothing_is_invisible():
    hidden = "\x00\x1b[31m\u202eevil\u2066\u00a0\u3000\ufeff\ue000\udcff"
    assert visible(hidden) == "⟨U+0000⟩⟨U+001B⟩[31m⟨U+202E⟩evil⟨U+2066⟩⟨U+00A0⟩⟨U+3000⟩⟨U+FEFF⟩⟨U+E000⟩\\xFF"
    assert visible("a\n\tb", inline=True) == "a↵\n⇥\tb"
    assert visible("") == ""


def test_a_run_has_the_numbers_of_its_record(record, run):
    live = record.mask[0]
    assert len(run.steps) == live.sum()
    assert [step.number for step in run.steps] == list(range(1, len(run.steps) + 1))
    for at, step in enumerate(run.steps):
        fed = {part.token.id: part.weight for part in step.kept}
        assert step.token.id == record.tokens[0, at] == max(fed, key=fed.get)
        assert fed == dict(zip(record.ids[0, at].tolist(), record.weights[0, at].tolist(), strict=True))
        assert step.is_soft == (at < 18)
        entropy = -sum(w * math.log(w) for w in fed.values() if w)
        assert step.fed_entropy == pytest.approx(entropy, abs=1e-9)
        assert step.fed_entropy <= BOUND_NATS + 1e-6
        assert (step.nearest.id, step.distance) == (record.nearest[0, at], record.distance[0, at])
        assert (step.likeliest.id, step.entropy) == (record.likeliest[0, at], record.entropy[0, at])


def test_what_stands_behind_the_end_is_left_out(texts):
    record = record_of(eos_ids=(1, 5, 6, 16))
    assert not record.mask.all(), "no text ends early: choose another seed"
    lengths = [len(run_of(line_of(record, row, ""), texts, "").steps) for row in (0, 1)]
    assert lengths == record.mask.sum(1).tolist()


def test_shown_parts_and_what_they_leave(run):
    step = run.steps[0]
    assert [part.weight for part in step.shown(99)] == sorted((p.weight for p in step.kept), reverse=True)
    for at_most in range(1, 7):
        shown, (count, weight) = step.shown(at_most), step.rest(at_most)
        assert len(shown) + count == len([part for part in step.kept if part.weight > 0.0])
        assert sum(part.weight for part in shown) + weight == pytest.approx(1.0)
    hard = run.steps[20]
    assert [part.weight for part in hard.shown(3)][:1] == [1.0]
    assert all(part.weight == 0.0 and part.prob >= 0.01 for part in hard.shown(9)[1:])


def test_a_file_of_pairs_and_one_of_lists_give_the_same_run(tmp_path, record, texts, run):
    line = line_of(record, 0, run.prompt)
    pairs = {key: value for key, value in line.items() if key not in ("ids", "weights", "probs")}
    pairs["kept"] = [
        [[i, w] for i, w in zip(ids, weights, strict=True) if w > 0.0]
        for ids, weights in zip(line["ids"], line["weights"], strict=True)
    ]
    few = {key: line[key] for key in ("tokens", "ids", "weights")} | {"entropy": None, "sample": 3}
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, [line, pairs, few])) + "\n\n")
    whole, paired, bare = (run_of(each, texts, "soft run", BOUND_NATS, run.settings) for each in read_lines(path))
    assert whole == run
    without_probs = [
        replace(step, kept=tuple(replace(part, prob=None) for part in step.kept if part.weight > 0.0))
        for step in run.steps
    ]
    assert paired.steps == tuple(without_probs)
    assert bare.ids == run.ids
    assert [step.is_soft for step in bare.steps] == [step.is_soft for step in run.steps]
    assert [step.fed_entropy for step in bare.steps] == pytest.approx([step.fed_entropy for step in run.steps])
    assert all(step.entropy is step.nearest is step.likeliest is step.distance is None for step in bare.steps)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1"),
        ("[1]", "a JSON list and no object"),
        ('{"tokens": [1]}', "no list under 'ids'"),
        ('{"tokens": [1, 2], "ids": [[1]], "weights": [[1]]}', "'ids' must be a list of 2 entries"),
        ('{"tokens": [1], "ids": [[1, 2]], "weights": [[1]]}', "'weights' of step 1 has 1 entries for 2 kept ids"),
        ('{"tokens": [1], "kept": [[[1, 1.0]]], "entropy": [1, 2]}', "'entropy' must be a list of 1 entries"),
        ('{"tokens": [1], "kept": [3]}', "softrl generate --output_file"),
        ("", "is empty"),
    ],
)
def test_a_file_that_is_no_record_is_named(tmp_path, line, message):
    path = tmp_path / "wrong.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_lines(path)


def test_conversations_and_prompts_are_shown_whole(texts, record):
    line = line_of(record, 0, [{"role": "user", "content": "a\nb\u200b"}])
    assert run_of(line, texts, "").prompt == "user: a↵\nb⟨U+200B⟩"


def test_where_runs_part():
    assert parting([1, 2, 3], [1, 2, 3]).first is None
    assert parting([1, 2], [1, 2, 3]).first == 2
    assert parting([], [3]).same == ((), (False,))
    split = parting([1, 2, 9, 4, 5, 6], [1, 2, 4, 5, 7])
    assert split.first == 2
    assert split.same == ((True, True, False, True, True, False), (True, True, True, True, False))


def test_alignment_is_a_common_subsequence():
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        one, two = (torch.randint(5, (30,), generator=generator).tolist() for _ in range(2))
        split = parting(one, two)
        kept = [[token for token, same in zip(ids, marks, strict=True) if same] for ids, marks in
                zip((one, two), split.same, strict=True)]  # fmt: skip
        assert kept[0] == kept[1]
        assert one[: split.first] == two[: split.first]
        assert one[split.first] != two[split.first]


def test_readings_draw_tokens_by_their_weights(run, texts):
    count = 4000
    drawn = readings(run, texts, count, seed=1)
    assert drawn == readings(run, texts, count, seed=1)
    assert drawn[:4] == readings(run, texts, 4, seed=1)
    assert drawn[:4] != readings(run, texts, 4, seed=2)
    scores = []
    for at, step in enumerate(run.steps):
        counts = Counter(reading.tokens[at].id for reading in drawn)
        assert set(counts) <= {part.token.id for part in step.kept if part.weight > 0.0}
        for part in step.kept:
            if 0.0 < part.weight < 1.0:
                error = math.sqrt(part.weight * (1 - part.weight) / count)
                scores.append(abs(counts[part.token.id] / count - part.weight) / error)
    assert max(scores) < 4.5  # a hundred scores, fixed seed; by chance once in 1,500
    assert drawn[0].texts == tuple(texts.texts([token.id for token in drawn[0].tokens]))


@pytest.fixture(scope="module")
def page(run, other, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "new" / "inspect.html"
    write_page(path, run, other, readings(run, texts, 3, 0), "softrl inspect --prompt '<b>'")
    assert [each.name for each in path.parent.iterdir()] == ["inspect.html"]
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_else_and_escapes_everything(page):
    assert page.count("<script>") == 1  # its own
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "the cat &lt;b&gt;sat&lt;/b&gt; {{7*7}}" in page
    assert "--prompt &#39;&lt;b&gt;&#39;" in page
    assert "{{7*7}}" in page
    assert all(each.startswith("#s") for each in re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page))
    assert not re.search(r"@import|url\(|https?:", page)
    assert "default-src 'none'" in page
    assert not any(each in page for each in "\u200b\u202e\x00")


def test_the_page_shows_every_step(page, run):
    for step in run.steps:
        assert f'<div id="s{step.number}">' in page
        assert page.count(f'href="#s{step.number}"') == 2  # in the text, and where runs part
    assert page.count("This step was hard") == 6
    for words in ("Model entropy", "Entropy fed", "Nearest token", "Likeliest token", "Drawn from it"):
        assert page.count(words) == len(run.steps)


def test_a_page_of_little(tmp_path, texts):
    line = {"tokens": [4], "ids": [[4]], "weights": [[1.0]]}
    write_page(tmp_path / "one.html", run_of(line, texts, "run"))
    page = (tmp_path / "one.html").read_text()
    assert "Where two runs part" not in page
    assert "Model entropy" not in page
    assert page.count("<figure") == 1


def test_summary_counts(run, other):
    words = " ".join(summary(run, other, parting(run.ids, other.ids)))
    assert "24 tokens were generated, 18 of them soft and 6 hard." in words
    same = sum(step.likeliest.id == step.token.id for step in run.steps[:18])
    assert f"in {same} of 18 soft steps" in words
    first = next(at for at, pair in enumerate(zip(run.ids, other.ids, strict=True)) if pair[0] != pair[1])
    assert f"they part at step {first + 1}." in words
    assert "to the end" in " ".join(summary(run, run, parting(run.ids, run.ids)))


def test_curves_stand_where_the_numbers_are(run):
    entropy, distance = plots(run)
    top = max(float(label) for _, label in entropy.ticks)
    for curve, values in zip(
        entropy.curves, ([s.entropy for s in run.steps], [s.fed_entropy for s in run.steps]), strict=True
    ):
        points = [tuple(map(float, point.split(","))) for point in curve.segments[0].split()]
        assert [x for x, _ in points] == [at + 0.5 for at in range(24)]
        assert [y for _, y in points] == pytest.approx([100 - 100 * value / top for value in values], abs=0.01)
    assert entropy.bound[0] == pytest.approx(100 - 100 * BOUND_NATS / top)
    assert all(0 <= y <= 100 for y, _ in entropy.ticks)
    assert distance.bound is None
    gap = replace(run, steps=tuple(replace(s, entropy=None if s.number == 3 else s.entropy) for s in run.steps))
    assert len(plots(gap)[0].curves[0].segments) == 2


def test_numbers_for_people():
    assert [percent(x) for x in (None, 0.0, 1e-5, 0.004, 0.0994, 0.0996, 0.5, 1.0)] == [
        "–", "0%", "<0.1%", "0.4%", "9.9%", "10%", "50%", "100%",  # noqa: RUF001
    ]  # fmt: skip
    assert [choices(x) for x in (0.0, math.log(3), math.log(1234))] == ["1.0", "3.0", "1,234"]
    assert step_labels(7) == [1, 2, 3, 4, 5, 6, 7]
    assert step_labels(48) == [1, 5, 10, 15, 20, 25, 30, 35, 40, 45]


def test_the_terminal_shows_every_step_and_no_markup(run, other, texts):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(console, run, other, readings(run, texts, 2, 0))
    words = console.export_text()
    assert "<script>alert(1)</script>" in words
    for step in run.steps:
        assert re.search(rf"^ *{step.number} ", words, re.M)
    assert "they part at step" in words
    assert "Hard decode:" in words
    assert len(PIECES) == 23
