"""Algebra of embeddings: sums and differences of tokens, the tokens they are near to, and how often analogies hold.

What the notes build on: king − man + woman ≈ queen. `combine` is the operation itself, differentiable, for what is put
into a context; memory slots are such sums too. `analogies` measures how far it can be trusted in a model's embeddings.
Operands are never an answer: left in, the nearest token to a* − a + b is mostly b or a* itself.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softrl.models.nearest import Metric, nearest_vectors
from softrl.models.policy import chunk_length


def combine(
    plus: Float[Tensor, "*batch P D"], minus: Float[Tensor, "*batch Q D"] | None = None
) -> Float[Tensor, "*batch D"]:
    """`Σ_i plus_i − Σ_j minus_j` of embeddings."""
    total = plus.sum(-2)
    return total if minus is None else total - minus.sum(-2)


def nearest_ids(
    table: Float[Tensor, "V D"],
    vectors: Float[Tensor, "M D"],
    k: int = 1,
    excluded: Int[Tensor, "M X"] | None = None,
    metric: Metric = "cosine",
) -> Int[Tensor, "M k"]:
    """The k tokens nearest to each of M vectors, the nearest first.

    Args:
        table: embeddings of all tokens.
        vectors: of `combine`.
        k: from 1 to V, less what is excluded; for a few, since each costs a pass over the table.
        excluded: ids that are not an answer: the operands.
        metric: "cosine" or "euclidean".
    Raises:
        ValueError: k out of range.
    """
    most = len(table) - (0 if excluded is None else excluded.shape[1])
    if not 1 <= k <= most:
        raise ValueError(f"k must be from 1 to {most}, the tokens that are not excluded, got {k}")
    found = vectors.new_zeros(len(vectors), 0, dtype=torch.long) if excluded is None else excluded
    for _ in range(k):
        ids, _ = nearest_vectors(lambda ids: table[ids], len(table), vectors, metric, found)
        found = torch.cat([found, ids[:, None]], 1)
    return found[:, -k:]


@torch.no_grad()
def ranks(
    table: Float[Tensor, "V D"],
    vectors: Float[Tensor, "M D"],
    answers: Int[Tensor, "M"],
    excluded: Int[Tensor, "M X"],
    metric: Metric = "cosine",
) -> Int[Tensor, "M"]:
    """How many tokens are nearer to each vector than the right one, excluded ones left out; 0 is a hit.

    Ties count against the answer: where nothing tells tokens apart, it has not been found.

    Raises:
        ValueError: an answer that is excluded, or numbers that are not finite.
    """
    for name, values in (("table", table), ("vectors", vectors)):
        if not values.isfinite().all():
            raise ValueError(f"{name} must be finite, got inf or nan, which is nearer to nothing; leave such rows out")
    if (wrong := (excluded == answers[:, None]).any(-1)).any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"answers[{row}]={int(answers[row])} is among the operands, excluded[{row}]={excluded[row].tolist()}; "
            "leave such items out"
        )
    offset = torch.zeros_like(table[:, 0])
    if metric == "cosine":
        table, vectors = (torch.nn.functional.normalize(each, dim=-1) for each in (table, vectors))
    else:
        offset = table.square().sum(-1) / -2.0
    counts = []
    for rows in torch.arange(len(vectors), device=vectors.device).split(chunk_length(len(table))):
        nearness = torch.addmm(offset, vectors[rows], table.T)
        of_answer = nearness.gather(1, answers[rows, None])
        left_out = torch.cat([excluded[rows], answers[rows, None]], 1)
        counts.append((nearness.scatter(1, left_out, -torch.inf) >= of_answer).sum(-1))
    return torch.cat(counts)


def analogies(table: Float[Tensor, "V D"], items: Int[Tensor, "M 4"], metric: Metric = "cosine") -> Int[Tensor, "M"]:
    """`ranks` of b* for a* − a + b, of items (a, a*, b, b*): a is to a* as b is to b*.

    Args:
        table: embeddings of all tokens; with the mean of all taken off, cosines tell more apart.
        items: token ids; b* differs from the other three.
        metric: "cosine" or "euclidean".
    Raises:
        ValueError: a b* that is one of the operands.
    Source: Mikolov, Yih & Zweig (2013), "Linguistic Regularities in Continuous Space Word Representations", eq. 1.
    """
    a, a_star, b, answers = items.T
    vectors = combine(table[torch.stack([a_star, b], 1)], table[a[:, None]])
    return ranks(table, vectors, answers, items[:, :3], metric)


def accuracy(found: Int[Tensor, "M"], k: int = 1) -> float:
    """The share of items whose answer is among the k nearest."""
    return (found < k).double().mean().item()
