"""What thinking after every token costs: branches that share their text's keys against one sequence under a mask.

Measured are the sampling rollout and one training pass (forward and backward, all parameters), against the length T of
the text and that of a thought. All attentions run in one process, alternating; a figure is the median of the rounds.
"dense" has no cache: every sampling step runs text and branches again. "naive" runs where T is small, and passes only.
On a busy machine the processor's seconds say more than the clock's: the other jobs do not count in them. Peak memory
comes from a process of its own for each setting and attention, beyond what it held before a phase.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from softrl.assets import resolve_model, write_atomically
from softrl.models.branches import BranchAttention
from softrl.models.thinking import ThinkingConfig, ThinkingLM
from softrl.rollouts.thoughts import thought_embeds, thought_pass, thought_rollout
from softrl.studies.memory import MIB, glibc_environment, peak_bytes, reset_peak_bytes
from softrl.studies.variance_style import pyplot
from softrl.tokens.noise import SequenceRandom
from softrl.types import Texts, Thoughts

SMALL = "small"  # a random Llama, small enough for attention to be what counts
PHASES = ("pass", "rollout")
ATTENTIONS: tuple[BranchAttention, ...] = ("shared", "dense", "naive")
COLOURS = dict(zip(ATTENTIONS, ("#0072B2", "#D55E00", "#009E73"), strict=True))
LONGEST_NAIVE = 32  # tokens of a text: it makes T passes of up to T tokens
SLOW_SECONDS = 60.0  # what takes longer is measured once, without a warm-up


@dataclass(frozen=True)
class Setting:
    """The same for all attentions: N texts of T tokens, and a thought after each but the last."""

    model: str = SMALL
    num_tokens: int = 64
    n_thought: int = 4
    n_talk: int = 4
    num_texts: int = 1

    @property
    def branch_tokens(self) -> int:
        """m: start, thought, end, and the true tokens that are fed."""
        return self.n_thought + 1 + self.n_talk


@dataclass(frozen=True)
class Row:
    """One phase under one attention; `peak_mib` is None where it was not measured or memory ran out.

    `cpu_seconds` are the processor's, of all threads.
    """

    phase: str
    attention: BranchAttention
    num_tokens: int
    n_thought: int
    n_talk: int
    seconds: float
    cpu_seconds: float
    rounds: int
    peak_mib: float | None = None


class Bench:
    """A model that thinks, and the two phases on it."""

    def __init__(self, setting: Setting):
        torch.manual_seed(0)
        self.setting = setting
        self.model = ThinkingLM(_language_model(setting.model), ThinkingConfig(n_thought=setting.n_thought)).eval()
        self.texts, self.anchors = self._texts(setting.num_tokens)
        self._thoughts = self._rollout("shared")

    def _texts(self, num_tokens: int) -> tuple[Texts, torch.Tensor]:
        ids = torch.randint(3, self.model.policy.vocab_size, (self.setting.num_texts, num_tokens))
        return Texts(ids, torch.ones_like(ids).bool()), torch.arange(num_tokens - 1).expand(len(ids), -1)

    def _rollout(self, attention: BranchAttention) -> Thoughts:
        random = SequenceRandom(list(range(self.setting.num_texts)), rows=self.anchors.shape[1])
        is_anchor = torch.ones_like(self.anchors).bool()
        return thought_rollout(self.model, self.texts, self.anchors, is_anchor, random, attention=attention)

    def _pass(self, attention: BranchAttention) -> None:
        embeds = thought_embeds(self.model, self._thoughts, "policy")
        passed = thought_pass(
            self.model, self.texts, self._thoughts, self.setting.n_talk, embeds, attention, with_entropy=True
        )
        (-(passed.rewards.mean() + passed.log_probs.mean() + passed.text_log_probs.mean())).backward()
        self.model.zero_grad()

    def seconds(self, phase: str, attention: BranchAttention) -> tuple[float, float]:
        """Run a phase once; by the clock, and of the processor."""
        run: Callable[[BranchAttention], object] = self._pass if phase == "pass" else self._rollout
        started, cpu_started = time.perf_counter(), time.process_time()
        run(attention)
        return time.perf_counter() - started, time.process_time() - cpu_started


def _language_model(name: str) -> torch.nn.Module:
    transformers_logging.disable_progress_bar()
    if name != SMALL:
        return AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype="float32")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def contenders(setting: Setting) -> list[tuple[str, BranchAttention]]:
    """What is measured: pairs of phase and attention, those that are compared beside each other."""
    pairs = [(phase, attention) for phase in PHASES for attention in ATTENTIONS]
    naive_fits = setting.num_tokens <= LONGEST_NAIVE
    return [pair for pair in pairs if pair[1] != "naive" or (naive_fits and pair[0] == "pass")]


def measure(setting: Setting, rounds: int) -> list[Row]:
    """Warm up, then alternate."""
    bench, pairs = Bench(setting), contenders(setting)
    what = f"T={setting.num_tokens}, n={setting.n_thought}"
    first = {pair: bench.seconds(*pair) for pair in tqdm(pairs, f"{what}, warm-up", leave=False)}
    found = {pair: [seconds] if seconds[0] > SLOW_SECONDS else [] for pair, seconds in first.items()}
    for _ in tqdm(range(rounds), f"{what}, rounds", leave=False):
        for pair in pairs:
            if first[pair][0] <= SLOW_SECONDS:
                found[pair].append(bench.seconds(*pair))
    sizes = (setting.num_tokens, setting.n_thought, setting.n_talk)
    medians = {pair: [statistics.median(of) for of in zip(*each, strict=True)] for pair, each in found.items()}
    return [Row(*pair, *sizes, *medians[pair], rounds=len(each)) for pair, each in found.items()]


def peaks_mib(setting: Setting, attention: BranchAttention) -> dict[str, float]:
    """Peak memory of every phase in a process of its own, beyond what it held before; none of them if it ran out."""
    given = json.dumps({"setting": asdict(setting), "attention": attention})
    command = [sys.executable, "-m", "softrl.studies.thought_attention", given]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=glibc_environment(), check=False)
    return json.loads(finished.stdout.splitlines()[-1]) if finished.returncode == 0 else {}


def _peaks_here(setting: Setting, attention: BranchAttention) -> dict[str, float]:
    bench, peaks = Bench(setting), {}
    for phase, which in reversed(contenders(setting)):  # the rollout first: it holds less
        if which == attention:
            before = reset_peak_bytes()
            bench.seconds(phase, attention)
            peaks[phase] = (peak_bytes() - before) / MIB
    return peaks


def run(settings: list[Setting], rounds: int, with_memory: bool, output: Path) -> list[Row]:
    """Measure every setting; prints a table as it goes, and writes JSON and, beside it, a figure after each."""
    rows: list[Row] = []
    print(header(), flush=True)
    for setting in tqdm(settings, "settings", disable=len(settings) == 1):
        measured = measure(setting, rounds)
        if with_memory:
            which = tqdm(dict.fromkeys(row.attention for row in measured), "peak memory", leave=False)
            peaks = {attention: peaks_mib(setting, attention) for attention in which}
            measured = [replace(row, peak_mib=peaks[row.attention].get(row.phase)) for row in measured]
        tqdm.write(table(measured))
        rows += measured
        output.parent.mkdir(parents=True, exist_ok=True)
        record = {"model": setting.model, "num_texts": setting.num_texts, "threads": torch.get_num_threads()}
        with write_atomically(output) as temporary:
            temporary.write_text(json.dumps({**record, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
        plot(rows, output.with_suffix(".png"), title=f"{setting.model}, {setting.num_texts} text(s)")
    return rows


def header() -> str:
    """The table's first line."""
    return (
        f"{'phase':<8} {'T':>5} {'thought':>8} {'talk':>5} {'attention':<9} {'seconds':>8} {'/ shared':>8} "
        f"{'CPU s':>8} {'/ shared':>8} {'peak MiB':>9} {'/ shared':>8} {'rounds':>6}"
    )


def table(rows: list[Row]) -> str:
    """Rows of one setting as text; ratios are to the shared prefix in the same phase."""
    lines = []
    for row in rows:
        shared = next(each for each in rows if (each.phase, each.attention) == (row.phase, "shared"))
        memory = f"{'':>9} {'':>8}"
        if row.peak_mib is not None and shared.peak_mib:
            memory = f"{row.peak_mib:>9.1f} {row.peak_mib / shared.peak_mib:>8.2f}"
        lines.append(
            f"{row.phase:<8} {row.num_tokens:>5} {row.n_thought:>8} {row.n_talk:>5} {row.attention:<9} "
            f"{row.seconds:>8.3f} {row.seconds / shared.seconds:>8.2f} {row.cpu_seconds:>8.3f} "
            f"{row.cpu_seconds / shared.cpu_seconds:>8.2f} {memory} {row.rounds:>6}"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Seconds, and memory where it was measured, against T; a row of panels a phase, a line style a thought length."""
    plt = pyplot()
    measures = [("cpu_seconds", "seconds of the processor")]
    if any(row.peak_mib is not None for row in rows):
        measures.append(("peak_mib", "peak memory, MiB"))
    figure, axes = plt.subplots(
        len(PHASES), len(measures), figsize=(5.5 * len(measures), 8), layout="constrained", squeeze=False
    )
    lengths = sorted({row.n_thought for row in rows})
    ticks = sorted({row.num_tokens for row in rows})
    for phase, panels in zip(PHASES, axes, strict=True):
        for (name, label), axis in zip(measures, panels, strict=True):
            for attention in ATTENTIONS:
                for line, n_thought in zip(("-", "--", ":", "-."), lengths, strict=False):
                    own = [
                        (row.num_tokens, getattr(row, name))
                        for row in rows
                        if (row.phase, row.attention, row.n_thought) == (phase, attention, n_thought)
                        and getattr(row, name) is not None
                    ]
                    if own:
                        style = {"color": COLOURS[attention], "linestyle": line, "marker": "o"}
                        axis.plot(*zip(*sorted(own), strict=True), label=f"{attention}, n={n_thought}", **style)
            axis.set(title=f"{phase}: {label}", xlabel="T, tokens", xscale="log", yscale="log")
            axis.set_xticks(ticks, ticks, minor=False)
            axis.xaxis.set_minor_locator(plt.NullLocator())
            axis.grid(which="both", alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(f"A thought after every token: {title}")
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("given", type=json.loads)
    given = parser.parse_args().given
    print(json.dumps(_peaks_here(Setting(**given["setting"]), given["attention"])))
