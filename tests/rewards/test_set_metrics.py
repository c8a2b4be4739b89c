"""Measures of sets of texts: against definitions and other formulas."""

import pytest
import sacrebleu
import torch

from softrl.rewards.metrics import load_metric
from softrl.rewards.set_metrics import frechet_distance

TEXTS = ["the film was good", "the film was bad", "I went home early", "the film was good and long"]


def test_self_bleu_is_the_mean_of_sentence_scores_against_the_others():
    found = load_metric("self_bleu").compute(predictions=TEXTS, references=TEXTS)
    expected = [
        sacrebleu.sentence_bleu(text, TEXTS[:row] + TEXTS[row + 1 :], use_effective_order=True).score
        for row, text in enumerate(TEXTS)
    ]
    assert found["score"] == pytest.approx(sum(expected) / 4)
    alike = load_metric("self_bleu").compute(predictions=TEXTS[:1] * 3, references=TEXTS[:1] * 3)
    assert alike["score"] == pytest.approx(100.0)
    with pytest.raises(ValueError, match="give two or more"):
        load_metric("self_bleu").compute(predictions=TEXTS[:1], references=TEXTS[:1])


@pytest.mark.parametrize(("n", "m", "d"), [(50, 40, 5), (6, 9, 20)])
def test_frechet_distance_is_that_of_the_covariances(n, m, d):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(n, d, generator=generator).double()
    second = (torch.randn(m, d, generator=generator) @ torch.randn(d, d, generator=generator) + 0.5).double()
    c1, c2 = torch.cov(first.T), torch.cov(second.T)
    eigenvalues = torch.linalg.eigvals(c1 @ c2)  # those of C₁C₂ are not negative, and their roots sum to the trace
    root = eigenvalues.real.clamp(min=0).sqrt().sum()
    expected = (first.mean(0) - second.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * root
    # with fewer texts than features the product has zero eigenvalues, whose roots are as inexact as 1e-8
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_and_of_a_shift():
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double()
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-10)
    assert frechet_distance(features, features + 2.0) == pytest.approx(16.0)
    with pytest.raises(ValueError, match="two texts at least"):
        frechet_distance(features[:1], features)
