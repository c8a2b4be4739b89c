"""Corpus scores of decoded texts against references, as `evaluate.Metric` objects that need no hub.

They wrap the packages that the scripts of `evaluate.load` wrap, and return what they return.
"""

from typing import Any

import datasets
import evaluate


class Sacrebleu(evaluate.Metric):
    """sacrebleu's corpus BLEU, from 0 to 100.

    `compute(predictions=..., references=...)`, references one text a prediction or equally many each; further keyword
    arguments (`tokenize`, `smooth_method`, `lowercase`, ...) go to `sacrebleu.corpus_bleu`.
    Returns `score`, `counts`, `totals`, `precisions`, `bp`, `sys_len` and `ref_len`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info("Corpus BLEU by sacrebleu.", "M. Post (2018), A Call for Clarity in Reporting BLEU Scores.")

    def _compute(
        self, predictions: list[str], references: list[str] | list[list[str]], **options: Any
    ) -> dict[str, Any]:
        import sacrebleu

        several = _as_lists(references)
        if len({len(row) for row in several}) > 1:
            raise ValueError("sacrebleu needs the same number of references for every prediction")
        result = sacrebleu.corpus_bleu(predictions, [list(column) for column in zip(*several, strict=True)], **options)
        names = ("score", "counts", "totals", "precisions", "bp", "sys_len", "ref_len")
        return {name: getattr(result, name) for name in names}


class Rouge(evaluate.Metric):
    """rouge-score's mean F1 over predictions, from 0 to 1: `rouge1`, `rouge2`, `rougeL` and `rougeLsum`.

    `compute(predictions=..., references=..., rouge_types=..., use_stemmer=False)`; of several references of a
    prediction the best counts.
    """

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "ROUGE by rouge-score.", "C.-Y. Lin (2004), ROUGE: A Package for Automatic Evaluation of Summaries."
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str] | list[list[str]],
        rouge_types: list[str] | None = None,
        use_stemmer: bool = False,
    ) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        rouge_types = rouge_types or ["rouge1", "rouge2", "rougeL", "rougeLsum"]
        scorer = RougeScorer(rouge_types, use_stemmer=use_stemmer)
        pairs = zip(_as_lists(references), predictions, strict=True)
        scores = [scorer.score_multi(several, text) for several, text in pairs]
        return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in rouge_types}


def metric_info(description: str, citation: str) -> evaluate.MetricInfo:
    """What `evaluate` wants to know of a metric of texts."""
    text, texts = datasets.Value("string"), datasets.Sequence(datasets.Value("string"))
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description="predictions: a list of texts; references: a text or a list of texts for each of them.",
        features=[
            datasets.Features({"predictions": text, "references": texts}),
            datasets.Features({"predictions": text, "references": text}),
        ],
    )


def _as_lists(references: list[str] | list[list[str]]) -> list[list[str]]:
    return [[row] if isinstance(row, str) else list(row) for row in references]
