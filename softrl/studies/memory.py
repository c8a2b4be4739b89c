"""How much memory the cotangents of a rollout take, by method and horizon, each measurement in its own process.

Counted is the peak of the process during the solve, less what it held before, less the key-value cache and its
cotangent buffer (which every exact method that uses a cache has to hold). The reward is the only term of J: a KL term
runs the reference model over the whole horizon in one pass, whatever the method.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from softrl.assets import resolve_model
from softrl.estimators.adjoint import solve_cotangents
from softrl.estimators.pathwise import PathwiseObjective
from softrl.estimators.system import AdjointSettings, Cotangents
from softrl.models.policy import Policy
from softrl.objectives.token_terms import DirectTerms
from softrl.rewards.token_linear import TokenLinearReward
from softrl.rollouts.soft import soft_rollout
from softrl.studies.tables import write_csv
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import StraightThroughGumbel
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts

MIB = 2**20


@dataclass(frozen=True)
class Measurement:
    """One solve: memory in MiB, and the norm of the cotangents, which has to agree between exact methods."""

    method: str
    num_steps: int
    activations_mib: float
    cache_mib: float
    seconds: float
    cotangent_norm: float


def measure(model: str, method: str, num_steps: int, num_sequences: int) -> Measurement:
    """Solve once in this process, which must not have solved anything before."""
    transformers_logging.disable_progress_bar()
    causal_lm = AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype="float32").requires_grad_(False)
    policy = Policy(causal_lm)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, policy.vocab_size, (num_sequences, 8), generator=generator)
    prompts = Prompts(ids, torch.ones_like(ids, dtype=torch.bool))
    relaxation = StraightThroughGumbel(Truncation(32))
    random = SequenceRandom.keyed(0, 0, list(range(num_sequences)), 1)
    rollout = soft_rollout(policy, prompts, relaxation, random, num_steps)
    reward = TokenLinearReward(torch.randn(policy.vocab_size, generator=generator), 0.0)
    objective = PathwiseObjective(policy, rollout, reward, DirectTerms(), {})
    cache = _cache_bytes(causal_lm.config, num_sequences, num_steps, prompt_length=8) if method != "parallel" else 0
    before = reset_peak_bytes()
    started = time.perf_counter()
    found: Cotangents = solve_cotangents(policy, rollout, relaxation, objective, AdjointSettings(method, tol=0.0))
    seconds = time.perf_counter() - started
    grown = peak_bytes() - before
    norm = found.weights.norm().item()
    return Measurement(method, num_steps, (grown - cache) / MIB, cache / MIB, seconds, norm)


def glibc_environment() -> dict[str, str]:
    """glibc returns every block of 64 KiB or more at once, so that resident memory is memory in use."""
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def _cache_bytes(config: object, num_sequences: int, num_steps: int, prompt_length: int) -> int:
    """Keys and values of all slots, and the cotangents of the generated ones, in float32."""
    per_slot = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * num_sequences
    return per_slot * (prompt_length + 2 * num_steps)


def reset_peak_bytes() -> int:
    """Make the peak count from here (Linux); returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Largest resident size since the reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run(model: str, methods: list[str], horizons: list[int], num_sequences: int, output: Path) -> list[Measurement]:
    """Measure every method at every horizon, one process each; writes a CSV and prints a table as it goes."""
    rows: list[Measurement] = []
    print(f"{'method':>12} {'T':>5} {'beyond the cache, MiB':>22} {'cache, MiB':>11} {'seconds':>8} {'norm of a':>12}")
    for method in methods:
        for num_steps in horizons:
            arguments = [model, method, str(num_steps), str(num_sequences)]
            command = [sys.executable, "-m", "softrl.studies.memory", *arguments]
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=glibc_environment())
            row = Measurement(**json.loads(finished.stdout.splitlines()[-1]))
            rows.append(row)
            print(
                f"{row.method:>12} {row.num_steps:>5} {row.activations_mib:>22.0f} {row.cache_mib:>11.0f} "
                f"{row.seconds:>8.1f} {row.cotangent_norm:>12.6g}",
                flush=True,
            )
    write_csv(rows, output)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("method")
    parser.add_argument("num_steps", type=int)
    parser.add_argument("num_sequences", type=int)
    given = parser.parse_args()
    print(json.dumps(asdict(measure(given.model, given.method, given.num_steps, given.num_sequences))))
