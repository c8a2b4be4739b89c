"""Measures of a set of texts as a whole, as `evaluate.Metric` objects: how much alike, how far from real ones."""

from typing import Any

import evaluate
import torch
from jaxtyping import Float
from torch import Tensor

from softrl.rewards.overlap_metrics import metric_info


class SelfBleu(evaluate.Metric):
    """BLEU of each text against all others, from 0 to 100: the lower, the more diverse.

    `compute(predictions=...)`; references are taken and not looked at. Returns `score`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info("Self-BLEU.", "Y. Zhu et al. (2018), Texygen, arXiv 1802.01886.")

    def _compute(self, predictions: list[str], references: list[Any] | None = None) -> dict[str, float]:
        from sacrebleu.metrics import BLEU

        if len(predictions) < 2:
            raise ValueError(f"self_bleu compares texts with each other and got {len(predictions)}; give two or more")
        bleu = BLEU(effective_order=True)
        others = (predictions[:row] + predictions[row + 1 :] for row in range(len(predictions)))
        scores = [bleu.sentence_score(text, rest).score for text, rest in zip(predictions, others, strict=True)]
        return {"score": sum(scores) / len(scores)}


class FrechetDistance(evaluate.Metric):
    """Fréchet distance of sentence embeddings (MiniLM's) of texts and references: the lower, the more alike the sets.

    `compute(predictions=..., references=...)`, of several references of a text the first. Both sets are taken for
    Gaussian. It grows as sets shrink, so only sets of equal sizes are comparable. Returns `distance`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Fréchet distance of embeddings.",
            "M. Heusel et al. (2017), arXiv 1706.08500; of texts: S. Semeniuta et al. (2018), arXiv 1806.04936.",
        )

    def _compute(self, predictions: list[str], references: list[Any]) -> dict[str, float]:
        from softrl import assets
        from softrl.rewards.judge import SentenceEncoder

        encoder = SentenceEncoder(assets.encoder())
        real = [row if isinstance(row, str) else row[0] for row in references]
        last = encoder.num_features // 3  # of the last layer
        features = [encoder.features(texts)[:, -last:] for texts in (predictions, real)]
        return {"distance": frechet_distance(*features)}


def frechet_distance(first: Float[Tensor, "n D"], second: Float[Tensor, "m D"]) -> float:
    """`‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁ C₂)^½)` of two sets of features, computed in float64.

    The trace of the root is the sum of the singular values of `X₁ X₂ᵀ / √((n−1)(m−1))`, X centred: no root of a matrix
    is taken, and sets with fewer texts than features are no trouble.

    Raises:
        ValueError: a set of fewer than two.
    Source: D. Dowson, B. Landau (1982), The Fréchet distance between multivariate normal distributions.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"a set needs two texts at least to have a spread, got {len(first)} and {len(second)}")
    means, centred = [], []
    for features in (first.double(), second.double()):
        means.append(features.mean(0))
        centred.append((features - means[-1]) / (len(features) - 1) ** 0.5)
    spreads = sum(float(rows.square().sum()) for rows in centred)
    root = float(torch.linalg.svdvals(centred[0] @ centred[1].T).sum())
    return max(0.0, float((means[0] - means[1]).square().sum()) + spreads - 2 * root)
