"""Nearest embeddings against all distances at once, in pieces, and with answers that are ruled out."""

import inspect

import pytest
import torch
from helpers import ALL_MODELS
from scipy.spatial.distance import cdist

from softrl.models import policy as policy_module
from softrl.models.nearest import nearest_tokens, nearest_vectors
from softrl.models.policy import Policy


def vectors(count, seed=0):
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("elements", [3, 40, 2**23])
def test_nearest_as_all_distances_say(monkeypatch, metric, elements):
    monkeypatch.setattr(policy_module, "CHUNK_ELEMENTS", elements)
    table, embeds = vectors(31) + 1.0, vectors(12, 1)
    excluded = torch.stack([torch.arange(12), torch.arange(12) + 12, torch.full((12,), 30)], 1)
    for ruled_out in (None, excluded):
        distances = torch.tensor(cdist(embeds, table, metric))
        if ruled_out is not None:
            distances = distances.scatter(1, ruled_out, torch.inf)
        ids, far = nearest_vectors(lambda ids: table[ids], 31, embeds, metric, ruled_out)
        assert torch.equal(ids, distances.argmin(-1))
        torch.testing.assert_close(far, distances.amin(-1), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("name", ALL_MODELS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_policys_own_embeddings_are_nearest_to_themselves(name, metric):
    policy = Policy(ALL_MODELS[name]())
    ids = torch.arange(policy.vocab_size)
    found, distance = nearest_tokens(policy, policy.embed(ids) * (3.0 if metric == "cosine" else 1.0), metric)
    assert torch.equal(found, ids)
    assert distance.max() < 1e-12


def test_of_equally_near_ones_the_first():
    table = torch.tensor([[1.0], [3.0], [1.0], [3.0]])
    assert nearest_vectors(lambda ids: table[ids], 4, torch.tensor([[2.0], [1.1], [2.5]]))[0].tolist() == [0, 0, 1]


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="metric must be one of"):
        inspect.unwrap(nearest_vectors)(lambda ids: ids, 1, torch.zeros(1, 1), "manhattan")
