"""What a run shows at its end: a table before and after, completions side by side, curves over steps."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from softrl.assets import write_atomically
from softrl.studies.entropy_bound import plot_adjoint
from softrl.trainers.evaluation import Sample, summary
from softrl.trainers.listwise_evaluation import RankedSet
from softrl.trainers.soft_rollout_trainer import ADJOINT_NORM_AT

_ROWS = (
    ("reward/hard", "reward (hard, trained on)", "{:.3f}", "reward_se"),
    ("judge", "judge (never trained on)", "{:.3f}", "judge_se"),
    ("kl", "KL to base, nats a token", "{:.3f}", None),
    ("kl_completion", "KL to base, nats a completion", "{:.2f}", None),
    ("base_perplexity", "perplexity under the base", "{:.1f}", None),
    ("distinct_1", "distinct-1", "{:.3f}", None),
    ("distinct_2", "distinct-2", "{:.3f}", None),
    ("completions/mean_length", "tokens a completion", "{:.1f}", None),
)


def paired_change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean of after − before over the same prompts, and its standard error."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    if count < 2:
        return mean, float("nan")
    variance = sum((value - mean) ** 2 for value in differences) / (count - 1)
    return mean, (variance / count) ** 0.5


def before_after_table(before: list[Sample], after: list[Sample]) -> Table:
    """Metrics of the same held-out prompts before and after training; changes with their standard errors."""
    table = Table(title=f"{len(after)} held-out prompts, sampled completions", title_justify="left")
    table.add_column("")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    old, new = summary(before), summary(after)
    values = {"reward/hard": [[s.reward for s in samples] for samples in (before, after)]}
    if "judge" in new:
        values["judge"] = [[s.judge for s in samples] for samples in (before, after)]
    for key, label, form, error in _ROWS:
        if key not in new:
            continue
        cells = []
        for metrics in (old, new):
            value = (
                metrics[key] if abs(metrics[key]) > 1e-4 else 0.0
            )  # a KL that is zero up to rounding, without its sign
            cells.append(form.format(value) + (f" ± {metrics[error]:.3f}" if error else ""))
        change = ""
        if key in values:
            mean, standard_error = paired_change(*values[key])
            change = f"{mean:+.3f} ± {standard_error:.3f}"
        table.add_row(label, *cells, change)
    return table


def completions_table(before: list[Sample], after: list[Sample], count: int = 5) -> Table:
    """The first few prompts with their completions before and after."""
    table = Table(title="completions (sampled, not selected)", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=2)
    table.add_column("before", ratio=4)
    table.add_column("after", ratio=4)
    for old, new in list(zip(before, after, strict=True))[:count]:
        cells = [f"{' '.join(sample.completion.split())} [{sample.reward:.2f}]" for sample in (old, new)]
        table.add_row(new.prompt.replace("[", r"\["), *(cell.replace("[", r"\[") for cell in cells))
    return table


def print_report(before: list[Sample], after: list[Sample]) -> None:
    """Both tables, on standard output."""
    console = Console()
    console.print(before_after_table(before, after))
    console.print("± is one standard error over prompts; the change is paired by prompt.")
    console.print(completions_table(before, after))
    console.print(r"\[number]: hard reward of the completion.")


_RANKED_ROWS = {
    "loss": "loss",
    "accuracy": "pairs ordered rightly by log π - log π_ref",
    "policy_accuracy": "pairs ordered rightly by log π",
    "margin": "β (log π - log π_ref), the best less the others",
}


def ranked_table(before: list[RankedSet], after: list[RankedSet]) -> Table:
    """Measures of the same held-out sets before and after training, each a mean over sets with its standard error."""
    table = Table(title=f"{len(after)} held-out sets of ranked completions", title_justify="left")
    table.add_column("")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for name, label in _RANKED_ROWS.items():
        pairs = [(getattr(old, name), getattr(new, name)) for old, new in zip(before, after, strict=True)]
        kept = [pair for pair in pairs if None not in pair]
        if not kept:  # every set is one tie
            continue
        zeros = [0.0] * len(kept)
        old, new = zip(*kept, strict=True)
        means = [paired_change(zeros, values) for values in (old, new)] + [paired_change(old, new)]
        forms = ("{:.3f} ± {:.3f}", "{:.3f} ± {:.3f}", "{:+.3f} ± {:.3f}")
        table.add_row(label, *(form.format(*values) for form, values in zip(forms, means, strict=True)))
    return table


def print_ranked_report(before: list[RankedSet], after: list[RankedSet]) -> None:
    """The table of ranked sets, on standard output."""
    console = Console(width=max(100, Console().width))  # a cut label would not say what was measured
    console.print(ranked_table(before, after))
    console.print("± is one standard error over sets; the change is paired by set. Pairs that tie are left out.")


def save_samples(samples: Sequence[Sample | RankedSet], path: Path) -> None:
    """Completions, or sets of them, and their numbers as JSON."""
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps([asdict(sample) for sample in samples], indent=1), encoding="utf-8")


def load_samples(path: Path) -> list[Sample]:
    """Read what `save_samples` wrote."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    of_lists = [
        {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()} for row in rows
    ]
    return [Sample(**row) for row in of_lists]


def plot_run(log_history: list[dict[str, float]], folder: Path) -> list[Path]:
    """`curves.png` and, where adjoint norms were logged, `adjoint.png`; nothing for a run without a logged step."""
    written = []
    if any({"reward/hard", "rewards/margins", "nll", "base_nll", "guided_nll"} & row.keys() for row in log_history):
        written.append(folder / "curves.png")
        plot_training(log_history, written[-1])
    norms = adjoint_norms(log_history)
    if norms:
        written.append(folder / "adjoint.png")
        plot_adjoint(norms, written[-1])
    return written


def adjoint_norms(log_history: list[dict[str, float]]) -> list[tuple[int, dict[int, float]]]:
    """‖λ_t‖ at the logged positions (from 0), by training step."""
    rows = [
        (
            row["step"],
            {
                int(key.removeprefix(ADJOINT_NORM_AT)): value
                for key, value in row.items()
                if key.startswith(ADJOINT_NORM_AT)
            },
        )
        for row in log_history
    ]
    return [(step, norms) for step, norms in rows if norms]


_PANELS = (
    ("reward and judge", {
        "reward/hard": "hard reward", "reward/soft": "soft reward", "judge": "judge", "eval_judge": "judge, held out",
    }),
    ("gap, soft minus hard reward", {"reward/gap": "gap"}),
    ("KL to base, nats a token", {"kl": "KL", "eval_kl": "KL, held out"}),
    ("diversity", {
        "repetition": "repetition", "eval_distinct_1": "distinct-1, held out",
        "eval_distinct_2": "distinct-2, held out",
    }),
    ("perplexity under the base", {"eval_base_perplexity": "perplexity, held out"}),
    ("pairs in the right order", {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"}),
    ("margin of the best", {"rewards/margins": "training", "eval_rewards/margins": "held out"}),
    ("NLL of true tokens, nats", {
        "nll": "training", "base_nll": "training, without thoughts", "eval_nll": "held out",
        "eval_base_nll": "held out, without thoughts",
    }),
    ("NLL beyond the first window, nats", {
        "eval_nll_beyond": "own memory", "eval_nll_permuted_beyond": "another text's memory",
        "eval_nll_truncated_beyond": "no memory", "eval_nll_soft_beyond": "own soft tokens",
    }),
    ("NLL of true tokens, nats, behind", {
        "guided_nll": "what is fed, training", "eval_soft_nll": "own soft tokens, held out",
        "eval_hard_nll": "true tokens, held out",
    }),
    ("entropy of what is fed, nats", {"fed_entropy": "training", "eval_fed_entropy": "unguided, held out"}),
    ("share of the true token", {"guidance_alpha": "guidance", "true_token_probability": "probability"}),
    ("weight of thoughts", {"mixing": "training", "eval_mixing": "held out"}),
    ("log-probability of a thought token, nats", {"thought_log_prob": "thoughts"}),
    ("seconds a step", {
        "step_time/rollout": "rollout", "step_time/cotangents": "cotangents", "step_time/surrogate": "surrogate",
        "step_time/thoughts": "thoughts",
    }),
)  # fmt: skip


def plot_training(log_history: list[dict[str, float]], path: Path) -> None:
    """What shows whether a reward is gamed, over steps, as a PNG: a panel for each thing that was logged.

    Rewards and judge, the gap between soft and hard reward, KL, diversity, perplexity under the base; and seconds.
    Rewards of decoded text by another tokenizer are drawn beside the hard reward.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    decoded = {key for row in log_history for key in row if key.startswith("rewards/") and "_decoded/mean" in key}
    panels = [(title, dict(curves)) for title, curves in _PANELS]
    panels[0][1].update(dict.fromkeys(sorted(decoded), "decoded text"))
    logged = {key for row in log_history for key in row}
    panels = [(title, curves) for title, curves in panels if logged & curves.keys()]
    figure, axes = plt.subplots(-(-len(panels) // 2), 2, figsize=(10, 3.2 * -(-len(panels) // 2)), squeeze=False,
                                layout="constrained")  # fmt: skip
    for axis, (title, curves) in zip(axes.flat, panels, strict=False):
        for key, label in curves.items():
            points = [(row["step"], row[key]) for row in log_history if key in row]
            if points:
                # the hard and the soft reward coincide under straight-through: dashes keep both visible
                style = {"linestyle": "--"} if key == "reward/soft" else {}
                style |= {"marker": "o", "markersize": 3} if key.startswith("eval_") else {}
                axis.plot(*zip(*points, strict=True), label=label, **style)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1 or axis.lines[0].get_label() not in title:
            axis.legend(fontsize=8)
        if title.startswith("gap"):
            axis.axhline(0.0, color="grey", linewidth=0.8)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
