"""Expected counts against enumeration of all texts that independent soft tokens stand for, and against counting."""

import itertools
from collections import Counter

import pytest
import torch

from softrl.rewards.ngrams import (
    Presence,
    ReferenceTokens,
    expected_common_subsequence,
    expected_matches,
    probabilities_of,
)
from softrl.types import SoftTokens

T, K = 5, 3
REFERENCES = [[[2, 3, 2, 5]], [[1, 2]], [[]], [[4, 4, 4], [4, 2, 6, 2]]]


def soft_tokens(seed=0, eos_ids=(), lengths=(5, 5, 3, 4)):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(7, generator=generator)[:K] for _ in range(len(lengths) * T)])
    weights = torch.rand(len(lengths), T, K, generator=generator, dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return SoftTokens(ids.view(len(lengths), T, K), weights / weights.sum(-1, keepdim=True), mask, eos_ids)


def texts_of(tokens, row):
    """Every text that a row stands for, with its probability; hard stopping."""
    length = int(tokens.mask[row].sum())
    for choice in itertools.product(range(K), repeat=length):
        steps = range(length)
        probability = torch.stack([tokens.weights[row, t, choice[t]] for t in steps]).prod().item()
        yield [int(tokens.ids[row, t, choice[t]]) for t in steps], probability


def clipped(text, references, n):
    most = Counter()
    for reference in references:
        most |= Counter(tuple(reference[i : i + n]) for i in range(len(reference) - n + 1))
    found = Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
    return sum(min(found[gram], count) for gram, count in most.items())


def matches_of(tokens, references, n, eos_ids=()):
    reference_tokens = ReferenceTokens.of(references, tokens.ids.device)
    probabilities = probabilities_of(tokens, reference_tokens.vocabulary, torch.float64)
    return expected_matches(probabilities, Presence.of(tokens, eos_ids), reference_tokens.table(n))


def test_expected_unigram_matches_are_exact():
    tokens = soft_tokens()
    expected = [
        sum(probability * clipped(text, REFERENCES[row], 1) for text, probability in texts_of(tokens, row))
        for row in range(4)
    ]
    found = matches_of(tokens, REFERENCES, 1)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    in_expectation = torch.tensor([2.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    assert (found - in_expectation).abs().max() > 0.05, "the counts are uncertain, or this shows nothing"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_at_one_hot_tokens_they_are_counts(n):
    tokens = soft_tokens(3)
    choice = tokens.weights.argmax(-1, keepdim=True)
    one_hot = tokens.with_weights(torch.zeros_like(tokens.weights).scatter(-1, choice, 1.0))
    texts = tokens.ids.gather(-1, choice).squeeze(-1)
    texts = [text[keep].tolist() for text, keep in zip(texts, tokens.mask, strict=True)]
    references = [[[*texts[0][1:], 5, *texts[0][:2]]], [texts[1], texts[1][:2] * 2], [[]], [[texts[3][-1]] * 3]]
    expected = [clipped(text, references[row], n) for row, text in enumerate(texts)]
    assert max(expected) >= 3
    torch.testing.assert_close(matches_of(one_hot, references, n), torch.tensor(expected, dtype=torch.float64))


def test_number_of_ngrams_leaves_the_end_out():
    """`P(the text goes on through position t + n − 1)` by enumeration, with token 0 as the end of a text."""
    tokens = soft_tokens(1, eos_ids=(0,), lengths=(5, 5, 5, 5))
    presence = Presence.of(tokens, (0,))
    lengths = torch.zeros(4, T + 1, dtype=torch.float64)
    for row in range(4):
        for text, probability in texts_of(tokens, row):
            lengths[row, text.index(0) if 0 in text else T] += probability
    assert lengths[:, T].max() < 0.9
    for n in (1, 2, 4):
        counted = (torch.arange(T + 1) - n + 1).clamp(min=0).double()
        torch.testing.assert_close(presence.num_ngrams(n), lengths @ counted, rtol=1e-9, atol=1e-9)


def lcs(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, j in itertools.product(range(len(first)), range(len(second))):
        same = first[i] == second[j]
        table[i + 1][j + 1] = table[i][j] + 1 if same else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def common_subsequence_of(tokens, rows):
    references = ReferenceTokens.of([[row] for row in rows], tokens.ids.device)
    probabilities = references.in_order(probabilities_of(tokens, references.vocabulary, torch.float64))
    return expected_common_subsequence(probabilities, Presence.of(tokens, ()), torch.tensor([*map(len, rows)]))


def test_common_subsequence_at_one_hot_tokens_and_below_its_expectation():
    rows = [[2, 3, 2, 5, 1, 0, 4], [1, 2], [], [4]]
    for seed in range(20):
        tokens = soft_tokens(seed)
        choice = tokens.weights.argmax(-1, keepdim=True)
        one_hot = tokens.with_weights(torch.zeros_like(tokens.weights).scatter(-1, choice, 1.0))
        texts = tokens.ids.gather(-1, choice).squeeze(-1)
        expected = [lcs(text[keep].tolist(), row) for text, keep, row in zip(texts, tokens.mask, rows, strict=True)]
        found = common_subsequence_of(one_hot, rows)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    mean = [sum(p * lcs(text, row) for text, p in texts_of(tokens, n)) for n, row in enumerate(rows)]
    soft = common_subsequence_of(tokens, rows)
    assert (soft <= torch.tensor(mean) + 1e-9).all()
    assert (soft > 0.5 * torch.tensor(mean) - 1e-9).all()


def test_gradient_against_finite_differences():
    tokens = soft_tokens(2, eos_ids=(0,))
    weights = tokens.weights.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: matches_of(tokens.with_weights(w), REFERENCES, 2, (0,)), weights)
    rows = [row[0] for row in REFERENCES]
    assert torch.autograd.gradcheck(lambda w: common_subsequence_of(tokens.with_weights(w), rows), weights)
