"""Fitting the reward and the judge on a made-up corpus whose sentiment is planted in two words."""

import csv
import json
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from softrl import assets
from softrl.data.reviews import load_reviews, pieces, sample
from softrl.rewards import fit, fit_judge, fit_reward
from softrl.rewards.fit_reward import Pieces, TokenisedReviews, cut
from softrl.rewards.judge import SentenceEncoder

NEUTRAL = ["the", "film", "plot", "actor", "scene", "was", "is", "and", "it", "long", "with", "my"]
VOCABULARY = ["[UNK]", "good", "bad", *NEUTRAL, "never", "used"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Half the reviews of each source hold "good", the other half "bad", in every few words."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("fit") / "reviews.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "source"))
        for number in range(1200):
            source, length = ("imdb", 70) if number % 3 else ("rotten_tomatoes", 15)
            words = draw.choices(NEUTRAL, k=length)
            words[::6] = ["good" if number % 2 else "bad"] * len(words[::6])
            writer.writerow((" ".join(words), number % 2, source))
    return path


@pytest.fixture
def cached_corpus(corpus, monkeypatch, tmp_path):
    monkeypatch.setenv("SOFTRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "reviews_csv", lambda: corpus)
    return corpus


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def test_cutting_drops_short_ends_but_no_short_reviews():
    reviews = TokenisedReviews(
        ids=[[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5], [7], []],
        labels=[1, 0, 1, 0],
        sources=["imdb", "imdb", "rotten_tomatoes", "imdb"],
    )
    pieces = cut(reviews, 4, vocab_size=9)
    assert pieces.ids.tolist() == [[1, 2, 3, 4], [5, 6, 9, 9], [1, 2, 3, 4], [7, 9, 9, 9]]
    assert pieces.lengths.tolist() == [4, 2, 4, 1]
    assert pieces.labels.tolist() == [1, 1, 0, 1]
    assert pieces.is_snippet.tolist() == [False, False, False, True]


def test_margins_are_means_and_pullback_is_their_transpose():
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 1, 4], [0, 5, 5], [2, 3, 4]])  # 5 fills up
    ones = torch.ones(3, dtype=torch.float64)
    pieces = Pieces(ids, torch.tensor([3.0, 1.0, 3.0], dtype=torch.float64), ones, ones.bool(), vocab_size=5)
    weight = torch.randn(5, generator=generator, dtype=torch.float64)
    residuals = torch.randn(3, generator=generator, dtype=torch.float64)
    w = weight.tolist()
    expected = [(2 * w[1] + w[4]) / 3, w[0], (w[2] + w[3] + w[4]) / 3]
    torch.testing.assert_close(pieces.margins(weight), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(residuals @ pieces.margins(weight), pieces.pullback(residuals) @ weight)
    torch.testing.assert_close(
        pieces.frequencies(), torch.tensor([2, 3, 2, 2, 3], dtype=torch.float64) / 2.4, rtol=1e-12, atol=0
    )


def test_snippets_get_their_share_of_the_loss():
    weights = fit_reward._weights_by_source(torch.tensor([True, False, False, False]))
    assert weights.tolist() == pytest.approx([0.15, 0.85 / 3, 0.85 / 3, 0.85 / 3])
    assert fit_reward._weights_by_source(torch.tensor([False] * 4)).tolist() == [0.25] * 4


def test_the_reward_finds_the_planted_words_and_repeats_itself(cached_corpus, tokenizer):
    reward, facts = fit_reward.fit(tokenizer, len(VOCABULARY) + 3)
    assert reward.vocab_size == len(VOCABULARY) + 3
    good, bad = float(reward.weight[1]), float(reward.weight[2])
    neutral = reward.weight[3:15].abs().max()
    assert good > 1 + neutral
    assert bad < -1 - neutral
    assert reward.weight[15:].tolist() == [0.0] * 5  # never seen: neither good nor bad
    assert facts["held_out_accuracy"] == {
        "rotten_tomatoes_snippets": 1.0,
        "imdb_whole": 1.0,
        "imdb_pieces_of_24_tokens": 1.0,
    }
    assert facts["num_held_out_reviews"] == len(load_reviews("judge"))
    again, _ = fit_reward.fit(tokenizer, len(VOCABULARY) + 3)
    assert torch.equal(reward.weight, again.weight)


def test_held_out_accuracy_is_of_reviews_that_were_not_fitted_on(cached_corpus, tokenizer, monkeypatch):
    """With the labels of the other part turned round, every answer is wrong."""

    def turned_round(part):
        reviews = load_reviews(part)
        if part == "judge":
            return reviews.map(lambda row: {"label": 1 - row["label"]}, load_from_cache_file=False)
        return reviews

    monkeypatch.setattr(fit_reward, "load_reviews", turned_round)
    _, facts = fit_reward.fit(tokenizer, len(VOCABULARY))
    assert set(facts["held_out_accuracy"].values()) == {0.0}


def test_a_fit_is_cached_until_what_went_into_it_changes(cached_corpus, tokenizer, monkeypatch, tmp_path):
    fits = []
    original = fit_reward.fit

    def counting(*arguments):
        fits.append(arguments[1])
        return original(*arguments)

    monkeypatch.setattr(fit_reward, "fit", counting)
    first = fit.sentiment_reward(tokenizer)
    second = fit.sentiment_reward(tokenizer)
    assert fits == [len(VOCABULARY)]
    assert torch.equal(first.weight, second.weight)
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    card = json.loads((folder / "card.json").read_text())
    assert card["held_out_accuracy"]["imdb_whole"] == 1.0
    assert card["inputs"]["reviews"] == assets.sha256_of(cached_corpus)

    fit.sentiment_reward(tokenizer, vocab_size=100)
    assert fits == [len(VOCABULARY), 100]
    monkeypatch.setattr(fit_reward, "SETTINGS", {**fit_reward.SETTINGS, "recipe": 2})
    fit.sentiment_reward(tokenizer)
    assert len(fits) == 3
    changed = tmp_path / "changed.csv"
    changed.write_text(cached_corpus.read_text() + "one more,1,imdb\n")
    monkeypatch.setattr(assets, "reviews_csv", lambda: changed)
    fit.sentiment_reward(tokenizer)
    assert len(fits) == 4
    fit.sentiment_reward(tokenizer, rebuild=True)
    assert len(fits) == 5


class CountingEncoder(SentenceEncoder):
    """How often "good" and "bad" occur, on very different scales and with an offset."""

    num_features = 2

    def __init__(self, *arguments):
        """Nothing to load."""

    def features(self, texts, batch_size=64, title=None):
        counts = [[100.0 * text.count("good") + 7, 0.01 * text.count("bad") - 3] for text in texts]
        return torch.tensor(counts).reshape(-1, 2)


def test_the_judge_is_fitted_on_the_other_part_and_cached(cached_corpus, monkeypatch, tmp_path):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "card.json").write_text('{"inputs": {"version": 1}}')
    monkeypatch.setattr(assets, "encoder", lambda: tmp_path / "encoder")
    monkeypatch.setattr(fit, "SentenceEncoder", CountingEncoder)
    parts = []
    monkeypatch.setattr(fit_judge, "load_reviews", lambda part: parts.append(part) or load_reviews(part))

    judge = fit.sentiment_judge()
    assert parts == ["judge", "reward"]  # the first is fitted on, the second only measured
    scores = judge.score(["good good film", "bad bad film"])
    assert scores[0] > 0.9
    assert scores[1] < 0.1
    card = json.loads((tmp_path / "cache" / "sentiment-judge" / "card.json").read_text())
    assert card["held_out_accuracy"] == {"rotten_tomatoes_snippets": 1.0, "imdb_pieces_of_32_words": 1.0}
    again = fit.sentiment_judge()
    assert parts == ["judge", "reward"]
    assert torch.equal(again.score(["good film", "it was bad"]), judge.score(["good film", "it was bad"]))
    (tmp_path / "encoder" / "card.json").write_text('{"inputs": {"version": 2}}')
    fit.sentiment_judge()
    assert len(parts) == 4


def test_pieces_and_samples_of_texts(cached_corpus):
    reviews = load_reviews("judge")
    cut = pieces(reviews, 32)
    imdb = [text for text, source in zip(reviews["text"], reviews["source"], strict=True) if source == "imdb"]
    assert len(cut) == 2 * len(imdb)  # 70 words
    assert {len(text.split()) for text, _ in cut} == {32}
    assert all(("good" in text) == (label == 1) for text, label in cut)
    drawn = sample(cut, 10)
    assert len(set(drawn)) == 10
    assert drawn == sample(cut, 10)
    assert sorted(sample(cut, 10**6)) == sorted(cut)
