"""`model.generate` with soft decoding: as `soft_generate`, as transformers' own greedy text, and what it refuses."""

import io
from contextlib import redirect_stdout

import pytest
import torch
from generation.soft_texts import Script, byte_model, byte_tokenizer, pieces
from helpers import EOS, V, gpt2, llama, prompts
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LogitsProcessorList, TextStreamer

from softrl.generation.custom_generate import soft_decode, write_custom_generate
from softrl.generation.next_token import NextToken
from softrl.generation.soft_arguments import decoding_from
from softrl.generation.soft_generate import soft_generate
from softrl.generation.soft_settings import Phase, SoftDecoding, save_soft_decoding
from softrl.models.policy import Policy
from softrl.tokens.relaxation import GumbelSoftmax, SoftmaxMixture
from softrl.tokens.truncation import Truncation

MIXTURE = SoftDecoding(Phase(SoftmaxMixture(Truncation(5), max_entropy_nats=0.9)))
GIVEN = prompts(3)
INPUTS = {"input_ids": GIVEN.ids, "attention_mask": GIVEN.mask.long()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that transformers loads our function from, and a place for its copy of the code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return str(write_custom_generate(tmp_path / "soft"))


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize(
    "decoding", [MIXTURE, SoftDecoding(Phase(GumbelSoftmax(Truncation(5)))), SoftDecoding(Phase())]
)
def test_as_soft_generate(build, decoding):
    model = build()
    output = model.generate(
        **INPUTS, custom_generate=soft_decode, max_new_tokens=7, num_return_sequences=2, do_sample=True,
        decoding=decoding, seed=4,
        return_dict_in_generate=True, num_recorded=6, eos_token_id=[EOS, 7],
    )  # fmt: skip
    record = soft_generate(
        Policy(model), GIVEN, 7, decoding, 2, (EOS, 7), seed=4, pad_id=2, num_recorded=6,
    )  # fmt: skip
    assert torch.equal(output.sequences[:, 5:], record.tokens)
    assert torch.equal(output.sequences[:, :5], GIVEN.ids.repeat_interleave(2, 0))
    torch.testing.assert_close(output.record.weights, record.weights)
    assert torch.equal(output.record.nearest, record.nearest)
    plain = model.generate(
        **INPUTS, custom_generate=soft_decode, max_new_tokens=7, num_return_sequences=2, do_sample=True,
        decoding=decoding, seed=4,
        eos_token_id=[EOS, 7],
    )  # fmt: skip
    assert torch.equal(plain, output.sequences)


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5], [9, 10]]},
        {"suppress_tokens": [3, 4, 5, 6, 7, 8]},
        {"eos_token_id": [EOS, *range(3, 15)], "min_new_tokens": 4},
        {"eos_token_id": [EOS, *range(3, 15)]},
        {"max_length": 12},
        {"forced_eos_token_id": 9},
        {"sequence_bias": [[[7], 3.0]]},
        {"prefix_allowed_tokens_fn": lambda _, ids: [4 + len(ids) % 2, 9, 11]},
        {"generation_config": GenerationConfig(max_new_tokens=9, repetition_penalty=1.3, pad_token_id=2)},
    ],
)
def test_one_hot_soft_tokens_are_transformers_own_greedy_text(build, settings):
    model = build().float()
    settings = settings if {"max_length", "generation_config"} & set(settings) else settings | {"max_new_tokens": 12}
    theirs = model.generate(**INPUTS, **settings)
    ours = model.generate(**INPUTS, custom_generate=soft_decode, soft_top_k=1, **settings)
    assert torch.equal(ours, theirs)
    hard = SoftDecoding(Phase(None, NextToken(greedy=True)))
    assert torch.equal(model.generate(**INPUTS, custom_generate=soft_decode, decoding=hard, **settings), theirs)


def test_generates_own_settings_are_of_the_answer_and_the_temperature_of_both(tmp_path):
    model = gpt2()
    common = {"custom_generate": soft_decode, "max_new_tokens": 8, "seed": 3, "max_thinking_tokens": 3}
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.02}
    ours = model.generate(**INPUTS, **common, **sampling, soft_top_k=4)
    answer = Phase(None, NextToken(False, 0.7, 9, 0.9, 0.02))
    expected = decoding_from({"soft_top_k": 4, "soft_temperature": 0.7, "max_thinking_tokens": 3})
    decoding = SoftDecoding(expected.thinking, answer, max_thinking_tokens=3)
    record = soft_generate(Policy(model), GIVEN, 8, decoding, seed=3, eos_ids=(EOS,), pad_id=2)
    assert torch.equal(ours[:, 5:], record.tokens)
    assert expected.thinking.temperature == 0.7


def test_what_lies_beside_the_model_is_the_default_and_what_the_call_says_wins(tmp_path):
    gpt2().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    call = {"custom_generate": soft_decode, "max_new_tokens": 6, "return_dict_in_generate": True, "seed": 1}
    without = model.generate(**INPUTS, **call).record
    assert without.ids.shape[-1] == 10  # the default decoding
    saved = SoftDecoding(
        Phase(SoftmaxMixture(Truncation(4)), NextToken(temperature=1.7)),
        Phase(None, NextToken(False, 0.4, 7)), max_thinking_tokens=2,
    )  # fmt: skip
    save_soft_decoding(saved, tmp_path)
    by_default = model.generate(**INPUTS, **call).record
    expected = soft_generate(Policy(model), GIVEN, 6, saved, seed=1, eos_ids=(EOS,), pad_id=2)
    torch.testing.assert_close(by_default.weights, expected.weights)
    assert torch.equal(by_default.tokens, expected.tokens)
    greedy = model.generate(**INPUTS, **call, temperature=0.2, max_thinking_tokens=1).record
    changed = decoding_from({"temperature": 0.2, "max_thinking_tokens": 1}, saved)
    expected = soft_generate(Policy(model), GIVEN, 6, changed, seed=1, eos_ids=(EOS,), pad_id=2)
    assert torch.equal(greedy.tokens, expected.tokens)
    torch.testing.assert_close(greedy.probs, expected.probs)


def test_without_a_seed_torchs_own_rules():
    model, call = gpt2(), {"custom_generate": soft_decode, "max_new_tokens": 9, "decoding": SoftDecoding(Phase())}

    def text(seed):
        torch.manual_seed(seed)
        return model.generate(**INPUTS, **call, do_sample=True)

    assert torch.equal(text(1), text(1))
    assert not torch.equal(text(1), text(2))


def test_a_folder_does_the_same(folder):
    model = gpt2()
    call = {
        "max_new_tokens": 7,
        "soft_top_k": 4,
        "seed": 4,
        "num_return_sequences": 2,
        "do_sample": True,
        "return_dict_in_generate": True,
    }
    by_function = model.generate(**INPUTS, custom_generate=soft_decode, **call)
    by_folder = model.generate(**INPUTS, custom_generate=folder, trust_remote_code=True, **call)
    assert torch.equal(by_folder.sequences, by_function.sequences)
    torch.testing.assert_close(by_folder.record.weights, by_function.record.weights)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(**INPUTS, custom_generate=folder, trust_remote_code=False, **call)


def test_in_a_models_folder_it_is_the_models_generate(tmp_path, folder):
    gpt2().save_pretrained(folder)
    save_soft_decoding(MIXTURE, folder)
    trusted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, trust_remote_code=True)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    expected = soft_generate(Policy(plain), GIVEN, 6, MIXTURE, eos_ids=(EOS,), pad_id=2)
    call = {"attention_mask": INPUTS["attention_mask"], "max_new_tokens": 6}
    assert torch.equal(trusted.generate(GIVEN.ids, **call)[:, 5:], expected.tokens)
    assert torch.equal(trusted.generate(input_ids=GIVEN.ids, **call)[:, 5:], expected.tokens)
    assert not torch.equal(plain.generate(GIVEN.ids, **call)[:, 5:], expected.tokens)


def test_adapters_count():
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)).double()
    call = {"max_new_tokens": 6, "decoding": MIXTURE, "custom_generate": soft_decode}
    ours = model.generate(**INPUTS, **call)
    record = soft_generate(Policy(model), GIVEN, 6, MIXTURE, eos_ids=(EOS,), pad_id=2)
    assert torch.equal(ours[:, 5:], record.tokens)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**INPUTS, **call), ours)


@pytest.mark.parametrize("by_folder", [False, True])
def test_streamers_stop_strings_and_delimiters(by_folder, folder):
    tokenizer, model = byte_tokenizer(), byte_model()
    words = ("a", "<", "th", "ink", ">\n", "b", "c", "<", "/", "think", ">", "d", "e", "f")
    ids = torch.tensor([pieces(tokenizer, *"xyz")])
    names = ("tokenizer", "stop_strings") if by_folder else ("soft_tokenizer", "soft_stop_strings")
    call = dict(zip(names, (tokenizer, "de"), strict=True))
    if by_folder:
        call["trust_remote_code"] = True
    shown = io.StringIO()
    with redirect_stdout(shown):
        output = model.generate(
            ids, custom_generate=folder if by_folder else soft_decode, max_new_tokens=30, soft_top_k=5,
            think_start="<think>", think_end="</think>", streamer=TextStreamer(tokenizer),
            logits_processor=LogitsProcessorList([Script([pieces(tokenizer, *words)])]), return_dict_in_generate=True,
            **call,
        )  # fmt: skip
    text = "xyza<think>\nbc</think>de"
    assert tokenizer.decode(output.sequences[0]) == text
    assert shown.getvalue() == text + "\n"
    assert output.record.is_soft[0].tolist() == [False] * 5 + [True] * 5 + [False] * 3


def _filled_cache(model):
    return model(GIVEN.ids, use_cache=True).past_key_values


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 3}, "num_beams=3"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"do_sample": True, "typical_p": 0.5}, "typical_p=0.5"),
        ({"do_sample": True, "eta_cutoff": 0.1}, "eta_cutoff=0.1"),
        ({"do_sample": True, "epsilon_cutoff": 0.1}, "epsilon_cutoff=0.1"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states=True"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"assistant_model": True}, "assistant_model='GPT2LMHeadModel'"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"inputs_embeds": torch.zeros(3, 5, 16, dtype=torch.float64)}, "inputs_embeds='Tensor'"),
        ({"token_type_ids": torch.zeros(3, 5, dtype=torch.long)}, "token_type_ids='Tensor'"),
        ({"past_key_values": True}, "cache='a filled DynamicCache'"),
        ({"position_ids": torch.arange(5).expand(3, 5) + 2}, "position_ids: soft decoding counts positions"),
        ({"watermarking_config": {"bias": 2.0}}, "watermarking_config="),
        ({"soft_topk": 3}, "soft_topk"),
        ({"think_start": "<think>", "think_end": "</think>"}, "soft_tokenizer"),
        ({"soft_top_k": V + 1}, "more than the vocabulary"),
    ],
)
def test_what_it_cannot_follow_is_named(settings, message):
    model = gpt2()
    if "assistant_model" in settings:
        settings = {"assistant_model": gpt2(1)}
    if "past_key_values" in settings:
        settings = {"past_key_values": _filled_cache(model)}
        assert isinstance(settings["past_key_values"], DynamicCache)
    with pytest.raises(ValueError, match=message):
        model.generate(**INPUTS, custom_generate=soft_decode, max_new_tokens=3, **settings)
