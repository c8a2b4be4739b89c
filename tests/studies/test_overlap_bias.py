"""The bias of soft BLEU and ROUGE: the study measures what its columns say."""

import csv

import pytest
from datasets import Dataset
from trainers.tiny import word_tokenizer

from softrl.studies import overlap_bias


def test_bias_is_soft_less_hard_and_none_is_left_of_sharp_tokens(tmp_path, monkeypatch):
    references = [" ".join(f"w{3 + (7 * row + step) % 15}" for step in range(4 + row % 3)) for row in range(6)]
    rows = Dataset.from_dict({"prompt": references, "reference": references})
    monkeypatch.setattr(overlap_bias, "review_keywords", lambda *args, **settings: rows)
    found = overlap_bias.run(word_tokenizer(), 6, 40, tmp_path / "bias.csv", tmp_path / "bias.png")
    assert len(found) == 4 * len(overlap_bias.TEMPERATURES)
    assert {row.reward for row in found} == {"bleu", "rouge1", "rouge2", "rougeL"}
    for row in found:
        assert row.bias == pytest.approx(row.soft - row.hard, abs=1e-6)
        assert abs(row.bias) < 0.1 + 4 * row.bias_se
        assert row.temperature > 0.02 or abs(row.bias) < 0.01 + 4 * row.bias_se
    entropies = [row.entropy_nats for row in found if row.reward == "bleu"]
    assert entropies == sorted(entropies, reverse=True)
    with (tmp_path / "bias.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found)
    assert (tmp_path / "bias.png").read_bytes()[:4] == b"\x89PNG"
