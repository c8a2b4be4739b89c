"""Expected counts of a reference's n-grams, and of its common subsequence, in soft tokens. Pure functions.

Everything is a polynomial in the weights, up to the maximum inside a common subsequence: gradients exist at one-hot
tokens, where each function gives the integer that counting gives.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from softrl.masking import is_any_of
from softrl.types import SoftTokens


@dataclass(frozen=True)
class Presence:
    """How likely each step of N texts holds a token that counts: one that is written and does not end the text."""

    written: Float[Tensor, "N T"]  # s_t
    goes_on: Float[Tensor, "N T"]  # 1 − q_t[eos]
    mask: Bool[Tensor, "N T"]

    @classmethod
    def of(cls, tokens: SoftTokens, eos_ids: tuple[int, ...]) -> "Presence":
        """Of soft tokens, in float32 at least; `eos_ids` end a text and are no part of it, however stopping works."""
        precise = torch.promote_types(tokens.weights.dtype, torch.float32)
        ending = (tokens.weights.to(precise) * is_any_of(tokens.ids, eos_ids)).sum(-1)
        return cls(tokens.survival.to(precise), 1.0 - ending, tokens.mask)

    def num_ngrams(self, n: int) -> Float[Tensor, "N"]:
        """Expected number of n-grams, `Σ_t s_t Π_{m<n} (1 − q_{t+m}[eos])`; with n = 1 the length in tokens."""
        starts = self.written[:, : _num_starts(self.mask.shape[1], n)]
        return (starts * _windows_product(self.goes_on * self.mask, n)).sum(-1)


@dataclass(frozen=True)
class NgramTable:
    """The different n-grams of each of N references, padded with count 0."""

    columns: Int[Tensor, "N G n"]  # of the reference's vocabulary, see `ReferenceTokens`
    counts: Int[Tensor, "N G"]


@dataclass(frozen=True)
class ReferenceTokens:
    """N texts to compare with, each given by one reference or several.

    `vocabulary` holds the different ids of each row's references in rising order, padded with −1 on the right.
    """

    rows: Sequence[Sequence[Sequence[int]]]
    vocabulary: Int[Tensor, "N U"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[Sequence[int]]], device: torch.device) -> "ReferenceTokens":
        """From the token ids of the references of every row."""
        occurring = [sorted({token for reference in row for token in reference}) for row in rows]
        return cls(rows, _padded([torch.tensor(ids, dtype=torch.long) for ids in occurring], -1).to(device))

    def table(self, n: int) -> NgramTable:
        """The n-grams of each row; one that several references have counts as often as where it is most frequent."""
        columns, counts = [], []
        for row, vocabulary in zip(self.rows, self.vocabulary.tolist(), strict=True):
            column_of = {token: column for column, token in enumerate(vocabulary) if token >= 0}
            most: Counter[tuple[int, ...]] = Counter()
            for reference in row:
                most |= Counter(tuple(reference[i : i + n]) for i in range(len(reference) - n + 1))
            grams = [[column_of[token] for token in gram] for gram in most]
            columns.append(torch.tensor(grams, dtype=torch.long).reshape(len(grams), n))
            counts.append(torch.tensor(list(most.values()), dtype=torch.long))
        device = self.vocabulary.device
        return NgramTable(_padded(columns, 0).to(device), _padded(counts, 0).to(device))

    def in_order(self, probabilities: Float[Tensor, "N T U"]) -> Float[Tensor, "N T J"]:
        """The probability of each of the first reference's J tokens, from those of the vocabulary; 0 in padding."""
        unknown = probabilities.shape[-1]  # a column of zeros behind those of the vocabulary
        firsts = _padded([torch.tensor(row[0], dtype=torch.long) for row in self.rows], -1).to(self.vocabulary.device)
        ascending = self.vocabulary.masked_fill(self.vocabulary < 0, torch.iinfo(torch.long).max)
        column = torch.searchsorted(ascending, firsts).masked_fill(firsts < 0, unknown)
        return pad(probabilities, (0, 1)).gather(-1, column[:, None].expand(-1, probabilities.shape[1], -1))


def probabilities_of(tokens: SoftTokens, vocabulary: Int[Tensor, "N U"], dtype: torch.dtype) -> Float[Tensor, "N T U"]:
    """`q_t[u]` for each id u of a row's vocabulary: 0 where it is not kept, and in the padding."""
    num_rows, num_ids = vocabulary.shape
    if num_ids == 0:
        return tokens.weights.to(dtype)[..., :0]
    ascending = vocabulary.masked_fill(vocabulary < 0, torch.iinfo(vocabulary.dtype).max)
    ids = tokens.ids.reshape(num_rows, -1)
    column = torch.searchsorted(ascending, ids.contiguous()).clamp(max=num_ids - 1)
    weights = tokens.weights.to(dtype) * (ascending.gather(1, column) == ids).view_as(tokens.ids)
    dense = weights.new_zeros(*tokens.ids.shape[:2], num_ids)
    return dense.scatter_add(-1, column.view_as(tokens.ids), weights)


def expected_matches(
    probabilities: Float[Tensor, "N T U"], presence: Presence, table: NgramTable
) -> Float[Tensor, "N"]:
    """Expected clipped matches, `Σ_g E[min(C_g, c_g)]`: how many n-grams of a text its reference has as well.

    `C_g` is a sum of independent events, one for every start t, with probabilities `s_t Π_{m<n} q_{t+m}[g_m]` (a
    Poisson binomial variable), and c_g the reference's count. That is exact for the unigrams of independently drawn
    tokens; longer n-grams at overlapping places, and places that share an uncertain end, depend on each other. At
    one-hot tokens it is the number that BLEU and ROUGE count. `min(E C_g, c_g)`, the shorter way, is never less
    (Jensen) and loses its gradient where the expectation alone reaches the count.

    Source: V. Zhukov, E. Golikov, M. Kretov (2017), arXiv:1712.04708, for the expectation under independent tokens;
    the Poisson binomial recursion is standard.
    """
    n = table.columns.shape[-1]
    num_starts = _num_starts(presence.mask.shape[1], n)
    if num_starts == 0 or table.counts.numel() == 0:
        return probabilities.new_zeros(len(probabilities))
    probabilities = probabilities * presence.mask[..., None]
    occurs = presence.written[:, :num_starts, None].expand(-1, -1, table.counts.shape[1])  # [N, starts, G]
    for shift in range(n):
        column = table.columns[..., shift][:, None].expand(-1, num_starts, -1)
        occurs = occurs * probabilities[:, shift : shift + num_starts].gather(-1, column)
    return _mean_of_clipped(occurs, table.counts)


def _mean_of_clipped(occurs: Float[Tensor, "N starts G"], counts: Int[Tensor, "N G"]) -> Float[Tensor, "N"]:
    """`Σ_g E[min(C_g, c_g)]` where C_g counts which of the independent events of probabilities `occurs` happen."""
    highest = int(counts.max())
    # exactly[..., k]: the probability of k occurrences so far, for k below the largest count of the reference
    exactly = torch.zeros(*counts.shape, highest, dtype=occurs.dtype, device=occurs.device)
    exactly[..., 0] = 1.0
    for event in occurs.unbind(1):
        one_more = pad(exactly[..., :-1], (1, 0))
        exactly = exactly * (1.0 - event[..., None]) + one_more * event[..., None]
    missing = (counts[..., None] - torch.arange(highest, device=occurs.device)).clamp(min=0)
    return (counts - (missing * exactly).sum(-1)).sum(-1)


def expected_common_subsequence(
    probabilities: Float[Tensor, "N T J"], presence: Presence, lengths: Int[Tensor, "N"]
) -> Float[Tensor, "N"]:
    """Soft length of the longest common subsequence with a reference.

    `L_tj = m_tj (L_{t−1,j−1} + 1) + (1 − m_tj) max(L_{t−1,j}, L_{t,j−1})` with `m_tj` the probability that the text's
    token t is the reference's j-th: the textbook recursion, whose two cases are mixed by their probability. At
    one-hot tokens it is that recursion. The maximum of expectations is at most the expectation of the maximum, so
    before that it tends to be too small.

    Args:
        probabilities: `q_t[y_j]` of the reference's tokens y; 0 in its padding.
        presence: of the text.
        lengths: of the references, in tokens.
    Source: ours; the recursion is that of rouge-score's ROUGE-L.
    """
    match = probabilities * (presence.written * presence.mask)[..., None]
    num_rows, num_steps, num_tokens = match.shape
    if num_steps == 0 or num_tokens == 0:
        return match.new_zeros(num_rows)
    step = torch.arange(1, num_steps + 1, device=match.device)
    before = last = match.new_zeros(num_rows, num_steps + 1)  # L on the two diagonals t + j before this one
    ends = [last[:, -1]]  # L_{T,j} for j = 0, 1, ...
    for diagonal in range(2, num_steps + num_tokens + 1):
        token = diagonal - step
        inside = (token >= 1) & (token <= num_tokens)
        here = match[:, step - 1, (token - 1).clamp(0, num_tokens - 1)] * inside
        mixed = here * (before[:, :-1] + 1.0) + (1.0 - here) * torch.maximum(last[:, :-1], last[:, 1:])
        before, last = last, pad(mixed * (token >= 1), (1, 0))
        if diagonal > num_steps:
            ends.append(last[:, -1])
    return torch.stack(ends, 1).gather(1, lengths[:, None]).squeeze(1)


def _num_starts(num_steps: int, n: int) -> int:
    return max(0, num_steps - n + 1)


def _windows_product(values: Float[Tensor, "N T"], n: int) -> Float[Tensor, "N starts"]:
    """The product of every n neighbours."""
    num_starts = _num_starts(values.shape[1], n)
    product = torch.ones_like(values[:, :num_starts])
    for shift in range(n):
        product = product * values[:, shift : shift + num_starts]
    return product


def _padded(rows: list[Tensor], fill: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=fill)
