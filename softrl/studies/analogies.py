"""Does king − man + woman give queen in a language model's input embeddings? Analogies by category, with controls.

Of the pairs of a category every two make two analogies: a is to a* as b is to b*. Only words that are one token with
a space before them count. The nearest token to a* − a + b, operands left out, should be b*. That can be right for
reasons that have nothing to do with the offset: b* is near to b anyway, or to a*. So the same is asked of b alone, of
a* alone and of b + r, r a random direction as long as a* − a. Other spellings of an operand ("king", " King") are
tokens too and count as wrong answers, which accuracy@5 forgives.

Left out: output embeddings, hidden states, and words of several tokens.
Source: the controls are Linzen's (2016), arXiv:1606.07736.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from softrl.assets import write_atomically
from softrl.contexts.algebra import accuracy, analogies, combine, nearest_ids, ranks
from softrl.data.word_pairs import WORD_PAIRS
from softrl.models.nearest import Metric
from softrl.models.policy import Policy
from softrl.studies.tables import write_csv
from softrl.studies.variance_style import png, pyplot, styles

EMBEDDINGS = ("raw", "mean-centred")
METHODS = ("a*-a+b", "b alone", "a* alone", "b+random")
ALL = "all"
_RANDOM_DRAWS = 5


@dataclass(frozen=True)
class Row:
    """One category, embeddings and method. Errors are by leaving out one pair of words after the other."""

    category: str
    embeddings: str
    method: str
    num_pairs: int  # of single tokens
    num_pairs_given: int
    num_analogies: int
    accuracy_at_1: float
    accuracy_at_1_se: float
    accuracy_at_5: float
    accuracy_at_5_se: float
    mean_reciprocal_rank: float


def run(
    policy: Policy,
    tokenizer: Any,
    output: Path,
    figure: Path,
    metric: Metric = "cosine",
    seed: int = 0,
    pairs: Mapping[str, Sequence[tuple[str, str]]] = WORD_PAIRS,
) -> list[Row]:
    """Measure, write rows and figure, and print the table.

    Args:
        policy: its input embeddings, as the model's own module returns them.
        tokenizer: the policy's.
        output: a CSV file.
        figure: a PNG file.
        metric: of "nearest".
        seed: of the random directions.
        pairs: words by category.
    Raises:
        ValueError: fewer than three pairs of single tokens in every category.
    """
    with torch.no_grad():
        table = policy.embed(torch.arange(policy.vocab_size)).float()
    tables = {"raw": table, "mean-centred": table - table.mean(0)}
    rows: list[Row] = []
    used = {category: single_tokens(tokenizer, given) for category, given in pairs.items()}
    used = {category: ids for category, ids in used.items() if len(ids) >= 3}
    if not used:
        raise ValueError(
            "no category has three pairs of words that are one token each with this tokenizer; pass others"
        )
    for name, vectors in tables.items():
        for method in METHODS:
            found = {category: _measure(vectors, ids, method, metric, seed) for category, ids in used.items()}
            for category, (of_pairs, items) in found.items():
                rows.append(_row(category, name, method, len(pairs[category]), of_pairs, items))
            rows.append(_total(name, method, rows[-len(found) :]))
    write_csv(rows, output)
    plot(rows, figure)
    show(rows)
    _show_example(tables, tokenizer, next(iter(used.values())), metric)
    return rows


def single_tokens(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """The ids of those pairs whose words are both one token with a space before them."""
    ids = [[tokenizer(f" {word}", add_special_tokens=False).input_ids for word in pair] for pair in pairs]
    unknown = getattr(tokenizer, "unk_token_id", None)
    single = [(one[0], other[0]) for one, other in ids if len(one) == len(other) == 1]
    return [pair for pair in single if unknown is None or unknown not in pair]


def _items(ids: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """All analogies (a, a*, b, b*) of two pairs, in both orders, and the numbers of their pairs."""
    made = [
        (*ids[i], *ids[j], i, j)
        for i, j in itertools.permutations(range(len(ids)), 2)
        if ids[j][1] not in (*ids[i], ids[j][0])
    ]
    items = torch.tensor(made)
    return items[:, :4], items[:, 4:]


def _measure(
    table: Tensor, ids: Sequence[tuple[int, int]], method: str, metric: Metric, seed: int
) -> tuple[Tensor, Tensor]:
    """The pairs of all analogies [M, 2], and the answers' ranks [draws, M]."""
    items, of_pairs = _items(ids)
    a, a_star, b, answers = items.T
    generator = torch.Generator().manual_seed(seed)
    if method == "a*-a+b":
        return of_pairs, analogies(table, items, metric)[None]
    found = []
    for _ in range(_RANDOM_DRAWS if method == "b+random" else 1):
        if method == "b+random":
            offset = table[a_star] - table[a]
            random = torch.randn(offset.shape, generator=generator)
            scaled = random * (offset.norm(dim=-1) / random.norm(dim=-1))[:, None]
            vectors = combine(torch.stack([table[b], scaled], 1))
        else:
            vectors = table[b if method == "b alone" else a_star]
        found.append(ranks(table, vectors, answers, items[:, :3], metric))
    return of_pairs, torch.stack(found)


def _row(category: str, embeddings: str, method: str, given: int, of_pairs: Tensor, found: Tensor) -> Row:
    count = int(of_pairs.max()) + 1

    def error(k: int) -> float:
        """The jackknife's, over pairs: analogies that share a pair are not independent."""
        left = [accuracy(found[:, (of_pairs != pair).all(-1)].flatten(), k) for pair in range(count)]
        mean = sum(left) / count
        return math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in left))

    flat = found.flatten()
    return Row(
        category, embeddings, method, count, given, len(of_pairs), accuracy(flat, 1), error(1), accuracy(flat, 5),
        error(5), (1.0 / (flat + 1).double()).mean().item(),
    )  # fmt: skip


def _total(embeddings: str, method: str, rows: Sequence[Row]) -> Row:
    """The mean over categories, each counting the same; its error from theirs."""
    count = len(rows)

    def mean(name: str) -> float:
        return sum(getattr(row, name) for row in rows) / count

    def error(name: str) -> float:
        return math.sqrt(sum(getattr(row, name) ** 2 for row in rows)) / count

    return Row(
        ALL, embeddings, method, sum(row.num_pairs for row in rows), sum(row.num_pairs_given for row in rows),
        sum(row.num_analogies for row in rows), mean("accuracy_at_1"), error("accuracy_at_1_se"),
        mean("accuracy_at_5"), error("accuracy_at_5_se"), mean("mean_reciprocal_rank"),
    )  # fmt: skip


def show(rows: Sequence[Row]) -> None:
    """Print accuracy@1 and @5 by category, a column for each method."""
    for embeddings in EMBEDDINGS:
        table = Table(title=f"{embeddings} embeddings: accuracy@1 / @5, %", title_justify="left")
        for column in ("category", "pairs", "items", *METHODS):
            table.add_column(column, justify="left" if column == "category" else "right", no_wrap=True)
        own = [row for row in rows if row.embeddings == embeddings]
        for category in dict.fromkeys(row.category for row in own):
            of_category = {row.method: row for row in own if row.category == category}
            first = of_category[METHODS[0]]
            cells = [f"{100 * row.accuracy_at_1:.0f} / {100 * row.accuracy_at_5:.0f}" for row in of_category.values()]
            counts = f"{first.num_pairs}/{first.num_pairs_given}", str(first.num_analogies)
            table.add_row(category, *counts, *cells, end_section=category == own[-2].category)
        Console().print(table)


def _show_example(
    tables: Mapping[str, Tensor], tokenizer: Any, ids: Sequence[tuple[int, int]], metric: Metric
) -> None:
    """The five tokens that are nearest to the answer of the first two pairs."""
    (a, a_star), (b, _) = ids[:2]
    named = [tokenizer.decode([token]).strip() for token in (b, a, a_star)]
    for name, table in tables.items():
        vector = combine(table[[b, a_star]], table[[a]])[None]
        found = nearest_ids(table, vector, 5, torch.tensor([[a, b, a_star]]), metric)[0].tolist()
        words = ", ".join(repr(tokenizer.decode([token])) for token in found)
        print(f"{name}: {named[0]} - {named[1]} + {named[2]} is near {words}")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy@1 by category, a bar for each method, raw embeddings above mean-centred ones."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 1, figsize=(8, 6), sharex=True, sharey=True, layout="constrained")
    categories, style = list(dict.fromkeys(row.category for row in rows)), styles(METHODS)
    width = 0.8 / len(METHODS)
    for axis, embeddings in zip(axes, EMBEDDINGS, strict=True):
        for number, method in enumerate(METHODS):
            own = [row for row in rows if (row.embeddings, row.method) == (embeddings, method)]
            at = [categories.index(row.category) + (number - (len(METHODS) - 1) / 2) * width for row in own]
            axis.bar(
                at, [row.accuracy_at_1 for row in own], width, yerr=[row.accuracy_at_1_se for row in own],
                color=style[method].colour, label=method, error_kw={"linewidth": 0.8},
            )  # fmt: skip
        axis.set_ylabel("accuracy@1, ± 1 standard error")
        axis.set_title(f"{embeddings} embeddings", loc="left", fontsize=10)
        axis.set_ylim(0.0, 1.15)  # room for the legend
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(ncols=len(METHODS), fontsize=8)
    axes[1].set_xticks(range(len(categories)), categories)
    picture = png(figure, dpi=100)
    with write_atomically(path) as temporary:
        temporary.write_bytes(picture)
