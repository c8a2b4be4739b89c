"""Cleaning and splitting of the reviews, on a made-up corpus."""

import csv
import inspect
import random

import pytest

from softrl.data.reviews import clean, load_reviews, unit_hash

NUM_IMDB, NUM_SNIPPETS = 3000, 1000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A CSV in the corpus's format: different texts of two sources, then a duplicate and an empty one."""
    words = ["a", "the", "film", "plot", "actor", "scene", "was", "is", "good", "bad", "long", "dull", "bright", "and"]
    draw = random.Random(0)
    rows = [
        (
            f"{number} {' '.join(draw.choices(words, k=12))}",
            number % 2,
            "imdb" if number < NUM_IMDB else "rotten_tomatoes",
        )
        for number in range(NUM_IMDB + NUM_SNIPPETS)
    ]
    path = tmp_path_factory.mktemp("corpus") / "reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "source"))
        writer.writerows(rows)
        writer.writerow((f"  {rows[0][0]}<br /><br />", 1, "imdb"))  # the first text again, once it is cleaned
        writer.writerow(("<br />", 1, "imdb"))
    return path, rows


@pytest.mark.parametrize(
    ("text", "source", "expected"),
    [
        ("Good.<br /><br />Bad.", "imdb", "Good. Bad."),
        ("  two\t spaces \n", "imdb", "two spaces"),
        ("caf&#233; &amp; <i>bar</i> <3", "imdb", "café & bar <3"),
        ("wait\x85 it\x92s \x96 fine", "imdb", "wait\u2026 it\u2019s \u2013 fine"),
        ("left alone , here .", "imdb", "left alone , here ."),
        ("good , but long .", "rotten_tomatoes", "good, but long."),
        ('the " sum of all fears . "', "rotten_tomatoes", 'the "sum of all fears."'),
        ("( yes ! ) it's . . . fine", "rotten_tomatoes", "(yes!) it's... fine"),
        ("a 'quote' , -- and more", "rotten_tomatoes", "a 'quote', -- and more"),
    ],
)
def test_clean(text, source, expected):
    assert clean(text, source) == expected


def test_the_parts_are_disjoint_and_together_the_whole_corpus(corpus):
    path, rows = corpus
    parts = {part: load_reviews(part, path) for part in ("prompts", "reward", "judge")}
    found = [
        (text, label, source)
        for part in parts.values()
        for text, label, source in zip(part["text"], part["label"], part["source"], strict=True)
    ]
    assert sorted(found) == sorted(rows)
    assert set(parts["prompts"]["source"]) == {"imdb"}
    # Four standard deviations of binomials with p = 0.0965 and 0.5; the hash is fixed, so this cannot flicker.
    assert abs(len(parts["prompts"]) - 0.0965 * NUM_IMDB) < 4 * (0.0965 * 0.9035 * NUM_IMDB) ** 0.5
    left = NUM_IMDB - len(parts["prompts"])
    in_reward = parts["reward"]["source"].count("imdb")
    assert abs(in_reward - left / 2) < 4 * (left / 4) ** 0.5


def test_the_split_is_the_same_on_every_machine():
    """From `printf 'prompts\\na review' | sha256sum`, its first 48 bits; Python's own hash is salted."""
    assert unit_hash("a review", "prompts") == 0x6CA1421F9604 / 2**48
    assert unit_hash("a review", "halves") == 0xF198254F405D / 2**48


def test_an_unknown_part(corpus):
    with pytest.raises(ValueError, match=r"part must be one of \('prompts', 'reward', 'judge'\), got 'train'"):
        inspect.unwrap(load_reviews)("train", corpus[0])
