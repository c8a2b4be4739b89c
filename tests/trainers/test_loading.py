"""The policy by name or as an object: what reaches `from_pretrained`, adapters, quantization, ends of sequence."""

import pytest
import torch
from helpers import EOS, PairReward, llama
from peft import LoraConfig
from trainers.tiny import dataset
from transformers import LlamaConfig, LlamaForCausalLM

from softrl.rewards.token_linear import TokenLinearReward
from softrl.trainers import SoftRolloutConfig, SoftRolloutTrainer, loading

pytestmark = pytest.mark.slow  # imports trl


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A folder with a model and its tokenizer."""
    folder = tmp_path / "tiny-base"
    llama(seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def arguments(tmp_path, **settings):
    defaults = {"report_to": [], "use_cpu": True, "top_k": 7, "beta": 0.0, "gradient_checkpointing": False}
    return SoftRolloutConfig(str(tmp_path / "run"), **{**defaults, **settings})


def test_a_model_by_name_is_loaded_with_its_keywords(tmp_path, saved):
    kept = llama(seed=3).state_dict()
    for keywords, dtype in ((None, torch.float32), ({"dtype": "float64"}, torch.float64)):
        trainer = SoftRolloutTrainer(
            saved, PairReward(), arguments(tmp_path, model_init_kwargs=keywords), train_dataset=dataset(),
            peft_config=LoraConfig(r=2, target_modules="all-linear"),
        )  # fmt: skip
        weight = trainer.model.get_base_model().model.embed_tokens.weight
        assert weight.dtype == dtype
        torch.testing.assert_close(weight, kept["model.embed_tokens.weight"].to(dtype), rtol=0, atol=0)
        assert trainer.processing_class("w5 w9").input_ids == [5, 9]
        assert trainer.reference.model is trainer.model  # with its adapter off, not a copy


def test_without_arguments_the_run_is_named_after_the_model(tmp_path, tokenizer, monkeypatch):
    config = LlamaConfig(
        vocab_size=70, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, eos_token_id=EOS,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny-base")
    monkeypatch.chdir(tmp_path)
    trainer = SoftRolloutTrainer(
        "tiny-base", TokenLinearReward(torch.zeros(70), 0.0), train_dataset=dataset(), processing_class=tokenizer
    )
    assert trainer.args.output_dir == "tiny-base-SoftRollout"
    assert trainer.relaxation.truncation.top_k == 64


def test_a_quantization_reaches_from_pretrained(tmp_path, saved, monkeypatch):
    """And the adapter on a model that is quantized is bfloat16, but for DoRA's magnitudes."""
    quantization, given = object(), {}

    def from_pretrained(name, **settings):
        given.update(settings, name=name)
        model = llama().float()
        model.is_loaded_in_4bit = True
        return model

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    trainer = SoftRolloutTrainer(
        saved, PairReward(), arguments(tmp_path), train_dataset=dataset(), quantization_config=quantization,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    )  # fmt: skip
    assert given == {"name": saved, "dtype": "float32", "quantization_config": quantization}
    trained = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == 6  # A, B and DoRA's magnitude in two layers
    for name, dtype in trained.items():
        assert dtype == (torch.float32 if "magnitude" in name else torch.bfloat16), name


def test_wrong_quantizations_and_adapters_are_refused(tmp_path, saved, tokenizer):
    with pytest.raises(ValueError, match=r"quantization_config is applied while .* but model is a LlamaForCausalLM"):
        SoftRolloutTrainer(
            llama(), PairReward(), arguments(tmp_path), dataset(), processing_class=tokenizer,
            quantization_config=object(),
        )  # fmt: skip
    args = arguments(tmp_path, model_init_kwargs={"quantization_config": object()})
    with pytest.raises(ValueError, match=r"to the trainer and in args\.model_init_kwargs; keep one"):
        loading.load_model(saved, args, object())
    with pytest.raises(TypeError, match=r"peft_config must be a peft\.PeftConfig such as LoraConfig, got dict"):
        loading.with_adapter(llama(), {"r": 2})
    config = LoraConfig(r=2, target_modules="all-linear")
    with pytest.raises(ValueError, match="peft_config is given, but model is a PeftModel already"):
        loading.with_adapter(loading.with_adapter(llama(), config), config)
    with pytest.raises(ValueError, match="processing_class is None, and the model has no name"):
        loading.load_tokenizer(llama(), args)


def test_every_declared_end_of_sequence_counts(tokenizer):
    model = llama()
    model.generation_config.eos_token_id = [7, EOS, 9]
    assert loading.eos_token_ids(model, tokenizer) == (EOS, 7, 9)
    model.generation_config.eos_token_id = 7
    assert loading.eos_token_ids(model, tokenizer) == (EOS, 7)
    model.generation_config.eos_token_id = None
    assert loading.eos_token_ids(model, tokenizer) == (EOS,)


@pytest.mark.parametrize("computes", [True, False])
def test_bfloat16_only_where_the_processor_computes_it(tmp_path, saved, monkeypatch, computes):
    monkeypatch.setattr(loading, "computes_bfloat16", lambda: computes)
    model = loading.load_model(saved, arguments(tmp_path, model_init_kwargs={"dtype": "bfloat16"}))
    assert model.dtype == (torch.bfloat16 if computes else torch.float32)
