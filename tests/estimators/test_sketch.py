"""Count sketches: linear, repeatable, and inner products right on average within the stated variance."""

import pytest
import torch

from softrl.estimators.sketch import CountSketch

SHAPES = {"a": (70, 9), "b": (301,)}


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def whole(named):
    return torch.cat([tensor.flatten() for tensor in named.values()])


def test_a_sketch_is_linear_and_its_names_count():
    sketch, x, y = CountSketch(64), tensors(0), tensors(1)
    mixed = {name: 2.0 * x[name] - 3.0 * y[name] for name in SHAPES}
    torch.testing.assert_close(sketch.of(mixed), 2.0 * sketch.of(x) - 3.0 * sketch.of(y))
    torch.testing.assert_close(CountSketch(64).of(x), sketch.of(x), rtol=0, atol=0)
    assert not torch.allclose(CountSketch(64, seed=1).of(x), sketch.of(x))
    assert not torch.allclose(sketch.of({"b": x["a"].flatten()[:301]}), CountSketch(64).of({"c": x["b"]}))
    torch.testing.assert_close(sketch.of({"a": x["a"]}) + sketch.of({"b": x["b"]}), sketch.of(x))


@pytest.mark.parametrize(("size", "seeds"), [(16, 600), (256, 300)])
def test_inner_products_are_unbiased_within_the_stated_variance(size, seeds):
    """The mean over seeds is within 4 standard errors (false with P < 1e-4); the variance within its bound, and a
    tenth of it at least, with room for the error of a measured variance."""
    x, y = tensors(0), tensors(1)
    y = {name: y[name] + 0.5 * x[name] for name in SHAPES}
    products = []
    for seed in range(seeds):
        sketch = CountSketch(size, seed)
        products.append(sketch.of(x) @ sketch.of(y))
    products = torch.stack(products)
    exact = whole(x) @ whole(y)
    bound = (whole(x).square().sum() * whole(y).square().sum() + exact.square()) / size
    assert (products.mean() - exact).abs() < 4.0 * products.std() / seeds**0.5
    assert 0.1 * bound < products.var() < 1.3 * bound


def test_a_sketch_refuses_no_buckets_and_another_length():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        CountSketch(0)
    sketch = CountSketch(8)
    sketch.of({"a": torch.zeros(20)})
    with pytest.raises(ValueError, match="'a' had 20 entries in an earlier sketch and has 21"):
        sketch.of({"a": torch.zeros(21)})
