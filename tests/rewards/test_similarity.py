"""Sentence embeddings of soft tokens, against plain forwards of the encoder; mean and cosine are written out here."""

import pytest
import torch
from classifiers import drawn, tokenizer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)
from vocabularies import BERT_LIKE, BYTES, POLICY

from softrl import assets
from softrl.rewards import similarity
from softrl.rewards.alignment import pieces_of
from softrl.rewards.base import checked_hard, checked_soft, one_hot_tokens
from softrl.rewards.resolve import resolve_rewards
from softrl.rewards.similarity import EmbeddingSimilarityReward
from softrl.types import SoftTokens

V, EOS = len(POLICY), POLICY.eos_token_id
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
REFERENCES = ["the films were dull", ["a wonderful cast", "the film"], "wonder"]


def encoder(model_class, config):
    """Without the last bias, which would be most of every embedding of a random model."""
    model = drawn(model_class, config).double()
    torch.nn.init.zeros_(model.encoder.layer[-1].output.LayerNorm.bias)
    return model


def bert():
    """Between [CLS] and [SEP]."""
    return encoder(BertModel, BertConfig(vocab_size=len(BERT_LIKE), max_position_embeddings=40, **SIZES))


def roberta(own_tokenizer=BYTES):
    """Positions that count from the pad id on; nothing around a text."""
    config = RobertaConfig(vocab_size=len(own_tokenizer), max_position_embeddings=60, pad_token_id=0, **SIZES)
    return encoder(RobertaModel, config)


KINDS = {
    "bert": (bert, BERT_LIKE),
    "roberta": (roberta, BYTES),
    "the policy's own tokenizer": (lambda: roberta(POLICY), POLICY),
}


def reward_of(kind, **settings):
    model, own_tokenizer = KINDS[kind]
    return EmbeddingSimilarityReward(model(), own_tokenizer, POLICY, **{"min_coverage": 0.2, **settings})


def completions(texts=(" was wonderful.", " films", " the cast")):
    rows = [[*POLICY(text).input_ids[:5], EOS] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [7] * (longest - len(row)) for row in rows])
    return ids, torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]


def kept_tokens(eos_ids):
    """Completions whose steps keep the hard token, two others and the end."""
    hard_ids, mask = completions()
    generator = torch.Generator().manual_seed(0)
    some = torch.tensor(POLICY(" the film and a cast. wonder dull").input_ids)
    others = some[torch.randint(len(some), (*hard_ids.shape, 2), generator=generator)]
    ids = torch.cat([hard_ids[..., None], others, torch.full_like(hard_ids[..., None], EOS)], -1)
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64) + torch.tensor([2.0, 0.1, 0.1, 0.0])
    return SoftTokens(ids, weights / weights.sum(-1, keepdim=True), mask, eos_ids)


def embedding(model, ids):
    """Plain forward, one text at a time, and the mean over its tokens, normalised."""
    states = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
    return states / states.norm()


def expected(kind, model, rows):
    """Cosines with the references for the ids of texts without special tokens."""
    own_tokenizer = KINDS[kind][1]
    found = []
    for row, reference in zip(rows, REFERENCES, strict=True):
        several = [reference] if isinstance(reference, str) else reference
        framed = [2, *row, 3] if kind == "bert" else row
        others = [embedding(model, own_tokenizer(text).input_ids) for text in several]
        found.append(max(float(embedding(model, framed) @ other) for other in others))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_hard_face_is_the_plain_computation_on_the_pieces(kind):
    reward, (ids, mask) = reward_of(kind), completions()
    pieces = [pieces_of(row[written].tolist(), reward.alignment) for row, written in zip(ids, mask, strict=True)]
    if kind == "the policy's own tokenizer":
        assert pieces == [row[written].tolist()[:-1] for row, written in zip(ids, mask, strict=True)]
    found = checked_hard(reward, ids, mask, reference=REFERENCES)
    torch.testing.assert_close(found, expected(kind, reward.network.model, pieces), rtol=1e-6, atol=1e-6)
    assert found.std() > 1e-3
    one_hot = one_hot_tokens(ids, mask)
    for soft_tokens in (one_hot, SoftTokens(one_hot.ids, one_hot.weights, torch.ones_like(mask), (EOS,))):
        soft = checked_soft(reward, soft_tokens, reference=REFERENCES)
        torch.testing.assert_close(soft, found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("include_prompt", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_decoded_face_is_the_plain_computation_on_the_text(kind, include_prompt):
    reward, (ids, mask) = reward_of(kind, include_prompt=include_prompt), completions()
    prompts = ["The cast", "a", "wonderful films"]
    fronts = prompts if include_prompt else ["", "", ""]
    texts = POLICY.batch_decode([row[written].tolist() for row, written in zip(ids, mask, strict=True)], True)
    whole = [front + text for front, text in zip(fronts, texts, strict=True)]
    rows = KINDS[kind][1](whole, add_special_tokens=False).input_ids
    found = reward.hard_decoded(ids, mask, reference=REFERENCES, prompt=prompts)
    torch.testing.assert_close(found, expected(kind, reward.network.model, rows), rtol=1e-6, atol=1e-6)
    if kind == "bert":  # whose pieces of whole words are those of the text
        hard = checked_hard(reward, ids, mask, reference=REFERENCES, prompt=prompts)
        torch.testing.assert_close(hard, found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eos_ids", [(), (EOS,)], ids=["hard stopping", "soft stopping"])
def test_soft_face_by_hand(eos_ids):
    """In the policy's own vocabulary: mixtures of embeddings, and what is present to a degree in bias and mean."""
    reward, tokens = reward_of("the policy's own tokenizer"), kept_tokens(eos_ids)
    model, references = reward.network.model, [[text] if isinstance(text, str) else text for text in REFERENCES]
    table = model.get_input_embeddings().weight
    found = reward.soft(tokens, reference=REFERENCES)
    for row, several in enumerate(references):
        steps, survival, place = int(tokens.mask[row].sum()), 1.0, 1  # RoBERTa counts from the pad id on
        embeds, present, places = [], [], []
        for ids, weights in zip(tokens.ids[row, :steps], tokens.weights[row, :steps], strict=True):
            read = reward.alignment.lengths[0, ids] > 0  # neither the end nor parts of characters
            share = float(weights[read].sum())
            embeds.append((weights[read, None] * table[ids[read]]).sum(0) / share)
            present.append(survival * share)
            places.append(place)
            place += int(survival > 0.5 and read[weights.argmax()])
            if eos_ids:
                survival *= 1.0 - float(weights[ids == EOS].sum())
        present = torch.tensor(present, dtype=torch.float64)
        states = model(
            inputs_embeds=torch.stack(embeds)[None], position_ids=torch.tensor([places]),
            attention_mask=present.log().expand(1, 1, steps, steps),
        ).last_hidden_state[0]  # fmt: skip
        ours = (present[:, None] * states).sum(0) / present.sum()
        cosines = [float(ours @ embedding(model, POLICY(text).input_ids) / ours.norm()) for text in several]
        there = 1.0 - float((1.0 - present).prod())
        assert float(found[row]) == pytest.approx(there * max(cosines), abs=1e-6)


@pytest.mark.parametrize("eos_ids", [(), (EOS,)], ids=["hard stopping", "soft stopping"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_against_finite_differences(kind, eos_ids):
    reward, tokens = reward_of(kind), kept_tokens(eos_ids)
    weights = tokens.weights.clone().requires_grad_()

    def value(w):
        return checked_soft(reward, tokens.with_weights(w), reference=REFERENCES)

    assert torch.autograd.gradcheck(value, weights, fast_mode=True)
    (grad,) = torch.autograd.grad(value(weights).sum(), weights)
    assert grad[~tokens.mask].abs().max() == 0.0
    assert grad[0, 0, 0].abs() > 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_after_a_likely_end_counts_as_little_as_it_is_likely(kind):
    reward, (ids, mask) = reward_of(kind), completions((" was wonderful.",) * 3)
    whole = torch.ones_like(mask)

    def ended_with(probability):
        kept = torch.stack([ids, torch.full_like(ids, EOS)], -1)
        weights = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(*ids.shape, 2).clone()
        weights[:, 1] = torch.tensor([1.0 - probability, probability])
        return reward.soft(SoftTokens(kept, weights, whole, (EOS,)), reference=REFERENCES)

    two_steps = ids.clone()
    two_steps[:, 1] = EOS
    short = reward.hard(two_steps, torch.arange(ids.shape[1]).expand_as(ids) < 2, reference=REFERENCES)
    long = reward.hard(ids, mask, reference=REFERENCES)
    assert (short - long).abs().min() > 1e-3
    torch.testing.assert_close(ended_with(0.0), long, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ended_with(1.0), short, rtol=1e-5, atol=1e-5)
    # Random attention is far from uniform: what is read strongly has to be very unlikely until this becomes linear.
    near, nearer = ((ended_with(1.0 - left) - short).abs() for left in (1e-9, 1e-11))
    assert (near > 1e-12).all()
    assert (near > 50 * nearer).all()


@pytest.mark.parametrize("kind", KINDS)
def test_empty_completions(kind):
    """With special tokens around them they have an embedding; without, the reward is 0, and nears it smoothly."""
    reward, (ids, mask) = reward_of(kind), completions((" was wonderful.", "", ""))
    model = reward.network.model
    for rows in (slice(0, 3), slice(1, 3)):  # beside a text, and where there is none at all
        columns = {"reference": REFERENCES[rows]}
        if kind == "bert":
            alone, others = embedding(model, [2, 3]), [BERT_LIKE("the film").input_ids, BERT_LIKE("wonder").input_ids]
            nothing = torch.stack([alone @ embedding(model, other) for other in others])
            columns["reference"] = [*REFERENCES[rows][:-2], "the film", "wonder"]
        else:
            nothing = torch.zeros(2, dtype=torch.float64)
        found = checked_hard(reward, ids[rows], mask[rows], **columns)
        decoded = reward.hard_decoded(ids[rows], mask[rows], **columns)
        for values in (found[-2:], decoded[-2:]):
            torch.testing.assert_close(values, nothing, check_dtype=False)
        tokens = one_hot_tokens(ids[rows], mask[rows])
        weights = tokens.weights.requires_grad_()
        (grad,) = torch.autograd.grad(checked_soft(reward, tokens, **columns).sum(), weights)
        assert torch.isfinite(grad).all()
        assert grad[-2:].abs().max() == 0.0
    film = POLICY(" film").input_ids[0]
    kept = torch.tensor([[[film, EOS]]] * 3)
    weights = torch.tensor([1e-3, 1e-6, 1e-9], dtype=torch.float64)
    weights = torch.stack([weights, 1.0 - weights], -1)[:, None].requires_grad_()
    nearly = SoftTokens(kept, weights, torch.ones(3, 1, dtype=torch.bool), (EOS,))
    values = checked_soft(reward, nearly, reference=["the film"] * 3)
    limit = checked_hard(reward, kept[..., 1], nearly.mask, reference=["the film"] * 3)
    assert ((values - limit).abs() < torch.tensor([0.1, 1e-4, 1e-7])).all()
    (grad,) = torch.autograd.grad(values.sum(), weights)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() < 100.0


def test_column_and_what_is_wrong_with_it():
    ids, mask = completions()
    reward = reward_of("bert", column="answer", name="close")
    same = reward_of("bert").hard(ids, mask, reference=REFERENCES)
    torch.testing.assert_close(reward.hard(ids, mask, answer=REFERENCES, reference=["x"] * 3), same)
    with pytest.raises(ValueError, match=r"'close' compares with references, .*no column 'answer' \(it has \['prompt"):
        reward.hard(ids, mask, prompt=["a"] * 3)
    with pytest.raises(ValueError, match="got 2 rows of references for 3 completions"):
        reward.hard_decoded(ids, mask, answer=["the film", "a"])
    for wrong, kind in (("", "str"), ([], "list"), (["the", " \n"], "list"), (None, "NoneType"), ([[3, 4]], "list")):
        with pytest.raises(ValueError, match=rf"row 1 of the column 'answer' is .* \({kind}\); give a text of"):
            reward.hard(ids, mask, answer=["the", wrong, "a"])
    with pytest.raises(ValueError, match=r"row 2 of the column 'answer' has 42 pieces, .*the model reads 40; shorten"):
        reward.hard(ids, mask, answer=["the", "a", "the film " * 20])


def test_completions_that_cannot_be_read():
    (ids, mask), columns = completions(), {"reference": REFERENCES}
    reward = reward_of("bert", include_prompt=True)
    with pytest.raises(ValueError, match=f"token id {V + 7} is outside the {V} ids that reward 'similarity'"):
        reward.hard(torch.full_like(ids, V + 7), mask, prompt=["a"] * 3, **columns)
    with pytest.raises(ValueError, match="pieces exceed the context of 40 of reward 'similarity'"):
        reward.hard(ids, mask, prompt=["the film " * 30] * 3, **columns)
    with pytest.raises(ValueError, match="reads the prompts, and there is no column 'prompt'"):
        reward.hard(ids, mask, **columns)
    with pytest.raises(ValueError, match=r"min_coverage=0.99 asks for 99.0%"):
        reward_of("bert", min_coverage=0.99)


def test_networks_that_are_no_encoders_or_count_positions_otherwise():
    """MPNet's attention sees how many places are between two tokens, also those where nothing is."""
    config = LlamaConfig(vocab_size=len(BYTES), num_key_value_heads=4, max_position_embeddings=60, **SIZES)
    with pytest.raises(TypeError, match=r"'similarity' \(LlamaModel\) hides from tokens what comes after them"):
        EmbeddingSimilarityReward(drawn(LlamaModel, config).double(), BYTES, POLICY, min_coverage=0.2)
    config = MPNetConfig(vocab_size=len(BERT_LIKE), max_position_embeddings=60, **SIZES)
    with pytest.raises(TypeError, match=r"\(MPNetModel\) counts how many places are between two tokens"):
        EmbeddingSimilarityReward(drawn(MPNetModel, config), BERT_LIKE, POLICY, min_coverage=0.2)
    config = T5Config(vocab_size=len(BYTES), d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
    with pytest.raises(TypeError, match="T5EncoderModel"):
        EmbeddingSimilarityReward(drawn(T5EncoderModel, config), BYTES, POLICY, min_coverage=0.2)


def test_loading_and_the_short_name(tmp_path, monkeypatch):
    model = bert().float()
    model.save_pretrained(tmp_path)
    BERT_LIKE.save_pretrained(tmp_path)
    (ids, mask), columns = completions(), {"reference": REFERENCES}
    loaded = EmbeddingSimilarityReward.from_pretrained(POLICY, tmp_path, min_coverage=0.2, name="mine")
    assert loaded.name == "mine"
    assert not loaded.network.model.training
    expected = reward_of("bert").float().hard(ids, mask, **columns)
    torch.testing.assert_close(loaded.train().hard(ids, mask, **columns), expected)
    with pytest.raises(ValueError, match="cannot be loaded as an encoder"):
        similarity.load_encoder("no-such-user/no-such-model")


def test_the_short_name(tmp_path, monkeypatch):
    words = tokenizer()
    drawn(BertModel, BertConfig(vocab_size=len(words), max_position_embeddings=40, **SIZES)).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(similarity, "resolve_model", lambda name: asked.append(name) or str(tmp_path))
    (reward,) = resolve_rewards("similarity", words, "policy", vocab_size=len(words) + 3)
    assert asked == ["minilm-l6"]
    assert (reward.name, reward.vocab_size, reward.column) == ("similarity", len(words) + 3, "reference")
    assert not reward.include_prompt
    ids = torch.tensor([[5, 6]])
    found = reward.hard(ids, torch.ones_like(ids, dtype=torch.bool), reference=["w5 w6"])
    torch.testing.assert_close(found, torch.ones(1))


@pytest.mark.slow
def test_minilm_tells_related_sentences_from_others():
    folder = assets.encoder()
    model, own_tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    policy_tokenizer = AutoTokenizer.from_pretrained(assets.language_model())
    reward = EmbeddingSimilarityReward.from_pretrained(policy_tokenizer)
    texts = [
        " A musician plays his guitar on stage.",
        " The cat was asleep on the sofa.",
        " The stock market fell sharply.",
    ]
    others = ["Someone performs a song with a guitar.", "A kitten naps on the couch.", "Share prices dropped today."]
    rows = [[*policy_tokenizer(text).input_ids, policy_tokenizer.eos_token_id] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]

    def plain(sentences):
        batch = own_tokenizer(sentences, padding=True, return_tensors="pt")
        counts = batch.attention_mask[..., None].float()
        with torch.no_grad():
            mean = (model(**batch).last_hidden_state * counts).sum(1) / counts.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)

    cosines = plain(texts) @ plain(others).T
    for shift in range(3):
        references = others[shift:] + others[:shift]
        by_row = cosines.roll(-shift, 1).diagonal()
        torch.testing.assert_close(reward.hard_decoded(ids, mask, reference=references), by_row, rtol=0, atol=1e-5)
        hard = checked_hard(reward, ids, mask, reference=references)
        assert (hard > 0.4).all() if shift == 0 else (hard < 0.2).all(), hard
