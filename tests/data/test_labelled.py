"""Texts for reward models, and sentences with their keywords: halves that share no text, bad files named."""

import csv
import json
import random

import pytest
from datasets import Dataset
from trainers.tiny import word_tokenizer

from softrl.data import labelled
from softrl.data.keywords import keywords, prompt_of, review_keywords
from softrl.data.labelled import labelled_texts, preference_pairs

WORDS = {1: ["good", "fine", "warm"], 0: ["bad", "dull", "cold"]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("labelled") / "reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "source"))
        for number in range(600):
            label, source = number % 2, ("imdb", "rotten_tomatoes")[number % 3 == 0]
            length = 70 if source == "imdb" else draw.randint(4, 9)
            writer.writerow((f"{number} " + " ".join(draw.choices(WORDS[label], k=length)), label, source))
    return path


@pytest.fixture
def reviews(corpus, monkeypatch):
    monkeypatch.setattr("softrl.assets.reviews_csv", lambda: corpus)


def test_halves_share_no_text_and_labels_are_the_reviews_own(reviews):
    train, test = labelled_texts("reviews", "judge", 100, 80)
    assert (len(train), len(test)) == (100, 80)
    assert set(train["source"]) == {"snippets", "pieces"}
    numbers = [{text.split()[0] for text in rows["text"] if text[0].isdigit()} for rows in (train, test)]
    assert numbers[0]
    assert not numbers[0] & numbers[1]
    for rows in (train, test):
        assert all(any(word in row["text"] for word in WORDS[row["label"]]) for row in rows)
        assert 0.3 < sum(rows["label"]) / len(rows) < 0.7
    other = labelled_texts("reviews", "reward", 100, 80)
    assert other[1]["text"] != test["text"]


def test_pairs_prefer_the_favourable_text(reviews):
    train, test = preference_pairs("reviews", "judge", "My review: ", 20, 10)
    assert (len(train), len(test)) == (20, 10)
    for row in [*train, *test]:
        assert row["prompt"] == "My review: "
        assert any(word in row["chosen"] for word in WORDS[1])
        assert any(word in row["rejected"] for word in WORDS[0])


def test_a_file_is_split_where_it_has_no_second_part(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"text {number}", "label": number % 2} for number in range(200)]
    path.write_text("\n".join(map(json.dumps, rows)))
    train, test = labelled_texts(str(path), "judge", 1000, 1000)
    assert len(train) + len(test) == 200
    assert 5 < len(test) < 40
    assert not set(train["text"]) & set(test["text"])


def test_bad_data_is_named(tmp_path, reviews):
    with pytest.raises(ValueError, match=r"part must be one of \['judge', 'reward'\]"):
        labelled_texts("reviews", "prompts", 10, 10)
    Dataset.from_dict({"text": ["a"] * 50}).to_json(tmp_path / "unlabelled.jsonl")
    with pytest.raises(ValueError, match=r"lacks the columns \['label'\]"):
        labelled_texts(str(tmp_path / "unlabelled.jsonl"), "judge", 10, 10)
    rows = {"text": [f"{n}" for n in range(50)], "label": [0, 3] * 25}
    Dataset.from_dict(rows).to_json(tmp_path / "wrong.jsonl")
    with pytest.raises(ValueError, match="labels must be 0 and 1, got 3"):
        labelled_texts(str(tmp_path / "wrong.jsonl"), "judge", 10, 10)
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "nothing.jsonl"):
        with pytest.raises(ValueError, match=r"cannot be read .*pass 'reviews'"):
            labelled_texts(str(tmp_path / name), "judge", 10, 10)
    Dataset.from_dict({"chosen": ["a"] * 50}).to_json(tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match="rejected"):
        preference_pairs(str(tmp_path / "pairs.jsonl"), "judge", "", 10, 10)


def test_keywords_of_a_sentence():
    assert keywords('It\'s "a" Gripping, gripping tale (of the sea).') == ["it's", "gripping", "tale", "sea"]
    assert prompt_of(" A warm film.") == "Keywords: warm, film\nSentence:"


def test_prompts_hold_the_keywords_of_their_references(corpus):
    tokenizer = word_tokenizer()
    train = review_keywords(tokenizer, 20, 8, "train", csv_path=corpus)
    test = review_keywords(tokenizer, 10, 8, "test", csv_path=corpus)
    assert not set(train["reference"]) & set(test["reference"])
    for row in [*train, *test]:
        assert row["reference"].startswith(" ")
        assert row["prompt"] == prompt_of(row["reference"])
        assert len(row["reference"].split()) <= 8
    again = review_keywords(tokenizer, 5, 8, "train", csv_path=corpus)
    assert again["prompt"] == train["prompt"][:5]
    with pytest.raises(ValueError, match="sentences of at most 8 tokens; ask for at most that many"):
        review_keywords(tokenizer, 10**6, 8, "train", csv_path=corpus)


def test_the_built_in_name_is_the_one_that_the_command_documents():
    assert labelled.BUILTIN == "reviews"
