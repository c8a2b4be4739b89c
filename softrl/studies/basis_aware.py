"""`softrl study basis-aware`: where basis-aware truncation is sound, what it costs, and what it accepts.

Parts, each a CSV: "tiny" (a model whose true distributions are known, by norm and constraint set), "cost" (seconds a
generated token, and the same programs by HiGHS), "rules" (human text: BA-η beside η and top-p at equal entropy).
Left out: human or automatic ratings of the samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from softrl.assets import resolve_model
from softrl.contexts.basis_aware import BasisAware, basis_aware
from softrl.data.reviews import load_reviews
from softrl.models.policy import Policy
from softrl.studies.basis_real import Program, RecordingRule, Rule, compare_program, compare_rules, generate
from softrl.studies.basis_tiny import TinyResult, tiny_check
from softrl.studies.tables import write_csv
from softrl.types import Prompts

PARTS = ("tiny", "cost", "rules")
_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        model: name or folder.
        epsilon, rule, num_directions, representation: see `basis_aware`.
        texts: generated, and read, texts.
        tokens: T of each.
        programs: how many of the programs that drawing asked for HiGHS gets too.
        time_limit_seconds: of HiGHS, a program.
        seeds: of the tiny models.
    """

    model: str = "smollm2-135m"
    epsilon: float = 0.003
    rule: str = "eta"
    num_directions: int = 20
    representation: str = "before_norm"
    texts: int = 16
    tokens: int = 64
    programs: int = 100
    time_limit_seconds: float = 60.0
    seeds: int = 3


@dataclass(frozen=True)
class Cost:
    """Seconds of drawing.

    Args:
        num_directions: k.
        tokens: generated ones.
        seconds_per_token: of the truncation and the draw.
        model_seconds_per_token: of everything else.
        asked_per_token, solved_per_token: tokens below τ that a verdict was asked for, and programs solved.
        accepted: share of these tokens that was accepted.
        failed: programs without a verdict.
    """

    num_directions: int
    tokens: int
    seconds_per_token: float
    model_seconds_per_token: float
    asked_per_token: float
    solved_per_token: float
    accepted: float
    failed: int


def run(settings: Settings, parts: Sequence[str], folder: Path) -> list[str]:
    """Run the parts; lines for the terminal, and a CSV a part in the folder.

    Raises:
        ValueError: an unknown part.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"parts must be among {PARTS}, got {unknown}")
    lines = []
    if "tiny" in parts:
        tiny = [
            row for norm in ("none", "rms", "layer") for seed in range(settings.seeds) for row in _tiny(norm, seed)
        ]
        write_csv(tiny, folder / "tiny.csv")
        lines += _tiny_lines(tiny)
    if {"cost", "rules"} & set(parts):
        path = resolve_model(settings.model)
        policy = Policy(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())
        texts = _review_ids(AutoTokenizer.from_pretrained(path), settings)
        rule = basis_aware(policy, settings.epsilon, settings.rule, settings.num_directions, settings.representation)
        if "cost" in parts:
            lines += _cost(policy, rule, texts, settings, folder)
        if "rules" in parts:
            lines += _rules(policy, rule, texts, settings, folder)
    return lines


def _tiny(norm: str, seed: int) -> list[TinyResult]:
    return tiny_check(norm, seed=seed)  # type: ignore[arg-type]


def _tiny_lines(rows: list[TinyResult]) -> list[str]:
    lines = [f"{'norm':<7} {'constraints':<12} {'accepted':>9} {'false':>6} {'above tau':>10}   (sums over seeds)"]
    for norm, name in dict.fromkeys((row.norm, row.constraints) for row in rows):
        own = [row for row in rows if (row.norm, row.constraints) == (norm, name)]
        accepted, false, plain = (
            sum(getattr(row, key) for row in own) for key in ("accepted", "false", "by_threshold")
        )
        lines.append(f"{norm:<7} {name:<12} {accepted:>9} {false:>6} {plain:>10}")
    return lines


def _review_ids(tokenizer: object, settings: Settings) -> Tensor:
    """Beginnings of reviews, all of one length."""
    length = _PROMPT_TOKENS + settings.tokens
    rows: list[list[int]] = []
    for row in load_reviews("prompts"):
        ids = tokenizer(row["text"]).input_ids  # type: ignore[operator]
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == settings.texts:
            return torch.tensor(rows)
    raise ValueError(f"there are only {len(rows)} reviews of {length} tokens; ask for fewer texts or tokens")


def _cost(policy: Policy, rule: BasisAware, texts: Tensor, settings: Settings, folder: Path) -> list[str]:
    recording = RecordingRule(rule.directions, rule.epsilon, rule.rule)
    for row in range(len(texts)):  # one text at a time, as a user waits for it
        ids = texts[row : row + 1, :_PROMPT_TOKENS]
        _, seconds = generate(
            policy, Prompts(ids, torch.ones_like(ids, dtype=torch.bool)), recording, settings.tokens, row
        )
        recording.total_seconds += seconds
    number, counts = settings.texts * settings.tokens, recording.counts
    cost = Cost(
        settings.num_directions, number, recording.seconds / number,
        (recording.total_seconds - recording.seconds) / number, counts.asked / number, counts.solved / number,
        counts.accepted / max(1, counts.asked), counts.failed,
    )  # fmt: skip
    write_csv([cost], folder / "cost.csv")
    lines = [
        f"draws, k={cost.num_directions}: {1e3 * cost.seconds_per_token:.2f} ms a token beside the model's "
        f"{1e3 * cost.model_seconds_per_token:.1f} ms; {cost.asked_per_token:.3f} verdicts and "
        f"{cost.solved_per_token:.3f} programs a token; {cost.accepted:.0%} accepted, {cost.failed} failed"
    ]
    order = torch.randperm(len(recording.asked), generator=torch.Generator().manual_seed(0))[: settings.programs]
    programs: list[Program] = []
    for index in order.tolist():
        logits, token = recording.asked[index]
        programs.append(compare_program(rule, logits, token, settings.time_limit_seconds))
        write_csv(programs, folder / "programs.csv")
    return lines + _program_lines(programs, cost)


def _program_lines(programs: list[Program], cost: Cost) -> list[str]:
    if not programs:
        return []
    ended = [row for row in programs if not np.isnan(row.highs)]
    same = sum(row.accepted == row.highs_accepts for row in ended)
    gaps = [abs(row.ours - row.highs) / row.tau for row in ended]
    proved = sum(row.certified < row.level for row in programs if row.accepted)
    ours, highs = (np.mean([getattr(row, key) for row in programs]) for key in ("seconds", "highs_seconds"))
    median = np.median([row.highs_seconds for row in programs])
    return [
        f"programs: {len(programs)}, of which HiGHS ended {len(ended)} in time; same verdict {same} of {len(ended)}; "
        f"largest distance of thresholds {max(gaps, default=0.0):.1e} tau",
        f"certificates that the independent checker verifies: {proved} of {sum(row.accepted for row in programs)}",
        f"seconds a program: ours {ours:.4f}, HiGHS {highs:.2f} (median {median:.2f}); "
        f"HiGHS amortised {highs * cost.solved_per_token:.3f} s a token",
    ]


def _rules(policy: Policy, rule: BasisAware, texts: Tensor, settings: Settings, folder: Path) -> list[str]:
    ids, mask = texts[:, :_PROMPT_TOKENS], torch.ones_like(texts[:, :_PROMPT_TOKENS], dtype=torch.bool)
    true = texts[:, _PROMPT_TOKENS:]
    with torch.no_grad():
        hidden = policy.hidden(Prompts(ids, mask), policy.embed(true))
        logits = torch.cat([policy.head(piece) for piece in hidden.flatten(0, 1).split(64)])
    rows: list[Rule] = compare_rules(logits, true.flatten(), rule)
    write_csv(rows, folder / "rules.csv")
    lines = [f"{'rule':<18} {'parameter':>10} {'nats':>6} {'kept':>7} {'true kept':>10} {'new':>6} {'new, true':>10}"]
    for row in rows:
        lines.append(
            f"{row.rule:<18} {row.parameter:>10.5f} {row.entropy_nats:>6.3f} {row.kept:>7.1f} {row.true_kept:>10.4f} "
            f"{row.only_here:>6.2f} {row.true_only_here:>10.4f}"
        )
    return lines
