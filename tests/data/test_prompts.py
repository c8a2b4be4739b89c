"""Prompts: openings of reviews that survive tokenising again, apart for training and testing."""

import csv
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from softrl.data.prompts import review_openings
from softrl.data.reviews import load_reviews

WORDS = [
    "a",
    "the",
    "film",
    "plot",
    "actor",
    "scene",
    "was",
    "is",
    "good",
    "bad",
    "long",
    "dull",
    "bright",
    "and",
    "it",
]
SHARED = ["this", "film", "was", "good", "and", "it", "was", "long", "with"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Texts of 3 to 30 words; every tenth opens with the same words."""
    draw = random.Random(1)
    path = tmp_path_factory.mktemp("prompts") / "reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "source"))
        for number in range(3000):
            words = draw.choices(WORDS, k=draw.randint(3, 30))
            if number % 10 == 0:
                words = SHARED + words
            writer.writerow((" ".join([*words, str(number)]), number % 2, "imdb"))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level pairs, like the policy's, but small."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def most(tokenizer, split, path, length=6):
    """All openings of a split, their number taken from the error."""
    with pytest.raises(ValueError, match="ask for at most that many") as caught:
        review_openings(tokenizer, 10**6, length, split, csv_path=path)
    number = int(str(caught.value).split("has ")[1].split(" ")[0])
    return review_openings(tokenizer, number, length, split, csv_path=path)["prompt"]


def test_openings_are_beginnings_of_prompt_reviews_of_the_asked_length(tokenizer, corpus):
    texts = load_reviews("prompts", corpus)["text"]
    for split in ("train", "test"):
        openings = most(tokenizer, split, corpus)
        assert len(openings) > 10
        for opening in openings:
            assert len(tokenizer(opening, add_special_tokens=False).input_ids) == 6
            assert any(text.startswith(opening) for text in texts)


def test_no_opening_occurs_twice_in_or_across_the_splits(tokenizer, corpus):
    train, test = (most(tokenizer, split, corpus) for split in ("train", "test"))
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)
    assert not set(train) & set(test)
    shared = [text for text in [*train, *test] if " ".join(SHARED).startswith(text)]
    assert len(shared) == 1
    assert 0.1 < len(test) / (len(train) + len(test)) < 0.3


def test_the_seed_orders_them_and_fewer_are_the_first_of_more(tokenizer, corpus):
    def prompts(number, seed):
        return review_openings(tokenizer, number, 6, seed=seed, csv_path=corpus)["prompt"]

    assert prompts(20, 0)[:5] == prompts(5, 0)
    assert prompts(20, 0) != prompts(20, 1)
    assert prompts(20, 3) == prompts(20, 3)


def test_openings_that_do_not_survive_tokenising_again_are_left_out(tokenizer, corpus, monkeypatch):
    """A tokenizer whose decoding loses the word "dull"."""
    whole = most(tokenizer, "train", corpus)
    decode = type(tokenizer).batch_decode

    def lossy(self, ids, **options):
        return [text.replace("dull", "") for text in decode(self, ids, **options)]

    monkeypatch.setattr(type(tokenizer), "batch_decode", lossy)
    kept = most(tokenizer, "train", corpus)
    assert set(kept) == {text for text in whole if "dull" not in text}
    assert len(kept) < len(whole)


@pytest.mark.parametrize(("number", "length"), [(0, 8), (5, 0)])
def test_numbers_out_of_range(tokenizer, corpus, number, length):
    with pytest.raises(ValueError, match="must be 1 or more, got 0"):
        review_openings(tokenizer, number, length, csv_path=corpus)


def test_references_are_what_the_reviews_go_on_with(tokenizer, corpus):
    rows = review_openings(tokenizer, 50, 4, csv_path=corpus, reference_length_tokens=5)
    texts = load_reviews("prompts", corpus)["text"]
    for row in rows:
        assert any(text.startswith(row["prompt"] + row["reference"]) for text in texts)
        assert len(tokenizer(row["reference"], add_special_tokens=False).input_ids) == 5
    assert "reference" not in review_openings(tokenizer, 5, 4, csv_path=corpus).column_names
