"""The latent reasoner against plain loops over positions, thoughts and latents; causality, padding, fast paths."""

import itertools

import pytest
import torch
from models.latent_reasoners import KINDS, SEED, SIZES, V, close, reasoner, texts
from torch import nn
from transformers import DynamicCache

from softrl.models.reasoner_config import WEIGHT_GROUPS

pytestmark = pytest.mark.usefixtures("float64_inside")


# The forward pass against loops.


class LoopedGRU:
    """States as GRU cells give them, one token at a time."""

    def __init__(self, model, module):
        self.decoder = model.cores[model.config.group_of(module)].decoder
        self.embed = self.decoder.embed_tokens

    def read(self, ids, state=None):
        return self.feed(self.embed(ids), state)

    def feed(self, embeds, state=None):
        states = [None] * len(self.decoder.cells) if state is None else list(state)
        for embed in embeds:
            for index, cell in enumerate(self.decoder.cells):
                states[index] = embed = nn.GRUCell.forward(cell, embed[None], states[index])[0][None]
                embed = embed[0]
        return states[-1][0], states


class LoopedLlama:
    """States of whole sequences, with transformers' own cache handed from one model to the next."""

    def __init__(self, model, module):
        self.decoder = model.cores[model.config.group_of(module)].decoder
        self.embed = self.decoder.embed_tokens

    def read(self, ids, state=None):
        return self.feed(self.embed(ids), state)

    def feed(self, embeds, state=None):
        cache = DynamicCache()
        for index, (keys, values) in enumerate(state or []):
            cache.update(keys, values, index)
        before = cache.get_seq_length()
        where = torch.arange(before, before + len(embeds))[None]
        out = self.decoder(inputs_embeds=embeds[None], cache=cache, position_ids=where, use_cache=True)
        return out.last_hidden_state[0, -1], [(layer.keys, layer.values) for layer in cache.layers]


def looped(model, ids, values):
    """log p_mixed and log π(h) of given latents, position by position and thought by thought."""
    config = model.config
    core = LoopedGRU if config.core == "gru" else LoopedLlama
    base, context, reason, interpret = (
        core(model, name) for name in ("base_lm", "base_reasoner", "reasoner", "interpreter")
    )
    talk, thought = [], []
    for row, where, sample in itertools.product(range(len(ids)), range(ids.shape[1]), range(values.shape[2])):
        prefix, latents = ids[row, : where + 1], values[row, where, sample]
        embeds = model.latent.embed(latents)
        state, log_prob, fed = context.read(prefix)[1], 0.0, model.start
        for latent, embed in zip(latents, embeds, strict=True):
            hidden, state = reason.feed(fed[None], state)
            log_prob = log_prob + model.latent.log_prob(model.latent_head(hidden), latent)
            fed = embed
        hidden, state = interpret.read(prefix)
        if len(latents):
            hidden = interpret.feed(model.to_interpreter(embeds), state)[0]
        head = model.interpreter_head or model.head
        of_thought = head(model.to_head(hidden)).softmax(-1)
        of_base = base.read(prefix)[0]
        weight = model.mixing(of_base, hidden).sigmoid()
        talk.append(((1 - weight) * model.head(of_base).softmax(-1) + weight * of_thought).log())
        thought.append(torch.as_tensor(log_prob))
    shape = (*ids.shape, values.shape[2])
    return torch.stack(talk).unflatten(0, shape), torch.stack(thought).unflatten(0, shape)


CASES = {
    "gru": {},
    "gru, two layers, shared": {"num_hidden_layers": 2, "weight_groups": "AAAA"},
    "gru, sizes, shared head": {**SIZES, "share_lm_head": True},
    "gru, deep head, reasoner and interpreter shared": {
        "weight_groups": "ABCC", "simple_lm_head": False, "head_activation": "gelu",
    },
    "gru, one latent": {"n_thought": 1},
    "gru, no latents": {"n_thought": 0},
    "llama": {"core": "transformer", "num_hidden_layers": 2},
    "llama, shared": {"core": "transformer", "weight_groups": "AAAA"},
    "llama, sizes": {"core": "transformer", **SIZES, "num_hidden_layers": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_forward_is_a_loop_over_positions_and_thoughts(case, kind):
    model, ids = reasoner(**CASES[case], **KINDS[kind]), texts()
    out = model(ids, labels=ids, num_thoughts=2, seed=SEED)
    values = out.thought_values.detach()
    talk, thought = looped(model, ids, values)
    close(out.talk_log_probs, talk)
    close(out.thought_log_probs, thought.to(talk.dtype))
    close(out.logits, talk.exp().mean(2).log())
    close(out.rewards[:, :-1], talk[:, :-1].gather(-1, ids[:, 1:, None, None].expand(-1, -1, 2, 1))[..., 0])
    assert torch.equal(out.rewards[:, -1], torch.zeros(2, 2, dtype=torch.float64))
    close(out.loss, -talk.exp().mean(2).log()[:, :-1].gather(-1, ids[:, 1:, None]).mean())
    parameters = [each for name, each in model.named_parameters() if "log_z" not in name]
    grads = []
    for of_talk, of_thought in ((out.talk_log_probs, out.thought_log_probs), (talk, thought.to(talk.dtype))):
        weights = torch.linspace(-1.0, 1.0, of_talk.numel(), dtype=torch.float64).view_as(of_talk)
        total = (of_talk * weights).sum() + (of_thought * weights[..., 0]).sum()
        grads.append(torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True))
    for (name, _), ours, theirs in zip(model.named_parameters(), *grads, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("core", ["gru", "transformer"])
def test_given_latents_are_scored_as_they_were_when_drawn(core, kind):
    model, ids = reasoner(core=core, **KINDS[kind]), texts()
    drawn = model(ids, labels=ids, num_thoughts=3, seed=SEED)
    scored = model(ids, labels=ids, values=drawn.thought_values)
    for name in ("logits", "rewards", "thought_log_probs", "thought_embeds", "thought_entropy"):
        close(scored[name], drawn[name])


def test_reparameterised_thoughts_are_finite_differences_and_sampled_ones_have_no_path():
    for kind in ("gaussian", "soft"):
        model, ids = reasoner(**KINDS[kind]), texts()
        weight = model.latent_head.weight

        def loss(reparameterised=True, model=model, ids=ids):
            return model(ids, labels=ids, num_thoughts=2, seed=SEED, reparameterised=reparameterised).loss

        (grad,) = torch.autograd.grad(loss(), weight)
        direction = torch.linspace(-1.0, 1.0, weight.numel(), dtype=torch.float64).view_as(weight)
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight.add_(step * direction)
                ends.append(loss())
                weight.sub_(step * direction)
        slope = (grad * direction).sum()
        assert slope.abs() > 1e-4
        torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-9)
        assert torch.autograd.grad(loss(reparameterised=False), weight, allow_unused=True) == (None,)


def test_log_probabilities_are_of_values_as_constants_also_of_reparameterised_ones():
    model, ids = reasoner(n_thought=1, **KINDS["gaussian"]), texts()
    drawn = model(ids, seed=SEED, reparameterised=True)
    given = model(ids, values=drawn.thought_values.detach())
    parameters = [model.latent_head.weight, model.latent_head.bias]
    grads = [torch.autograd.grad(out.thought_log_probs.square().sum(), parameters) for out in (drawn, given)]
    close(*grads)


# Causality, batches, padding.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("core", ["gru", "transformer"])
def test_a_later_token_changes_no_earlier_prediction(core, kind):
    model, ids = reasoner(core=core, **KINDS[kind]), texts()
    changed = ids.clone()
    changed[:, 3] = (changed[:, 3] + 1) % V
    before, after = (model(each, seed=SEED) for each in (ids, changed))
    for name in ("logits", "talk_log_probs", "base_log_probs", "context", "thought_log_probs"):
        close(after[name][:, :3], before[name][:, :3])
        if name == "thought_log_probs" and kind != "discrete":
            continue  # a density of a draw is a function of its random numbers (and of σ)
        assert not torch.allclose(after[name][:, 3:], before[name][:, 3:], atol=1e-6), name


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("core", ["gru", "transformer"])
def test_rows_alone_and_together_give_the_same_numbers(core, kind, side):
    model, lengths = reasoner(core=core, **KINDS[kind]), {"none": (4, 4, 4)}.get(side, (4, 6, 2))
    rows = [texts(1, length, seed=index) for index, length in enumerate(lengths)]
    width = max(lengths)
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    places = [slice(width - len(row[0]), width) if side == "left" else slice(0, len(row[0])) for row in rows]
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[index, place], mask[index, place] = row[0], 1
    keys = [17, 4, 99]
    labels = ids.masked_fill(mask == 0, -100)
    together = model(ids, mask, labels, seed=SEED, row_ids=keys)
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        alone = model(row, labels=row, seed=SEED, row_ids=[keys[index]])
        for name in ("logits", "thought_log_probs", "rewards", "thought_embeds"):
            close(together[name][index, place], alone[name][0])
        assert torch.equal(together.is_target[index, place], alone.is_target[0])
    assert together.is_target.sum() == sum(lengths) - 3, "nothing is predicted from padding"
    other = model(ids, mask, seed=SEED, row_ids=[1, 2, 3])
    assert not torch.allclose(other.logits, together.logits, atol=1e-6), "thoughts of other rows"


def test_thoughts_of_a_position_differ_and_a_seed_repeats_them():
    model, ids = reasoner(**KINDS["gaussian"]), texts()
    first, again, other = (model(ids, seed=seed, num_thoughts=2) for seed in (1, 1, 2))
    assert torch.equal(first.thought_values, again.thought_values)
    assert not torch.equal(first.thought_values, other.thought_values)
    assert not torch.equal(first.thought_values[:, :, 0], first.thought_values[:, :, 1])
    torch.manual_seed(3)
    drawn = [model(ids).thought_values for _ in range(2)]
    assert not torch.equal(*drawn), "without a seed it is drawn"
    torch.manual_seed(3)
    assert torch.equal(model(ids).thought_values, drawn[0])


def test_discrete_thoughts_are_drawn_with_their_probabilities():
    """One latent, 4,000 thoughts after one token: shares lie within 4.5 standard errors but once in 150,000."""
    model, count = reasoner(n_thought=1, **KINDS["discrete"]), 4000
    out = model(torch.tensor([[3]]), num_thoughts=count, seed=SEED)
    codes = out.thought_values.flatten()
    probs = torch.zeros(3, dtype=torch.float64).scatter(0, codes, out.thought_log_probs.detach().exp().flatten())
    assert float(probs.sum()) == pytest.approx(1.0)
    errors = (torch.bincount(codes, minlength=3) / count - probs) / (probs * (1 - probs) / count).sqrt()
    assert errors.abs().max() < 4.5


def test_what_is_not_a_label_does_not_count():
    model, ids = reasoner(), texts()
    labels = ids.clone()
    labels[0, :3] = -100
    out = model(ids, labels=labels, seed=SEED)
    assert out.is_target.tolist() == [[False, False, True, True, False], [True] * 4 + [False]]
    assert (out.rewards[0, :2] == 0.0).all()
    kept = out.logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][out.is_target[:, :-1]]
    close(out.loss, -kept.mean())
    nothing = model(ids, labels=torch.full_like(ids, -100))
    assert nothing.loss == 0.0


# Fast and slow path, controls.


def one_prefix_at_a_time(model, ids):
    """log p_mixed without a reasoner: every module reads every prefix anew, by the loops above."""
    core = LoopedGRU if model.config.core == "gru" else LoopedLlama
    base, interpret = core(model, "base_lm"), core(model, "interpreter")
    head, rows = model.interpreter_head or model.head, []
    for row, where in itertools.product(range(len(ids)), range(ids.shape[1])):
        prefix = ids[row, : where + 1]
        of_base, hidden = base.read(prefix)[0], interpret.read(prefix)[0]
        weight = model.mixing(of_base, hidden).sigmoid()
        mixed = (1 - weight) * model.head(of_base).softmax(-1) + weight * head(model.to_head(hidden)).softmax(-1)
        rows.append(mixed.log())
    return torch.stack(rows).unflatten(0, ids.shape)


@pytest.mark.parametrize("groups", WEIGHT_GROUPS)
@pytest.mark.parametrize("core", ["gru", "transformer"])
def test_without_a_reasoner_one_pass_is_the_slow_computation_in_every_pattern(core, groups):
    """Predictions, loss and all gradients; also of the model with a reasoner whose thoughts have no length."""
    fast = reasoner(use_reasoner=False, core=core, weight_groups=groups, share_lm_head=groups == "AAAA")
    ids = texts()
    slow = one_prefix_at_a_time(fast, ids)
    loss = -slow[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    theirs = torch.autograd.grad(loss, list(fast.parameters()))
    full = reasoner(n_thought=0, core=core, weight_groups=groups, share_lm_head=groups == "AAAA")
    full.load_state_dict({**full.state_dict(), **fast.state_dict()})
    for model in (fast, full):
        out = model(ids, labels=ids, num_thoughts=1)
        close(out.logits, slow)
        close(out.loss, loss)
        named = dict(model.named_parameters())
        mine = torch.autograd.grad(out.loss, [named[name] for name, _ in fast.named_parameters()])
        for (name, _), ours, expected in zip(fast.named_parameters(), mine, theirs, strict=True):
            assert expected.any() or not name.startswith("cores"), name
            close(ours, expected)


@pytest.mark.parametrize("use_base_lm", [True, False])
@pytest.mark.parametrize("core", ["gru", "transformer"])
def test_the_fast_path_is_the_slow_one_without_latents(core, use_base_lm):
    shared = {"core": core, "use_base_lm": use_base_lm, "weight_groups": "ABCA" if use_base_lm else "ABCD"}
    slow, fast = reasoner(n_thought=0, **shared), reasoner(use_reasoner=False, **shared)
    assert fast.num_parameters() < slow.num_parameters()
    fast.load_state_dict({name: slow.state_dict()[name] for name in fast.state_dict()})
    ids = texts()
    outs = [model(ids, labels=ids, num_thoughts=3, seed=SEED) for model in (slow, fast)]
    close(outs[1].logits, outs[0].logits)
    close(outs[1].loss, outs[0].loss)
    assert (outs[0].thought_log_probs == 0.0).all()
    for out in outs:
        out.loss.backward()
    theirs = dict(slow.named_parameters())
    for name, parameter in fast.named_parameters():
        close(parameter.grad, theirs.pop(name).grad)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in theirs.values())


def test_without_reasoner_and_base_it_is_a_plain_language_model():
    model, ids = reasoner(use_reasoner=False, use_base_lm=False), texts()
    assert model.num_parameters() == V * 8 + 2 * (24 * 8 + 24) + 8 * V + V
    core = model.cores["D"].decoder
    plain = nn.GRU(8, 8, batch_first=True).double()
    for name, value in core.cells[0].named_parameters():
        getattr(plain, f"{name}_l0").data.copy_(value)
    logits = model.head(plain(core.embed_tokens(ids))[0])
    close(model(ids).logits, logits.log_softmax(-1))
    close(model(ids, labels=ids).loss, nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
