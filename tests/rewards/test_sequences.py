"""Packing, pooling weights and attention biases against enumeration and numbers written out."""

import itertools
import math

import pytest
import torch

from softrl.rewards.sequences import attention_bias, last_token_weights, packed, pooling_weights, with_end
from softrl.types import SoftTokens

T, K = 3, 4


def soft_tokens(eos_ids, lengths=(3, 3, 2, 0)):
    """Every step keeps the ids 0 to 3, so that ends and padding are kept where they are wanted."""
    weights = torch.rand(len(lengths), T, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.arange(K).expand(len(lengths), T, K)
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    return SoftTokens(ids, weights / weights.sum(-1, keepdim=True), mask, eos_ids)


def by_enumeration(weights, length, eos_ids, pad_id):
    """The distribution of the last token that counts, over all texts that tokens drawn one by one can make."""
    found = [0.0] * (1 + T)
    for text in itertools.product(range(K), repeat=length):
        probability = math.prod(float(weights[t, token]) for t, token in enumerate(text))
        end = next((t for t, token in enumerate(text) if token in eos_ids), length - 1)
        written = text[: end + 1]
        last = max((t + 1 for t, token in enumerate(written) if token != pad_id), default=0)
        found[last] += probability
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("eos_ids", [(), (1,), (1, 3)])
@pytest.mark.parametrize("pad_id", [None, 1, 2, 3])
def test_last_token_weights_are_the_distribution_of_the_last_token_that_counts(eos_ids, pad_id):
    tokens = soft_tokens(eos_ids)
    expected = [
        by_enumeration(weights, int(mask.sum()), eos_ids, pad_id)
        for weights, mask in zip(tokens.weights, tokens.mask, strict=True)
    ]
    torch.testing.assert_close(last_token_weights(tokens, pad_id), torch.stack(expected), rtol=0, atol=1e-12)


def test_without_padding_they_are_differences_of_survival():
    tokens = soft_tokens((1, 3))
    survival = tokens.survival
    following = torch.cat([survival[:, 1:], torch.zeros_like(survival[:, :1])], -1)
    torch.testing.assert_close(last_token_weights(tokens, None)[:, 1:], survival - following, rtol=0, atol=1e-12)


def test_packed_texts_stand_at_the_left():
    completions = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    rows = packed([torch.tensor([7.0]), torch.tensor([]), torch.tensor([8.0, 9.0])], completions, -1.0)
    assert rows.tolist() == [[7.0, 1.0, 2.0, -1.0], [3.0, 4.0, -1.0, -1.0], [8.0, 9.0, 5.0, 6.0]]


def test_pooling_weights_of_packed_texts():
    tokens = soft_tokens((), lengths=(3, 2, 1))
    last = pooling_weights(tokens, [2, 0, 1], "last", None)
    assert last.tolist() == [[0, 0, 0, 0, 1], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0]]
    mean = pooling_weights(tokens, [2, 0, 1], "mean", None)
    expected = torch.tensor([[0.2] * 5, [0.5, 0.5, 0, 0, 0], [0.5, 0.5, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(mean, expected)


def test_a_text_of_padding_alone_pools_its_first_token():
    ids = torch.tensor([[[2], [2]], [[2], [2]]])
    tokens = SoftTokens(ids, torch.ones(2, 2, 1), torch.ones(2, 2, dtype=torch.bool))
    assert pooling_weights(tokens, [0, 3], "last", 2).tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0]]


@pytest.mark.parametrize("causal", [True, False])
def test_attention_bias_is_log_survival_on_what_may_be_read(causal):
    log_survival = torch.tensor([[0.0, -0.5, -30.0, -math.inf]])
    low = torch.finfo(torch.float32).min
    expected = torch.tensor([[0.0, -0.5, -30.0, low]]).repeat(4, 1)
    if causal:
        expected[torch.ones(4, 4, dtype=torch.bool).triu(1)] = low
    assert torch.equal(attention_bias(log_survival, causal, torch.float32)[0, 0], expected)


def test_an_end_goes_behind_what_was_cut_off():
    ids = torch.tensor([[5, 6, 7], [5, 9, 7], [5, 7, 7], [7, 7, 7], [5, 6, 8]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()
    tokens = SoftTokens(ids[..., None], torch.ones(5, 3, 1), mask)
    ended = with_end(tokens, 9, (8,))
    assert ended.mask.sum(-1).tolist() == [4, 2, 2, 1, 3]  # cut off, ended, cut off, empty, ended by another token
    written = [row[present].tolist() for row, present in zip(ended.ids[..., 0], ended.mask, strict=True)]
    assert written == [[5, 6, 7, 9], [5, 9], [5, 9], [9], [5, 6, 8]]
    assert (
        with_end(SoftTokens(ids[:, :0, None], torch.ones(5, 0, 1), mask[:, :0]), 9).ids.flatten().tolist() == [9] * 5
    )


def test_under_soft_stopping_the_end_counts_by_what_survives():
    weights = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]], dtype=torch.float64, requires_grad=True)
    tokens = SoftTokens(torch.tensor([[[3, 9], [4, 9]]]), weights, torch.ones(1, 2, dtype=torch.bool), (9,))
    ended = with_end(tokens, 9)
    torch.testing.assert_close(ended.survival[0], torch.tensor([1.0, 0.75, 0.375], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(ended.survival[0, 2], weights)
    torch.testing.assert_close(gradient[0, :, 1], torch.tensor([-0.5, -0.75], dtype=torch.float64))
