"""Thinking inside delimiters, what opens and closes it, the cold stop, the cap, stop strings and streamers."""

import io
from contextlib import redirect_stdout

import pytest
import torch
from generation.soft_texts import Script, byte_model, byte_tokenizer, pieces, replayed
from helpers import gpt2
from transformers import LogitsProcessorList, TextStreamer

from softrl.generation.next_token import NextToken
from softrl.generation.soft_generate import soft_generate
from softrl.generation.soft_settings import Phase, SoftDecoding
from softrl.models.policy import Policy
from softrl.tokens.relaxation import SoftmaxMixture
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts

MIXTURE = Phase(SoftmaxMixture(Truncation(6)))
GREEDY = Phase(None, NextToken(greedy=True))
START, END = (5,), (9, 4)
PROMPTS = Prompts(
    torch.tensor([[2, 8, 7, 12], [9, 4, 5, 6], [5, 6, 9, 4]]),
    torch.tensor([[False, True, True, True], [True] * 4, [True] * 4]),
)


def soft(record):
    return ["".join("s" if each else "." for each in row) for row in record.is_soft.tolist()]


def check_replay(model, record, processor):
    """What the model sees is what was recorded, whatever was fed: its distributions are those of a pass over that."""
    for row in range(len(record.tokens)):
        if not callable(processor.margin):
            found = replayed(model, record, row)
            free = [i for i in range(record.tokens.shape[1]) if i >= len(processor.scripts[row])]
            for step in free:
                p = found[step].exp()[record.ids[row, step]]
                torch.testing.assert_close(record.probs[row, step], p, rtol=0.0, atol=1e-9)
    assert torch.equal(record.tokens, record.ids[..., 0])
    assert record.weights[..., 0][~record.is_soft].eq(1.0).all()
    assert (record.weights[..., 0] < 1.0)[record.is_soft].all()


def test_soft_inside_the_delimiters_only():
    model = gpt2()
    script = Script([[6, 5, 7, 8, 9, 4, 10, 11], [7, 9, 4, 5, 6, 9, 4, 8], [6, 9, 4, 6, 4, 9, 7, 7]])
    decoding = SoftDecoding(MIXTURE, GREEDY, START, END)
    record = soft_generate(Policy(model), PROMPTS, 12, decoding, logits_processor=script)
    assert [row[:8] for row in record.tokens.tolist()] == script.scripts
    # The opening token is the answer's own; of the closing ones the last is fed hard.
    assert [row[:8] for row in soft(record)] == ["..sss...", "ss..ss..", "........"]
    check_replay(model, record, script)


def test_the_answer_may_be_soft_and_the_thinking_hard():
    script = Script([[6, 5, 7, 9, 4, 10]] * 3)
    decoding = SoftDecoding(GREEDY, MIXTURE, START, END)
    record = soft_generate(Policy(gpt2()), PROMPTS, 6, decoding, logits_processor=script)
    assert soft(record) == ["ss...s", ".....s", "ss...s"]


def test_forced_thinking_opens_what_the_prompt_has_not():
    model, script = gpt2(), Script([[]] * 3)
    decoding = SoftDecoding(MIXTURE, GREEDY, (5, 13), END, force_thinking=True)
    opened = Prompts(torch.tensor([[2, 8, 7, 12], [9, 4, 5, 13], [5, 13, 9, 4]]), PROMPTS.mask)
    record = soft_generate(Policy(model), opened, 6, decoding, logits_processor=script)
    assert record.tokens[0, :2].tolist() == record.tokens[2, :2].tolist() == [5, 13]
    assert [row[:3] for row in soft(record)] == ["..s", "sss", "..s"]
    check_replay(model, record, script)


@pytest.mark.parametrize("delimited", [True, False])
def test_the_cap_ends_the_thinking(delimited):
    model, script = gpt2(), Script([[10, 10, 10, 10]] * 3)
    ids = (START, END) if delimited else ()
    decoding = SoftDecoding(MIXTURE, None, *ids, force_thinking=delimited, max_thinking_tokens=3)
    record = soft_generate(Policy(model), PROMPTS, 9, decoding, logits_processor=script)
    if delimited:
        assert soft(record) == [".sss.....", "sss......", ".sss....."]
        assert record.tokens[0, 4:6].tolist() == record.tokens[1, 3:5].tolist() == list(END)
    else:
        assert soft(record) == ["sss......"] * 3
    check_replay(model, record, script)
    never = SoftDecoding(MIXTURE, None, *ids, force_thinking=delimited, max_thinking_tokens=0)
    record = soft_generate(Policy(model), PROMPTS, 5, never)
    assert not record.is_soft.any()
    if delimited:
        assert record.tokens[0, :3].tolist() == [*START, *END]
        assert record.tokens[1, :2].tolist() == list(END)


def test_the_cap_is_of_the_text_and_counts_on_where_it_thinks_again():
    script = Script([[5, 7, 7, 9, 4, 5, 7, 7, 7, 7, 7]] + [[7] * 11] * 2)
    decoding = SoftDecoding(MIXTURE, None, START, END, max_thinking_tokens=5)
    record = soft_generate(Policy(gpt2()), PROMPTS, 11, decoding, logits_processor=script)
    assert soft(record)[0] == ".sss..ss..."  # 7, 7, 9, then 7, 7; the token that closes is none of them
    assert record.tokens[0, 8:10].tolist() == list(END)


@pytest.mark.parametrize("delimited", [True, False])
def test_the_cold_stop_is_each_rows_own(delimited):
    """Row 0 is sure from step 3, with one doubt at step 5; row 1 from step 1 on; row 2 never."""
    sure = {0: {3, 4, 6, 7, 8, 9, 10}, 1: set(range(1, 11)), 2: set()}
    script = Script([[10] * 11] * 3, margin=lambda row, step: 40.0 if step in sure[row] else 0.5)
    ids = (START, END) if delimited else ()
    opened = Prompts(torch.tensor([[2, 8, 7, 5], [9, 4, 5, 6], [9, 4, 5, 6]]), PROMPTS.mask)
    decoding = SoftDecoding(MIXTURE, None, *ids, cold_stop_nats=0.01, cold_stop_steps=3)
    record = soft_generate(Policy(gpt2()), opened, 11, decoding, logits_processor=script)
    assert soft(record) == ["sssssssss..", "ssss.......", "sssssssssss"]
    assert (record.entropy[0] < 0.01).nonzero()[:, 0].tolist()[:5] == [3, 4, 6, 7, 8]
    if delimited:
        assert record.tokens[0, 9:].tolist() == record.tokens[1, 4:6].tolist() == list(END)
        assert record.likeliest[1, 4] == 10  # what it would have said
    assert record.weights[1, 4:, 0].eq(1.0).all()


def test_delimiters_are_found_as_text_however_they_are_cut():
    tokenizer, model = byte_tokenizer(), byte_model()
    start, end = (tuple(tokenizer(text).input_ids) for text in ("<think>", "</think>"))
    assert tokenizer.convert_ids_to_tokens(end) == ["</", "think", ">"]
    scripts = [
        pieces(tokenizer, "a", "<", "th", "i", "n", "k", ">\n", "b", "<", "/", "think", ">\n", "c", "c"),
        pieces(tokenizer, "</", "think", ">", "c", "c", "c", "c", "c", "c", "c", "c", "c", "c", "c"),
    ]
    prompts = Prompts(
        torch.tensor([[0, *pieces(tokenizer, "x", "y", "z")], pieces(tokenizer, "<", "think", ">\n", "z")]),
        torch.tensor([[False, True, True, True], [True] * 4]),
    )
    decoding, script = SoftDecoding(MIXTURE, None, start, end), Script(scripts)
    record = soft_generate(Policy(model), prompts, 16, decoding, tokenizer=tokenizer, logits_processor=script)
    assert [row[:14] for row in soft(record)] == [".......ssss...", "ss............"]
    assert soft(record)[0][11] == "."  # `>\n` closes: fed hard
    check_replay(model, record, script)
    by_ids = soft_generate(Policy(model), prompts, 16, decoding, logits_processor=Script(scripts))
    assert [row[:14] for row in soft(by_ids)] == ["..............", ".............."]


@pytest.mark.parametrize("stop", ["nk>", ["zz", ">\nc"], "b", "bab</", "think"])
def test_stop_strings_end_a_text_where_transformers_ends_it(stop):
    tokenizer, model = byte_tokenizer(), byte_model()
    words = ("ab", "a", "b", "<", "/", "th", "ink", ">\n", "c", "c", "c")
    scripts, prompt = [pieces(tokenizer, *words), pieces(tokenizer, *("c" * 11))], pieces(tokenizer, *"xyzb")
    prompts = Prompts(torch.tensor([prompt, prompt]), torch.ones(2, 4, dtype=torch.bool))
    theirs = model.generate(
        prompts.ids, max_new_tokens=11, do_sample=False, stop_strings=stop, tokenizer=tokenizer,
        logits_processor=LogitsProcessorList([Script(scripts)]),
    )[:, 4:]  # fmt: skip
    record = soft_generate(
        Policy(model), prompts, 11, SoftDecoding(MIXTURE), stop=stop, tokenizer=tokenizer,
        logits_processor=Script(scripts),
    )  # fmt: skip
    assert torch.equal(record.tokens, theirs)
    assert record.mask[1].all()
    assert record.mask[0].sum() < 11


def test_a_streamer_sees_the_text():
    tokenizer, model = byte_tokenizer(), byte_model()
    prompt = pieces(tokenizer, *"xyz")
    prompts = Prompts(torch.tensor([prompt]), torch.ones(1, 3, dtype=torch.bool))
    words = ("ab", " ", "c", "\n", "b", "<", "c")
    shown = io.StringIO()
    with redirect_stdout(shown):
        record = soft_generate(
            Policy(model), prompts, 7, SoftDecoding(MIXTURE), streamer=TextStreamer(tokenizer),
            logits_processor=Script([pieces(tokenizer, *words)]),
        )  # fmt: skip
    assert shown.getvalue() == "xyz" + tokenizer.decode(record.tokens[0]) + "\n" == "xyzab c\nb<c\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"think_start": (3,)}, "give both delimiters, or neither"),
        ({"force_thinking": True}, "there is none; give both"),
        ({"cold_stop_nats": 0.0}, "cold_stop_nats must be positive, got 0.0"),
        ({"cold_stop_nats": 0.1, "cold_stop_steps": 0}, "cold_stop_steps must be at least 1, got 0"),
        ({"max_thinking_tokens": -1}, "max_thinking_tokens must not be negative, got -1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        SoftDecoding(MIXTURE, **settings)
