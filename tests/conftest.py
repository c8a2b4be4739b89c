"""Shapes are checked under pytest only: every softrl module is imported through jaxtyping's hook."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook("softrl", "beartype.beartype")

import pytest
import torch


# Tiny tensors gain nothing from threads, and threads that wait for each other on a busy machine cost a hundredfold.
torch.set_num_threads(1)


@pytest.fixture
def float64_inside(monkeypatch):
    """Models that call `.float()` on their way (Mamba) stay in float64, so that 1e-6 means something for them."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
