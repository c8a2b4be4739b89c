"""Parameters counted on the meta device are those of real models and of published sizes."""

import copy

import pytest
from helpers import gpt2, llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, LlamaConfig, MambaConfig

from softrl.models.shape import adapter_shape, model_shape, num_parameters
from softrl.studies.scale import LLAMAS

SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
LORA = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=False), gpt2], ids=["tied", "untied", "gpt2"])
def test_counts_are_those_of_the_model(make):
    model = make()
    shape = model_shape(model.config)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.num_embedding == model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shape.num_head == (0 if tied else model.get_output_embeddings().weight.numel())
    adapted = get_peft_model(model, copy.deepcopy(LORA))
    assert adapter_shape(model.config, LORA).num_parameters == adapted.get_nb_trainable_parameters()[0]


def test_smollm2_by_the_formula_of_its_architecture():
    shape = model_shape(SMOLLM2)
    d, f, kv = 576, 1536, 192
    layer = 2 * d * d + 2 * d * kv + 3 * d * f + 2 * d
    assert shape.num_parameters == 49152 * d + 30 * layer + d == 134_515_008
    assert (shape.attention_size, shape.kv_size, shape.mlp_size) == (d, kv, f)
    adapter = adapter_shape(SMOLLM2, LORA)
    assert adapter.num_parameters == 30 * 16 * (2 * (d + d) + 2 * (d + kv) + 3 * (d + f))
    assert dict(adapter.targets)["down_proj"] == f
    assert len(adapter.targets) == 7


@pytest.mark.parametrize(
    ("name", "published"), [("1B", 1_235_814_400), ("8B", 8_030_261_248), ("70B", 70_553_706_496)]
)
def test_the_llamas_have_their_published_sizes(name, published):
    assert model_shape(LlamaConfig(vocab_size=128_256, **LLAMAS[name])).num_parameters == published


def test_what_has_no_heads_is_refused_by_name():
    with pytest.raises(ValueError, match="MambaConfig has none of"):
        model_shape(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=20))


def test_other_models_are_counted_too():
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForSequenceClassification.from_config(config)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters(config, AutoModelForSequenceClassification) == expected
