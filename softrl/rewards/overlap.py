"""BLEU and ROUGE of the policy's tokens as differentiable rewards.

Words are the policy's tokens: what is compared are token ids, as SentencePiece BLEU does. The hard faces are computed
by sacrebleu and rouge-score. Scores of decoded words are for measuring: `overlap_metrics.py`.

Soft scores are not expected hard scores: counts are replaced by expectations, and BLEU and F1 are not linear in them.
The difference shrinks as the soft tokens sharpen and is zero at one-hot ones (`tests/rewards/test_overlap.py`).
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softrl.rewards.ngrams import (
    Presence,
    ReferenceTokens,
    expected_common_subsequence,
    expected_matches,
    probabilities_of,
)
from softrl.types import SoftTokens

Smoothing = Literal["exp", "add-k", "floor", "none"]
Measure = Literal["f1", "precision", "recall"]
RougeType = Literal["rouge1", "rouge2", "rougeL"]

_ADDED, _FLOOR = 1.0, 0.1  # sacrebleu's own values of "add-k" and "floor"


class _ReferenceReward:
    """What both have in common: references from a column of the data set, and which tokens are words."""

    vocab_size: int | None = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        reference_column: str,
        eos_ids: Sequence[int] | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.reference_column = reference_column
        if eos_ids is None:
            ending = None if tokenizer is None else tokenizer.eos_token_id
            eos_ids = () if ending is None else (ending,)
        self.eos_ids = tuple(eos_ids)

    def references(self, columns: dict[str, Any], num_rows: int) -> list[list[list[int]]]:
        """Token ids of the references of every row.

        Raises:
            ValueError: no such column, another number of rows, or a row that is no reference.
        """
        if self.reference_column not in columns:
            raise ValueError(
                f"reward {self.name!r} compares with references, and the data set has no column "
                f"{self.reference_column!r} (it has {sorted(columns) or 'none'}); add it, texts or lists of texts, or "
                "name another one with reference_column"
            )
        rows = columns[self.reference_column]
        if len(rows) != num_rows:
            raise ValueError(
                f"reward {self.name!r} got {len(rows)} rows of references for {num_rows} completions; give each one"
            )
        return [self._ids_of(row, index) for index, row in enumerate(rows)]

    def _ids_of(self, row: Any, index: int) -> list[list[int]]:
        texts = [row] if isinstance(row, str) else row
        if not isinstance(texts, list | tuple) or not texts:
            raise ValueError(self._no_reference(row, index))
        if all(isinstance(text, str) for text in texts) and self.tokenizer is not None:
            found = self.tokenizer(list(texts), add_special_tokens=False).input_ids
        elif all(isinstance(text, list) and all(isinstance(token, int) for token in text) for text in texts):
            found = texts
        else:
            raise ValueError(self._no_reference(row, index))
        return [[token for token in ids if token not in self.eos_ids] for ids in found]

    def _no_reference(self, row: Any, index: int) -> str:
        without = "" if self.tokenizer else " (without a tokenizer: lists of token ids)"
        return (
            f"reward {self.name!r}: row {index} of the column {self.reference_column!r} is {repr(row)[:60]} "
            f"({type(row).__name__}); give a reference text or a list of at least one{without}"
        )

    def _words(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> list[str]:
        """Token ids as texts whose words they are, for packages that count words."""
        rows = zip(ids.tolist(), mask.tolist(), strict=True)
        return [
            _as_words([i for i, written in zip(*row, strict=True) if written and i not in self.eos_ids])
            for row in rows
        ]


class BleuReward(_ReferenceReward):
    """Sentence BLEU, in [0, 1].

    `BP · Π_n precision_n^(1/N)` over the orders n that a text is long enough for (sacrebleu's `effective_order`).
    Matches, totals and length are expectations, see `ngrams.py`. With less than one expected match of an order, the
    value is interpolated between those of none and of one: sacrebleu's smoothing jumps there, and a fourth root has no
    gradient at zero, where a policy that matches nothing needs one. With several references, counts are clipped by
    the highest and the length is compared with the closest.

    Args:
        tokenizer: the policy's; it cuts the references, as they stand: one that follows a prompt begins with the
            space that the completion begins with. Not needed where references are lists of token ids.
        max_ngram_order: N.
        smooth_method: of precisions without a match: sacrebleu's "exp", "add-k" (k = 1), "floor" (0.1) or "none".
        reference_column: of the data set; a text or a list of texts a row.
        eos_ids: tokens that end a text and are no words; the tokenizer's by default.
        name: what logs call it.
    Raises:
        ValueError: an unknown smoothing, or an order below 1.
    Source: K. Papineni et al. (2002); smoothing: B. Chen, C. Cherry (2014), W14-3346, methods 1 to 3, as in
        sacrebleu; a BLEU of expected counts: V. Zhukov, E. Golikov, M. Kretov (2017), arXiv:1712.04708; N. Casas et
        al. (2018), "A differentiable BLEU loss"; the interpolation: ours.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_ngram_order: int = 4,
        smooth_method: Smoothing = "exp",
        reference_column: str = "reference",
        eos_ids: Sequence[int] | None = None,
        name: str = "bleu",
    ) -> None:
        super().__init__(tokenizer, name, reference_column, eos_ids)
        if smooth_method not in get_args(Smoothing):
            raise ValueError(f"smooth_method must be one of {get_args(Smoothing)}, got {smooth_method!r}")
        if max_ngram_order < 1:
            raise ValueError(f"max_ngram_order must be 1 or more, got {max_ngram_order}")
        self.max_ngram_order = max_ngram_order
        self.smooth_method: Smoothing = smooth_method

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Scores of soft tokens, in float32 at least.

        Raises:
            ValueError: references are missing or malformed.
        """
        rows = self.references(columns, len(tokens.ids))
        references = ReferenceTokens.of(rows, tokens.ids.device)
        presence = Presence.of(tokens, self.eos_ids)
        probabilities = probabilities_of(tokens, references.vocabulary, presence.written.dtype)
        orders = range(1, self.max_ngram_order + 1)
        matches = torch.stack([expected_matches(probabilities, presence, references.table(n)) for n in orders], -1)
        totals = torch.stack([presence.num_ngrams(n) for n in orders], -1)
        lengths = _closest(presence.num_ngrams(1), rows)
        return brevity_penalty(totals[:, 0], lengths) * mean_precision(matches, totals, self.smooth_method)

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """sacrebleu's sentence scores of token ids, over 100."""
        from sacrebleu.metrics.bleu import BLEU

        bleu = BLEU(
            tokenize="none", effective_order=True, smooth_method=self.smooth_method,
            max_ngram_order=self.max_ngram_order,
        )  # fmt: skip
        rows = zip(self._words(ids, mask), self.references(columns, len(ids)), strict=True)
        scores = [bleu.sentence_score(text, [_as_words(one) for one in several]).score for text, several in rows]
        return torch.tensor(scores, dtype=torch.get_default_dtype(), device=ids.device) / 100.0


class RougeReward(_ReferenceReward):
    """ROUGE-1, ROUGE-2 or ROUGE-L, in [0, 1].

    With m matches (for "rougeL", the length of the common subsequence) of a text's a and a reference's b units:
    precision `m / a`, recall `m / b`, F1 `2 m / (a + b)`, where a and b are at least 1. Matches and a are
    expectations, see `ngrams.py`. Of several references that of the highest F1 counts.

    Args:
        tokenizer: the policy's; see `BleuReward`.
        rouge_type: "rouge1", "rouge2" (unigrams, bigrams) or "rougeL" (longest common subsequence).
        measure: "f1", "precision" or "recall".
        reference_column: of the data set; a text or a list of texts a row.
        eos_ids: tokens that end a text and are no words; the tokenizer's by default.
        name: what logs call it; default: the type.
    Raises:
        ValueError: an unknown type or measure.
    Source: C.-Y. Lin (2004), "ROUGE", as in rouge-score; expectations: ours.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        rouge_type: RougeType = "rougeL",
        measure: Measure = "f1",
        reference_column: str = "reference",
        eos_ids: Sequence[int] | None = None,
        name: str | None = None,
    ) -> None:
        if rouge_type not in get_args(RougeType):
            raise ValueError(f"rouge_type must be one of {get_args(RougeType)}, got {rouge_type!r}")
        if measure not in get_args(Measure):
            raise ValueError(f"measure must be one of {get_args(Measure)}, got {measure!r}")
        super().__init__(tokenizer, name or rouge_type, reference_column, eos_ids)
        self.rouge_type: RougeType = rouge_type
        self.measure: Measure = measure

    def soft(self, tokens: SoftTokens, **columns: Any) -> Float[Tensor, "N"]:
        """Scores of soft tokens, in float32 at least.

        Raises:
            ValueError: references are missing or malformed.
        """
        rows = self.references(columns, len(tokens.ids))
        scores = []
        for place in range(max(map(len, rows), default=1)):  # of a row's references; too few: the last one again
            references = [row[min(place, len(row) - 1)] for row in rows]
            scores.append(self._scores(tokens, references))
        of_each = torch.stack(scores)  # [references, N, 3]
        best = of_each[..., 0].argmax(0)
        chosen = of_each.gather(0, best[None, :, None].expand(1, -1, 3)).squeeze(0)
        return chosen[:, get_args(Measure).index(self.measure)]

    def hard(self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], **columns: Any) -> Float[Tensor, "N"]:
        """rouge-score's scores of token ids."""
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([self.rouge_type], tokenizer=_SplitAtSpaces())
        rows = zip(self._words(ids, mask), self.references(columns, len(ids)), strict=True)
        field = "fmeasure" if self.measure == "f1" else self.measure
        scores = [
            getattr(scorer.score_multi([_as_words(one) for one in several], text)[self.rouge_type], field)
            for text, several in rows
        ]
        return torch.tensor(scores, dtype=torch.get_default_dtype(), device=ids.device)

    def _scores(self, tokens: SoftTokens, rows: list[list[int]]) -> Float[Tensor, "N 3"]:
        """F1, precision and recall of one reference a row."""
        device = tokens.ids.device
        references = ReferenceTokens.of([[row] for row in rows], device)
        presence = Presence.of(tokens, self.eos_ids)
        probabilities = probabilities_of(tokens, references.vocabulary, presence.written.dtype)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        if self.rouge_type == "rougeL":
            in_order = references.in_order(probabilities)
            matches = expected_common_subsequence(in_order, presence, lengths)
            written, wanted = presence.num_ngrams(1), lengths
        else:
            n = int(self.rouge_type[-1])
            matches = expected_matches(probabilities, presence, references.table(n))
            written, wanted = presence.num_ngrams(n), lengths - n + 1
        written, wanted = written.clamp(min=1.0), wanted.clamp(min=1)
        return torch.stack([2.0 * matches / (written + wanted), matches / written, matches / wanted], -1)


def brevity_penalty(length: Float[Tensor, "N"], reference_length: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """`exp(min(0, 1 − r / L))` of lengths in tokens; 0 for an empty text with a reference that is not."""
    shortness = (1.0 - reference_length / length.clamp(min=1e-2)).clamp(max=0.0)
    return shortness.exp()


def mean_precision(
    matches: Float[Tensor, "N orders"], totals: Float[Tensor, "N orders"], smooth_method: Smoothing
) -> Float[Tensor, "N"]:
    """The geometric mean of smoothed n-gram precisions: sacrebleu's at whole numbers, continuous between them.

    Args:
        matches: expected clipped matches of orders 1..N.
        totals: expected n-grams of the text.
        smooth_method: see `BleuReward`.
    """
    k = torch.zeros_like(matches)
    if smooth_method == "add-k":
        k[:, 1:] = _ADDED
    long_enough = torch.ones_like(totals)  # for n-grams of the order; adding k, all texts are
    if smooth_method != "add-k":
        long_enough[:, 1:] = totals[:, 1:].clamp(max=1.0)
    exponent = 1.0 / long_enough.sum(-1, keepdim=True)
    counted = (totals + k).clamp(min=1.0)
    below_one = matches < 1.0  # not `clamp`, which has a gradient on either side of its bound
    share_without = torch.where(below_one, 1.0 - matches, torch.zeros_like(matches))
    with_match = ((torch.where(below_one, torch.ones_like(matches), matches) + k) / counted) ** exponent
    unmatched = _count_without_match(share_without, smooth_method)
    without = (torch.where(unmatched > 0, unmatched, torch.ones_like(matches)) / counted) ** exponent
    without = without.masked_fill(unmatched == 0, 0.0)  # 0^x has no gradient in x
    precision = share_without * without + (1.0 - share_without) * with_match
    return (long_enough * precision + 1.0 - long_enough).prod(-1)


def _count_without_match(
    share_without: Float[Tensor, "N orders"], smooth_method: Smoothing
) -> Float[Tensor, "N orders"]:
    """What stands for the count of an order without a match; "exp" halves it with every such order."""
    if smooth_method == "exp":
        count = torch.exp2(share_without - 1.0 - share_without.cumsum(-1))
    else:
        count = torch.full_like(share_without, {"add-k": _ADDED, "floor": _FLOOR, "none": 0.0}[smooth_method])
    return torch.cat([torch.zeros_like(count[:, :1]), count[:, 1:]], -1)  # without any match the score is 0


def _closest(length: Float[Tensor, "N"], rows: list[list[list[int]]]) -> Int[Tensor, "N"]:
    """Length of the reference that is closest to each text's, the shorter of two."""
    closest = []
    for text, references in zip(length.tolist(), rows, strict=True):
        _, chosen = min((abs(len(reference) - text), len(reference)) for reference in references)
        closest.append(chosen)
    return torch.tensor(closest, device=length.device)


def _as_words(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


class _SplitAtSpaces:
    """A tokenizer for rouge-score that leaves words as they are."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()
