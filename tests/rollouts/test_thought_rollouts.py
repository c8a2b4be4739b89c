"""Thoughts: what is drawn, with which probabilities, and what true tokens are worth after it."""

import math

import pytest
import torch
from helpers import ALL_RELAXATIONS, V, gpt2, gru, llama, relaxation_of, thinking, with_float64_norms
from peft import LoraConfig, get_peft_model

from softrl.models import policy as policy_module
from softrl.rollouts.thoughts import thought_embeds, thought_pass, thought_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.types import Texts

N, T, S, N_TALK = 3, 7, 2, 2
MASKS = {
    "right": torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4]).bool(),
    "left": torch.tensor([[1] * 7, [0] * 2 + [1] * 5, [0] * 4 + [1] * 3]).bool(),
}
ANCHORS = {
    "right": torch.tensor([[0, 3, 6], [0, 3, 4], [1, 0, 0]]),
    "left": torch.tensor([[0, 3, 6], [2, 5, 6], [5, 4, 4]]),
}
IS_ANCHOR = torch.tensor([[True] * 3, [True] * 3, [True, True, False]])
MODELS = {
    "llama": lambda: with_float64_norms(llama()),
    "gpt2": gpt2,
    "gru": gru,
    "llama, LoRA": lambda: get_peft_model(
        with_float64_norms(llama()), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    ).double(),
}


def texts(side="right"):
    ids = torch.randint(3, V, (N, T), generator=torch.Generator().manual_seed(3))
    return Texts(ids.masked_fill(~MASKS[side], 2), MASKS[side])


def streams(rows=3 * S, num=N):
    return SequenceRandom(list(range(num)), rows=rows)


def think(model, side="right", **settings):
    random = settings.pop("random", None) or streams()
    return thought_rollout(model, texts(side), ANCHORS[side], IS_ANCHOR, random, S, **settings)


def scored(model, thoughts, side="right", source="policy", **settings):
    embeds = thought_embeds(model, thoughts, source)
    return thought_pass(model, texts(side), thoughts, N_TALK, embeds, with_entropy=True, **settings)


def real_text(side, row):
    given = texts(side)
    return given.ids[row, given.mask[row]]


def place(side, row, column):
    """An anchor's place among the real tokens of its text."""
    return int(MASKS[side][row, : ANCHORS[side][row, column]].sum())


# The whole pass, against the model's own forward on one plain sequence a thought.


def by_hand(model, thoughts, side):
    """log π, entropy, and log p of every thought and the true tokens after it, from embeddings written out."""
    lm, table = model.policy.causal_lm, model.policy.causal_lm.get_input_embeddings()
    log_probs, entropies, talk = [], [], []
    for row, column, sample in torch.cartesian_prod(torch.arange(N), torch.arange(3), torch.arange(S)).tolist():
        text, after = real_text(side, row), place(side, row, column) + 1
        fed = thoughts.fed[row, column, sample][..., None]
        thought = (fed * table(thoughts.support.ids[row, column, sample])).sum(-2)
        true = text[after : after + N_TALK]
        told = table(true[:-1]) if len(true) else table(true)
        inputs = torch.cat([table(text[:after]), model.start[None], thought, model.end[None], told])
        hidden, base = (
            model.policy.decoder(inputs_embeds=each[None], use_cache=False).last_hidden_state[0]
            if "GRU" not in type(lm).__name__
            else model.policy.decoder(inputs_embeds=each[None]).last_hidden_state[0]
            for each in (inputs, table(text))
        )
        policy = (lm.get_output_embeddings()(hidden[after : after + thoughts.length]) / TEMPERATURE).log_softmax(-1)
        log_probs.append(policy.gather(-1, thoughts.tokens[row, column, sample][:, None])[:, 0])
        entropies.append(-(policy.exp() * policy).sum(-1))
        first = after + thoughts.length + 1
        alone, thinking = base[after - 1 : after - 1 + len(true)], hidden[first : first + len(true)]
        weight = model.mixing(alone, thinking)[:, None]
        mixed = lm.get_output_embeddings()((1 - weight) * alone + weight * thinking).log_softmax(-1)
        found = mixed.gather(-1, true[:, None])[:, 0]
        talk.append(torch.cat([found, found.new_zeros(N_TALK - len(true))]))
    shape = (N, 3, S)
    return tuple(torch.stack(each).view(*shape, -1) for each in (log_probs, entropies, talk))


TEMPERATURE = 0.7


def gradients(model, total):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(total, parameters, allow_unused=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)]


CASES = [(name, way) for name in MODELS for way in ("naive", "dense", "shared") if (name, way) != ("gru", "dense")]


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_a_pass_is_what_plain_sequences_give(name, attention, side):
    model = thinking(MODELS[name](), n_thought=3, temperature=TEMPERATURE).eval()
    thoughts = think(model, side, attention=attention)
    assert torch.equal(thoughts.tokens, think(model, side, attention="naive").tokens)
    passed = scored(model, thoughts, side, attention=attention)
    log_probs, entropies, talk = by_hand(model, thoughts, side)
    actual = [passed.log_probs, passed.entropy, passed.talk_log_probs * passed.is_talk[:, :, None]]
    expected = [log_probs, entropies, talk * passed.is_talk[:, :, None]]
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine[IS_ANCHOR], theirs[IS_ANCHOR], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(passed.rewards, (talk * passed.is_talk[:, :, None]).sum(-1), rtol=1e-9, atol=1e-9)
    total, reference = (a[0][IS_ANCHOR].sin().sum() + a[1][IS_ANCHOR].sum() + a[2].sum() for a in (actual, expected))
    for mine, theirs in zip(gradients(model, total), gradients(model, reference), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_true_tokens_end_with_the_text_and_padding_is_none():
    model = thinking(n_thought=1)
    right = scored(model, think(model)).is_talk
    assert right.tolist() == [
        [[True, True], [True, True], [False, False]],  # after 1, 4 and 7 of 7 tokens
        [[True, True], [True, False], [False, False]],  # after 1, 4 and 5 of 5
        [[True, False], [True, True], [False, False]],  # after 2 and 1 of 3, and no anchor
    ]
    left = scored(model, think(model, "left"), "left").is_talk
    assert left.tolist() == [
        [[True, True], [True, True], [False, False]],
        [[True, True], [True, False], [False, False]],
        [[True, False], [True, True], [False, False]],
    ]


def test_the_text_alone_is_scored_as_the_model_does():
    model = thinking(n_thought=1, temperature=0.3)
    passed = scored(model, think(model))
    for row in range(N):
        ids = real_text("right", row)
        expected = model.lm(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        torch.testing.assert_close(passed.text_log_probs[row, : len(ids) - 1], expected, rtol=1e-9, atol=1e-9)
        for column in range(3):
            count = int(passed.is_talk[row, column].sum())
            after = place("right", row, column)
            mine = passed.base_log_probs[row, column, :count]
            torch.testing.assert_close(mine, expected[after : after + count], rtol=1e-9, atol=1e-9)


def test_untrained_the_rewards_are_those_of_the_text_alone():
    model = thinking(redraw=False, n_thought=2)
    passed = scored(model, think(model))
    expected = (passed.base_log_probs * passed.is_talk).sum(-1)[..., None].expand_as(passed.rewards)
    torch.testing.assert_close(passed.rewards, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(passed.mixing, torch.zeros_like(passed.mixing))


def test_chunks_of_the_vocabulary_change_nothing(monkeypatch):
    model = thinking(n_thought=3, temperature=TEMPERATURE)
    outcomes = []
    for elements in (2**23, 100, 1):
        monkeypatch.setattr(policy_module, "CHUNK_ELEMENTS", elements)
        thoughts = think(model)
        passed = scored(model, thoughts)
        total = passed.rewards.sum() + passed.log_probs.sin().sum() + passed.entropy.sum()
        outcomes.append([thoughts.tokens, passed.talk_log_probs, *gradients(model, total)])
    for chunked in outcomes[1:]:
        for mine, whole in zip(chunked, outcomes[0], strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-10, atol=1e-11)


# What is thought.


def test_thoughts_are_draws_of_the_policy_at_its_temperature():
    """Chi-square of 6,000 first tokens and of the second ones after the likeliest first, 22 degrees of freedom each.

    Threshold 53.4: a false failure has probability 2e-4 in each, over seeds; the seed is fixed.
    """
    count = 6000
    model = thinking(n_thought=2, temperature=2.5)
    given = Texts(torch.tensor([[3, 9, 4, 17]]), torch.ones(1, 4).bool())
    anchors, is_anchor = torch.tensor([[2]]), torch.tensor([[True]])
    random = SequenceRandom([11], rows=count)
    tokens = thought_rollout(model, given, anchors, is_anchor, random, count).tokens[0, 0]
    table = model.lm.get_input_embeddings()
    inputs = torch.cat([table(given.ids[0, :3]), model.start[None]])[None]
    first = (model.lm(inputs_embeds=inputs).logits[0, -1] / 2.5).softmax(-1)
    assert chi_square(tokens[:, 0], first) < 53.4
    likeliest = int(first.argmax())
    inputs = torch.cat([inputs, table(torch.tensor([[likeliest]]))], 1)
    second = (model.lm(inputs_embeds=inputs).logits[0, -1] / 2.5).softmax(-1)
    assert chi_square(tokens[tokens[:, 0] == likeliest, 1], second) < 53.4
    colder = (first.log() * 2.5 / 1.5).softmax(-1)
    assert chi_square(tokens[:, 0], colder) > 200, "the test sees another temperature"


def chi_square(tokens, probs):
    """Rare tokens, expected less than five times, are pooled, which can only lower the degrees of freedom."""
    expected = probs.detach() * len(tokens)
    counts = torch.bincount(tokens, minlength=V).double()
    rare = expected < 5.0
    terms = ((counts - expected).square() / expected)[~rare].sum()
    if expected[rare].sum() > 0.0:
        terms = terms + (counts[rare].sum() - expected[rare].sum()) ** 2 / expected[rare].sum()
    return float(terms)


def test_random_thoughts_are_uniform_and_ignore_the_policy():
    """Chi-square of 6,000 tokens, 22 degrees of freedom, threshold 53.4: a false failure has probability 2e-4."""
    count = 3000
    given, anchors = Texts(torch.tensor([[3, 9, 4, 17]]), torch.ones(1, 4).bool()), torch.tensor([[2]])
    found = [
        thought_rollout(
            thinking(gpt2(seed), n_thought=2), given, anchors, torch.tensor([[True]]),
            SequenceRandom([11], rows=count), count, source="random",
        ).tokens
        for seed in (0, 1)
    ]  # fmt: skip
    assert torch.equal(*found)
    assert chi_square(found[0].flatten(), torch.full((V,), 1 / V, dtype=torch.float64)) < 53.4


def test_greedy_thoughts_are_the_argmax_and_draw_nothing():
    model = thinking(n_thought=3, temperature=1.7)
    random = streams()
    thoughts = think(model, source="greedy", random=random)
    assert torch.equal(random.exponential(4, torch.float64), streams().exponential(4, torch.float64))
    passed = scored(model, thoughts)
    logits = model.policy.head(passed.thought_hidden.flatten(0, 3)).view(*thoughts.tokens.shape, V)
    assert torch.equal(logits.argmax(-1), thoughts.tokens)


def test_pauses_feed_the_pause_embedding_and_nothing_else():
    model = thinking(n_thought=3)
    thoughts = think(model, source="pause")
    embeds = thought_embeds(model, thoughts, "pause")
    assert torch.equal(embeds, model.pause.expand(N, 3, S, 3, -1))
    passed = scored(model, thoughts, source="pause")
    grads = dict(zip((n for n, _ in model.named_parameters()), gradients(model, passed.rewards.sum()), strict=True))
    assert grads["pause"].norm() > 1e-3
    own = torch.cat([model.start[None], model.pause.expand(3, -1), model.end[None]])
    table = model.lm.get_input_embeddings()
    hidden = model.lm.transformer(inputs_embeds=torch.cat([table(real_text("right", 0)[:4]), own])[None])
    torch.testing.assert_close(passed.thought_hidden[0, 1, 0], hidden.last_hidden_state[0, 4:7], rtol=1e-9, atol=1e-9)
    unused = gradients(model, scored(model, think(model)).rewards.sum())
    assert unused[[n for n, _ in model.named_parameters()].index("pause")].norm() == 0.0


def test_draws_of_a_text_are_its_own():
    """The same whoever shares the batch, however long its padding, and in chunks; different for another stream."""
    model = thinking(n_thought=3, temperature=2.0)
    for relaxation in (None, *map(relaxation_of, ALL_RELAXATIONS)):
        together = think(model, relaxation=relaxation)
        for row in range(N):
            alone = Texts(real_text("right", row)[None], torch.ones(1, len(real_text("right", row))).bool())
            random = SequenceRandom([row], rows=3 * S)
            anchors, is_anchor = ANCHORS["right"][row : row + 1], IS_ANCHOR[row : row + 1]
            apart = thought_rollout(model, alone, anchors, is_anchor, random, S, relaxation=relaxation)
            assert torch.equal(apart.tokens[0], together.tokens[row])
            torch.testing.assert_close(apart.fed[0], together.fed[row], rtol=1e-9, atol=1e-9)
    assert len({tuple(tokens) for tokens in together.tokens.flatten(0, 2).tolist()}) > 9, "samples differ"


@pytest.mark.parametrize("relaxation_name", ALL_RELAXATIONS)
def test_chunks_leave_draws_of_relaxations_to_the_text(monkeypatch, relaxation_name):
    """Chunks that hold one text, or a part of one, whoever else is in the batch."""
    model, relaxation = thinking(n_thought=2, temperature=2.0), relaxation_of(relaxation_name)
    monkeypatch.setattr(policy_module, "CHUNK_ELEMENTS", 4 * V)  # four of a text's six rows
    together = think(model, relaxation=relaxation)
    alone = Texts(texts().ids[1:2], texts().mask[1:2])
    apart = thought_rollout(
        model, alone, ANCHORS["right"][1:2], IS_ANCHOR[1:2], SequenceRandom([1], rows=3 * S), S, relaxation=relaxation
    )
    assert torch.equal(apart.tokens[0], together.tokens[1])
    torch.testing.assert_close(apart.fed[0], together.fed[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("relaxation_name", ALL_RELAXATIONS)
def test_soft_thoughts_are_what_the_relaxation_makes_of_the_pass(relaxation_name):
    """Step by step in the rollout, and all at once in the pass."""
    model, relaxation = thinking(n_thought=3, temperature=TEMPERATURE), relaxation_of(relaxation_name)
    thoughts = think(model, relaxation=relaxation)
    passed = scored(model, thoughts)
    logits = model.policy.head(passed.thought_hidden.flatten(0, 3)).view(*thoughts.tokens.shape, V)
    weights = relaxation.weights(logits.gather(-1, thoughts.support.ids), thoughts.support)
    torch.testing.assert_close(relaxation.fed(weights, thoughts.support), thoughts.fed, rtol=1e-9, atol=1e-9)


def test_sampled_thoughts_have_one_kept_id_of_weight_one():
    thoughts = think(thinking(n_thought=3))
    assert thoughts.fed.shape == (N, 3, S, 3, 1)
    assert torch.equal(thoughts.fed, torch.ones_like(thoughts.fed))
    assert not thoughts.fed.requires_grad


@pytest.mark.parametrize("attention", ["naive", "dense", "shared"])
def test_thoughts_of_no_tokens_are_start_and_end_alone(attention):
    model = thinking(n_thought=0)
    thoughts = think(model, attention=attention)
    assert thoughts.length == 0
    passed = scored(model, thoughts, attention=attention)
    assert passed.log_probs.shape == (N, 3, S, 0)
    log_probs, _, talk = by_hand(model, thoughts, "right")
    torch.testing.assert_close(passed.rewards, (talk * passed.is_talk[:, :, None]).sum(-1), rtol=1e-9, atol=1e-9)
    assert log_probs.numel() == 0
    names = [name for name, _ in model.named_parameters()]
    grads = dict(zip(names, gradients(model, passed.rewards.sum()), strict=True))
    assert all(grads[name].norm() > 1e-6 for name in ("start", "end", "mixing.last.weight"))


def test_hits_are_where_the_true_token_is_the_likeliest():
    """A text that the model writes itself, but for one token; untrained, a thought changes no hit."""
    model, ids = thinking(redraw=False, n_thought=1), torch.tensor([[3]])
    for _ in range(6):
        ids = torch.cat([ids, model.lm(ids).logits[:, -1:].argmax(-1)], 1)
    ids[0, 4] = (ids[0, 4] + 1) % V
    right = model.lm(ids).logits[0, :-1].argmax(-1) == ids[0, 1:]
    assert 0 < right.sum() < 6
    given, anchors = Texts(ids, torch.ones_like(ids).bool()), torch.tensor([[0, 2, 3]])
    thoughts = thought_rollout(model, given, anchors, anchors >= 0, SequenceRandom([1], rows=6), S)
    embeds = thought_embeds(model, thoughts, "policy")
    passed = thought_pass(model, given, thoughts, 3, embeds, with_hits=True)
    expected = torch.stack([right[0:3], right[2:5], right[3:6]])
    assert torch.equal(passed.base_hits[0], expected)
    assert torch.equal(passed.talk_hits[0], expected[:, None].expand(3, S, 3))
    assert not thought_pass(model, given, thoughts, 3, embeds).base_hits.any()


def test_dropout_is_off_while_thinking_and_on_again_after():
    model = thinking(n_thought=2).train()
    assert torch.equal(think(model).tokens, think(model).tokens)
    assert model.training
    assert model.lm.transformer.drop.training


# What is refused.

ONE = torch.tensor([[True]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchors": torch.tensor([[0, 7, 1]] * 3)}, "anchors are slots of texts of 7 tokens, got 0 to 7"),
        ({"anchors": torch.tensor([[0, -1, 1]] * 3)}, "got -1 to 1"),
        ({"anchors": torch.tensor([[0, 1, 6]] * 3)}, r"is padding; set is_anchor to False"),
        ({"anchors": torch.zeros(3, 0).long(), "is_anchor": torch.zeros(3, 0).bool()}, "at least one column"),
        ({"anchors": torch.tensor([[0]]), "is_anchor": ONE}, r"a row for each of 3 texts, got shape \(1, 1\)"),
        ({"random": streams(rows=5)}, r"expected 3 streams of 6 rows \(anchors \* samples\), got 3 of 5"),
        ({"random": streams(num=2)}, r"expected 3 streams of 6 rows .*, got 2 of 6"),
        ({"num_samples": 0, "random": streams(rows=0)}, "num_samples must be at least 1, got 0"),
        ({"source": "greedy", "relaxation": relaxation_of("softmax")}, "with source='greedy' leave it out"),
        ({"relaxation": relaxation_of("softmax", top_k=50)}, "top_k=50 is larger than the vocabulary, V=23"),
    ],
)
def test_bad_rollouts_are_refused(change, message):
    arguments = {
        "texts": texts(), "anchors": ANCHORS["right"], "is_anchor": IS_ANCHOR, "random": streams(), "num_samples": S,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        thought_rollout(thinking(n_thought=2), **{**arguments, **change})


def test_unknown_sources_are_refused():
    with pytest.raises(
        ValueError, match=r"source must be one of \('policy', 'greedy', 'random', 'pause'\), got 'oracle'"
    ):
        thought_rollout.__wrapped__.__wrapped__(
            thinking(n_thought=2), texts(), ANCHORS["right"], IS_ANCHOR, streams(), S, source="oracle"
        )


def test_passes_without_a_true_token_are_refused():
    model = thinking(n_thought=1)
    thoughts = think(model)
    with pytest.raises(ValueError, match="n_talk=0 and texts of 7 tokens: both need at least one"):
        thought_pass(model, texts(), thoughts, 0, thought_embeds(model, thoughts, "policy"))
    short = Texts(torch.tensor([[3]]), ONE)
    alone = thought_rollout(model, short, torch.tensor([[0]]), ONE, SequenceRandom([1]))
    with pytest.raises(ValueError, match="texts of 1 tokens"):
        thought_pass(model, short, alone, 1, thought_embeds(model, alone, "policy"))


def test_what_exceeds_the_context_is_refused():
    """64 positions: padding does not count, the branch after the last anchor does."""
    model = thinking(n_thought=2)
    ids = torch.full((1, 70), 5)
    mask = torch.arange(70)[None] < 62
    short = Texts(ids, mask)
    at = torch.tensor([[58]])
    thoughts = thought_rollout(model, short, at, ONE, SequenceRandom([1]))
    assert thought_pass(model, short, thoughts, 2, thought_embeds(model, thoughts, "policy")).rewards.isfinite().all()
    with pytest.raises(
        ValueError, match=r"a text of 62 tokens, with 6 of a thought.*exceeds the model's context of 64"
    ):
        thought_pass(model, short, thoughts, 3, thought_embeds(model, thoughts, "policy"))
    with pytest.raises(ValueError, match="with 3 of a thought"):
        thought_rollout(model, short, torch.tensor([[61]]), ONE, SequenceRandom([1]))
    with pytest.raises(ValueError, match="a text of 70 tokens"):
        thought_rollout(model, Texts(ids, torch.ones_like(mask)), at, ONE, SequenceRandom([1]))


def test_the_chance_that_the_statistical_tests_name():
    """P(chi-square with 22 degrees of freedom > 53.4), by its finite sum for even degrees."""
    half = 53.4 / 2
    assert math.exp(-half) * sum(half**k / math.factorial(k) for k in range(11)) == pytest.approx(2e-4, rel=0.1)
