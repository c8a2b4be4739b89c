"""Tensors whose names begin alike have maps of their own: the layers of a model must not meet in the same buckets."""

import torch

from softrl.estimators.sketch import CountSketch


def test_names_that_begin_alike_are_told_apart():
    sketch, values = CountSketch(size=1024), torch.randn(700, generator=torch.Generator().manual_seed(0))
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(4)]
    parts = torch.stack([sketch.of({name: values}) for name in names])
    products = parts @ parts.T / values.double().square().sum()
    others = products[~torch.eye(4, dtype=torch.bool)]
    assert others.abs().max() < 0.2  # five standard deviations of an inner product of unrelated signs
    assert products.diagonal().allclose(torch.ones(4, dtype=torch.float64))
