"""Soft decoding against transformers' own greedy decoding, a loop without a cache, exact probabilities, and itself."""

from dataclasses import fields, replace

import pytest
import torch
from helpers import EOS, V, gemma3, gpt2, gru, llama, mamba, prompts, rwkv, with_float64_norms

from softrl.generation.next_token import NextToken
from softrl.generation.soft_generate import soft_generate
from softrl.generation.soft_settings import Phase, SoftDecoding
from softrl.models.policy import Policy
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import RELAXATIONS, SoftmaxMixture, make_relaxation
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts

STEPS = 9
GREEDY = Phase(None, NextToken(greedy=True))
MODELS = {"llama": lambda: with_float64_norms(llama()), "gpt2": gpt2, "gru": gru, "mamba": mamba, "gemma3": gemma3}


def mixture(top_k=7, name="softmax", temperature=1.0, relaxation_temperature=1.0, **settings):
    truncation = Truncation(top_k, settings.pop("top_p", 1.0), settings.pop("min_p", 0.0))
    return Phase(
        make_relaxation(name, truncation, relaxation_temperature, **settings), NextToken(temperature=temperature)
    )


def theirs(model, given, steps, **settings):
    return model.generate(
        input_ids=given.ids, attention_mask=given.mask.long(), max_new_tokens=steps, pad_token_id=2, **settings
    )[:, given.ids.shape[1] :]  # fmt: skip


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize(
    "phase", [GREEDY, mixture(1), mixture(7, relaxation_temperature=1e-9), mixture(5, name="softmax", min_p=0.999)]
)
def test_one_hot_soft_tokens_are_the_greedy_text_of_transformers(build, phase):
    model, given = build().float(), prompts(4)
    whole = theirs(model, given, 20, do_sample=False, eos_token_id=EOS)
    ends = (EOS, int(whole[0, 3]), int(whole[1, 8]))
    expected = theirs(model, given, 20, do_sample=False, eos_token_id=list(ends))
    record = soft_generate(Policy(model), given, 20, SoftDecoding(phase), eos_ids=ends, pad_id=2)
    assert torch.equal(record.tokens, expected)
    assert record.weights[record.mask].max(-1).values.min() > 1.0 - 1e-6
    assert len(set(record.mask.sum(-1).tolist())) > 1  # rows end separately
    assert record.is_soft[record.mask].all() == (phase.relaxation is not None)


def slow_text(model, prompt, phase, steps, key, norm_correction="none"):
    """One row without a cache: the whole prefix is fed again at every step; ids, weights, entropies, embeddings."""
    embedding, cap = model.get_input_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    random = SequenceRandom.keyed(*key[:2], [key[2]], key[3] + 1).part(slice(key[3], key[3] + 1), 1)
    fed, found = embedding(prompt), []
    for _ in range(steps):
        logits = model.get_output_embeddings()(model.base_model(inputs_embeds=fed[None]).last_hidden_state[0, -1])
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        logits = logits / phase.temperature
        support = phase.relaxation.draw(logits[None], random)
        q = phase.relaxation.weights(logits[support.ids], support)
        q, ids = phase.relaxation.fed(q, support)[0], support.ids[0]
        vectors = embedding(ids)
        e = (q[:, None] * vectors).sum(0)
        if norm_correction == "match":
            e = e * (q * vectors.norm(dim=-1)).sum() / e.norm()
        elif norm_correction == "inverse_l2":
            e = e / q.square().sum().sqrt()
        p = logits.softmax(-1)
        far = (embedding.weight - e if norm_correction != "scaled" else None).norm(dim=-1)
        found.append(
            {
                "weights": dict(zip(ids.tolist(), q.tolist(), strict=True)), "probs": p, "embedding": e,
                "entropy": -(p * p.log()).sum().item(), "likeliest": int(logits.argmax()),
                "fed_entropy": -sum(w * torch.tensor(w).log().item() for w in q.tolist() if w > 0.0),
                "nearest": int(far.argmin()),
                "distance": far.min().item() / (q * vectors.norm(dim=-1)).sum().item(),
            }
        )  # fmt: skip
        fed = torch.cat([fed, e[None]])
    return found


def check_row(record, row, found, scaled=False):
    for step, expected in enumerate(found):
        weights = record.weights[row, step].tolist()
        ids = record.ids[row, step].tolist()
        assert weights == sorted(weights, reverse=True)
        assert len(set(ids)) == len(ids)
        assert {i: w for i, w in zip(ids, weights, strict=True) if w > 0} == pytest.approx(
            {i: w for i, w in expected["weights"].items() if w > 0}, abs=1e-8
        )
        assert record.probs[row, step].tolist() == pytest.approx(expected["probs"][ids].tolist(), abs=1e-8)
        assert record.tokens[row, step] == ids[0]
        numbers = ["entropy", "fed_entropy", "likeliest"] + ([] if scaled else ["nearest", "distance"])
        for name in numbers:
            assert getattr(record, name)[row, step].item() == pytest.approx(expected[name], abs=1e-6), name


@pytest.mark.parametrize("name", MODELS)
def test_as_a_loop_that_feeds_the_whole_prefix_again(name, float64_inside):
    model, given = MODELS[name](), prompts(3)
    phase = mixture(temperature=0.8, max_entropy_nats=1.2)
    record = soft_generate(Policy(model), given, STEPS, SoftDecoding(phase), num_samples=2, seed=3)
    for row in range(6):
        prompt = given.ids[row // 2][given.mask[row // 2]]
        found = slow_text(model, prompt, phase, STEPS, (3, 0, row // 2, row % 2))
        check_row(record, row, found, scaled=name == "gemma3")  # whose embeddings are not the module's weight


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("correction", ["none", "match", "inverse_l2"])
def test_every_relaxation_and_norm_correction_as_that_loop(relaxation, correction):
    model, given = gpt2(), prompts(2)
    phase = mixture(name=relaxation, min_p=0.02, top_p=0.9)
    decoding = SoftDecoding(phase, norm_correction=correction)
    record = soft_generate(Policy(model), given, STEPS, decoding, seed=5)
    for row in range(2):
        found = slow_text(model, given.ids[row][given.mask[row]], phase, STEPS, (5, 0, row, 0), correction)
        check_row(record, row, found)
    assert record.is_soft.all() == (not phase.relaxation.feeds_one_hot)
    assert record.is_soft.any() == (not phase.relaxation.feeds_one_hot)


def test_models_without_padding_or_cache():
    model, given = rwkv(), prompts(1)
    phase = mixture()
    record = soft_generate(Policy(model), given, 4, SoftDecoding(phase))
    check_row(record, 0, slow_text(model, given.ids[0], phase, 4, (0, 0, 0, 0)))


@pytest.mark.parametrize(
    "phase",
    [
        Phase(None, NextToken(temperature=0.7, top_k=9, top_p=0.8)),
        mixture(6, name="straight_through", temperature=0.7),
        mixture(V, name="st_gumbel", temperature=0.7),
        mixture(V, name="gumbel_softmax", temperature=0.7),
    ],
)
def test_draws_have_the_policys_probabilities(phase):
    """z-scores of 6000 draws of the first token: any of V beyond 4.2 has a chance of 6e-4; the seed is fixed."""
    model, given, count = gpt2(), prompts(1), 6000
    record = soft_generate(Policy(model), given, 1, SoftDecoding(phase), num_samples=count, seed=1, find_nearest=False)
    logits = (model(given.ids).logits[0, -1] / 0.7).detach()
    if phase.relaxation is None:
        logits[logits < logits.topk(9).values[-1]] = -torch.inf
        order = logits.argsort(descending=True)
        before = logits[order].softmax(-1).cumsum(-1) - logits[order].softmax(-1)
        logits[order[before >= 0.8]] = -torch.inf
    if phase.relaxation is not None and phase.relaxation.name == "straight_through":
        logits[logits < logits.topk(6).values[-1]] = -torch.inf
    probs = logits.softmax(-1)
    counts = torch.bincount(record.tokens[:, 0], minlength=V)
    assert not counts[probs == 0.0].any()
    inside = (probs > 0.0) & (probs < 1.0)
    spread = (count * probs * (1.0 - probs)).sqrt()
    assert ((counts - count * probs) / spread)[inside].abs().max() < 4.2
    assert inside.sum() > 2


def equal_rows(together, row, alone, sample=0):
    count = int(together.mask[row].sum())
    assert count == alone.mask[sample].sum()
    for each in fields(together):
        if each.name not in ("prompts", "mask"):
            ours, others = (getattr(r, each.name)[i, :count] for r, i in ((together, row), (alone, sample)))
            torch.testing.assert_close(ours, others, rtol=0.0, atol=1e-9, msg=each.name)


@pytest.mark.parametrize(
    "decoding",
    [
        SoftDecoding(Phase()),
        SoftDecoding(mixture(name="gumbel_softmax")),
        SoftDecoding(mixture(), Phase(), max_thinking_tokens=3),
        SoftDecoding(mixture(name="gumbel_softmax"), Phase(), cold_stop_nats=2.0, cold_stop_steps=2),
        SoftDecoding(mixture(), Phase(), (5,), (9, 4), force_thinking=True, cold_stop_nats=2.0, cold_stop_steps=2),
        SoftDecoding(Phase(), mixture(name="gumbel_softmax"), (5,), (7,)),
    ],
)
def test_a_row_is_the_same_in_any_batch(decoding):
    model, given = gpt2(), prompts(4)
    settings = {"num_samples": 2, "seed": 5, "eos_ids": (EOS, 7)}
    together = soft_generate(Policy(model), given, STEPS, decoding, **settings)
    for index in range(4):
        length = given.mask[index].sum()  # without padding
        alone = Prompts(given.ids[index : index + 1, -length:], given.mask[index : index + 1, -length:])
        one = soft_generate(Policy(model), alone, STEPS, decoding, prompt_indices=[index], **settings)
        for sample in range(2):
            equal_rows(together, 2 * index + sample, one, sample)
    other = soft_generate(Policy(model), given, STEPS, decoding, **settings | {"seed": 6})
    assert not torch.equal(other.tokens, together.tokens)  # every one of these draws something


def test_the_entropy_bound_holds_at_every_step_and_without_it_entropies_are_larger():
    model, given = llama(), prompts(3)
    bounded = soft_generate(Policy(model), given, 30, SoftDecoding(mixture(16, max_entropy_nats=0.7)))
    free = soft_generate(Policy(model), given, 30, SoftDecoding(mixture(16)))
    assert bounded.fed_entropy.max() <= 0.7 + 1e-9
    assert (bounded.fed_entropy > 0.69).any()
    assert free.fed_entropy.max() > 0.7 + 0.5


def test_hard_steps_record_the_token_first_and_the_likeliest_behind_it():
    model, given = gpt2(), prompts(2)
    record = soft_generate(Policy(model), given, 5, SoftDecoding(Phase()), num_recorded=4, seed=2)
    assert record.ids.shape == (2, 5, 4)
    whole = torch.cat([given.ids, record.tokens], 1)
    for row in range(2):
        ids = whole[row][int((~given.mask[row]).sum()) :]
        probs = model(ids[None]).logits[0].softmax(-1)[-6:-1]
        for step in range(5):
            kept = record.ids[row, step].tolist()
            others = [each for each in probs[step].argsort(descending=True).tolist() if each != kept[0]]
            assert kept[0] == record.tokens[row, step]
            assert kept[1:] == others[:3]
            assert record.probs[row, step].tolist() == pytest.approx(probs[step][kept].tolist(), abs=1e-6)
    assert record.weights[..., 0].eq(1.0).all()
    assert not record.weights[..., 1:].any()
    assert torch.equal(record.nearest, record.tokens)
    assert not record.distance.any()
    assert not record.fed_entropy.any()


def test_without_the_search_the_distance_is_to_the_heaviest_token():
    model, given = gpt2(), prompts(2)
    searched, not_searched = (
        soft_generate(Policy(model), given, 5, SoftDecoding(mixture()), find_nearest=each) for each in (True, False)
    )
    assert torch.equal(not_searched.nearest, not_searched.ids[..., 0])
    assert (searched.distance <= not_searched.distance + 1e-9).all()
    assert torch.equal(searched.weights, not_searched.weights)


@pytest.mark.parametrize("phase", [mixture(), mixture(name="gumbel_softmax"), Phase()])
def test_a_text_ends_where_it_shows_an_end_and_padding_stands_behind_it(phase):
    model, given = gpt2(), prompts(4)
    whole = soft_generate(Policy(model), given, 20, SoftDecoding(phase))
    ends = (int(whole.tokens[0, 3]), int(whole.tokens[1, 8]))
    record = soft_generate(Policy(model), given, 20, SoftDecoding(phase), eos_ids=ends, pad_id=11)
    assert not record.mask.all()
    for row in range(4):
        shown = whole.tokens[row].tolist()
        length = next((i + 1 for i, token in enumerate(shown) if token in ends), len(shown))
        assert record.tokens[row].tolist()[:length] == shown[:length]
        assert record.mask[row].sum() == length
    assert (record.tokens[~record.mask] == 11).all()
    for each in fields(record):
        if each.name not in ("prompts", "tokens", "mask"):
            assert not getattr(record, each.name)[~record.mask].any(), each.name


def test_the_policys_temperature_counts_beside_the_phases():
    model, given = gpt2(), prompts(2)
    ours = soft_generate(Policy(model, temperature=0.5), given, 6, SoftDecoding(mixture(temperature=1.4)))
    same = soft_generate(Policy(model), given, 6, SoftDecoding(mixture(temperature=0.7)))
    torch.testing.assert_close(ours.weights, same.weights)
    torch.testing.assert_close(ours.entropy, same.entropy)


def test_logits_processors_see_what_is_shown_and_may_forbid():
    model, given, seen = gpt2(), prompts(2), []

    def forbids(tokens, logits):
        seen.append(tokens.clone())
        return logits.masked_fill(torch.arange(V) % 2 == 0, -torch.inf)

    record = soft_generate(Policy(model), given, 6, SoftDecoding(mixture(16)), logits_processor=forbids)
    assert (record.ids[record.weights > 0] % 2 == 1).all()
    assert torch.isfinite(record.entropy).all()
    assert torch.equal(seen[-1], torch.cat([given.ids, record.tokens[:, :-1]], 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoding": SoftDecoding(mixture(V + 1))}, "K=24 kept tokens"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 60}, "context of 64"),
        ({"stop": ["w4"]}, "the model's tokenizer"),
    ],
)
def test_what_cannot_be_is_said(change, message):
    settings = {"max_new_tokens": 4, "decoding": SoftDecoding(mixture())} | change
    with pytest.raises(ValueError, match=message):
        soft_generate(Policy(gpt2()), prompts(2), **settings)


def test_a_frozen_record_keeps_no_vocabulary():
    record = soft_generate(Policy(gpt2()), prompts(2), 5, SoftDecoding(mixture(3)))
    for each in fields(record):
        if each.name != "prompts":
            assert getattr(record, each.name).shape in ((2, 5), (2, 5, 3))
    assert replace(record, nearest=record.tokens).nearest is record.tokens
    assert isinstance(mixture(3).relaxation, SoftmaxMixture)
