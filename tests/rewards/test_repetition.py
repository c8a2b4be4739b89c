"""The repetition penalty against counts, its formula one number at a time, and the size of what it keeps."""

import itertools
from collections import Counter

import pytest
import torch

from softrl.rewards.repetition import RepetitionPenalty
from softrl.types import SoftTokens

V, N, T, K, EOS = 6, 4, 7, 3, 1


def soft_tokens(eos_ids=()):
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(N * T)]).view(N, T, K)
    weights = torch.rand(N, T, K, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([7, 5, 2, 1])
    return SoftTokens(ids, weights / weights.sum(-1, keepdim=True), torch.arange(T) < lengths[:, None], eos_ids)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_hard_face_counts_equal_pairs_of_ngrams(n):
    texts = [[3, 4, 3, 4, 3, 4, 3], [2, 2, 2, 2, 2, 0, 0], [5, 4, 3, 2, 1, 0, 5], [3, 4, 5, 3, 4, 0, 0]]
    lengths = [7, 5, 7, 2]
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    found = RepetitionPenalty(n).hard(torch.tensor(texts), mask)
    for text, length, value in zip(texts, lengths, found.tolist(), strict=True):
        ngrams = Counter(tuple(text[start : start + n]) for start in range(length - n + 1))
        equal = sum(count * (count - 1) // 2 for count in ngrams.values())
        number = sum(ngrams.values())
        assert value == pytest.approx(-equal / max(1, number * (number - 1) // 2))
    assert found[1] == -1.0, "a loop of one word"
    assert found[2].item() == pytest.approx(-1 / 21 if n == 1 else 0.0), "one word comes back"


@pytest.mark.parametrize("eos_ids", [(), (EOS,)])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_soft_face_is_the_formula(n, eos_ids):
    tokens = soft_tokens(eos_ids)
    dense = torch.zeros(N, T, V, dtype=torch.float64).scatter(-1, tokens.ids, tokens.weights).tolist()
    survival = tokens.survival.tolist()
    found = RepetitionPenalty(n).soft(tokens).tolist()
    for row in range(N):
        equal, pairs = 0.0, 0.0
        for j in range(T - n + 1):
            for i in range(j):
                match = 1.0
                for m in range(n):
                    match *= sum(a * b for a, b in zip(dense[row][i + m], dense[row][j + m], strict=True))
                equal += survival[row][j + n - 1] * match
                pairs += survival[row][j + n - 1]
        assert found[row] == pytest.approx(-equal / max(1.0, pairs), abs=1e-12)


def test_soft_unigrams_are_the_expectation_over_tokens_drawn_independently():
    tokens = soft_tokens()
    expected = 0.0
    for kept in itertools.product(range(K), repeat=5):  # the second text has five tokens
        probability, text = 1.0, []
        for step, k in enumerate(kept):
            probability *= float(tokens.weights[1, step, k])
            text.append(int(tokens.ids[1, step, k]))
        equal = sum(count * (count - 1) // 2 for count in Counter(text).values())
        expected -= probability * equal / 10
    assert RepetitionPenalty(1).soft(tokens)[1].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [2, 3])
def test_gradient_against_finite_differences(n):
    tokens = soft_tokens((EOS,))
    weights = tokens.weights.clone().requires_grad_()
    penalty = RepetitionPenalty(n)
    assert torch.autograd.gradcheck(lambda w: penalty.soft(tokens.with_weights(w)), weights, fast_mode=True)


def test_a_loop_still_has_a_gradient_out_of_it():
    """Where every bigram is repeated many times, 1 − distinct-2 would be flat."""
    ids = torch.tensor([3, 4, 5]).expand(1, 12, 3)
    weights = torch.tensor([1.0, 0.0, 0.0]).repeat(1, 12, 1).requires_grad_()
    tokens = SoftTokens(ids, weights, torch.ones(1, 12, dtype=torch.bool))
    (grad,) = torch.autograd.grad(RepetitionPenalty(2).soft(tokens).sum(), weights)
    assert (grad[0, :, 0] < -1e-2).all()
    assert grad[0, :, 1:].abs().max() == 0.0


def test_long_texts_with_many_kept_ids_stay_small():
    """At T=128 and K=64 all pairs of kept ids are 67 million numbers a text; what is kept is the input."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40_000, (2, 128, 64), generator=generator)
    weights = torch.rand(2, 128, 64, generator=generator).softmax(-1).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved.numel()) or saved, lambda saved: saved
    ):
        penalties = RepetitionPenalty(2).soft(SoftTokens(ids, weights, torch.ones(2, 128, dtype=torch.bool)))
    assert sum(kept) <= 4 * ids.numel()
    assert torch.autograd.grad(penalties.sum(), weights)[0].isfinite().all()


def test_n_is_checked():
    with pytest.raises(ValueError, match="n must be at least 1"):
        RepetitionPenalty(0)
    assert RepetitionPenalty(3).name == "repetition_3"
