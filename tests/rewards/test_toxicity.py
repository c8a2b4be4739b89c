"""The toxicity reward: its network against torch's LSTM, its words against the text's and against enumeration."""

import inspect

import pytest
import torch
from helpers import toxicity_classifier
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import PreTrainedTokenizerFast
from vocabularies import byte_level

from softrl import assets
from softrl.assets import WordVocabulary
from softrl.masking import mask_through_eos
from softrl.rewards.base import checked_hard, checked_soft, one_hot_tokens
from softrl.rewards.resolve import resolve_rewards
from softrl.rewards.spelling import soft_words, spelling_of
from softrl.rewards.toxicity import ToxicityReward
from softrl.types import SoftTokens

CORPUS = ["the moral of the film, it's a moron\n", "an assume-d film. The Films!", " a b, morons\n\nassumed\tthe"] * 3
POLICY = byte_level(300, CORPUS)
V, EOS = len(POLICY), POLICY.eos_token_id
WORDS = ("", "the", "a", "film", "moron", "moral", "mor", "it's", "ass", "assume", "b", "assumed", "als", "s")
VOCABULARY = WordVocabulary(WORDS, "!,.-\t\n")
SPELLING = spelling_of(POLICY, VOCABULARY, V)


def reward_of(max_words=6, **settings):
    return ToxicityReward(toxicity_classifier(len(WORDS), max_words), VOCABULARY, POLICY, **settings)


def ids_of(*pieces):
    """Token ids of texts that are one token each."""
    ids = [POLICY(piece).input_ids for piece in pieces]
    assert all(len(several) == 1 for several in ids), list(zip(pieces, ids, strict=True))
    return [several[0] for several in ids]


STOPPING = {"hard stopping": (), "soft stopping": (EOS,), "a word that ends the text": tuple(ids_of(" mor"))}


def random_texts(count, length, seed=0):
    """Token ids that often spell words: cut from the corpus, every way of cutting, with other tokens between."""
    generator = torch.Generator().manual_seed(seed)
    letters = ids_of(*"theamorlnfis bduA,.-'")
    whole = [index for text in CORPUS[:3] for index in POLICY(text).input_ids]
    pool = torch.tensor(whole * 3 + letters)
    starts = torch.randint(len(pool) - length, (count,), generator=generator)
    texts = torch.stack([pool[start : start + length] for start in starts])
    drawn = pool[torch.randint(len(pool), texts.shape, generator=generator)]
    return torch.where(torch.rand(texts.shape, generator=generator) < 0.5, drawn, texts)


def mixed_tokens(eos_ids=(), kept=3):
    """Three texts of 6, 5 and 1 steps that spell words of several tokens, mixed with others.

    The third token may end the text; behind it stands what would go on with its word, and what would begin another.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([random_texts(3, 6, seed) for seed in range(kept)], -1)
    ids[:, 2, 0] = eos_ids[0] if eos_ids else ids[:, 2, 0]
    ids[:, 3, :2] = torch.tensor(ids_of("on", ","))
    ids[:, 4, 0] = ids_of("s")[0]
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64) + 0.1
    mask = torch.arange(6) < torch.tensor([6, 5, 1])[:, None]
    return SoftTokens(ids, weights / weights.sum(-1, keepdim=True), mask, eos_ids)


def written(tokens, spelling=SPELLING):
    """Presence of every word in every slot, [N, L, words]."""
    found = soft_words(tokens, spelling)
    presence = found.presence.new_zeros(found.presence.numel(), len(WORDS))
    presence.index_put_((found.slot, found.ids), found.weights * found.presence.flatten()[found.slot], True)
    return presence.view(*found.presence.shape, -1)


def test_network_is_a_bidirectional_lstm_over_padded_words():
    """Against `nn.LSTM`; texts of no word to more than are read."""
    reward = reward_of(link="logit", label="insult")
    weights = reward.classifier.weights
    lstm = nn.LSTM(5, 3, batch_first=True, bidirectional=True, dtype=torch.float64)
    with torch.no_grad():
        for side, suffix in enumerate(("", "_reverse")):
            getattr(lstm, f"weight_ih_l0{suffix}").copy_(weights["kernel"][side].T)
            getattr(lstm, f"weight_hh_l0{suffix}").copy_(weights["recurrent_kernel"][side].T)
            getattr(lstm, f"bias_ih_l0{suffix}").copy_(weights["bias"][side])
            getattr(lstm, f"bias_hh_l0{suffix}").zero_()
        for count in range(9):
            words = [WORDS[1 + (3 * index + count) % 13] for index in range(count)]
            ids = [0] * 6 + [WORDS.index(word) for word in words]
            outputs, _ = lstm(weights["embedding"][torch.tensor([ids[-6:]])])
            hidden = torch.relu(outputs.amax(1) @ weights["hidden_kernel"] + weights["hidden_bias"])
            expected = -(hidden @ weights["output_kernel"] + weights["output_bias"])[:, 4]
            torch.testing.assert_close(reward.of_texts([" zzz ".join(words)]), expected)


def test_absent_words_are_skipped_exactly():
    network = toxicity_classifier(len(WORDS), 6)
    ids = torch.tensor([[3, 9, 1, 9, 4, 9, 5, 9]])
    present = torch.tensor([[0.0, 0, 1, 0, 1, 0, 1, 0]], dtype=torch.float64)
    embedded = network.weights["embedding"][ids]
    kept = network(embedded[present > 0][None], torch.ones(1, 3, dtype=torch.float64))
    torch.testing.assert_close(network(embedded, present), kept, rtol=1e-12, atol=1e-12)
    assert (network(embedded, 0.5 * present) - kept).abs().max() > 1e-3


def pieces_with_separators_inside():
    """A tokenizer whose tokens end one word and begin another, as no byte-level BPE's do."""
    pieces = ["<eos>", "th", "e, a", "e,film th", " mor", "on!", "s", "e", " b,a b"]
    backend = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="s"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.mark.parametrize("kind", ["byte-level", "separators inside tokens"])
def test_tokens_spell_the_words_of_their_text(kind):
    tokenizer, texts, unseen = POLICY, random_texts(300, 8), {"mor", "als", "ass"}
    if kind != "byte-level":  # every text of four tokens
        tokenizer, unseen = pieces_with_separators_inside(), {"moral", "it's", "assume", "assumed", "als"}
        texts = torch.cartesian_prod(*[torch.arange(1, len(tokenizer))] * 4)
    one_hot = one_hot_tokens(texts, torch.ones_like(texts, dtype=torch.bool))
    spelt = written(one_hot, spelling_of(tokenizer, VOCABULARY, len(tokenizer)))
    seen = set()
    decoded = tokenizer.batch_decode(texts, clean_up_tokenization_spaces=False)
    for row, text in zip(spelt, decoded, strict=True):
        expected = [word for word in VOCABULARY.words_of(text) if word in WORDS]
        slots, words = row.nonzero().unbind(-1)
        assert [WORDS[index] for index in words.tolist()] == expected, text
        assert (row[slots, words] == 1.0).all()
        seen.update(expected)
    assert seen == set(WORDS[1:]) - unseen, "or this shows little"


def test_a_word_has_many_spellings_and_a_part_of_one_is_none():
    several = [(" moron",), (" mor", "on"), ("m", "o", "r", "o", "n"), (" mor", "al")]
    ids = [[token for piece in pieces for token in POLICY(piece).input_ids] for pieces in several]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [EOS] * (longest - len(row)) for row in ids])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in ids])[:, None]
    totals = written(one_hot_tokens(padded, mask)).sum(1)
    assert [WORDS[row.argmax()] for row in totals] == ["moron", "moron", "moron", "moral"]
    assert totals.sum(-1).tolist() == [1.0] * 4


@pytest.mark.parametrize("eos_ids", STOPPING.values(), ids=STOPPING)
def test_presence_is_the_probability_of_the_word(eos_ids):
    """By enumeration: the mean over all texts that independent tokens stand for."""
    tokens = mixed_tokens(eos_ids)
    found = written(tokens)
    for row, length in enumerate(tokens.mask.sum(-1).tolist()):
        choices = torch.cartesian_prod(*[torch.arange(tokens.ids.shape[-1])] * length).view(-1, length)
        steps = torch.arange(length)
        ids, probabilities = (values[row][steps, choices] for values in (tokens.ids, tokens.weights))
        each = written(one_hot_tokens(ids, mask_through_eos(ids, eos_ids)))
        expected = torch.zeros_like(found[row])
        expected[:length] = torch.einsum("c,clw->lw", probabilities.prod(-1), each.double())
        torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-9)
    assert ((found > 0.01) & (found < 0.99)).sum() > 10


@pytest.mark.parametrize("eos_ids", STOPPING.values(), ids=STOPPING)
@pytest.mark.parametrize("max_words", [2, 6])
def test_gradient_against_finite_differences(eos_ids, max_words):
    """With texts that are cut, and with texts that are padded."""
    reward, tokens = reward_of(max_words, link="logit"), mixed_tokens(eos_ids)
    weights = tokens.weights.clone().requires_grad_()

    def value(w):
        return checked_soft(reward, tokens.with_weights(w))

    assert torch.autograd.gradcheck(value, weights)
    (grad,) = torch.autograd.grad(value(weights).sum(), weights)
    assert grad[~tokens.mask].abs().max() == 0.0
    assert (grad[tokens.mask].abs() > 1e-4).float().mean() > 0.5


def test_gradient_of_straight_through_tokens():
    """One-hot weights of " mor", "al": more of "on" makes the other word, by its slope."""
    reward = reward_of(link="logit")
    first, al, on = ids_of(" mor", "al", "on")
    ids = torch.tensor([[[first, EOS], [al, on]]])
    weights = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64, requires_grad=True)

    def value(w):
        return reward.soft(SoftTokens(ids, w, torch.ones(1, 2, dtype=torch.bool)))

    (grad,) = torch.autograd.grad(value(weights).sum(), weights)
    step = 1e-6
    moved = weights.detach() + torch.tensor([[[0.0, 0.0], [-step, step]]])
    slope = (value(moved) - value(weights)) / step
    torch.testing.assert_close(grad[0, 1, 1] - grad[0, 1, 0], slope[0], rtol=1e-4, atol=1e-7)
    assert slope.abs() > 1e-3


@pytest.mark.parametrize("length", [1, 5])
def test_texts_without_a_word(length):
    """Special tokens, separators and unknown words: the padding alone is read, and gradients are finite."""
    reward = reward_of()
    ids = torch.tensor([[EOS] * length, (ids_of(",", ".", "-") * 2)[:length], ids_of("u") * length])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 1:] = False
    tokens = one_hot_tokens(ids, mask)
    weights = tokens.weights.requires_grad_()
    rewards = checked_soft(reward, tokens)
    torch.testing.assert_close(rewards.detach(), reward.of_texts(["", ",", "u"]), check_dtype=False)
    assert torch.isfinite(torch.autograd.grad(rewards.sum(), weights)[0]).all()


def test_mixed_precision_changes_nothing():
    reward, tokens = reward_of(link="logit").float(), mixed_tokens()
    tokens = tokens.with_weights(tokens.weights.float())
    expected = reward.soft(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = reward.soft(tokens)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("max_words", [2, 6])
def test_hard_is_decoded(max_words):
    """With texts that are cut, and with texts that are padded."""
    reward, texts = reward_of(max_words), random_texts(40, 10, seed=5)
    mask = torch.arange(10) < torch.randint(1, 11, (40, 1), generator=torch.Generator().manual_seed(2))
    hard = checked_hard(reward, texts, mask)
    torch.testing.assert_close(hard, reward.hard_decoded(texts, mask), rtol=1e-9, atol=1e-9)
    assert hard.std() > 0.01


def test_links_are_of_one_logit():
    text = ["the moron"]
    logit, probability, log_probability = (
        reward_of(link=link).of_texts(text) for link in ("logit", "probability", "log_probability")
    )
    torch.testing.assert_close(probability, logit.sigmoid())
    torch.testing.assert_close(log_probability, probability.log())
    assert reward_of(label="threat").of_texts(text) != probability


def test_coverage():
    coverage = SPELLING.coverage
    parts = (coverage.words, coverage.parts, coverage.separators, coverage.unknown)
    assert sum(parts) == pytest.approx(1.0)
    assert min(parts) > 0.0
    assert coverage.spellable_words == 1.0
    unspellable = WordVocabulary((*WORDS, "café", "日"), VOCABULARY.separators)
    assert spelling_of(POLICY, unspellable, V).coverage.spellable_words == pytest.approx(13 / 15)
    assert f"they spell {13 / 15:.1%} of the reward model's words" in str(spelling_of(POLICY, unspellable, V).coverage)


def test_what_is_refused():
    """Without the type checker of the test run, which users do not have."""
    construct = inspect.unwrap(ToxicityReward.__init__)
    arguments = (ToxicityReward.__new__(ToxicityReward), toxicity_classifier(14, 6), VOCABULARY, POLICY)
    with pytest.raises(ValueError, match=r"label must be one of .*'insult'.* got 'rude'"):
        construct(*arguments, label="rude")
    with pytest.raises(ValueError, match=r"link must be one of .*'logit'.* got 'sigmoid'"):
        construct(*arguments, link="sigmoid")
    with pytest.raises(ValueError, match=f"token id {V + 3} is outside the {V} ids"):
        reward_of().hard(torch.tensor([[V + 3]]), torch.ones(1, 1, dtype=torch.bool))


def test_by_name(monkeypatch, tmp_path):
    from safetensors.torch import save_file

    arrays = {"embedding": torch.zeros(14, 5), "hidden.kernel": torch.zeros(6, 4), "hidden.bias": torch.zeros(4)}
    for side in ("forward", "backward"):
        arrays |= {f"{side}.kernel": torch.zeros(5, 12), f"{side}.recurrent_kernel": torch.zeros(3, 12)}
        arrays[f"{side}.bias"] = torch.zeros(12)
    save_file(
        arrays | {"output.kernel": torch.zeros(4, 6), "output.bias": torch.ones(6)}, tmp_path / "model.safetensors"
    )
    (tmp_path / "vocabulary.json").write_text('{"separators": "!", "words": ["", "the"]}')
    monkeypatch.setattr("softrl.rewards.toxicity.toxicity_classifier", lambda: tmp_path)
    (reward,) = resolve_rewards("nontoxic", POLICY, None, vocab_size=V + 4)
    assert (reward.name, reward.vocab_size) == ("nontoxic", V + 4)
    torch.testing.assert_close(reward.of_texts(["the"]), torch.tensor([-1.0]).sigmoid())


# P of the six labels, by Keras 3.15.1 on its torch backend from the package's own files.
BY_KERAS = {
    "You are so dumb and stupid!": [0.98894, 0.07257, 0.62043, 0.01935, 0.86641, 0.04073],
    "You are an idiot and a moron.": [0.99752, 0.26863, 0.95896, 0.01332, 0.94585, 0.06501],
    "Thank you for your kind help, I learned a lot.": [0.08021, 0.00052, 0.01457, 0.00083, 0.02859, 0.00114],
    "": [0.06753, 0.00237, 0.02938, 0.00101, 0.01536, 0.00401],
    "Café — it\u2019s naïve\u00a0talk; don't (re)write e-mail\n\nplease": [
        0.00059,
        0.0,
        0.00022,
        0.0,
        0.00013,
        0.00002,
    ],
    "fuck " * 3 + "the film was good " * 30: [0.00521, 0.00004, 0.00145, 0.00004, 0.00147, 0.00018],
    "the film was good " * 30 + "you idiot": [0.85529, 0.07769, 0.65027, 0.01311, 0.68893, 0.03116],
}


@pytest.mark.slow
def test_the_real_classifier():
    """On SmolLM2's tokens: every face is what Keras computes, and insults are told from kindness."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.language_model())
    texts = list(BY_KERAS)
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    for index, label in enumerate(("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")):
        reward = ToxicityReward.pretrained(tokenizer, label=label)
        expected = 1.0 - torch.tensor([probabilities[index] for probabilities in BY_KERAS.values()])
        for face in (reward.hard, reward.hard_decoded):
            torch.testing.assert_close(face(ids, mask), expected, rtol=0.0, atol=1e-5)
    assert reward.coverage.spellable_words > 0.99
