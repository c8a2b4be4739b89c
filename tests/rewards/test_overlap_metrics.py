"""The metric objects against the packages that they wrap, through `evaluate`'s own interface."""

import evaluate
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from test_overlap import text_pairs

from softrl.rewards.metrics import load_metric


def test_sacrebleu_is_the_packages_corpus_score():
    metric = load_metric("sacrebleu")
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == "sacrebleu"
    texts, references = zip(*text_pairs(60), strict=True)
    first = [several[0] for several in references]
    for options in ({}, {"lowercase": True, "tokenize": "char"}):
        expected = sacrebleu.corpus_bleu(list(texts), [first], **options)
        found = metric.compute(predictions=list(texts), references=first, **options)
        assert (found["score"], found["bp"]) == (expected.score, expected.bp)
    assert 0 < found["score"] < 100
    one, two = ["a film"], ["the film", "a cast"]
    both = metric.compute(predictions=one, references=[two])
    assert both["score"] == sacrebleu.corpus_bleu(one, [[text] for text in two]).score
    with pytest.raises(ValueError, match="the same number of references for every prediction"):
        metric.compute(predictions=one * 2, references=[two, one])


def test_rouge_is_the_packages_mean_score():
    metric = load_metric("rouge")
    texts, references = zip(*text_pairs(60), strict=True)
    found = metric.compute(predictions=list(texts), references=list(references))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    scores = [scorer.score_multi(several, text) for text, several in zip(texts, references, strict=True)]
    for kind, value in found.items():
        assert value == pytest.approx(sum(score[kind].fmeasure for score in scores) / len(scores))
    metric.add_batch(predictions=["the films"], references=["the film"])
    assert metric.compute(rouge_types=["rouge1"], use_stemmer=True) == {"rouge1": 1.0}


def test_other_names_go_to_evaluate():
    with pytest.raises(
        ValueError, match=r"metric 'no_such_metric' cannot be loaded .*there are .*'rouge', 'sacrebleu'"
    ):
        load_metric("no_such_metric")
