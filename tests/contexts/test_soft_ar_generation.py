"""softAR models in transformers' hands: `generate`, adapters, settings of the model inside; the same or an error."""

import pytest
import torch
from contexts.test_soft_ar import LAYOUTS, MODELS, embedded, soft_ar, texts
from helpers import mamba, rwkv
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationConfig

from softrl.contexts.soft_ar import SoftARForCausalLM

WRITE = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


def greedy(model, ids, count=8):
    """By the forward pass alone."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_that_is_asked_for_changes_nothing(name):
    model, ids = soft_ar(name, tied=False), texts(2, 11)
    expected = greedy(model, ids)
    assert torch.equal(model.generate(ids, **WRITE, use_cache=True), expected)
    config = GenerationConfig(**WRITE, use_cache=True)
    assert torch.equal(model.generate(ids, generation_config=config), expected)
    assert torch.equal(model.generate(ids, **WRITE, cache=DynamicCache()), expected)


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_text_begins_with_embeddings(use_cache):
    model, ids = soft_ar("llama"), texts(3, 6)
    expected = greedy(model, ids)
    x = embedded(model, ids)
    assert torch.equal(model.generate(inputs_embeds=x, **WRITE, use_cache=use_cache), expected[:, 6:])
    # Vectors of no token, and a padded row.
    padded = torch.cat([torch.randn(1, 3, x.shape[-1], dtype=x.dtype), x[:1]], 1)
    mask = torch.arange(9)[None] >= 3
    found = model.generate(inputs_embeds=padded, attention_mask=mask.long(), **WRITE, use_cache=use_cache)
    assert torch.equal(found, expected[:1, 6:])


@pytest.mark.parametrize("use_cache", [False, True])
def test_beams_are_those_without_a_cache(use_cache):
    model, ids = soft_ar("llama"), texts(2, 7)
    beams = model.generate(ids, **WRITE, num_beams=3, use_cache=use_cache)
    by_embeds = model.generate(inputs_embeds=embedded(model, ids), **WRITE, num_beams=3, use_cache=use_cache)
    assert torch.equal(by_embeds, beams[:, 7:])
    scores = []
    for found in (beams, greedy(model, ids)):  # beams are at least as likely, which a wrong history is not
        log_probs = model(found).logits.log_softmax(-1)[:, 6:-1]
        scores.append(log_probs.gather(-1, found[:, 7:, None]).sum((1, 2)))
    assert (scores[0] >= scores[1] - 1e-9).all()


def test_what_needs_a_real_cache_is_refused():
    model, ids = soft_ar(), texts(2, 11)
    states = torch.zeros(2, 2, 4, 8)
    full = DynamicCache()
    full.update(states, states, 0)
    for name in ("past_key_values", "cache"):
        with pytest.raises(ValueError, match=r"holds 4 tokens or layers, and softAR models read whole histories"):
            model(ids, **{name: full})
    with pytest.raises(ValueError, match="holds 1 tokens or layers"):
        model(ids, past_key_values=((states, states),))
    with pytest.raises(ValueError, match="holds 4 tokens or layers"):
        model.generate(ids, **WRITE, cache=full)
    with pytest.raises(ValueError, match="to generate, exactly one of the two"):
        model.generate(ids, inputs_embeds=embedded(model, ids), **WRITE)
    with pytest.raises(ValueError, match="prefill_chunk_size=4 needs a cache of the chunks before"):
        model.generate(ids, **WRITE, use_cache=True, prefill_chunk_size=4)
    assert torch.equal(model(ids, past_key_values=DynamicCache(), use_cache=True).logits, model(ids).logits)


def test_adapters_with_virtual_tokens():
    model, ids = soft_ar("llama").float(), texts(1, 6)
    sizes = {"num_virtual_tokens": 2, "num_layers": 2, "token_dim": 16, "num_attention_heads": 4}
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", **sizes)).eval()
    assert torch.equal(tuned.generate(input_ids=ids, **WRITE, use_cache=True), tuned.generate(input_ids=ids, **WRITE))
    prefixed = get_peft_model(soft_ar("llama").float(), PrefixTuningConfig(task_type="CAUSAL_LM", **sizes)).eval()
    with pytest.raises(ValueError, match="softAR models read whole histories"):
        prefixed.generate(input_ids=ids, **WRITE)


# The model inside.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_that_reads_empty_places_is_refused(layout):
    """Without slots as well: in a batch, rows whose windows hold fewer tokens are padded."""
    with pytest.raises(ValueError, match="RwkvForCausalLM does not leave out what attention_mask says"):
        SoftARForCausalLM.from_backbone(rwkv(), LAYOUTS[layout])
    model, ids = SoftARForCausalLM.from_backbone(mamba(), LAYOUTS[layout]), texts()
    torch.testing.assert_close(model(ids).logits[:, :4], model(ids[:, :4]).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["eager", "sdpa", None])
def test_the_kind_of_attention_is_that_which_is_asked_for(tmp_path, kind):
    lm = MODELS["llama"]().float()
    if kind is not None:
        lm.set_attn_implementation(kind)
    model = SoftARForCausalLM.from_backbone(lm, LAYOUTS["soft"])
    kinds = [each.config._attn_implementation for each in (lm, model, model.model, model.model.backbone)]
    assert kinds == [kind or "sdpa"] * 4
    model.save_pretrained(tmp_path)
    for loader in (AutoModelForCausalLM, AutoModel):
        again = loader.from_pretrained(tmp_path, **({} if kind is None else {"attn_implementation": kind}))
        inside = again.backbone if loader is AutoModel else again.model.backbone
        assert again.config._attn_implementation == inside.config._attn_implementation == kinds[0]
        seen = type(again)(again.config)  # the configuration says it to the next one
        assert seen.config._attn_implementation == kinds[0]
    model.set_attn_implementation("eager")
    assert model.model.backbone.config._attn_implementation == "eager"
    assert lm.config._attn_implementation == kinds[0]


@pytest.mark.parametrize("make", [MODELS["gru"], mamba], ids=["gru", "mamba"])
def test_models_without_attention_are_made_again(tmp_path, make):
    model, ids = SoftARForCausalLM.from_backbone(make(), LAYOUTS["soft"]), texts()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64").eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    for each in (model, again):
        assert type(each)(each.config).model.layout == model.model.layout


def test_end_tokens_go_along(tmp_path):
    lm = MODELS["llama"]()
    lm.generation_config.eos_token_id = [1, 5]
    model = SoftARForCausalLM.from_backbone(lm, LAYOUTS["soft"])
    model.generation_config.eos_token_id.append(9)
    assert lm.generation_config.eos_token_id == [1, 5]
    model.save_pretrained(tmp_path)
    for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64")):
        assert each.generation_config.eos_token_id == [1, 5, 9]
        assert each.generation_config.use_cache is False
