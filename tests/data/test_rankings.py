"""Ranked sentences of reviews: which stand together, what they score, and that none is in both splits."""

import csv

import pytest
import torch
from trainers.tiny import word_tokenizer

from softrl.data.prompts import split_of
from softrl.data.ranked import ranked_batch
from softrl.data.rankings import review_rankings


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Reviews of three sentences: a common one, one with a beginning of five, and one that is too short."""
    path = tmp_path_factory.mktemp("rankings") / "reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "source"))
        for number in range(8000):  # a tenth of them is for prompts
            text = f"The film was just like that. The actor{number % 5} played part {number} well! Nice {number}."
            writer.writerow((text, number % 2, "imdb"))
    return path


def score(texts):
    return torch.tensor([float("".join(filter(str.isdigit, text.split()[-2]))) for text in texts])


def rankings(corpus, count, split="train", **settings):
    return review_rankings(word_tokenizer(), count, score, split=split, csv_path=corpus, **settings)


def sentences(rows):
    return [row["prompt"] + completion for row in rows for completion in row["completions"]]


def test_sentences_of_a_set_begin_alike_and_are_in_no_other(corpus):
    train, test = (rankings(corpus, 12, split) for split in ("train", "test"))
    for rows in (train, test):
        assert {row["prompt"] for row in rows} <= {f"The actor{n}" for n in range(5)}
        assert all(completion.startswith(" played part") for row in rows for completion in row["completions"])
        for row in rows:
            assert row["rewards"] == score(row["prompt"] + each for each in row["completions"]).tolist()
    together = sentences(train) + sentences(test)
    assert len(set(together)) == len(together) == 2 * 12 * 4
    assert all(split_of(_review(each)) == "test" for each in sentences(test))
    assert all(split_of(_review(each)) == "train" for each in sentences(train))
    batch = ranked_batch(list(train), word_tokenizer(), None)
    assert batch.mask.all()
    assert batch.ranks.sort(-1).values.tolist() == [[1.0, 2.0, 3.0, 4.0]] * 12


def _review(sentence):
    number = int(sentence.split()[-2])
    return f"The film was just like that. {sentence} Nice {number}."


def test_fewer_sets_are_the_first_of_more(corpus):
    more = list(rankings(corpus, 12))
    assert list(rankings(corpus, 5)) == more[:5]
    assert list(rankings(corpus, 12, seed=1)) != more
    pairs = rankings(corpus, 5, set_size=2)
    assert [len(row["completions"]) for row in pairs] == [2] * 5


def test_what_is_asked_for_in_vain_is_named(corpus):
    for arguments, message in (
        (
            {"count": 10**6},
            r"num_prompts=1000000, but the train split has \d+ sets of 4 sentences of at most 24 tokens",
        ),
        ({"count": 1, "max_length_tokens": 3}, "has 0 sets of 4 sentences of at most 3 tokens"),
        ({"count": 0}, "must be 1 or more, got 0"),
        ({"count": 1, "set_size": 1}, "set_size must be 2 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            rankings(corpus, **arguments)
