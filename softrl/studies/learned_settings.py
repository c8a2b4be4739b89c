"""Where learned relaxation settings go while the model stays as it is: the pull to greedy, with the guard and without.

A frozen language model reads the beginning of a text, then its own soft tokens, and is scored on the true tokens. The
settings alone learn, by the exact derivative through the feedback. Left out: models that learn too (soft SFT).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from softrl.assets import language_model
from softrl.data.reviews import load_reviews
from softrl.estimators.adjoint import solve_cotangents
from softrl.estimators.system import AdjointSettings, Objective, recorded_embeds
from softrl.models.policy import Policy
from softrl.rollouts.soft import soft_rollout
from softrl.studies.tables import write_csv
from softrl.tokens.learned import LearnedRelaxation
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import Relaxation, make_relaxation
from softrl.tokens.truncation import Truncation
from softrl.types import Prompts, Rollout

STARTS: tuple[dict[str, float], ...] = (
    {"temperature": 1.0},
    {"max_entropy_nats": 1.5},
    {"min_p": 0.02, "top_k": 16.0},
)
LEARNING_RATE = 0.2
NUM_KEPT = 32


@dataclass(frozen=True)
class Row:
    """One step of one run; `nll` and `entropy` in nats a token; settings that are not learned are None."""

    learned: str
    barrier: float
    step: int
    nll: float
    entropy: float
    temperature: float | None = None
    max_entropy_nats: float | None = None
    min_p: float | None = None
    top_k: float | None = None
    at_greedy_end: int = 0


def true_token_nll(policy: Policy, targets: Int[Tensor, "N T"]) -> Objective:
    """Minus the mean NLL of the true tokens, a sequence: what a model fed with its own soft tokens is to raise."""

    def objective(fed: Float[Tensor, "N T K"], hidden: Float[Tensor, "N T D"]) -> Float[Tensor, "N"]:
        log_probs = policy.head(hidden.flatten(0, 1)).log_softmax(-1)
        return log_probs.gather(-1, targets.flatten()[:, None]).view_as(targets).mean(-1)

    return objective


def _rollout(
    policy: Policy, texts: Int[Tensor, "N L"], relaxation: Relaxation, num_steps: int
) -> tuple[Rollout, Float[Tensor, "N T D"], float]:
    """Soft tokens after the beginnings of the texts, hidden states on the way, and the true tokens' mean NLL."""
    ids = texts[:, :-num_steps]
    prompts, random = Prompts(ids, torch.ones_like(ids, dtype=torch.bool)), SequenceRandom(list(range(len(ids))))
    rollout = soft_rollout(policy, prompts, relaxation, random, num_steps)
    with torch.no_grad():
        hidden = policy.hidden(rollout.prompts, recorded_embeds(policy, rollout))
        value = true_token_nll(policy, texts[:, -num_steps:])(rollout.fed, hidden)
    return rollout, hidden, -value.mean().item()


def greedy_nll(policy: Policy, texts: Int[Tensor, "N L"], num_steps: int) -> float:
    """The same NLL where the model is fed its likeliest tokens."""
    return _rollout(policy, texts, make_relaxation("softmax", Truncation(1)), num_steps)[2]


def learning(
    policy: Policy, texts: Int[Tensor, "N L"], learned: LearnedRelaxation, num_steps: int, updates: int, barrier: float
) -> Iterator[Row]:
    """Adam on the settings; a row before every update and one after the last."""
    optimizer = torch.optim.Adam(learned.parameters(), lr=LEARNING_RATE)
    objective, name = true_token_nll(policy, texts[:, -num_steps:]), " ".join(learned.start)
    for step in range(updates + 1):
        relaxation = learned.relaxation()
        rollout, hidden, nll = _rollout(policy, texts, relaxation, num_steps)
        entropy = -(rollout.weights * rollout.weights.clamp(min=1e-30).log()).sum(-1).mean().item()
        yield Row(name, barrier, step, nll, entropy, **learned.values(), at_greedy_end=len(learned.report()))
        if step == updates:
            return
        cotangents = solve_cotangents(policy, rollout, relaxation, objective, AdjointSettings("sequential"))
        with torch.no_grad():
            kept = policy.kept_logits(hidden.flatten(0, 1), rollout.support.ids.flatten(0, 1))
        weights = relaxation.weights(kept.view(rollout.weights.shape), rollout.support)
        value = (cotangents.weights * weights).sum() / len(texts)
        optimizer.zero_grad()
        (learned.penalty(barrier) - value).backward()
        optimizer.step()


def run(
    policy: Policy,
    texts: Int[Tensor, "N L"],
    num_steps: int,
    num_kept: int,
    updates: int,
    barriers: Sequence[float],
    output: Path,
) -> list[Row]:
    """Every start with every barrier weight; prints a line a run, writes a CSV.

    Args:
        policy: a frozen model.
        texts: token ids without padding; the last `num_steps` of each are the true tokens.
        num_steps: T.
        num_kept: K.
        updates: of the settings.
        barriers: weights of `LearnedRelaxation.penalty`, 0 for none.
        output: where the CSV goes.
    """
    rows: list[Row] = []
    print(f"fed its likeliest tokens: NLL {greedy_nll(policy, texts, num_steps):.3f} nats a token")
    for start in STARTS:
        for barrier in barriers:
            learned = LearnedRelaxation(Truncation(num_kept), **start)
            found = list(learning(policy, texts, learned, num_steps, updates, barrier))
            rows += found
            print(_line(found), *learned.report(), sep="\n  ", flush=True)
    write_csv(rows, output)
    return rows


def run_on_reviews(num_texts: int, num_steps: int, updates: int, barriers: Sequence[float], output: Path) -> list[Row]:
    """`run` with SmolLM2-135M, 32 kept ids and reviews of which it reads the first 24 tokens.

    Raises:
        ValueError: more texts than there are reviews of that length.
    """
    folder, length = language_model(), 24 + num_steps
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()
    tokenised = (tokenizer(text).input_ids for text in load_reviews("judge")["text"])
    rows = list(islice((ids[:length] for ids in tokenised if len(ids) >= length), num_texts))
    if len(rows) < num_texts:
        raise ValueError(f"texts={num_texts}: {len(rows)} reviews have {length} tokens; ask for fewer, or fewer steps")
    return run(Policy(model), torch.tensor(rows), num_steps, NUM_KEPT, updates, barriers, output)


def _line(rows: list[Row]) -> str:
    first, last = rows[0], rows[-1]
    moved = [
        f"{name} {getattr(first, name):.3g} -> {getattr(last, name):.3g}"
        for name in first.learned.split()
    ]  # fmt: skip
    left = f"barrier {first.barrier:g}: {', '.join(moved)}"
    return f"{left}; NLL {first.nll:.3f} -> {last.nll:.3f}, entropy {first.entropy:.2f} -> {last.entropy:.2f} nats"
