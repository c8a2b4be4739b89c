"""Rows of the key task: where key, question and answer are, that the text is the text, and that it tells no key."""

import inspect

import pytest
import torch
from transformers import AutoTokenizer

from softrl.assets import language_model
from softrl.data.characters import character_tokenizer, shakespeare
from softrl.data.corpus import corpus_tokenizer
from softrl.data.key_recall import KEYS, key_recall, key_tokens, with_keys

FILLER = "".join(f"Line {number} of the play,\n  and what it says.\n" for number in range(200))
WORDS = ("piano", "robot", "rocket", "zebra")


@pytest.fixture(autouse=True)
def cache(request, tmp_path, monkeypatch):
    if request.node.get_closest_marker("slow") is None:  # which reads the real model and corpus
        monkeypatch.setenv("SOFTRL_CACHE", str(tmp_path / "cache"))


def tokenizer_of(kind):
    tokenizer = corpus_tokenizer(kind, FILLER + "The word is was.bckpqxz")
    return with_keys(tokenizer, WORDS)


def rows_of(tokenizer, count=40, **settings):
    return key_recall(tokenizer, count, **({"keys": WORDS, "filler": FILLER, "distance_tokens": 50} | settings))


@pytest.mark.parametrize("kind", ["characters", 300])
@pytest.mark.parametrize("position", [0, 30])
def test_a_row_is_announcement_text_question_and_answer(kind, position):
    tokenizer = tokenizer_of(kind)
    for row in rows_of(tokenizer, key_position_tokens=position):
        ids, key = row["input_ids"], WORDS[row["key"]]
        text = tokenizer.decode(ids)
        gap = "\n\n" if position else ""
        before, _, rest = text.partition(f"{gap}The word is {key}.\n\n")
        between, question, after = rest.rpartition("\n\nThe word was")
        assert (question, after) == ("\n\nThe word was", f" {key}")
        assert before + between in FILLER
        assert [len(tokenizer(part).input_ids) for part in (before, between)] == [position, 50] or kind == 300
        (answer,) = key_tokens(tokenizer, WORDS)[row["key"]]
        assert [slot for slot, token in enumerate(ids) if token == answer] == [row["key_position"], len(ids) - 1]
        assert row["completion_mask"] == [0] * (len(ids) - 1) + [1]
        assert (row["answer_position"], row["distance_tokens"]) == (len(ids) - 2, 50)
        others = [each[0] for each in key_tokens(tokenizer, WORDS) if each != [answer]]
        assert not set(others) & set(ids)


def test_keys_of_several_tokens_are_scored_from_where_they_differ():
    tokenizer = character_tokenizer(FILLER + "The word is was.bckpqxz")
    for row in rows_of(tokenizer, 10):
        key = WORDS[row["key"]]
        marked = [token for token, mark in zip(row["input_ids"], row["completion_mask"], strict=True) if mark]
        assert tokenizer.decode(marked) == key  # the space is the question's
        assert tokenizer.decode(row["input_ids"][: row["answer_position"] + 1]).endswith("The word was ")
        start = row["key_position"]
        assert tokenizer.decode(row["input_ids"][start : start + len(key)]) == key


def test_everything_is_scored_where_asked_for():
    rows, answers = rows_of(tokenizer_of("characters"), scored="everything"), rows_of(tokenizer_of("characters"))
    assert all(all(row["completion_mask"]) for row in rows)
    assert rows["input_ids"] == answers["input_ids"]


def test_keys_are_drawn_evenly_and_the_text_does_not_tell_them():
    """4,000 keys: each count is within 4.5 standard errors of a quarter, a false failure in 1 of 40,000 runs; seeds
    are fixed. The first text character is independent of the key as well: chi-squared with (4 − 1)(c − 1) degrees."""
    tokenizer = tokenizer_of("characters")
    rows = rows_of(tokenizer, 4_000, distance_tokens=5, key_position_tokens=1)
    keys = torch.tensor(rows["key"])
    counts = keys.bincount(minlength=4).double()
    assert ((counts - 1_000).abs() < 4.5 * (4_000 * 3 / 16) ** 0.5).all()
    first = torch.tensor([row[0] for row in rows["input_ids"]])
    common = [token for token, count in zip(*first.unique(return_counts=True), strict=True) if count >= 100]
    table = torch.stack([torch.stack([((first == token) & (keys == k)).sum() for k in range(4)]) for token in common])
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    degrees = 3 * (len(common) - 1)
    assert degrees > 20
    assert ((table - expected).square() / expected).sum() < degrees + 4.5 * (2 * degrees) ** 0.5


def test_rows_depend_on_seed_split_and_number_and_lengths_are_drawn():
    tokenizer = tokenizer_of("characters")
    settings = {"distance_tokens": (20, 60), "key_position_tokens": (0, 9)}
    many, few = rows_of(tokenizer, 60, **settings), rows_of(tokenizer, 7, **settings)
    assert many["input_ids"][:7] == few["input_ids"][:]
    assert many["input_ids"] != rows_of(tokenizer, 60, seed=1, **settings)["input_ids"]
    assert many["input_ids"] != rows_of(tokenizer, 60, split="test", **settings)["input_ids"]
    assert 20 <= min(many["distance_tokens"]) < 25
    assert 55 < max(many["distance_tokens"]) <= 60
    assert len(set(many["key_position"])) == 10


def test_the_tokenizer_with_keys_is_a_copy_and_is_saved(tmp_path):
    plain = character_tokenizer(FILLER)
    keyed = with_keys(plain, WORDS)
    assert len(keyed) == len(plain) + 4
    keyed.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert key_tokens(loaded, WORDS) == key_tokens(keyed, WORDS) == [[len(plain) + number] for number in range(4)]
    assert loaded.decode(loaded("Line  robot, piano").input_ids) == "Line  robot, piano"
    assert keyed("Line 7").input_ids == plain("Line 7").input_ids


def test_what_cannot_be_asked_for_is_refused():
    tokenizer = tokenizer_of("characters")
    bad = {
        "num_rows": {"num_rows": 0}, "scored": {"scored": "nothing"}, "distance_tokens": {"distance_tokens": 0},
        "key_position_tokens": {"key_position_tokens": (5, 2)}, "filler must have 9050": {"key_position_tokens": 9000},
        "keys must be two different words": {"keys": ("piano",)},
        r"keys must not occur in the filler.*\['line', 'play'\]": {"keys": ("piano", "play", "line")},
        "the tokenizer tells apart.*'jjj'": {"keys": ("piano", "jjj")},
    }  # fmt: skip
    for message, settings in bad.items():
        given = {"num_rows": 40, "keys": WORDS, "filler": FILLER, "distance_tokens": 50} | settings
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(key_recall)(tokenizer, **given)  # pytest's own check of types would come first


@pytest.mark.slow
def test_the_default_keys_are_unknown_to_shakespeare_and_tokens_of_the_real_model():
    for split in ("train", "test"):
        text = shakespeare(split).lower()
        assert not [key for key in KEYS if key in text]
    tokenizer = AutoTokenizer.from_pretrained(language_model())
    assert len(with_keys(tokenizer)) == len(tokenizer)
    assert all(len(ids) == 1 for ids in key_tokens(tokenizer))
    row = key_recall(tokenizer, 1, split="test")[0]
    assert tokenizer.decode(row["input_ids"][-4:]) == f"The word was {KEYS[row['key']]}"
    assert inspect.signature(key_recall).parameters["keys"].default is KEYS
