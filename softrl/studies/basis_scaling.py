"""Seconds a verdict against the size of the vocabulary V and the number of directions k, beside HiGHS.

The vocabularies are rows of the real model's output embedding, drawn at random; beyond its own V each further row is a
drawn one with noise of a tenth of its deviation in every column. Contexts are the model's states behind human text,
and the distribution is the softmax over those rows. So norms, spectrum and sparsity are a real model's at all sizes,
but the token that language calls for may be missing. Tokens are drawn, as sampling would, among those below τ, and
only programs that had to be solved count. Sizes take turns within one run.
"""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from softrl.contexts.basis_aware import BasisAware
from softrl.contexts.basis_directions import Directions, svd_directions
from softrl.contexts.final_norm import find_final_norm
from softrl.studies.basis_bench import Bench
from softrl.studies.basis_real import highs_seconds

_NOISE = 0.1  # of a column's deviation, for rows beyond the model's own
_ATTEMPTS = 20  # contexts a program wanted: some have no token below τ, or one that is rejected in closed form


@dataclass(frozen=True)
class Scaling:
    """Seconds of a program at one size.

    Args:
        vocab_size, num_directions: V, k.
        solver: "ours" or "HiGHS".
        programs: how many were solved.
        seconds, low, high: median and quartiles.
        timeouts: programs at which HiGHS was stopped; each counts with the limit.
    """

    vocab_size: int
    num_directions: int
    solver: str
    programs: int
    seconds: float
    low: float
    high: float
    timeouts: int


@dataclass(frozen=True)
class Size:
    """A vocabulary with its rule.

    Args:
        weight: its rows, shape (V, D).
        rule: at k.
    """

    weight: Float[Tensor, "V D"]
    rule: BasisAware


def scaled_weight(weight: Float[Tensor, "V D"], vocab_size: int, seed: int = 0) -> Float[Tensor, "W D"]:
    """Rows drawn without replacement; beyond V, drawn with replacement and with noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = weight[torch.randperm(len(weight), generator=generator)[:vocab_size]]
    missing = vocab_size - len(rows)
    if missing == 0:
        return rows
    drawn = weight[torch.randint(len(weight), (missing,), generator=generator)]
    noise = torch.randn(drawn.shape, generator=generator, dtype=weight.dtype)
    return torch.cat([rows, drawn + _NOISE * weight.std(0) * noise])


def leading(directions: Directions, num_directions: int) -> Directions:
    """The first k of more directions."""
    return replace(
        directions, columns=directions.columns[:, :num_directions].contiguous(),
        map=directions.map[:, :num_directions].contiguous(), strengths=directions.strengths[:num_directions],
    )  # fmt: skip


def scaling(bench: Bench) -> list[Scaling]:
    """Median seconds at every V and k."""
    own = bench.settings
    sizes = _sizes(bench)
    seconds: dict[tuple[int, int, str], list[float]] = {(*key, solver): [] for key in sizes for solver in SOLVERS}
    timeouts = dict.fromkeys(seconds, 0)
    generator = torch.Generator().manual_seed(0)
    with tqdm(total=own.scaled_programs * len(sizes), desc="scaling", unit="program") as bar:
        for number in range(own.scaled_programs):
            for key, size in sizes.items():
                found = _program(size, bench.states, generator)
                bar.update()
                if found is None:
                    continue
                logits, token, taken = found
                seconds[*key, "ours"].append(taken)
                if number < own.highs_programs:
                    threshold, taken = highs_seconds(size.rule.programs(logits), token, own.time_limit_seconds)
                    seconds[*key, "HiGHS"].append(taken)
                    timeouts[*key, "HiGHS"] += int(np.isnan(threshold))
    return [_row(*key, values, timeouts[key]) for key, values in seconds.items() if values]


SOLVERS = ("ours", "HiGHS")


def _row(vocab_size: int, num_directions: int, solver: str, seconds: list[float], timeouts: int) -> Scaling:
    low, median, high = np.percentile(seconds, [25, 50, 75]).tolist()
    return Scaling(vocab_size, num_directions, solver, len(seconds), median, low, high, timeouts)


def _sizes(bench: Bench) -> dict[tuple[int, int], Size]:
    """All V at the main k, and all k at the largest V that the model has itself."""
    own = bench.settings
    weight = bench.policy.causal_lm.get_output_embeddings().weight.detach()
    norm = find_final_norm(bench.policy) if own.representation == "before_norm" else None
    fitting = [size for size in own.vocab_sizes if size <= len(weight)]
    at = max(fitting, default=min(own.vocab_sizes))
    sizes: dict[tuple[int, int], Size] = {}
    for vocab_size in tqdm(own.vocab_sizes, desc="directions", leave=False):
        rows = scaled_weight(weight, vocab_size)
        numbers = sorted({own.num_directions, *(own.scaled_directions if vocab_size == at else ())})
        whole = svd_directions(rows, max(numbers), norm)
        for k in numbers:
            sizes[vocab_size, k] = Size(rows, BasisAware(leading(whole, k), own.epsilon, own.rule, None))
    return sizes


def _program(
    size: Size, states: Float[Tensor, "M D"], generator: torch.Generator
) -> tuple[Float[Tensor, "1 V"], int, float] | None:
    """A context's logits, a token whose program had to be solved, and how long its verdict took."""
    for _ in range(_ATTEMPTS):
        context = int(torch.randint(len(states), (), generator=generator))
        logits = (states[context] @ size.weight.mT)[None]
        probs = logits.double().softmax(-1)
        below = probs.masked_fill(probs > size.rule.tau(probs)[:, None], 0.0)
        if float(below.sum()) == 0.0:
            continue
        token = below.multinomial(1, generator=generator)
        started = time.perf_counter()
        found = size.rule.verdicts(logits, token)
        taken = time.perf_counter() - started
        if bool(found.solved.all()):
            return logits, int(token), taken
    return None
