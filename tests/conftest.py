"""Shapes are checked under pytest only: the core rooms are imported through jaxtyping's hook."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# Not the trainers: the host annotates loosely (its own `logging_steps: float` is given integers throughout).
CORE_ROOMS = [
    "types", "masking", "data", "tokens", "models", "contexts", "rollouts", "rewards", "objectives", "estimators",
    "generation",
]  # fmt: skip
install_import_hook([f"softrl.{room}" for room in CORE_ROOMS], "beartype.beartype")

import pytest
import torch


# Tiny tensors gain nothing from threads, and threads that wait for each other on a busy machine cost a hundredfold.
torch.set_num_threads(1)


@pytest.fixture
def float64_inside(monkeypatch):
    """Models that call `.float()` on their way (Mamba) stay in float64, so that 1e-6 means something for them."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def pytest_collection_modifyitems(items):
    """Fast tests first: a broken gradient is reported before the first model is fetched."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
