"""What is saved beside a model comes back, what is wrong in it is said, and single settings take others' places."""

import json
from dataclasses import replace

import pytest
import torch
from generation.soft_texts import byte_tokenizer

from softrl.generation.next_token import NextToken
from softrl.generation.soft_arguments import decoding_from
from softrl.generation.soft_settings import (
    DEFAULT_DECODING,
    FILE_NAME,
    Phase,
    SoftDecoding,
    as_mapping,
    load_soft_decoding,
    save_soft_decoding,
)
from softrl.tokens.relaxation import GumbelRao, GumbelSoftmax, SoftmaxMixture
from softrl.tokens.truncation import Truncation

SOFT = SoftmaxMixture(Truncation(9, 0.9, 0.01), max_entropy_nats=0.8)
ALL = [
    DEFAULT_DECODING,
    SoftDecoding(Phase(None, NextToken(greedy=True))),
    SoftDecoding(
        Phase(SOFT, NextToken(temperature=0.6)), Phase(None, NextToken(False, 0.7, 20, 0.95, 0.05)), (3, 4), (5,),
        force_thinking=True, cold_stop_nats=0.05, cold_stop_steps=7, max_thinking_tokens=100, norm_correction="match",
    ),
    SoftDecoding(Phase(GumbelRao(Truncation(5), 0.5, num_draws=3)), Phase(GumbelSoftmax(Truncation(4), 2.0))),
]  # fmt: skip


@pytest.mark.parametrize("decoding", ALL)
def test_settings_come_back(tmp_path, decoding):
    path = save_soft_decoding(decoding, tmp_path / "made" / "here")
    assert path == tmp_path / "made" / "here" / "soft_decoding.json"
    assert load_soft_decoding(path.parent) == decoding
    assert json.loads(path.read_text()) == json.loads(json.dumps(as_mapping(decoding)))


def test_a_folder_without_the_file():
    assert load_soft_decoding("/nowhere") is None


def test_tensors_are_refused_and_the_old_file_stays(tmp_path):
    save_soft_decoding(ALL[2], tmp_path)
    learned = replace(SOFT)
    object.__setattr__(learned, "max_entropy_nats", torch.tensor(0.5, requires_grad=True).exp())
    broken = replace(ALL[2])
    object.__setattr__(broken, "thinking", replace(ALL[2].thinking))
    object.__setattr__(broken.thinking, "relaxation", learned)
    with pytest.raises(ValueError, match=r"more than plain numbers .*freeze learned ones first"):
        save_soft_decoding(broken, tmp_path)
    assert load_soft_decoding(tmp_path) == ALL[2]
    assert [each.name for each in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("top", 3, r"soft_decoding.json: unknown settings \['top'\]; this version knows"),
        ("thinking.relaxation.kept", 3, r"thinking.relaxation: unknown settings \['kept'\]"),
        ("thinking.relaxation.name", "max", r"thinking.relaxation.name: expected one of .*'softmax'.*, got 'max'"),
        ("thinking.relaxation.truncation.top_k", "64", r"truncation.top_k: expected int, got '64'"),
        ("thinking.relaxation.truncation.top_k", 0, r"truncation: top_k must be at least 1, got 0"),
        ("thinking.relaxation.truncation.top_k", 2.5, r"truncation.top_k: expected int, got 2.5"),
        ("thinking.relaxation.truncation.top_p", True, r"truncation.top_p: expected float, got True"),
        ("thinking.relaxation.max_entropy_nats", 9.0, r"max_entropy_nats must lie in \(0, log K\)"),
        ("thinking.relaxation", 5, r"thinking.relaxation: expected a mapping of settings, got 5"),
        ("thinking.next_token.temperature", 0.0, r"next_token: temperature must be positive, got 0.0"),
        ("answer.next_token.greedy", 1, r"answer.next_token.greedy: expected bool, got 1"),
        ("think_end", [], r"soft_decoding.json: think_start=\(3, 4\) and think_end=\(\)"),
        ("think_end", ["</think>"], r"think_end: expected int, got '</think>'"),
        ("norm_correction", "l3", r"norm_correction: expected \('none', 'inverse_l2', 'match'\), got 'l3'"),
        ("cold_stop_steps", None, r"cold_stop_steps: expected int, got None"),
    ],
)
def test_wrong_settings_are_named(tmp_path, path, value, message):
    mapping = json.loads(json.dumps(as_mapping(ALL[2])))
    *folders, name = path.split(".")
    place = mapping
    for each in folders:
        place = place[each]
    place[name] = value
    (tmp_path / FILE_NAME).write_text(json.dumps(mapping))
    with pytest.raises(ValueError, match=message):
        load_soft_decoding(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is broken"),
        ("[1]", r"expected a mapping of settings, got \[1\]"),
        ("{}", r"settings \['thinking'\] are missing"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match=f"soft_decoding.json.*{message}"):
        load_soft_decoding(tmp_path)


def test_truncation_of_hard_tokens_beside_a_relaxation_is_an_error():
    for rules in (NextToken(top_k=4), NextToken(top_p=0.5), NextToken(min_p=0.5)):
        with pytest.raises(ValueError, match="beside relaxation 'softmax'"):
            Phase(SOFT, rules)


def test_single_settings_replace_single_ones():
    base = ALL[2]
    assert decoding_from({}, base) == base
    assert decoding_from({"soft_top_k": None}, base) == base
    changed = decoding_from({"soft_top_k": 4, "soft_min_p": 0.2}, base).thinking
    assert changed == Phase(replace(SOFT, truncation=Truncation(4, 0.9, 0.2)), NextToken(temperature=0.6))
    assert decoding_from({"soft_top_k": 2}, base).thinking.relaxation.max_entropy_nats is None  # log 2 is below it
    hot = decoding_from({"relaxation_temperature": 0.5}, base).thinking.relaxation
    assert (hot.temperature, hot.max_entropy_nats) == (0.5, None)
    bounded = decoding_from({"max_entropy_nats": 0.3}, replace(base, thinking=Phase(hot))).thinking.relaxation
    assert (bounded.temperature, bounded.max_entropy_nats) == (1.0, 0.3)
    gumbel = decoding_from({"relaxation": "gumbel_softmax"}, base).thinking.relaxation
    assert gumbel == GumbelSoftmax(SOFT.truncation, max_entropy_nats=0.8)
    assert decoding_from({"cold_stop_steps": 3}, base) == replace(base, cold_stop_steps=3)
    assert decoding_from({}, base, vocab_size=5).thinking.relaxation.truncation.top_k == 5
    assert decoding_from({}).thinking == DEFAULT_DECODING.thinking


def test_settings_of_hard_tokens_are_the_answers_and_the_temperature_is_of_both():
    base = ALL[2]
    greedy = decoding_from({"do_sample": False, "top_k": 3}, base)
    assert greedy.answer == Phase(None, NextToken(greedy=True))
    drawn = decoding_from({"temperature": 0.3, "top_k": 0}, base)
    assert drawn.answer == Phase(None, NextToken(False, 0.3, None, 0.95, 0.05))
    assert drawn.thinking.temperature == 0.3
    both = decoding_from({"temperature": 0.3, "soft_temperature": 0.9}, base)
    assert (both.thinking.temperature, both.answer.temperature) == (0.9, 0.3)
    hard = SoftDecoding(Phase(None, NextToken(top_k=4)))
    assert decoding_from({}, hard).thinking == hard.thinking
    assert decoding_from({"soft_top_k": 3}, hard).thinking.relaxation.truncation.top_k == 3


def test_delimiters_are_texts_or_ids():
    tokenizer = byte_tokenizer()
    texts = decoding_from({"think_start": "<think>", "think_end": "</think>"}, tokenizer=tokenizer)
    assert tokenizer.decode(texts.think_end) == "</think>"
    assert len(texts.think_start) == 3
    ids = decoding_from({"think_start": 7, "think_end": [8, 9]})
    assert (ids.think_start, ids.think_end) == ((7,), (8, 9))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"soft_topk": 3}, "unknown setting 'soft_topk'; did you mean 'soft_top_k'"),
        ({"think_start": "<think>"}, "think_start='<think>' is text, and there is no tokenizer"),
        ({"think_start": [], "think_end": 3}, "think_start: expected a text or token ids, got"),
        ({"relaxation_temperature": 0.5, "max_entropy_nats": 0.2}, "sets the relaxation temperature itself"),
        ({"relaxation": "max"}, "relaxation must be one of"),
    ],
)
def test_what_cannot_be_set_is_said(given, message):
    with pytest.raises(ValueError, match=message):
        decoding_from(given)
