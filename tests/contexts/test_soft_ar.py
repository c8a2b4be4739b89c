"""softAR models against windows that are built by hand, one at a time, and against the language model inside."""

from itertools import pairwise

import pytest
import torch
from helpers import V, gemma3, gpt2, gru, llama, prompts
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from softrl.contexts.soft_ar import NO_MEMORY, SoftARForCausalLM, SoftARModel
from softrl.contexts.soft_ar_config import SoftARConfig
from softrl.contexts.window import WindowLayout
from softrl.generation.soft_ar import soft_ar_generate
from softrl.models.policy import Policy, check_policy
from softrl.models.state import PrefixState
from softrl.types import Prompts

MODELS = {"llama": llama, "gpt2": gpt2, "gru": gru, "gemma3": gemma3}
LAYOUTS = {
    "hard": WindowLayout(2, 2, 4, 0, stride=3),
    "soft": WindowLayout(1, 3, 3, 2),
    "aggregate last": WindowLayout(2, 3, 4, 0, order=("segments", "aggregate")),
    "truncating": WindowLayout(0, 1, 3, 2, aggregate=False),
}
LENGTH = 17


def soft_ar(name="gpt2", layout="soft", output="tokens", tied=True):
    """With types away from their start."""
    model = SoftARForCausalLM.from_backbone(MODELS[name](tied=tied), LAYOUTS.get(layout, layout), output)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.model.place_types.normal_(0.0, 0.5, generator=generator)
        if output == "embedding":
            model.lm_head.projection.weight.normal_(0.0, 0.5, generator=generator)
            model.lm_head.projection.bias.normal_(0.0, 0.5, generator=generator)
    return model.eval()


def texts(num_rows=3, length=LENGTH, seed=0):
    return torch.randint(3, V, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def by_hand(model, x, position, memory=None, soft=None, soft_x=None):
    """The hidden state at a token of one row [n, D], from the one window that it is new in; slots are means."""
    layout, start = model.model.layout, 0
    while position > start + layout.uncompressed - 1:
        start += layout.stride
    memory = x if memory is None else memory
    cuts = [max(start - k * layout.segment_tokens, 0) for k in range(layout.num_segments, -1, -1)]
    slots = [(0, memory[: cuts[0]])] if layout.aggregate else []
    segments = [(1 + s, memory[first:last]) for s, (first, last) in enumerate(pairwise(cuts))]
    slots = segments + slots if layout.order[0] == "segments" else slots + segments
    fed = [each.mean(0) + model.model.place_types[kind] for kind, each in slots if len(each)]
    for place, t in enumerate(range(start, position + 1)):
        is_soft = soft is not None and soft[t] and place >= layout.num_hard
        fed.append(soft_x[t] + model.model.place_types[-1] if is_soft else x[t])
    return model.model.backbone(inputs_embeds=torch.stack(fed)[None]).last_hidden_state[0, -1]


def embedded(model, ids):
    return model.get_input_embeddings()(ids)


@pytest.mark.parametrize("name", MODELS)
def test_the_first_window_is_the_language_model_itself(name):
    """Also where it comes first in a longer history, and with absolute positions."""
    lm, ids = MODELS[name](), texts()
    model = SoftARForCausalLM.from_backbone(lm, LAYOUTS["soft"])
    for length in (2, 5, LENGTH):
        torch.testing.assert_close(model(ids[:, :length]).logits[:, :5], lm(ids[:, :5]).logits[:, :length])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_position_is_read_from_its_window(name, layout):
    model, ids = soft_ar(name, layout), texts()
    x, hidden = embedded(model, ids), model.model(ids).last_hidden_state
    for row in range(len(ids)):
        expected = torch.stack([by_hand(model, x[row], t) for t in range(LENGTH)])
        torch.testing.assert_close(hidden[row], expected, rtol=1e-6, atol=1e-6)  # Llama's norms round to float32


@pytest.mark.parametrize("name", MODELS)
def test_soft_tokens_are_soft_in_the_soft_region_alone(name):
    model, ids = soft_ar(name), texts()
    generator = torch.Generator().manual_seed(1)
    x, soft = embedded(model, ids), torch.rand(ids.shape, generator=generator) < 0.6
    soft_x = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    hidden = model.model(inputs_embeds=x, soft_mask=soft, soft_embeds=soft_x).last_hidden_state
    for t in range(LENGTH):
        expected = by_hand(model, x[0], t, soft=soft[0], soft_x=soft_x[0])
        torch.testing.assert_close(hidden[0, t], expected, rtol=1e-6, atol=1e-6)
    same = model.model(inputs_embeds=x, soft_mask=soft, soft_embeds=x).last_hidden_state
    assert torch.equal(model.model(inputs_embeds=x, soft_mask=soft).last_hidden_state, same)


@pytest.mark.parametrize("name", ["gpt2", "gru"])
def test_rows_without_memory_and_with_that_of_another_row(name):
    model, ids = soft_ar(name, "hard"), texts()
    x = embedded(model, ids)
    hidden = model.model(ids, memory_of=torch.tensor([2, NO_MEMORY, 2])).last_hidden_state
    plain = SoftARForCausalLM.from_backbone(MODELS[name](), WindowLayout(0, 1, 4, 0, aggregate=False, stride=3))
    torch.testing.assert_close(hidden[1], plain.model(ids[1:2]).last_hidden_state[0])
    torch.testing.assert_close(hidden[2], model.model(ids).last_hidden_state[2])
    expected = torch.stack([by_hand(model, x[0], t, memory=x[2]) for t in range(LENGTH)])
    torch.testing.assert_close(hidden[0], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_padding_on_either_side_changes_nothing(name, layout):
    model, ids = soft_ar(name, layout), texts(1)
    alone = [model(ids[:, :length]).logits[0] for length in (LENGTH, 9, 3)]
    for left in (True, False):
        mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 9, 3])[:, None]
        rows = torch.where(mask, ids, 2)
        if left:
            shifts = (LENGTH - mask.sum(-1)).tolist()
            rows = torch.stack([row.roll(shift) for row, shift in zip(rows, shifts, strict=True)])
            mask = mask.flip(-1)
        logits = model(rows, mask.long()).logits
        for row, expected in enumerate(alone):
            torch.testing.assert_close(logits[row][mask[row]], expected, rtol=1e-6, atol=1e-6)


def test_it_is_causal_and_memory_carries_what_the_window_has_left_behind():
    for layout, remembers in (("soft", True), ("truncating", False)):
        model, ids = soft_ar("gpt2", layout), texts(1)
        x = embedded(model, ids).detach().requires_grad_()
        hidden = model.model(inputs_embeds=x).last_hidden_state @ torch.linspace(-1.0, 1.0, 16).double()
        (grad,) = torch.autograd.grad(hidden[0, 9], x, retain_graph=True)
        assert not grad[0, 10:].any()
        assert grad[0, 9].norm() > 1e-3
        (grad,) = torch.autograd.grad(hidden[0, -1], x)
        assert (grad[0, 0].norm() > 1e-6) == remembers


@pytest.mark.parametrize("name", ["gpt2", "gru"])
def test_derivatives_against_finite_differences(name):
    layout = WindowLayout(1, 3, 2, 1, normalisation="learned")
    model = soft_ar(name, layout)
    x = embedded(model, texts(2, 8)).detach().requires_grad_()
    weight = torch.randn(2, 8, model.config.hidden_size, generator=torch.Generator().manual_seed(2)).double()
    leaves = [x, model.model.place_types, model.model.normalisation.exponent]

    def value(*given):
        return (model.model(inputs_embeds=given[0]).last_hidden_state * weight).sum()

    grads = torch.autograd.grad(value(*leaves), leaves)
    generator = torch.Generator().manual_seed(6)
    for leaf, grad in zip(leaves, grads, strict=True):
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                leaf.add_(direction, alpha=step)
                values.append(value(*leaves).item())
                leaf.sub_(direction, alpha=step)
        assert (values[0] - values[1]) / 2e-5 == pytest.approx((grad * direction).sum().item(), rel=1e-6)


# As a policy: what softrl asks of any causal LM.


@pytest.mark.parametrize("output", ["tokens", "embedding"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_a_policy(name, output):
    check_policy(Policy(soft_ar(name, output=output), 1.3))


@pytest.mark.parametrize("output", ["tokens", "embedding"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_step_by_step_is_the_parallel_pass(name, layout, output):
    """Prompts of 11, 7 and 3 tokens slide at different steps; rows are chosen anew and branched on the way."""
    policy, ids = Policy(soft_ar(name, layout, output)), texts(3, 30)
    mask = torch.arange(11) >= torch.tensor([0, 4, 8])[:, None]
    start, x = Prompts(ids[:, :11], mask), policy.embed(ids)
    expected = policy.hidden(start, x[:, 11:])
    with torch.no_grad():
        hidden, state = policy.begin(start, 1, 19)
        torch.testing.assert_close(hidden, expected[:, 0])
        for t in range(11, 17):
            hidden = policy.advance(state, x[:, t : t + 1])[:, 0]
            torch.testing.assert_close(hidden, expected[:, t - 10], rtol=1e-6, atol=1e-6)
        order = torch.tensor([2, 0, 0, 1])
        branch = state.branched(order)
        for t in range(17, 29):
            hidden = policy.advance(branch, x[order, t : t + 1])[:, 0]
            torch.testing.assert_close(hidden, expected[order, t - 10], rtol=1e-6, atol=1e-6)
        again = policy.advance(state, x[:, 17:20])
        torch.testing.assert_close(again, expected[:, 7:10], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gpt2", "gru"])
def test_an_enriched_token_is_as_if_it_had_been_so(name, layout):
    """In the window, in a segment, in the aggregate or forgotten: against the forward pass over the changed history,
    until it has left all of them. A branch from before keeps its own past."""
    policy, ids = Policy(soft_ar(name, layout)), texts(3, 30)
    mask = torch.arange(11) >= torch.tensor([0, 4, 8])[:, None]
    start, x = Prompts(ids[:, :11], mask), policy.embed(ids).detach()
    generator = torch.Generator().manual_seed(4)
    before = policy.hidden(start, x[:, 11:])
    for back in (0, 5, 9):  # tokens before the newest
        _, state = policy.begin(start, 1, 19)
        policy.advance(state, x[:, 11:16])
        branch = state.branched(torch.arange(3))
        delta = torch.randn(3, x.shape[-1], generator=generator, dtype=x.dtype)
        column, changed = 15 - back, x.clone()
        changed[[0, 2], column] += delta[[0, 2]] * mask[[0, 2], min(column, 10), None]
        positions = torch.tensor([column, -1, column - 8 if column >= 8 else -1])
        whole = torch.nn.functional.pad(mask, (0, 19), value=True)
        expected = policy.decoder(inputs_embeds=changed, attention_mask=whole).last_hidden_state
        torch.testing.assert_close(state.enrich(positions, delta), expected[:, 15], rtol=1e-6, atol=1e-6)
        for t in range(16, 29):
            hidden = policy.advance(state, x[:, t : t + 1])[:, 0]
            torch.testing.assert_close(hidden, expected[:, t], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(policy.advance(branch, x[:, 16:17])[:, 0], before[:, 6], rtol=1e-6, atol=1e-6)


def test_several_samples_of_a_prompt_share_its_window():
    policy, batch = Policy(soft_ar()), prompts()
    x = policy.embed(texts(6, 9))
    expected = policy.hidden(batch.repeated(2), x)
    with torch.no_grad():
        hidden, state = policy.begin(batch, 2, 9)
        steps = [hidden, *(policy.advance(state, x[:, t : t + 1])[:, 0] for t in range(8))]
    torch.testing.assert_close(torch.stack(steps, 1), expected)


def test_a_growing_state_is_differentiable():
    model = soft_ar()
    assert isinstance(model.model.new_state(torch.ones(1, 3).bool(), 4, growing=True), PrefixState)


def test_a_soft_token_among_the_hard_ones_is_refused():
    policy = Policy(soft_ar())
    ids = texts(1, 6)
    with torch.no_grad():
        _, state = policy.begin(Prompts(ids[:, :1], torch.ones(1, 1).bool()), 1, 4)
        assert state.places.tolist() == [1]
        with pytest.raises(ValueError, match=r"among the 3 hard ones \(places \[1\]\); feed a hard token there"):
            state.advance(policy.embed(ids[:, 1:2]), torch.tensor([True]))


@pytest.mark.parametrize("name", MODELS)
def test_transformers_generate_is_the_greedy_continuation(name):
    model, ids = soft_ar(name), texts(2, 4)
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    found = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(found, expected)


# What it puts out.


def test_the_soft_output_of_logits_is_the_mixture():
    model, ids = soft_ar("gemma3"), texts(1)  # it scales embeddings inside its module and caps logits
    hidden = model.model(ids).last_hidden_state[0, :2]
    expected = model(ids).logits[0, :2].softmax(-1) @ model.get_input_embeddings()(torch.arange(V))
    torch.testing.assert_close(model.soft_outputs(hidden), expected)
    with pytest.raises(ValueError, match="output='tokens' has logits and no vector y"):
        _ = model.head


def test_the_loss_is_the_cross_entropy_of_what_is_labelled():
    model, ids = soft_ar(), texts()
    labels = ids.clone()
    labels[:, :6] = -100
    output = model(ids, labels=labels)
    expected = nn.functional.cross_entropy(output.logits[:, 5:-1].flatten(0, 1), ids[:, 6:].flatten())
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])


def test_padding_predicts_nothing():
    """Labelled texts padded on the left have the loss of the same texts without padding."""
    model, ids = soft_ar(), texts(1, 9)
    padded = nn.functional.pad(ids, (4, 0), value=2)
    mask = torch.arange(13)[None] >= 4
    loss = model(padded, mask, labels=padded.masked_fill(~mask, -100)).loss
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)


# Saving.


@pytest.mark.parametrize("output", ["tokens", "embedding"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_auto_classes_load_what_was_saved(tmp_path, name, tied, output):
    layout = WindowLayout(2, 3, 4, 2, order=("segments", "aggregate"), normalisation="learned", stride=1)
    model, ids = soft_ar(name, layout, output, tied), texts()
    with torch.no_grad():
        model.model.normalisation.gain.fill_(1.7)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64").eval()
    assert type(again) is SoftARForCausalLM
    assert again.model.layout == layout
    assert {name: value.shape for name, value in again.named_parameters()} == {
        name: value.shape for name, value in model.named_parameters()
    }
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)
    if output == "tokens":
        assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    decoder = AutoModel.from_pretrained(tmp_path, dtype="float64").eval()
    assert type(decoder) is SoftARModel
    expected = model.model(ids).last_hidden_state
    torch.testing.assert_close(decoder(ids).last_hidden_state, expected, rtol=1e-6, atol=1e-6)


def test_a_model_begins_with_the_weights_it_is_given_and_leaves_them_alone():
    lm = llama(tied=False)
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    model = SoftARForCausalLM.from_backbone(lm, LAYOUTS["hard"])
    model.lm_head.weight.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    assert not model.model.place_types.any()
    assert model.dtype == torch.float64


def test_a_vocabulary_that_has_grown_is_saved_as_it_is(tmp_path):
    model = soft_ar("llama")
    model.resize_token_embeddings(V + 3)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64")
    assert again.get_input_embeddings().weight.shape[0] == V + 3 == again(texts(1)).logits.shape[-1]


# What is refused.


def config(**settings):
    window = {"num_segments": 1, "segment_tokens": 2, "num_hard": 3, "num_soft": 1}
    return SoftARConfig(**{"backbone_config": gpt2().config.to_dict(), "window": window, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "words"}, r"output must be one of \('tokens', 'embedding'\), got 'words'"),
        ({"distance_temperature": 0.0}, "distance_temperature must be positive and finite, got 0.0"),
        (
            {"window": {"num_segments": 0, "segment_tokens": 1, "num_hard": 64, "num_soft": 0}},
            "window has 65 places, and the language model max_position_embeddings=64",
        ),
        ({"window": None}, "window is None; give the arguments of WindowLayout"),
        ({"backbone_config": {"vocab_size": 3}}, "must be a causal LM's configuration as a dictionary, with model_ty"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_configurations_are_read_by_transformers(tmp_path):
    config().save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is SoftARConfig
    assert (again.layout, again.vocab_size, again.hidden_size) == (config().layout, V, 16)


def test_embeddings_of_another_width_than_the_states_are_refused():
    """OPT can project its embeddings, inside the decoder that reads them."""
    sizes = {"vocab_size": V, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    lm = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=8, max_position_embeddings=64))
    with pytest.raises(ValueError, match="token embeddings are 8 wide, and its hidden_size is 16"):
        SoftARForCausalLM.from_backbone(lm, LAYOUTS["soft"])


@pytest.mark.parametrize("steps", [False, True])
def test_eager_attention_in_float64_is_refused_where_a_place_is_empty(steps):
    """Its softmax is in float32, where the mask of float64 is infinite."""
    lm = llama()
    lm.set_attn_implementation("eager")
    model, ids = SoftARForCausalLM.from_backbone(lm, LAYOUTS["hard"]), texts(1)
    start = Prompts(ids[:, :5], torch.ones(1, 5).bool())
    with pytest.raises(ValueError, match="float32, sdpa attention"):
        _ = soft_ar_generate(model, start, 12) if steps else model(ids)
    assert model(ids[:, :4]).logits.isfinite().all()
    assert model.float()(ids).logits.isfinite().all()


def test_bad_inputs_are_refused():
    model, ids = soft_ar(), texts(1)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds, exactly one of the two"):
        model(ids, inputs_embeds=embedded(model, ids))
    with pytest.raises(ValueError, match="soft_embeds needs soft_mask"):
        model(ids, soft_embeds=embedded(model, ids))
    for mask in (torch.zeros(1, LENGTH, dtype=torch.long), torch.zeros(1, LENGTH, dtype=torch.bool)):
        with pytest.raises(ValueError, match="attention_mask: no row has a token"):
            model(ids, mask)
    state = model.model.new_state(torch.ones_like(ids, dtype=torch.bool), 3)
    with pytest.raises(ValueError, match="is_soft must be None at the first call"):
        state.advance(embedded(model, ids), torch.tensor([True]))
