"""How many sweeps the parallel and the blocked solver need on a long rollout, how exact they are, what they cost.

The exact cotangents are those of the sequential solver; errors are relative, of the total cotangents a. The reward is
the only term of J.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softrl.assets import resolve_model
from softrl.data.prompts import review_openings
from softrl.estimators.adjoint import solve_cotangents
from softrl.estimators.pathwise import PathwiseObjective
from softrl.estimators.system import AdjointSettings
from softrl.models.policy import Policy
from softrl.objectives.token_terms import DirectTerms
from softrl.rewards.fit import sentiment_reward
from softrl.rollouts.soft import soft_rollout
from softrl.studies.tables import write_csv
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import Relaxation, make_relaxation
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts

RELAXATIONS: dict[str, tuple[str, float | None]] = {  # name of the relaxation, and its entropy bound in nats
    "gumbel_softmax": ("gumbel_softmax", None),
    "gumbel_softmax, H <= 0.5": ("gumbel_softmax", 0.5),
    "softmax, H <= 0.5": ("softmax", 0.5),
    "st_gumbel": ("st_gumbel", None),
}


@dataclass(frozen=True)
class Row:
    """One solver on one rollout; `adjoint_growth` is ‖λ_1‖ over ‖λ_{T−1}‖ of the exact solution."""

    relaxation: str
    num_steps: int
    solver: str
    sweeps: float
    residual: float
    relative_error: float
    seconds: float
    adjoint_growth: float


def solvers(tol: float, block_lengths: Iterable[int], num_steps: int) -> dict[str, AdjointSettings]:
    """What is compared; the parallel solver is stopped after 64 sweeps."""
    blocked = {f"blocked, {n}": AdjointSettings("blocked", tol=tol, block_length=n) for n in block_lengths}
    return blocked | {"parallel": AdjointSettings("parallel", tol=tol, hops=min(64, num_steps - 1))}


def compare(
    policy: Policy, prompts: Prompts, relaxation: Relaxation, name: str, num_steps: int,
    settings: dict[str, AdjointSettings], reward: object,
) -> Iterable[Row]:  # fmt: skip
    """Solve for the same rollout's cotangents by the sequential solver and by all others."""
    random = SequenceRandom.keyed(0, 0, list(range(len(prompts.ids))), 1)
    rollout = soft_rollout(policy, prompts, relaxation, random, num_steps)
    exact = None
    for solver, setting in {"sequential": AdjointSettings("sequential"), **settings}.items():
        objective = PathwiseObjective(policy, rollout, reward, DirectTerms(), {})
        started = time.perf_counter()
        found = solve_cotangents(policy, rollout, relaxation, objective, setting)
        seconds = time.perf_counter() - started
        exact = found if exact is None else exact
        error = ((found.weights - exact.weights).norm() / exact.weights.norm()).item()
        norms = exact.norm_by_position()
        growth = (norms[0] / norms[-2]).item()
        yield Row(name, num_steps, solver, found.sweeps, found.residual, error, seconds, growth)


def run(
    model: str,
    names: list[str],
    num_steps: int,
    num_sequences: int,
    tol: float,
    block_lengths: list[int],
    output: Path,
) -> None:
    """Compare on a real model, print as it goes, write a CSV."""
    path = resolve_model(model)
    policy = Policy(AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval().requires_grad_(False), 0.7)
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = list(review_openings(tokenizer, num_sequences)["prompt"])
    ids = torch.tensor(tokenizer(texts).input_ids)
    prompts, reward = Prompts(ids, torch.ones_like(ids, dtype=torch.bool)), sentiment_reward(path)
    rows = []
    print(
        f"{'relaxation':>25} {'T':>4} {'solver':>12} {'sweeps':>7} {'residual':>9} {'error':>9} {'seconds':>8} "
        f"{'growth':>9}"
    )
    for name in names:
        kind, bound = RELAXATIONS[name]
        relaxation = make_relaxation(kind, Truncation(32), max_entropy_nats=bound)
        settings = solvers(tol, block_lengths, num_steps)
        for row in compare(policy, prompts, relaxation, name, num_steps, settings, reward):
            rows.append(row)
            print(
                f"{row.relaxation:>25} {row.num_steps:>4} {row.solver:>12} {row.sweeps:>7.1f} {row.residual:>9.1e} "
                f"{row.relative_error:>9.1e} {row.seconds:>8.1f} {row.adjoint_growth:>9.2g}",
                flush=True,
            )
    write_csv(rows, output)
