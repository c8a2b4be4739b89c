"""The generator that runs past its window, against forward passes over the whole of what it has written."""

import pytest
import torch
from contexts.test_soft_ar import LAYOUTS, MODELS, soft_ar, texts
from peft import PromptTuningConfig, get_peft_model

from softrl.contexts.collapse import LearnedCollapse, selective
from softrl.contexts.window import WindowLayout
from softrl.generation.next_token import NextToken
from softrl.generation.soft_ar import SoftWriting, everything, learned, soft_ar_generate, writes_only_soft
from softrl.generation.soft_generate import soft_generate
from softrl.generation.soft_settings import Phase, SoftDecoding
from softrl.models.policy import Policy
from softrl.types import Prompts

SLIDING = WindowLayout(1, 2, 2, 3, stride=2)  # less than the soft region
LENGTH, T = 11, 25


def batch():
    return Prompts(texts(3, LENGTH), torch.arange(LENGTH) >= torch.tensor([[0], [4], [8]]))


def reread(model, prompts, text):
    """Hidden states before every written token, from one pass over the history as it is in the end."""
    embeds = model.get_input_embeddings()(prompts.ids)
    never = torch.zeros_like(prompts.mask)
    hidden = model.model(
        inputs_embeds=torch.cat([embeds, text.context], 1),
        attention_mask=torch.cat([prompts.mask, text.mask], 1),
        soft_mask=torch.cat([never, text.is_soft], 1),
        soft_embeds=torch.cat([embeds, text.embeds], 1),
    ).last_hidden_state
    return hidden[:, prompts.ids.shape[1] - 1 : -1]


@pytest.mark.parametrize("output", ["tokens", "embedding"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_hard_tokens_are_those_of_the_plain_forward_and_of_transformers(name, layout, output):
    model, prompts = soft_ar(name, layout, output), batch()
    text = soft_ar_generate(model, prompts, T)
    assert text.tokens.shape == (3, T)
    assert not text.is_soft.any()
    hidden = reread(model, prompts, text)
    assert torch.equal(model.logits(hidden).argmax(-1), text.tokens)
    torch.testing.assert_close(text.context, model.get_input_embeddings()(text.tokens))
    settings = {"max_new_tokens": T, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    theirs = model.generate(prompts.ids, attention_mask=prompts.mask.long(), **settings)
    assert torch.equal(theirs[:, LENGTH:], text.tokens)


@pytest.mark.parametrize("output", ["tokens", "embedding"])
@pytest.mark.parametrize("layout", ["soft", "truncating", SLIDING], ids=["soft", "truncating", "sliding"])
@pytest.mark.parametrize("name", MODELS)
def test_soft_tokens_are_the_outputs_of_the_plain_forward(name, layout, output):
    """Written soft, read soft in their window, and hard afterwards: one pass over all of it gives them again."""
    model, prompts = soft_ar(name, layout, output), batch()
    text = soft_ar_generate(model, prompts, T, soft=SoftWriting())
    outputs = model.soft_outputs(reread(model, prompts, text))
    torch.testing.assert_close(text.embeds[text.is_soft], outputs[text.is_soft], rtol=1e-5, atol=1e-5)
    # The last window's are still soft; what has left the region has collapsed into the nearest token.
    layout = model.model.layout
    table = model.get_input_embeddings()(torch.arange(model.config.vocab_size))
    nearest = torch.cdist(text.embeds, table[None].expand(3, -1, -1)).argmin(-1)
    assert torch.equal(text.tokens[text.is_soft], nearest[text.is_soft])
    assert (text.collapsed <= text.is_soft).all()
    position = prompts.mask.sum(-1, keepdim=True) + torch.arange(T)
    last = prompts.mask.sum(-1, keepdim=True) + T - 2  # the last one that was fed
    start = layout.window_of(last) * layout.stride
    leaves = position < start + layout.num_hard
    assert torch.equal(text.collapsed, text.is_soft & leaves & (position <= last))
    expected = torch.where(text.collapsed[..., None], table[text.tokens], text.embeds)
    torch.testing.assert_close(text.context, expected)


def test_tokens_among_the_hard_places_are_hard():
    model = soft_ar("gpt2", WindowLayout(1, 2, 5, 3))
    ids = texts(1, 2)
    text = soft_ar_generate(model, Prompts(ids, torch.ones_like(ids).bool()), 14, soft=SoftWriting())
    assert text.is_soft[0].tolist() == [False] * 3 + [True] * 11


@pytest.mark.parametrize(
    "layout", [*((1, 2, 3, 2, stride) for stride in range(1, 6)), (1, 2, 1, 3, 3), (0, 1, 2, 1, 2)]
)
def test_where_nothing_is_ever_drawn(layout):
    """Against what is written, over all phases of a window: lengths of prompts from 1 to two windows."""
    *sizes, stride = layout
    model = soft_ar("gpt2", WindowLayout(*sizes, stride=stride))
    uncompressed = model.model.layout.uncompressed
    lengths = torch.arange(1, 2 * uncompressed + 1)
    mask = torch.arange(len(lengths)) >= len(lengths) - lengths[:, None]
    prompts = Prompts(texts(len(lengths), len(lengths)), mask)
    text = soft_ar_generate(model, prompts, 2 * uncompressed + 1, soft=SoftWriting())
    assert torch.equal(writes_only_soft(model.model.layout, lengths), text.is_soft.all(-1))


def test_some_soft_tokens_stay_what_they_are():
    model, prompts = soft_ar("llama"), batch()
    every = soft_ar_generate(model, prompts, T, soft=SoftWriting())
    limit = every.distance[every.is_soft].median()
    text = soft_ar_generate(model, prompts, T, soft=SoftWriting(which=selective("distance", limit.item())))
    assert 0 < text.collapsed.sum() < every.collapsed.sum()
    assert (text.distance[text.collapsed] > limit).all()
    outputs = model.soft_outputs(reread(model, prompts, text))
    torch.testing.assert_close(text.embeds[text.is_soft], outputs[text.is_soft], rtol=1e-5, atol=1e-5)


def test_a_map_decides_what_they_become():
    model, prompts = soft_ar(), batch()
    table, seen = model.get_input_embeddings().weight, []

    head = LearnedCollapse(16).double()
    with torch.no_grad():
        head.layers.weight.mul_(1e-3)
        head.layers.bias.copy_(table[7])

    def which(tokens):
        seen.append(tokens)
        return everything(tokens)

    text = soft_ar_generate(model, prompts, T, soft=SoftWriting(learned(head), which))
    assert (text.tokens[text.is_soft] == 7).all()
    torch.testing.assert_close(text.context[text.collapsed], table[7].expand(int(text.collapsed.sum()), -1))
    assert all((each.entropy > 0.0).all() for each in seen)


def test_a_text_ends_at_its_end_and_rows_end_by_themselves():
    model, prompts = soft_ar(), batch()
    whole = soft_ar_generate(model, prompts, T)
    end = int(whole.tokens[0, 6])
    first = [(row == end).nonzero()[0].item() if (row == end).any() else T - 1 for row in whole.tokens]
    text = soft_ar_generate(model, prompts, T, eos_ids=(end,), pad_id=2)
    assert text.mask.sum(-1).tolist() == [t + 1 for t in first]
    for row, t in enumerate(first):
        assert torch.equal(text.tokens[row, : t + 1], whole.tokens[row, : t + 1])
        assert (text.tokens[row, t + 1 :] == 2).all()


def test_draws_belong_to_a_row_and_not_to_its_batch():
    model, prompts = soft_ar(), batch()
    sampled = NextToken(temperature=1.3, top_k=9)
    text = soft_ar_generate(model, prompts, T, sampled, num_samples=2, seed=5)
    alone = Prompts(prompts.ids[:1], prompts.mask[:1])
    assert torch.equal(soft_ar_generate(model, alone, T, sampled, num_samples=2, seed=5).tokens, text.tokens[:2])
    assert not torch.equal(text.tokens[0], text.tokens[1])
    assert not torch.equal(soft_ar_generate(model, alone, T, sampled, num_samples=2, seed=6).tokens, text.tokens[:2])


def test_draws_are_those_of_a_prompt_s_number():
    model, prompts = soft_ar(), batch()
    sampled = NextToken(temperature=1.3, top_k=9)
    text = soft_ar_generate(model, prompts, T, sampled, num_samples=2, seed=5)
    alone = Prompts(prompts.ids[1:2], prompts.mask[1:2])
    numbered = soft_ar_generate(model, alone, T, sampled, num_samples=2, seed=5, indices=[1])
    assert torch.equal(numbered.tokens, text.tokens[2:4])
    assert not torch.equal(soft_ar_generate(model, alone, T, sampled, num_samples=2, seed=5).tokens, text.tokens[2:4])


@pytest.mark.parametrize("output", ["tokens", "embedding"])
def test_virtual_tokens_come_first_in_the_history(output):
    model, prompts = soft_ar("llama", output=output), batch()
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_layers=2, token_dim=16, num_attention_heads=4
    )
    tuned = get_peft_model(model, config).double().eval()
    virtual = torch.randn(4, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tuned.prompt_encoder["default"].embedding.weight.data.copy_(virtual)
    text = soft_ar_generate(Policy(tuned), prompts, T, soft=SoftWriting())
    for row in range(3):  # every one alone, without padding
        ids = prompts.ids[row][prompts.mask[row]]
        before = torch.cat([virtual, model.get_input_embeddings()(ids)])
        never = torch.zeros(len(before), dtype=torch.bool)
        hidden = model.model(
            inputs_embeds=torch.cat([before, text.context[row]])[None],
            soft_mask=torch.cat([never, text.is_soft[row]])[None],
            soft_embeds=torch.cat([before, text.embeds[row]])[None],
        ).last_hidden_state[0, len(before) - 1 : -1]
        outputs, soft = model.soft_outputs(hidden), text.is_soft[row]
        torch.testing.assert_close(text.embeds[row][soft], outputs[soft], rtol=1e-5, atol=1e-5)
        assert torch.equal(model.logits(hidden).argmax(-1)[~soft], text.tokens[row][~soft])
    with tuned.disable_adapter():
        without = soft_ar_generate(Policy(tuned), prompts, T, soft=SoftWriting())
    assert torch.equal(without.embeds, soft_ar_generate(model, prompts, T, soft=SoftWriting()).embeds)
    assert not torch.equal(text.embeds[:, 0], without.embeds[:, 0])


def test_softrl_s_own_decoding_writes_the_same():
    """`softrl generate` goes through this; with hard, greedy tokens there is one right text."""
    model, prompts = soft_ar(), batch()
    decoding = SoftDecoding(Phase(None, NextToken(greedy=True)))
    theirs = soft_generate(Policy(model), prompts, T, decoding)
    assert torch.equal(theirs.tokens, soft_ar_generate(model, prompts, T).tokens)


def test_the_cache_is_used_and_its_size_does_not_grow():
    """Between two windows a step feeds one embedding; no call ever holds more than a window."""
    model = soft_ar("gpt2", WindowLayout(1, 2, 8, 0, stride=4))
    ids, fed = texts(1, 5), []
    model.model.backbone.register_forward_pre_hook(
        lambda module, args, settings: fed.append(settings["inputs_embeds"].shape[1]), with_kwargs=True
    )
    soft_ar_generate(model, Prompts(ids, torch.ones_like(ids).bool()), 200)
    assert max(fed) <= model.model.layout.size
    assert fed.count(1) >= 140
    assert sum(fed) < 200 + 50 * model.model.layout.size


def test_soft_tokens_need_a_soft_region_and_texts_a_token():
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        soft_ar_generate(soft_ar("gpt2", "hard"), batch(), 0)
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"num_samples must be at least 1, got {count}"):
            soft_ar_generate(soft_ar("gpt2", "hard"), batch(), 3, num_samples=count)
    with pytest.raises(ValueError, match=r"no place for soft tokens \(num_soft=0\); pass None"):
        soft_ar_generate(soft_ar("gpt2", "hard"), batch(), 3, soft=SoftWriting())
