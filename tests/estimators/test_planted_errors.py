"""The gradient tests are not too weak: each planted error moves the gradient far beyond their bound of 1e-6."""

import pytest
import torch
from estimators.test_gradients import EXACT, estimated_gradient, make, relative, true_gradient
from helpers import PairReward

from softrl.estimators import pathwise
from softrl.estimators.system import AdjointSettings
from softrl.models import kv
from softrl.models.state import KeyValueState


def error_of(settings, case=None):
    policy, relaxation, terms, rollout, reference = make("llama", "softmax") if case is None else case
    expected = true_gradient(policy, relaxation, terms, rollout, reference, PairReward())
    return relative(estimated_gradient(policy, relaxation, terms, rollout, settings, PairReward()), expected)


@pytest.mark.parametrize("method", EXACT)
def test_nothing_planted(method):
    assert error_of(EXACT[method]) < 1e-6


def test_embedding_path_dropped(monkeypatch):
    monkeypatch.setattr(pathwise, "_embedding_term", lambda policy, estimate: torch.zeros(3, dtype=torch.float64))
    assert error_of(EXACT["parallel"]) > 1e-3


def test_cache_cut_from_the_graph(monkeypatch):
    whole = kv.GrowingLayer.update

    def cut(layer, keys, values, *args, **kwargs):
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return whole(layer, keys, values, *args, **kwargs)

    monkeypatch.setattr(kv.GrowingLayer, "update", cut)
    assert error_of(EXACT["autograd"]) > 1e-3


def test_cotangents_of_the_cache_not_collected(monkeypatch):
    whole = kv._Splice.backward

    def forgetful(ctx, grad):
        ctx.cotangents = torch.zeros_like(ctx.cotangents)
        return whole(ctx, grad)

    monkeypatch.setattr(kv._Splice, "backward", staticmethod(forgetful))
    assert error_of(EXACT["sequential"]) > 1e-3
    assert error_of(EXACT["blocked, 2"]) > 1e-3


def test_later_blocks_counted_in_every_sweep(monkeypatch):
    pull = KeyValueState.pull
    monkeypatch.setattr(
        KeyValueState, "pull", lambda state, hidden, embeds, cotangents, with_later=True, is_last=False: pull(
            state, hidden, embeds, cotangents, is_last=is_last)
    )  # fmt: skip
    assert error_of(EXACT["sequential"]) < 1e-6
    assert error_of(EXACT["blocked, 2"]) > 1e-3


def test_one_sweep_too_few():
    case = make("llama", "softmax")
    sweeps = case[3].mask.shape[1] - 1
    assert error_of(AdjointSettings(hops=sweeps, tol=0.0), case) < 1e-6
    assert error_of(AdjointSettings(hops=sweeps - 1, tol=0.0), case) > 1e-6


def test_reference_path_dropped(monkeypatch):
    """KL depends on the fed tokens through the reference as well; with that path cut the gradient is another one."""
    whole = pathwise.hidden_of_reference
    monkeypatch.setattr(
        pathwise, "hidden_of_reference", lambda terms, rollout, fed: whole(terms, rollout, fed.detach())
    )
    assert error_of(EXACT["parallel"]) > 1e-3
