"""Branches: three attentions and plain passes over every prefix agree, in values and in all gradients."""

import copy

import pytest
import torch
from helpers import V, gemma3, gpt2, gru, llama, mamba, rwkv, with_float64_norms
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
)

from softrl.models import prefix_attention
from softrl.models.branches import read_texts
from softrl.models.policy import Policy
from softrl.models.prefix_attention import reach_of, shared_prefix_attention

pytestmark = pytest.mark.usefixtures("float64_inside")


def lora_llama():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return model.double().eval()


def wide_gemma3():
    """A window that hides nothing, and norms in float64."""
    model = gemma3()
    model.config.sliding_window = 64
    return model


MODELS = {
    "llama, grouped keys": lambda: with_float64_norms(llama()),
    "llama, LoRA": lambda: with_float64_norms(lora_llama()),
    "gpt2": gpt2,
    "gemma3": wide_gemma3,
    "gru": gru,
}
ATTENTIONS = [(name, way) for name in MODELS for way in ("dense", "shared") if (name, way) != ("gru", "dense")]
NUM_TEXTS, T, LENGTH = 3, 6, 3
MASKS = {
    "right": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1, 1] + [0] * 4]).bool(),
    "left": torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [0] * 4 + [1] * 2]).bool(),
}
ANCHORS = {  # unordered, twice the same, on the last token, and on padding, as fillers of a batch are
    "right": torch.tensor([[5, 0, 3, 3], [0, 3, 1, 2], [1, 0, 0, 4]]),
    "left": torch.tensor([[5, 0, 3, 3], [2, 5, 3, 4], [4, 5, 5, 0]]),
}


def texts(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    ids = torch.randint(3, V, (NUM_TEXTS, T), generator=generator)
    return ids, torch.randn(NUM_TEXTS, 4, LENGTH, width, generator=generator, dtype=torch.float64)


def run(model, attention, side, embeds, reads=(T,), steps=(LENGTH,)):
    """Hidden states of texts and branches, reading and continuing in pieces."""
    policy, ids, mask = Policy(model), texts(model)[0], MASKS[side]
    state = read_texts(policy, attention, NUM_TEXTS, ids.device)
    fed = policy.embed(ids)
    read = [state.extend(*piece) for piece in zip(fed.split(reads, 1), mask.split(reads, 1), strict=True)]
    branches = state.branch(ANCHORS[side])
    return torch.cat(read, 1), torch.cat([branches.advance(piece) for piece in embeds.split(steps, 2)], 2)


def by_hand(model, side, embeds):
    """The model's own forward pass on the real tokens alone, for every text and for every branch."""
    ids, mask = texts(model)[0], MASKS[side]
    vectors = model.get_input_embeddings()(ids)

    def last_hidden(inputs):
        policy = Policy(model)
        arguments = policy.accepted({"inputs_embeds": inputs[None], "use_cache": False})
        return policy.decoder(**arguments).last_hidden_state[0]

    hidden = torch.zeros_like(vectors)
    after = torch.zeros_like(embeds)
    for row in range(NUM_TEXTS):
        hidden[row, mask[row]] = last_hidden(vectors[row, mask[row]])
        for index, anchor in enumerate(ANCHORS[side][row].tolist()):
            seen = mask[row].clone()
            seen[anchor + 1 :] = False
            seen[anchor] = True
            after[row, index] = last_hidden(torch.cat([vectors[row, seen], embeds[row, index]]))[-LENGTH:]
    return hidden, after


def outcome(model, side, result, embeds):
    """Hidden states, logits, and gradients of a non-linear function by inputs and by all parameters."""
    hidden, after = result
    assert after.isfinite().all()
    real, after = hidden[MASKS[side]], after[MASKS[side].gather(1, ANCHORS[side])]  # fillers count for nothing
    logits = Policy(model).head(torch.cat([real, after.flatten(0, 1)]))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = logits.log_softmax(-1)[:, 5].square().sum() + after.sin().sum() + real.cos().sum()
    grads = torch.autograd.grad(total, [embeds, *parameters], allow_unused=True)
    return [real, after, logits, *[grad for grad in grads if grad is not None]]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize(("name", "attention"), [*ATTENTIONS, *((name, "naive") for name in MODELS)])
def test_attentions_agree_with_passes_over_every_prefix(name, attention, side):
    model = MODELS[name]()
    embeds = texts(model)[1].requires_grad_()
    expected = outcome(model, side, by_hand(model, side, embeds), embeds)
    assert_same(outcome(model, side, run(model, attention, side, embeds), embeds), expected)


@pytest.mark.parametrize(("name", "attention"), [*ATTENTIONS, *((name, "naive") for name in MODELS)])
def test_reading_and_continuing_in_pieces_changes_nothing(name, attention):
    model = MODELS[name]()
    embeds = texts(model)[1].requires_grad_()
    expected = outcome(model, "left", run(model, attention, "left", embeds), embeds)
    pieces = run(model, attention, "left", embeds, reads=(1, 3, 2), steps=(1, 2))
    assert_same(outcome(model, "left", pieces, embeds), expected)


@pytest.mark.parametrize(("model", "side"), [(mamba, "left"), (mamba, "right"), (rwkv, "right")])
def test_other_architectures_branch_by_naive_passes(model, side):
    """RWKV ignores masks: padding on the right alone, where it harms nobody."""
    model = model()
    embeds = texts(model)[1].requires_grad_()
    expected = outcome(model, side, by_hand(model, side, embeds), embeds)
    assert_same(outcome(model, side, run(model, "naive", side, embeds, (2, 4), (2, 1)), embeds), expected)


def test_branches_do_not_see_each_other():
    model = with_float64_norms(llama())
    embeds = texts(model)[1]
    changed = embeds.clone()
    changed[:, 1, 1] += 1.0
    before, after = (run(model, "shared", "right", each)[1] for each in (embeds, changed))
    others = [0, 2, 3]
    torch.testing.assert_close(after[:, others], before[:, others], rtol=0.0, atol=1e-14)
    torch.testing.assert_close(after[:, 1, 0], before[:, 1, 0], rtol=0.0, atol=1e-14)
    assert (after[:, 1, 1:] - before[:, 1, 1:]).norm() > 0.1


def test_a_second_set_of_branches_starts_from_the_texts_alone():
    model = gpt2()
    policy, ids, embeds = Policy(model), *texts(model)
    state = read_texts(policy, "shared", NUM_TEXTS, ids.device)
    state.extend(policy.embed(ids), MASKS["right"])
    first, second = (state.branch(ANCHORS["right"]).advance(embeds) for _ in range(2))
    assert torch.equal(first, second)
    assert model.config._attn_implementation == "sdpa"


# The attention itself, against scores of all keys at once.


def attention_case(count, length, visible=None):
    """Two texts, four heads on two of keys, three branches; keys and values of different widths."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 3 * count, 5), (2, 2, 7, 5), (2, 2, 7, 4), (2, 2, 3, length, 5), (2, 2, 3, length, 4)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    if visible is None:
        visible = torch.rand(2, 3, 7, generator=generator) < 0.5
    return tensors, visible


def plain_attention(query, prefix_keys, prefix_values, own_keys, own_values, visible, scaling):
    """Softmax over the text's keys and the branch's own, written out for a query at a time."""
    out = query.new_zeros(len(query), query.shape[2], query.shape[1], own_values.shape[-1])
    length, count = own_keys.shape[3], query.shape[2] // own_keys.shape[2]
    rows = []
    for text, head, row in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        shared, (branch, step) = head // 2, divmod(row, count)
        seen, through = visible[text, branch], length - count + step + 1
        keys = torch.cat([prefix_keys[text, shared, seen], own_keys[text, shared, branch, :through]])
        values = torch.cat([prefix_values[text, shared, seen], own_values[text, shared, branch, :through]])
        rows.append((scaling * keys @ query[text, head, row]).softmax(0) @ values)
    return torch.stack(rows).view(len(query), query.shape[1], query.shape[2], -1).transpose(1, 2).view_as(out)


@pytest.mark.parametrize("block_elements", [1, 100, 2**20])
@pytest.mark.parametrize(("count", "length"), [(3, 3), (1, 4)])
def test_shared_attention_is_softmax_attention(monkeypatch, block_elements, count, length):
    monkeypatch.setattr(prefix_attention, "CPU_BLOCK_ELEMENTS", block_elements)
    tensors, visible = attention_case(count, length)
    visible[:, 1] = False  # a branch that sees nothing of its text
    mine = shared_prefix_attention(*tensors, visible, reach_of(visible), 0.3)
    theirs = plain_attention(*tensors, visible, 0.3)
    cotangent = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = [torch.autograd.grad(out, tensors, cotangent) for out in (mine, theirs)]
    assert_same([mine, *grads[0]], [theirs, *grads[1]])


def test_shared_attention_against_finite_differences():
    tensors, visible = attention_case(2, 3)
    reach = reach_of(visible)
    assert torch.autograd.gradcheck(lambda *given: shared_prefix_attention(*given, visible, reach, 0.3), tensors)


def test_shared_attention_takes_large_scores():
    tensors, visible = attention_case(2, 3)
    out = shared_prefix_attention(*tensors, visible, reach_of(visible), 1e6)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), tensors))


def test_shared_attention_in_bfloat16_is_near():
    tensors, visible = attention_case(2, 3)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors]
    results = []
    for given in (low, [tensor.detach().double().requires_grad_() for tensor in low]):
        out = shared_prefix_attention(*given, visible, reach_of(visible), 0.3)
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for mine, exact in zip(*results, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - exact).norm() < 0.02 * exact.norm()


def test_second_derivatives_are_refused_and_not_wrong():
    tensors, visible = attention_case(2, 3)
    out = shared_prefix_attention(*tensors, visible, reach_of(visible), 0.3)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_scores_are_not_kept_for_the_backward_pass():
    kept = []
    tensors, visible = attention_case(3, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.numel()) or saved, lambda x: x):
        shared_prefix_attention(*tensors, visible, reach_of(visible), 0.3)
    assert max(kept) < 2 * 4 * 9 * 7, "as many as there are scores on the texts"


# What is refused.


def read(model, attention="shared", mask=MASKS["right"]):
    policy, ids, embeds = Policy(model), *texts(model)
    state = read_texts(policy, attention, NUM_TEXTS, ids.device)
    state.extend(policy.embed(ids), mask)
    return state.branch(ANCHORS["right"]).advance(embeds)


@pytest.mark.parametrize("attention", ["dense", "shared"])
def test_architectures_that_only_branch_by_naive_passes_say_so(attention):
    for model in (mamba(), rwkv()):
        with pytest.raises(ValueError, match=r"needs a model whose state is keys and values.*attention='naive'"):
            read(model, attention)
    if attention == "dense":
        with pytest.raises(ValueError, match="GRUForCausalLM has another one"):
            read(gru(), attention)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2)).double()
    with pytest.raises(ValueError, match=r"BloomForCausalLM takes its positions from slots.*attention='naive'"):
        read(bloom, attention)
    with pytest.raises(ValueError, match=r"through a window of 4 tokens, and text and branch have 6.*'naive'"):
        read(gemma3(), attention)
    chunked = llama()
    chunked.config.attention_chunk_size = 8
    with pytest.raises(ValueError, match="through a window of 8 tokens, and text and branch have 9"):
        read(chunked, attention)


def test_models_that_bypass_the_attention_interface_are_noticed():
    """As models do that compute their attention themselves: here the layers look it up in another configuration."""
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.config = copy.deepcopy(model.config)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not call transformers' attention.*'naive'"):
        read(model)


def test_layers_that_read_the_keys_of_another_layer_are_noticed():
    model = llama()
    state = read_texts(Policy(model), "shared", NUM_TEXTS, torch.device("cpu"))
    state.extend(Policy(model).embed(texts(model)[0]), MASKS["right"])
    with pytest.raises(ValueError, match=r"layer 2 attends to keys of another layer; pass attention='naive'"):
        state.branch(ANCHORS["right"]).attend(2, torch.zeros(NUM_TEXTS, 4, 4, 4), 1.0)


def test_settings_that_the_shared_attention_does_not_know_are_refused():
    config = Gemma2Config(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).double().eval()
    with pytest.raises(ValueError, match=r"does not know this model's softcap; pass attention='naive'"):
        read(model, mask=torch.ones_like(MASKS["right"]))
    assert model.config._attn_implementation == "eager", "put back after an error"


def test_other_bad_requests():
    with pytest.raises(ValueError, match=r"attention must be one of \('shared', 'dense', 'naive'\), got 'flash'"):
        read_texts.__wrapped__(Policy(gpt2()), "flash", 1, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"padding comes before a text, which RwkvForCausalLM does not mask"):
        read(rwkv(), "naive", MASKS["left"])
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with pytest.raises(ValueError, match="gradient checkpointing is active"):
        read(model)
