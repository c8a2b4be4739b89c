"""Alignment of two vocabularies: pieces against the tokenizers, slots by hand, rewards against the model itself."""

import pytest
import torch
from classifiers import drawn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from vocabularies import BERT_LIKE, BYTES, POLICY

from softrl.rewards.aligned_reward_model import AlignedClassifierReward
from softrl.rewards.alignment import align, last_present, pieces_of, slots_of, token_texts
from softrl.rewards.base import checked_hard, checked_soft, one_hot_tokens
from softrl.types import SoftTokens

V = len(POLICY)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert():
    config = BertConfig(vocab_size=len(BERT_LIKE), max_position_embeddings=40, pad_token_id=0, **SIZES)
    return drawn(BertForSequenceClassification, config).double()


def roberta():
    config = RobertaConfig(vocab_size=len(BYTES), max_position_embeddings=60, pad_token_id=1, **SIZES)
    return drawn(RobertaForSequenceClassification, config).double()


def gpt2():
    config = GPT2Config(
        vocab_size=len(BYTES), n_positions=60, n_embd=16, n_layer=2, n_head=2, num_labels=2, pad_token_id=0
    )
    return drawn(GPT2ForSequenceClassification, config).double()


KINDS = {"bert": (bert, BERT_LIKE), "roberta": (roberta, BYTES), "gpt2": (gpt2, BYTES)}
PROMPTS = ["The cast", "a", "wonderful films"]


def reward_of(kind, **settings):
    model, tokenizer = KINDS[kind]
    settings = {"label": 1, "min_coverage": 0.2, **settings}
    return AlignedClassifierReward(model(), tokenizer, POLICY, **settings)


def completions():
    """Three texts of 6, 3 and 1 tokens, the last one empty but for its end."""
    texts = [" was wonderful.", " films", ""]
    rows = [[*POLICY(text).input_ids[:5], POLICY.eos_token_id] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [7] * (longest - len(row)) for row in rows])
    return ids, torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]


def test_pieces_are_what_the_other_tokenizer_makes_of_a_text():
    texts = token_texts(POLICY, V + 5)
    assert texts[POLICY.eos_token_id] is None
    assert texts[V:] == [None] * 5
    alignment = align(POLICY, BERT_LIKE, V + 5)
    names, inside = (
        {
            text: BERT_LIKE.convert_ids_to_tokens(pieces_of([i], alignment, behind))
            for i, text in enumerate(texts)
            if text
        }
        for behind in (False, True)
    )
    assert names[" the"] == ["the"]
    assert names[" film"] == ["film"]
    assert (names["f"], inside["f"]) == (["f"], ["##f"]), "letters without a space go on with a word"
    assert inside[" the"] == ["the"]
    assert names["."] == ["."]
    assert names[" wonder"] == ["wonder"]
    assert (names["T"], inside["T"]) == (["t"], ["##t"])
    assert names["\n"] == []
    assert names["0"] == ["[UNK]"]
    broken = POLICY("é").input_ids[0]
    assert BERT_LIKE.convert_ids_to_tokens(pieces_of([broken], alignment)) in (["e"], ["[UNK]"])
    assert pieces_of([POLICY.eos_token_id, V + 2], alignment) == []
    coverage = alignment.coverage
    parts = (coverage.one_piece, coverage.several_pieces, coverage.no_text, coverage.unknown)
    assert sum(parts) == pytest.approx(1.0)
    assert min(parts) > 0.0, parts
    assert f"{coverage.total:.1%} of the policy's tokens keep their text" in str(coverage)


def test_a_vocabulary_is_aligned_with_itself():
    alignment = align(POLICY, POLICY, V)
    own = [
        index for index in range(V) if index != POLICY.eos_token_id and "\ufffd" not in (token_texts(POLICY, V)[index])
    ]
    assert len(own) > 150
    assert [pieces_of([index], alignment) for index in own] == [[index] for index in own]


def test_slots_hold_the_candidates_pieces():
    """Presence and contents by hand: candidates of two, one and no pieces."""
    alignment = align(POLICY, BYTES, V)
    assert len(alignment.lengths) == 1
    by_length = [(alignment.lengths[0] == count).nonzero().flatten()[-1].item() for count in (2, 1, 0)]
    weights = torch.tensor([[[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]]], dtype=torch.float64)
    tokens = SoftTokens(torch.tensor([[by_length] * 2]), weights, torch.ones(1, 2, dtype=torch.bool))
    slots = slots_of(tokens, alignment, torch.tensor([False]))
    assert slots.step.tolist() == [0, 0, 1]
    assert slots.position.tolist() == [[0, 1, 2]]
    assert slots.lengths.tolist() == [3]
    torch.testing.assert_close(slots.presence, torch.tensor([[0.8, 0.5, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(slots.weights[0, 0], torch.tensor([0.625, 0.375, 0.0], dtype=torch.float64))
    assert slots.ids[0, 0, :2].tolist() == [alignment.pieces[0, i, 0] for i in by_length[:2]]
    assert slots.ids[0, 1, 0] == alignment.pieces[0, by_length[0], 1]


def test_a_candidate_goes_on_with_a_word_as_likely_as_there_is_one():
    """ "f" behind a token that is a word with probability 0.7."""
    alignment = align(POLICY, BERT_LIKE, V)
    film, stop, letter = (POLICY(text).input_ids[0] for text in (" film", ".", "f"))
    weights = torch.tensor([[[0.7, 0.3], [1.0, 0.0]]], dtype=torch.float64)
    tokens = SoftTokens(torch.tensor([[[film, stop], [letter, stop]]]), weights, torch.ones(1, 2, dtype=torch.bool))
    slots = slots_of(tokens, alignment, torch.tensor([True]))
    held = dict(zip(slots.ids[0, 1].tolist(), slots.weights[0, 1].tolist(), strict=True))
    starts, inside = BERT_LIKE.convert_tokens_to_ids(["f", "##f"])
    assert (held[starts], held[inside]) == pytest.approx((0.3, 0.7))


def test_pieces_of_texts_are_the_tokenizers_own():
    """Behind word, space, punctuation and line break, and at the beginning."""
    for text in (" films. the cast", "x-y\nz was the film", "b.b the film\n\nq k"):
        found = pieces_of(POLICY(text).input_ids, align(POLICY, BERT_LIKE, V))
        assert BERT_LIKE.convert_ids_to_tokens(found) == BERT_LIKE.tokenize(text)


def test_which_slot_is_the_last():
    """By enumeration of independent presences."""
    presence = torch.tensor([[0.2, 0.7, 0.4]], dtype=torch.float64)
    expected = [0.2 * 0.3 * 0.6, 0.7 * 0.6, 0.4]
    torch.testing.assert_close(
        last_present(presence, torch.ones(1, 3, dtype=torch.bool)).flatten(), torch.tensor(expected).double()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_hard_face_is_the_models_own_on_the_pieces(kind):
    reward, (ids, mask) = reward_of(kind), completions()
    model, tokenizer = reward.classifier.model, KINDS[kind][1]
    expected = []
    for prompt, row, written in zip(PROMPTS, ids, mask, strict=True):
        front = tokenizer(prompt, add_special_tokens=False).input_ids
        pieces = front + pieces_of(row[written].tolist(), reward.alignment, behind_word=True)
        framed = [2, *pieces, 3] if kind == "bert" else pieces
        expected.append(model(input_ids=torch.tensor([framed])).logits[0, 1])
    found = checked_hard(reward, ids, mask, prompt=PROMPTS)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-6)
    one_hot = one_hot_tokens(ids, mask)
    torch.testing.assert_close(checked_soft(reward, one_hot, prompt=PROMPTS), found)
    ended = SoftTokens(one_hot.ids, one_hot.weights, torch.ones_like(mask), (POLICY.eos_token_id,))
    soft = checked_soft(reward, ended, prompt=PROMPTS)
    torch.testing.assert_close(soft, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_face_is_the_models_own_on_the_text(kind):
    reward, (ids, mask) = reward_of(kind, include_prompt=kind != "roberta"), completions()
    model, tokenizer = reward.classifier.model, KINDS[kind][1]
    expected = []
    for prompt, row, written in zip(PROMPTS, ids, mask, strict=True):
        text = (prompt if kind != "roberta" else "x" * 0) + POLICY.decode(row[written], skip_special_tokens=True)
        if not text:
            continue
        expected.append(model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0, 1])
    rows = slice(0, len(expected))
    found = reward.hard_decoded(ids[rows], mask[rows], prompt=PROMPTS[rows])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-6)
    if kind == "bert":  # whose pieces of whole words are those of the text
        torch.testing.assert_close(checked_hard(reward, ids, mask, prompt=PROMPTS), found)


@pytest.mark.parametrize("eos_ids", [(), (POLICY.eos_token_id,)], ids=["hard stopping", "soft stopping"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_against_finite_differences(kind, eos_ids):
    reward, (hard_ids, mask) = reward_of(kind, link="sigmoid"), completions()
    generator = torch.Generator().manual_seed(0)
    others = torch.randint(1, V, (*hard_ids.shape, 2), generator=generator)
    ids = torch.cat([hard_ids[..., None], others, torch.full_like(hard_ids[..., None], POLICY.eos_token_id)], -1)
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64) + torch.tensor([2.0, 0.1, 0.1, 0.0])
    weights = (weights / weights.sum(-1, keepdim=True)).requires_grad_()

    def value(w):
        return checked_soft(reward, SoftTokens(ids, w, mask, eos_ids), prompt=PROMPTS)

    assert torch.autograd.gradcheck(value, weights, fast_mode=True)
    (grad,) = torch.autograd.grad(value(weights).sum(), weights)
    assert grad[~mask].abs().max() == 0.0
    assert grad[0, 0, :3].abs().min() > 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_straight_through_tokens(kind):
    """One-hot weights in texts of different numbers of pieces: finite, and what moving weight to a candidate does.

    Candidates of more pieces than the chosen one are left out: their further slots are not read where they are absent.
    """
    reward, (hard_ids, mask) = reward_of(kind, link="sigmoid"), completions()
    others = torch.randint(1, V, (*hard_ids.shape, 6), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([hard_ids[..., None], others], -1)
    weights = torch.zeros(ids.shape, dtype=torch.float64)
    weights[..., 0] = 1.0

    def value(w):
        return checked_soft(reward, SoftTokens(ids, w, mask), prompt=PROMPTS)

    leaf = weights.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(leaf).sum(), leaf)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() < 10.0
    lengths, step, moved = reward.alignment.lengths.amax(0), 1e-6, 0
    for row, place, other in [(0, 0, k) for k in range(1, 7)] + [(0, 2, k) for k in range(1, 7)] + [(1, 0, 1)]:
        if lengths[ids[row, place, other]] > reward.alignment.lengths.amin(0)[ids[row, place, 0]]:
            continue
        shifted = weights.clone()
        shifted[row, place, 0] -= step
        shifted[row, place, other] += step
        slope = (value(shifted) - value(weights))[row] / step
        expected = grad[row, place, other] - grad[row, place, 0]
        torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-5)
        moved += 1
    assert moved > 3


@pytest.mark.parametrize("kind", KINDS)
def test_texts_without_a_piece(kind):
    """Every completion ends at once; the prompts are all there is."""
    reward = reward_of(kind)
    ids = torch.full((3, 2), POLICY.eos_token_id)
    mask = torch.tensor([[True, False]] * 3)
    found = checked_hard(reward, ids, mask, prompt=PROMPTS)
    torch.testing.assert_close(found, reward.hard_decoded(ids, mask, prompt=PROMPTS), rtol=1e-6, atol=1e-6)
    one_hot = one_hot_tokens(ids, mask)
    weights = one_hot.weights.requires_grad_()
    assert torch.autograd.grad(checked_soft(reward, one_hot, prompt=PROMPTS).sum(), weights)[0].abs().max() == 0.0
    assert torch.isfinite(reward.hard_decoded(ids, mask, prompt=["", "a", ""])).all()


def test_what_cannot_be_aligned():
    ids, mask = completions()
    with pytest.raises(
        ValueError, match=r"% of the policy's tokens keep their text .* min_coverage=0.99 asks for 99.0%"
    ):
        reward_of("bert", min_coverage=0.99)
    reward = reward_of("bert")
    with pytest.raises(ValueError, match="reads the prompts, and there is no column 'prompt'"):
        reward.hard(ids, mask)
    with pytest.raises(ValueError, match=f"token id {V + 7} is outside the {V} ids that reward .* is aligned with"):
        reward.hard(torch.full_like(ids, V + 7), mask, prompt=PROMPTS)
    with pytest.raises(ValueError, match="pieces exceed the context of 40"):
        reward.hard(ids, mask, prompt=["the film " * 30] * 3)
    config = BloomConfig(vocab_size=len(BERT_LIKE), hidden_size=16, n_layer=2, n_head=2, pad_token_id=0)
    model = drawn(BloomForSequenceClassification, config).double()
    with pytest.raises(TypeError, match="takes no position ids, or counts them in another way"):
        AlignedClassifierReward(model, BERT_LIKE, POLICY, label=1, min_coverage=0.2)
