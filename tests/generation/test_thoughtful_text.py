"""Generation with thoughts: against a loop that keeps nothing, one row at a time, and the plain model's own text."""

import pytest
import torch
from generation.thinkers import slow_text, thinker
from helpers import EOS, V, prompts, relaxation_of
from trainers.tiny import word_tokenizer

from softrl.generation.next_token import NextToken
from softrl.generation.record import as_text
from softrl.generation.thoughts import Thinking, generate_with_thoughts
from softrl.tokens.noise import SequenceRandom
from softrl.types import Prompts

GREEDY = NextToken(greedy=True)
STEPS = 6
# The norms of llama and gemma compute in float32 whatever they are given.
MODELS = {"llama": ("shared", 1e-5), "gpt2": ("shared", 1e-9), "gru": ("shared", 1e-9), "gemma3": ("naive", 1e-5)}


def check(model, record, given, thinks, tolerance=1e-9, **settings):
    """Rows of a record are those of the slow loop."""
    some = 0
    for row in range(len(record.tokens)):
        prompt = given.ids[row][given.mask[row]].tolist()
        tokens, thoughts = slow_text(model, prompt, STEPS, thinks, key=(0, row, 0), **settings)
        assert record.tokens[row].tolist() == tokens
        assert record.thinks[row].nonzero()[:, 0].tolist() == [step for step, *_ in thoughts]
        for step, thought, weight, before, after in thoughts:
            found = zip(
                record.thought_ids[row, step].tolist(), record.thought_weights[row, step].tolist(), strict=True
            )
            for (ids, weights), expected in zip(found, thought, strict=True):
                heaviest = sorted(expected.values(), reverse=True)[: len(ids)]
                assert weights == pytest.approx(heaviest, abs=tolerance)
                assert [expected[each] for each in ids] == pytest.approx(heaviest, abs=tolerance)
            numbers = [each[row, step].item() for each in (record.mixing, record.base_entropy, record.entropy)]
            assert numbers == pytest.approx([weight, before, after], abs=tolerance)
            some += 1
    return some


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["sampled", "greedy", "pause", "gumbel_softmax", "st_gumbel", "softmax"])
def test_as_a_loop_that_computes_everything_again(name, kind):
    attention, tolerance = MODELS[name]
    model, given = thinker(name, temperature=0.8), prompts()
    source = {"sampled": "policy", "greedy": "greedy", "pause": "pause"}.get(kind, "policy")
    relaxation = relaxation_of(kind) if kind in ("gumbel_softmax", "st_gumbel", "softmax") else None
    record = generate_with_thoughts(
        model, given, STEPS, Thinking(source=source, relaxation=relaxation), GREEDY, attention=attention
    )
    settings = {"relaxation": relaxation, "source": source if source != "policy" else None}
    assert check(model, record, given, lambda *_: True, tolerance, **settings) == 3 * STEPS


@pytest.mark.parametrize("attention", ["naive", "dense", "shared"])
@pytest.mark.parametrize("mixing", ["hidden", "log_probs"])
@pytest.mark.parametrize("residual", [False, True])
def test_every_attention_and_mixture(attention, mixing, residual):
    model, given = thinker("gpt2", mixing=mixing, residual=residual, sigmoid=not residual), prompts()
    record = generate_with_thoughts(model, given, STEPS, next_token=GREEDY, attention=attention)
    check(model, record, given, lambda *_: True)


def test_architectures_without_keys_take_naive_branches():
    model, given = thinker("mamba"), prompts(1)
    record = generate_with_thoughts(model, given, STEPS, next_token=GREEDY, attention="naive")
    check(model, record, given, lambda *_: True, 1e-5)
    with pytest.raises(ValueError, match="pass attention='naive'"):
        generate_with_thoughts(model, given, STEPS, next_token=GREEDY)


@pytest.mark.parametrize(
    ("thinking", "thinks"),
    [
        (Thinking(every=2), lambda step, _: step % 2 == 0),
        (Thinking(steps=(1, 4)), lambda step, _: step in (1, 4)),
        (Thinking(steps=()), lambda *_: False),
        (Thinking(above_nats=2.2), lambda _, spread: spread > 2.2),
        (Thinking(every=2, above_nats=2.0), lambda step, spread: step % 2 == 0 and spread > 2.0),
    ],
)
def test_thinks_when_it_is_told_to(thinking, thinks):
    model, given = thinker("gpt2"), prompts()
    record = generate_with_thoughts(model, given, STEPS, thinking, GREEDY)
    some = check(model, record, given, thinks)
    assert some < 3 * STEPS
    assert not record.mixing[~record.thinks].any()
    assert not record.thought_weights[~record.thinks].any()
    if thinking.above_nats is not None:  # rows differ, so that a batch has both kinds at once
        assert some > 0
        assert (record.thinks.any(0) & ~record.thinks.all(0)).any()


@pytest.mark.parametrize("n_thought", [0, 1, 5])
def test_thoughts_of_another_length_than_the_models_own(n_thought):
    model, given = thinker("gpt2"), prompts()
    record = generate_with_thoughts(model, given, STEPS, Thinking(n_thought=n_thought), GREEDY)
    assert record.thoughts.shape == (3, STEPS, n_thought)
    check(model, record, given, lambda *_: True, n=n_thought)
    assert record.mixing.abs().min() > 0.0  # start and end alone say something, too


@pytest.mark.parametrize(
    "next_token", [NextToken(), NextToken(temperature=0.7, top_k=5, min_p=0.05), NextToken(top_p=0.6)]
)
@pytest.mark.parametrize(
    "thinking", [Thinking(), Thinking(above_nats=2.2), Thinking(relaxation=relaxation_of("st_gumbel"))]
)
def test_a_row_is_the_same_in_any_batch(next_token, thinking):
    model, given, settings = thinker("gpt2"), prompts(4), {"num_samples": 2, "seed": 5, "eos_ids": (EOS, 7)}
    together = generate_with_thoughts(model, given, STEPS, thinking, next_token, **settings)
    for index in range(4):
        length = given.mask[index].sum()  # without padding
        alone = Prompts(given.ids[index : index + 1, -length:], given.mask[index : index + 1, -length:])
        one = generate_with_thoughts(model, alone, STEPS, thinking, next_token, prompt_indices=[index], **settings)
        for sample, row in enumerate((2 * index, 2 * index + 1)):
            real = together.mask[row]
            count = int(real.sum())
            assert count == one.mask[sample].sum()
            for name in ("tokens", "thinks", "thought_ids", "thought_weights", "mixing", "entropy"):
                ours, theirs = getattr(together, name)[row, :count], getattr(one, name)[sample, :count]
                torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-10)
    assert len({tuple(row.tolist()) for row in together.tokens}) > 4  # samples differ


def test_without_a_mixing_weight_it_is_the_plain_models_text():
    """As transformers generates it, whatever is thought."""
    for build in ("llama", "gpt2"):
        model, given = thinker(build, sigmoid=False), prompts()
        torch.nn.init.zeros_(model.mixing.last.weight)
        torch.nn.init.zeros_(model.mixing.last.bias)
        record = generate_with_thoughts(model, given, 12, next_token=GREEDY, eos_ids=(EOS,))
        theirs = model.lm.generate(
            input_ids=given.ids, attention_mask=given.mask.long(), max_new_tokens=12, do_sample=False,
            eos_token_id=EOS, pad_token_id=2,
        )[:, given.ids.shape[1] :]  # fmt: skip
        assert torch.equal(record.tokens.masked_fill(~record.mask, 2), theirs)
        assert record.thinks.all()
        other = generate_with_thoughts(thinker(build), given, 12, next_token=GREEDY, eos_ids=(EOS,))
        assert (other.entropy[:, 0] - record.entropy[:, 0]).abs().max() > 1e-3  # with a weight, thoughts matter


def test_ends_and_lengths():
    model, given = thinker("gpt2"), prompts()
    whole = generate_with_thoughts(model, given, STEPS, next_token=GREEDY)
    ends = tuple(whole.tokens[:, 1].tolist())
    record = generate_with_thoughts(model, given, STEPS, next_token=GREEDY, eos_ids=ends)
    assert record.tokens.shape[1] <= 2
    assert torch.equal(record.tokens, whole.tokens[:, : record.tokens.shape[1]])
    assert record.mask.sum(-1).max() <= 2


@pytest.mark.parametrize(
    ("rule", "num_kept"),
    [
        (NextToken(temperature=1.5), 7),
        (NextToken(temperature=1.5, top_k=3), 3),
        (NextToken(temperature=1.5, top_p=0.8), 3),
        (NextToken(temperature=1.5, min_p=0.1), 5),
        (NextToken(top_k=5, top_p=0.9, min_p=0.01), 3),
    ],
)
def test_drawn_tokens_have_the_probabilities_of_the_rule(rule, num_kept):
    """20,000 draws of seven tokens; every share within 5 standard errors: fails once in 50,000 runs."""
    logits, count = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -2.0, -3.0]).double(), 20_000  # falling
    expected = (logits / rule.temperature).softmax(-1)
    expected[num_kept:] = 0.0
    expected /= expected.sum()
    tokens = rule.choose(logits.log_softmax(-1).expand(count, -1), SequenceRandom([11], rows=count))
    shares = torch.bincount(tokens, minlength=7) / count
    errors = (expected * (1 - expected) / count).sqrt()
    assert ((shares - expected).abs() <= 5 * errors).all()
    assert (shares[:num_kept] > 0.0).all()


def test_thoughts_are_hidden_unless_they_are_asked_for():
    tokenizer, model, given = word_tokenizer(), thinker("gpt2"), prompts()
    record = generate_with_thoughts(model, given, 3, Thinking(steps=(0, 2)), GREEDY)

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    words = [decode(given.ids[row][given.mask[row]]).split() for row in range(3)]
    told = [decode(row).split() for row in record.tokens]
    hidden = as_text(record, tokenizer)
    shown = as_text(record, tokenizer, show=True)
    for row in range(3):
        assert hidden[row].split() == words[row] + told[row]
        first, third = (decode(record.thoughts[row, step]) for step in (0, 2))
        begin = " ".join(words[row])
        assert shown[row].startswith(f"{begin}<|thought|> {first}".rstrip())
        assert third in shown[row]
        assert shown[row].count("<|thought|>") == shown[row].count("</thought|>") == 2
    assert as_text(record, tokenizer, with_prompt=False)[0].split() == hidden[0].split()[len(words[0]) :]
    paused = generate_with_thoughts(model, given, 1, Thinking(source="pause"), GREEDY)
    assert "<|thought|> … … … </thought|>" in as_text(paused, tokenizer, show=True)[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Thinking(every=0), "every must be at least 1"),
        (lambda: Thinking(steps=(-1,)), "counted from 0"),
        (lambda: Thinking(n_thought=-1), "must not be negative"),
        (lambda: Thinking(source="pause", relaxation=relaxation_of("softmax")), "has no soft thoughts"),
        (lambda: NextToken(temperature=0.0), "temperature must be positive"),
        (lambda: NextToken(top_k=0), "top_k must be at least 1"),
        (lambda: generated(prompts(), 0), "at least 1"),
        (lambda: generated(prompts(), 60), "exceed the model's context"),
        (lambda: generated(prompts(), 56), "a thought of 3 with its start and end exceed"),
        (lambda: generated(prompts(), 2, prompt_indices=[0]), "1 streams for 3 prompts"),
        (lambda: generated(Prompts(torch.zeros(0, 2).long(), torch.zeros(0, 2).bool()), 2), "at least one prompt"),
        (lambda: generated(prompts(), 2, thinking=Thinking(relaxation=relaxation_of("softmax", V + 1))), "vocabulary"),
        (lambda: generated(Prompts(prompts().ids, prompts().mask.flip(1)), 2), "pad on the left"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def generated(given, steps, **settings):
    return generate_with_thoughts(thinker("gpt2"), given, steps, **settings)


def test_a_thought_may_stand_at_the_models_last_position():
    record = generated(prompts(), 55)  # 5 + 55 + 3 + 2 = 65, but for the last token, which is not fed
    assert record.tokens.shape == (3, 55)
