"""The study of analogies: which words count, what each method scores, and its errors."""

import csv
import math

import pytest
import torch
from helpers import gpt2
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from softrl.assets import language_model
from softrl.data.word_pairs import WORD_PAIRS
from softrl.models.policy import Policy
from softrl.studies.analogies import ALL, EMBEDDINGS, METHODS, run, single_tokens

PAIRS = {
    "offset": tuple((f"o{i}", f"p{i}") for i in range(5)),
    "beside": (*((f"b{i}", f"c{i}") for i in range(5)), ("b0", "not a token")),
    "too few": (("o0", "p0"), ("o1", "p1"), ("o2", "missing"), ("missing", "p2")),
}


@pytest.fixture
def tokenizer():
    words = [f"{letter}{i}" for letter in "opbc" for i in range(5)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)} | {"?": 20}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


@pytest.fixture
def policy():
    """Words whose pairs differ by one vector, and words whose partner is beside them in a direction of its own."""
    model, generator = gpt2(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.normal_(generator=generator)
        weight[5:10] = weight[:5] + 3.0 * weight[22]
        weight[15:20] = weight[10:15] + 0.1 * torch.randn(5, 16, generator=generator, dtype=torch.float64)
    return Policy(model)


def test_each_method_scores_where_it_can(tokenizer, policy, tmp_path, capsys):
    rows = run(policy, tokenizer, tmp_path / "a.csv", tmp_path / "a.png", pairs=PAIRS)
    assert len(rows) == len(EMBEDDINGS) * len(METHODS) * 3
    found = {(row.category, row.embeddings, row.method): row for row in rows}
    for embeddings in EMBEDDINGS:
        offset, beside = ([found[name, embeddings, method] for method in METHODS] for name in ("offset", "beside"))
        assert (offset[0].num_pairs, offset[0].num_pairs_given, offset[0].num_analogies) == (5, 5, 20)
        assert (beside[0].num_pairs, beside[0].num_pairs_given) == (5, 6)
        assert offset[0].accuracy_at_1 == offset[0].mean_reciprocal_rank == 1.0
        assert max(row.accuracy_at_1 for row in offset[1:]) < 0.9
        assert beside[1].accuracy_at_1 == beside[1].accuracy_at_5 == 1.0  # b alone
        assert beside[2].accuracy_at_1 < 0.5  # a* alone
        total = found[ALL, embeddings, METHODS[0]]
        assert total.accuracy_at_1 == pytest.approx((offset[0].accuracy_at_1 + beside[0].accuracy_at_1) / 2)
        errors = [row.accuracy_at_1_se for row in (offset[0], beside[0])]
        assert total.accuracy_at_1_se == pytest.approx(math.hypot(*errors) / 2)
    assert "o1 - o0 + p0 is near 'p1'" in capsys.readouterr().out
    with (tmp_path / "a.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_errors_leave_out_one_pair_after_the_other(tokenizer, policy, tmp_path):
    pairs = {"half": PAIRS["offset"] + PAIRS["beside"][:5]}
    (row,) = [
        row for row in run(policy, tokenizer, tmp_path / "a.csv", tmp_path / "a.png", pairs=pairs)
        if (row.category, row.embeddings, row.method) == ("half", "raw", "b alone")
    ]  # fmt: skip
    table, ids = policy.embed(torch.arange(20)).detach(), single_tokens(tokenizer, pairs["half"])
    cosine = torch.nn.functional.cosine_similarity(table[:, None], policy.embed(torch.arange(23)).detach(), dim=-1)

    def accuracy(kept):
        hits = []
        for i in kept:
            for j in kept:
                if i != j:
                    scores = cosine[ids[j][0]].clone()
                    scores[[*ids[i], ids[j][0]]] = -2.0
                    hits.append(float(scores.argmax() == ids[j][1]))
        return sum(hits) / len(hits)

    left = [accuracy([i for i in range(10) if i != out]) for out in range(10)]
    expected = (9 / 10 * sum((value - sum(left) / 10) ** 2 for value in left)) ** 0.5
    assert 0.3 < row.accuracy_at_1 < 0.95
    assert row.accuracy_at_1 == pytest.approx(accuracy(range(10)))
    assert row.accuracy_at_1_se == pytest.approx(expected)


def test_words_without_tokens_of_their_own_are_refused(tokenizer, policy, tmp_path):
    with pytest.raises(ValueError, match="three pairs of words that are one token each"):
        run(policy, tokenizer, tmp_path / "a.csv", tmp_path / "a.png", pairs={"few": PAIRS["too few"]})


def test_the_words_are_pairs_without_repetition():
    for category, pairs in WORD_PAIRS.items():
        assert len(pairs) >= 20, category
        assert len(set(pairs)) == len(pairs)
        assert all(one != other for one, other in pairs)


@pytest.mark.slow
def test_most_words_are_single_tokens_of_the_real_model():
    tokenizer = AutoTokenizer.from_pretrained(language_model())
    for pairs in WORD_PAIRS.values():
        assert len(single_tokens(tokenizer, pairs)) >= 19
