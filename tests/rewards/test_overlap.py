"""BLEU and ROUGE: at one-hot tokens sacrebleu's and rouge-score's, between them differentiable."""

import inspect
import random

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu import sentence_bleu
from sacrebleu.metrics.bleu import BLEU
from test_ngrams import soft_tokens, texts_of

from softrl.rewards.base import checked_hard, checked_soft, one_hot_tokens
from softrl.rewards.overlap import BleuReward, RougeReward
from softrl.types import SoftTokens

WORDS = [
    "the", "a", "film,", "a", "cast;", "was", "is", "not", "Very", "dull.", "bright", "and", "of", "in", "it's",
    "well-made", '"fine"', "(2001)", "3.5", "%", "it!", "the", "the",
]  # fmt: skip
SMOOTHINGS = ["exp", "add-k", "floor", "none"]


def text_pairs(count=240):
    """A text and one to three references: unrelated, edited or the same, from no words to 30."""
    rng = random.Random(0)
    fixed = [("", ["the film"]), ("the", ["the"]), ("the", ["film"]), ("the film", [""]), ("", [""]), ("a a", ["a"])]
    pairs = [*fixed, ("the the the the", ["the cat the", "the"]), ("a film", ["a film was not", "a"])]
    while len(pairs) < count:
        reference = rng.choices(WORDS, k=rng.choice([0, 1, 2, 3, 4, 5, 8, 12, 20, 30]))
        text = [word if rng.random() < 0.7 else rng.choice(WORDS) for word in reference if rng.random() < 0.9]
        others = [" ".join(rng.choices(WORDS, k=rng.randint(0, 12))) for _ in range(rng.choice([0, 0, 1, 2]))]
        pairs.append((" ".join(text + rng.choices(WORDS, k=rng.choice([0, 0, 3]))), [" ".join(reference), *others]))
    return pairs


def as_ids(pairs, words_of):
    """Token ids, one a word; id 0 ends every text, and 1 pads."""
    ids = {}
    split = [([ids.setdefault(w, len(ids) + 2) for w in words_of(text)], references) for text, references in pairs]
    references = [
        [[ids.setdefault(w, len(ids) + 2) for w in words_of(one)] for one in several] for _, several in split
    ]
    longest = max(len(text) for text, _ in split) + 1
    rows = torch.tensor([[*text, 0, *[1] * (longest - len(text) - 1)] for text, _ in split])
    mask = torch.arange(longest) < torch.tensor([len(text) + 1 for text, _ in split])[:, None]
    return rows, mask, references


@pytest.mark.parametrize("smooth_method", SMOOTHINGS)
def test_bleu_is_sacrebleu_on_texts(smooth_method):
    pairs = text_pairs()
    ids, mask, references = as_ids(pairs, lambda text: BLEU().tokenizer(text).split())
    reward = BleuReward(smooth_method=smooth_method, eos_ids=[0])
    expected = [
        sentence_bleu(text, several, smooth_method=smooth_method, use_effective_order=True).score / 100
        for text, several in pairs
    ]
    soft = checked_soft(reward, one_hot_tokens(ids, mask), reference=references)
    torch.testing.assert_close(soft, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(checked_hard(reward, ids, mask, reference=references), torch.tensor(expected))
    assert sum(0.0 < score < 1.0 for score in expected) > 100


@pytest.mark.parametrize("measure", ["f1", "precision", "recall"])
@pytest.mark.parametrize("rouge_type", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_score_on_texts(rouge_type, measure):
    pairs = text_pairs()
    ids, mask, references = as_ids(pairs, DefaultTokenizer(use_stemmer=False).tokenize)
    reward = RougeReward(rouge_type=rouge_type, measure=measure, eos_ids=[0])
    scorer = RougeScorer([rouge_type])
    field = {"f1": "fmeasure"}.get(measure, measure)
    expected = [getattr(scorer.score_multi(several, text)[rouge_type], field) for text, several in pairs]
    soft = checked_soft(reward, one_hot_tokens(ids, mask), reference=references)
    torch.testing.assert_close(soft, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(checked_hard(reward, ids, mask, reference=references), torch.tensor(expected))
    assert sum(0.0 < score < 1.0 for score in expected) > 100


REWARDS = {
    **{f"bleu, {method}": BleuReward(smooth_method=method, eos_ids=[], max_ngram_order=2) for method in SMOOTHINGS},
    **{kind: RougeReward(rouge_type=kind, eos_ids=[]) for kind in ("rouge1", "rouge2", "rougeL")},
}
REFERENCES = [[[2, 3, 2, 5]], [[1, 2, 6]], [[3, 5]], [[4, 4, 4], [4, 2, 6, 2]]]


@pytest.mark.parametrize("name", REWARDS)
def test_bias_vanishes_as_tokens_sharpen(name):
    """Against the mean hard score of all texts that independent tokens stand for, by enumeration."""
    reward, tokens = REWARDS[name], soft_tokens(4)
    errors = []
    for temperature in (1.0, 0.3, 0.1, 0.02):
        sharper = tokens.with_weights((tokens.weights.log() / temperature).softmax(-1))
        soft = checked_soft(reward, sharper, reference=REFERENCES)
        errors.append((soft - _mean_of_hard(reward, sharper)).abs().max().item())
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-3
    assert errors[-1] < 0.1 * errors[0]


def _mean_of_hard(reward, tokens):
    means = []
    for row in range(len(tokens.ids)):
        texts, probabilities = zip(*texts_of(tokens, row), strict=True)
        ids = torch.tensor(texts)
        hard = reward.hard(ids, torch.ones_like(ids, dtype=torch.bool), reference=[REFERENCES[row]] * len(ids))
        means.append((hard.double() * torch.tensor(probabilities)).sum())
    return torch.stack(means)


@pytest.mark.parametrize("name", REWARDS)
def test_there_is_a_gradient_towards_a_first_match(name):
    """One-hot tokens of which none matches: more weight on a token (or two neighbours) of the reference must pay."""
    ids = torch.tensor([[[8, 2], [9, 3], [8, 5]]])
    weights = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]], requires_grad=True)
    value = REWARDS[name].soft(SoftTokens(ids, weights, torch.ones(1, 3, dtype=torch.bool)), reference=[[[2, 3, 5]]])
    (grad,) = torch.autograd.grad(value.sum(), weights)
    assert value.item() == 0.0
    assert torch.isfinite(grad).all()
    if name not in ("rouge2", "bleu, none"):  # two tokens have to change at once there
        assert (grad[..., 1] > 0.01).all()


@pytest.mark.parametrize("reward", [BleuReward(eos_ids=[0]), RougeReward(eos_ids=[0])], ids=["bleu", "rougeL"])
def test_a_text_can_learn_when_to_end(reward):
    """Soft stopping: weight on the end pays where the reference has ended, and costs where it goes on."""
    ids = torch.tensor([[[2, 0], [3, 0], [8, 0], [9, 0]]])
    weights = torch.tensor([[[0.9, 0.1]] * 4], dtype=torch.float64, requires_grad=True)
    tokens = SoftTokens(ids, weights, torch.ones(1, 4, dtype=torch.bool), (0,))
    for reference, pays in (([2, 3], True), ([2, 3, 8, 9, 5], False)):
        (grad,) = torch.autograd.grad(reward.soft(tokens, reference=[[reference]]).sum(), weights)
        assert (grad[0, 2, 1] - grad[0, 2, 0] > 0.0) == pays


def test_references_that_are_none():
    ids, mask = torch.tensor([[2, 3]]), torch.ones(1, 2, dtype=torch.bool)
    reward = BleuReward()
    with pytest.raises(ValueError, match=r"no column 'reference' \(it has \['prompt'\]\)"):
        reward.hard(ids, mask, prompt=["x"])
    with pytest.raises(ValueError, match="2 rows of references for 1 completions"):
        reward.hard(ids, mask, reference=[[[2]], [[3]]])
    with pytest.raises(ValueError, match=r"row 0 of the column 'reference' is None \(NoneType\)"):
        reward.hard(ids, mask, reference=[None])
    with pytest.raises(ValueError, match="at least one"):
        reward.hard(ids, mask, reference=[[]])
    with pytest.raises(ValueError, match="without a tokenizer: lists of token ids"):
        reward.soft(one_hot_tokens(ids, mask), reference=["a text"])


def test_settings_are_checked():
    """Without the type checker of the test run, which users do not have."""
    bleu, rouge = inspect.unwrap(BleuReward.__init__), inspect.unwrap(RougeReward.__init__)
    with pytest.raises(ValueError, match=r"smooth_method must be one of .* got 'expo'"):
        bleu(BleuReward.__new__(BleuReward), smooth_method="expo")
    with pytest.raises(ValueError, match="max_ngram_order must be 1 or more, got 0"):
        BleuReward(max_ngram_order=0)
    with pytest.raises(ValueError, match=r"rouge_type must be one of .* got 'rouge9'"):
        rouge(RougeReward.__new__(RougeReward), rouge_type="rouge9")
    with pytest.raises(ValueError, match=r"measure must be one of .* got 'f2'"):
        rouge(RougeReward.__new__(RougeReward), measure="f2")
