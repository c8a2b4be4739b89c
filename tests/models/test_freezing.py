"""Freezing names exactly the parameters that it should."""

import pytest
from helpers import ALL_MODELS, gpt2, llama
from peft import LoraConfig, get_peft_model

from softrl.models.freezing import freeze


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_embedding_and_first_layers_are_left_as_they_are():
    model = llama(tied=False)
    whole = trained(model)
    freeze(model, embeddings=True, layers=1)
    gone = whole - trained(model)
    assert gone == {name for name in whole if name.startswith(("model.embed_tokens", "model.layers.0."))}


def test_a_tied_head_goes_with_its_embedding():
    model = gpt2()
    freeze(model, embeddings=True)
    assert not model.lm_head.weight.requires_grad
    assert any(name.startswith("transformer.h.0.") for name in trained(model))


def test_adapters_of_frozen_layers_are_frozen():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    freeze(model, layers=1)
    assert trained(model)
    assert all("layers.1." in name for name in trained(model))


@pytest.mark.parametrize("name", sorted(set(ALL_MODELS) - {"gru"}))
def test_layers_are_found_in_every_architecture(name):
    model = ALL_MODELS[name]()
    before = len(trained(model))
    freeze(model, layers=1)
    assert 0 < len(trained(model)) < before


def test_more_layers_than_there_are():
    with pytest.raises(ValueError, match="freeze_layers must lie between 0 and 2, the number of layers, got 3"):
        freeze(llama(), layers=3)
