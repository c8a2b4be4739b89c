"""Soft decoding of the real model: greedy text as transformers', delimiters as its tokenizer cuts them, the bound."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softrl.assets import language_model
from softrl.generation.custom_generate import soft_decode
from softrl.generation.soft_arguments import decoding_from
from softrl.generation.soft_generate import soft_generate
from softrl.models.policy import Policy
from softrl.types import Prompts

pytestmark = pytest.mark.slow
TEXTS = ["The movie was", "Once upon a time, in a small village by the sea, there lived", "2 + 2 ="]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(language_model(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(language_model(), padding_side="left")


@pytest.fixture(scope="module")
def inputs(tokenizer):
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer(TEXTS, return_tensors="pt", padding=True)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}])
def test_one_kept_token_is_greedy_decoding_on_a_padded_batch(model, tokenizer, inputs, settings):
    call = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": tokenizer.pad_token_id, **settings}
    theirs = model.generate(**inputs, **call)
    assert not inputs.attention_mask.all()
    assert torch.equal(model.generate(**inputs, custom_generate=soft_decode, soft_top_k=1, **call), theirs)


def test_the_bound_holds_and_rows_do_not_depend_on_the_batch(model, inputs):
    policy, prompts = Policy(model), Prompts(inputs.input_ids, inputs.attention_mask.bool())
    decoding = decoding_from({"soft_top_k": 64, "max_entropy_nats": 0.8, "relaxation": "gumbel_softmax"})
    together = soft_generate(policy, prompts, 16, decoding, seed=3)
    assert together.fed_entropy.max() <= 0.8 + 1e-4
    assert (together.fed_entropy > 0.79).any()
    assert (together.nearest == together.tokens).float().mean() > 0.5  # bounded mixtures stay near their heaviest
    alone = Prompts(prompts.ids[:1, -3:], prompts.mask[:1, -3:])
    one = soft_generate(policy, alone, 16, decoding, seed=3)
    assert prompts.mask[0].sum() == 3
    first = slice(0, 6)  # float32's rounding grows through the feedback: to 0.08 by step 15
    assert torch.equal(one.tokens[0, first], together.tokens[0, first])
    torch.testing.assert_close(one.weights[0, first], together.weights[0, first], rtol=0.0, atol=2e-3)


def test_delimiters_as_the_model_writes_them(model, tokenizer, inputs):
    """Forced open, capped, closed, hard thereafter; and found where the prompt has opened it, its `>` in `>\\n`."""
    decoding = decoding_from(
        {"think_start": "<think>", "think_end": "</think>", "force_thinking": True, "max_thinking_tokens": 4},
        tokenizer=tokenizer,
    )
    opened = tokenizer(["Why?<think>\nBecause", "The movie was"], return_tensors="pt", padding=True)
    prompts = Prompts(opened.input_ids, opened.attention_mask.bool())
    record = soft_generate(Policy(model), prompts, 16, decoding, tokenizer=tokenizer)
    start, end = (len(tokenizer(text).input_ids) for text in ("<think>", "</think>"))
    assert record.is_soft.sum(-1).tolist() == [4, 4]
    assert record.is_soft[0, :4].all()
    assert record.is_soft[1, start : start + 4].all()
    assert tokenizer.decode(record.tokens[0, 4 : 4 + end]) == "</think>"
    assert tokenizer.decode(record.tokens[1, start + 4 : start + 4 + end]) == "</think>"
