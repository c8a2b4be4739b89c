"""How well a softAR model predicts held-out text past its window, and what its memory is worth there.

Every text is read with its own memory, with none (the window slides and truncates), and with that of another text of
the batch. What memory gives beyond having something in its slots is the difference from the last. A text that ends
before a window has no memory to lend there: tokens of longer texts in such windows, which are read without any, do not
count in the permuted numbers.

"Beyond" is what is predicted from more than `beyond_tokens` tokens, the model's own window by default. Models with
windows of different sizes are compared beyond one number of tokens, that of the largest.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from softrl.contexts.soft_ar import NO_MEMORY, SoftARForCausalLM
from softrl.models.policy import evaluating
from softrl.objectives.embedding_regression import embedding_spread
from softrl.objectives.soft_ar import SoftARObjective, text_hidden, token_scores
from softrl.trainers.metrics import check_counted
from softrl.types import Texts

OWN, TRUNCATED, PERMUTED, SOFT = "", "_truncated", "_permuted", "_soft"  # behind a metric's name
_MOST_WINDOWS = 16  # that have metrics of their own


@dataclass(frozen=True)
class ReadText:
    """What was measured of one text, a number for every token that counts.

    Attributes:
        text_index: of its row.
        window: in which the token is predicted; in the first one there is no memory.
        read: how many tokens it is predicted from.
        is_lent: whether the text before it in the batch reaches that window's start, so that it has memory to lend.
        nll, hits: by the way it was read, nats and 0 or 1; `PERMUTED` is missing where a batch had no other text.
        squared_error: of the embedding that is put out, 0 where none is.
        collapse_error: of the head that collapses, 0 where there is none.
    """

    text_index: int
    window: list[int]
    read: list[int]
    is_lent: list[bool]
    nll: dict[str, list[float]] = field(default_factory=dict)
    hits: dict[str, list[float]] = field(default_factory=dict)
    squared_error: list[float] = field(default_factory=list)
    collapse_error: list[float] = field(default_factory=list)


@torch.no_grad()
def read_texts(model: SoftARForCausalLM, texts: Texts, indices: list[int]) -> list[ReadText]:
    """Texts in every way; with a soft region also with the model's own outputs in it."""
    layout, rows = model.model.layout, torch.arange(len(indices), device=texts.ids.device)
    counted = (texts.mask if texts.counted is None else texts.mask & texts.counted)[:, 1:]
    read = texts.mask.long().cumsum(-1)[:, :-1]
    window = layout.window_of(read - 1)
    is_lent = window * layout.stride < texts.mask.sum(-1).roll(1)[:, None]
    made = [
        ReadText(index, *(each[row][counted[row]].tolist() for each in (window, read, is_lent)))
        for row, index in enumerate(indices)
    ]
    ways: dict[str, Tensor | None] = {OWN: None}
    if layout.num_slots:
        ways[TRUNCATED] = torch.full_like(rows, NO_MEMORY)
        ways |= {PERMUTED: rows.roll(1)} if len(rows) > 1 else {}
    if layout.num_soft:
        ways[SOFT] = None
    with evaluating(model):
        for way, memory_of in ways.items():
            is_soft = torch.ones_like(texts.mask) if way == SOFT else None
            scores = token_scores(model, text_hidden(model, texts, is_soft, memory_of), texts.ids, SoftARObjective())
            for row, text in enumerate(made):
                text.nll[way] = scores.nll[row][counted[row]].tolist()
                text.hits[way] = scores.hits[row][counted[row]].float().tolist()
                if way == OWN:
                    text.squared_error.extend(scores.squared_error[row][counted[row]].tolist())
                    text.collapse_error.extend(scores.collapse_error[row][counted[row]].tolist())
    return made


def summary(texts: list[ReadText], model: SoftARForCausalLM, beyond_tokens: int) -> dict[str, float]:
    """Means over tokens, in nats: all, those `_beyond` so many tokens, and by window; what memory gains there.

    Without slots there is one way to read a text; its numbers then stand under all names, so that tables compare.

    Raises:
        ValueError: no token of any text counts.
    """
    check_counted(sum(len(text.window) for text in texts), len(texts))
    values = {}
    window, read = _joined([text.window for text in texts]), _joined([text.read for text in texts])
    beyond = read > beyond_tokens
    for way in (OWN, TRUNCATED, PERMUTED, SOFT):
        there = [text for text in texts if way in text.nll]
        if not there and (way == SOFT or model.model.layout.num_slots):
            continue
        source, rows = (way, there) if there else (OWN, texts)
        keep = _kept(rows, source)
        is_beyond = _joined([text.read for text in rows])[keep] > beyond_tokens
        for name in ("nll", "hits"):
            numbers = _joined([getattr(text, name)[source] for text in rows])[keep]
            values |= _means(f"{'accuracy' if name == 'hits' else name}{way}", numbers, is_beyond)
    values |= {"loss": values["nll"], "perplexity": math.exp(values["nll"])}
    if beyond.any():
        values |= {"perplexity_beyond": math.exp(values["nll_beyond"]), "tokens_beyond": float(beyond.sum())}
    for number in range(1, min(int(window.max()), _MOST_WINDOWS) + 1):
        for way in (OWN, TRUNCATED):
            nll = _joined([text.nll.get(way, text.nll[OWN]) for text in texts])
            values |= _means(f"window_{number}/nll{way}", nll[window == number])
    values |= _gains(texts, beyond_tokens)
    if model.config.collapse_head:
        values["collapse_error"] = _joined([text.collapse_error for text in texts]).mean().item()
    if model.config.output == "embedding":
        values["squared_error"] = _joined([text.squared_error for text in texts]).mean().item()
        values["embedding_spread"] = embedding_spread(model.head.embeddings.double()).item()
        values["distance_temperature"] = model.head.log_temperature.exp().item()
    return values


def _kept(texts: list[ReadText], way: str) -> Tensor:
    """Which tokens of texts one after another count, read in a way."""
    is_lent = _joined([text.is_lent for text in texts]) > 0.0
    return is_lent if way == PERMUTED else torch.ones_like(is_lent)


def _gains(texts: list[ReadText], beyond_tokens: int) -> dict[str, float]:
    """What a text's own memory saves beyond so many tokens, nats a token: mean over texts and its standard error."""
    found = {}
    for way in (TRUNCATED, PERMUTED):
        gains = []
        for text in texts:
            counts = _kept([text], way) & (torch.tensor(text.read) > beyond_tokens)
            if way in text.nll and counts.any():
                other, own = (torch.tensor(text.nll[each], dtype=torch.float64) for each in (way, OWN))
                gains.append((other - own)[counts].mean())
        if len(gains) > 1:
            values = torch.stack(gains)
            found[f"gain{way}"] = values.mean().item()
            found[f"gain{way}_se"] = (values.std() / len(values) ** 0.5).item()
    return found


def _means(name: str, numbers: Tensor, beyond: Tensor | None = None) -> dict[str, float]:
    """Of all and of those beyond; nothing of none."""
    groups = {name: numbers} | ({} if beyond is None else {f"{name}_beyond": numbers[beyond]})
    return {name: group.mean().item() for name, group in groups.items() if len(group)}


def _joined(columns: list[list]) -> Tensor:
    return torch.tensor([value for column in columns for value in column], dtype=torch.float64)
