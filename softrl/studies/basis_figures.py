"""The figures of `softrl study basis-aware`: one PNG a part."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from softrl.studies.basis_real import Cost, Program
from softrl.studies.basis_rules import ContextRow, Rule
from softrl.studies.basis_samples import HUMAN, MEASURES, Difference, SampleRow
from softrl.studies.basis_scaling import Scaling
from softrl.studies.basis_tiny import Nested, TinyResult
from softrl.studies.variance_style import COLOURS, MARKERS, Style, pyplot, styles

NAMES = {
    "output": "W itself\n(published)", "before_norm": "before\nthe norm", "input": "at the\ninput",
    "joint": "before norm\nand input",
}  # fmt: skip
NORMS = {"none": "no norm", "rms": "RMSNorm", "layer": "LayerNorm"}
LABELS = {
    "nll_nats": "NLL a token", "repetition": "repetition", "distinct_1": "distinct-1", "distinct_2": "distinct-2",
    "distinct_3": "distinct-3", "self_bleu": "Self-BLEU", "frechet": "Fréchet distance",
}  # fmt: skip


def _panels(columns: int, width: float, height: float, rows: int = 1, **options: Any) -> tuple[Any, Any]:
    plt = pyplot()
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
        )
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    return figure, axes


def tiny(rows: Sequence[TinyResult], nested: Sequence[Nested]) -> Any:
    """Accepted and false tokens by norm and constraint set; below, accepted tokens against k."""
    norms = list(dict.fromkeys(row.norm for row in rows))
    figure, axes = _panels(len(norms), 10.0, 6.4, rows=2, sharey="row")
    for (bars, lines), norm in zip(axes.T, norms, strict=True):
        own = [row for row in rows if row.norm == norm]
        sets = list(dict.fromkeys(row.constraints for row in own))
        totals = {
            name: [sum(getattr(row, key) for row in own if row.constraints == name) for key in ("accepted", "false")]
            for name in sets
        }
        accepted, false = (np.array([totals[name][at] for name in sets]) for at in (0, 1))
        bars.bar(range(len(sets)), accepted - false, color=COLOURS[0], label="accepted, possible")
        bars.bar(range(len(sets)), false, bottom=accepted - false, color=COLOURS[1], label="accepted, impossible")
        for place, name in enumerate(sets):
            bars.text(place, totals[name][0], f"{totals[name][1]} false", ha="center", va="bottom", fontsize=8)
        plain = sum(row.by_threshold for row in own if row.constraints == sets[0])
        bars.axhline(plain, color="0.3", linestyle="--", linewidth=1.0, label="threshold alone")
        bars.set_xticks(range(len(sets)), [NAMES[name] for name in sets], fontsize=8)
        contexts = sum(row.num_contexts for row in own if row.constraints == sets[0])
        bars.set_title(f"{NORMS[norm]}, {contexts} contexts", fontsize=10)
        bars.margins(y=0.12)
        for number, name in enumerate(("output", "before_norm")):
            counts = _by_directions([row for row in nested if row.norm == norm], name)
            lines.plot(
                range(len(counts)), counts, marker=MARKERS[number], color=COLOURS[number + 2],
                linestyle="-" if number == 0 else "--", label=NAMES[name].replace("\n", " "),
            )  # fmt: skip
        lines.set_xlabel("directions k; 0 is the threshold alone")
        lines.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("accepted tokens")
    axes[1][0].set_ylabel("accepted tokens")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    axes[1][0].legend(frameon=False, fontsize=8)
    return figure


def _by_directions(nested: Sequence[Nested], name: str) -> list[int]:
    """Accepted tokens at k = 0, 1, ..., where ranks differ between seeds up to the largest."""
    chains = [
        [row for row in nested if row.seed == seed and row.larger.split(",")[0] == name
         and row.smaller.split(",")[0] in ("threshold", name)]
        for seed in dict.fromkeys(row.seed for row in nested)
    ]  # fmt: skip
    counts = [[chain[0].tokens_smaller, *(row.tokens_larger for row in chain)] for chain in chains]
    length = max(map(len, counts))
    return [sum(own[min(k, len(own) - 1)] for own in counts) for k in range(length)]


def scaling(rows: Sequence[Scaling]) -> Any:
    """Seconds a program against V and against k, log-log, with quartiles."""
    figure, (axes,) = _panels(2, 10.0, 4.2, sharey=True)
    sizes = {row.vocab_size for row in rows}
    by_k = {size: {row.num_directions for row in rows if row.vocab_size == size} for size in sizes}
    at = max(sizes, key=lambda size: (len(by_k[size]), size))
    main = set.intersection(*by_k.values())
    for axis, attribute, own, title in (
        (axes[0], "vocab_size", [row for row in rows if row.num_directions in main], f"k = {min(main)}"),
        (axes[1], "num_directions", [row for row in rows if row.vocab_size == at], f"V = {at:,}"),
    ):
        for solver, look in styles(["ours", "HiGHS"]).items():
            points = sorted((row for row in own if row.solver == solver), key=lambda row: getattr(row, attribute))
            across, seconds = [getattr(row, attribute) for row in points], [row.seconds for row in points]
            bars = [[row.seconds - row.low for row in points], [row.high - row.seconds for row in points]]
            axis.errorbar(across, seconds, bars, color=look.colour, marker=look.marker, capsize=3, label=solver)
            stopped = [row for row in points if row.timeouts]
            if stopped:
                axis.scatter(
                    [getattr(row, attribute) for row in stopped], [row.seconds for row in stopped], s=90,
                    facecolors="none", edgecolors="0.2", zorder=4, label="some stopped by the time limit",
                )  # fmt: skip
        ticks = sorted({getattr(row, attribute) for row in own})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45 if attribute == "vocab_size" else 0)
        axis.minorticks_off()
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
    axes[0].set_xlabel("V, tokens")
    axes[1].set_xlabel("k, directions")
    axes[0].set_ylabel("seconds a program,\nmedian and quartiles")
    axes[0].legend(frameon=False)
    return figure


def cost(rows: Sequence[Cost], programs: Sequence[Program]) -> Any:
    """Milliseconds a token by k, and seconds of single programs by both solvers."""
    figure, (axes,) = _panels(2, 10.0, 3.6, width_ratios=[3, 2])
    left, right = axes
    rows = sorted(rows, key=lambda row: row.num_directions)
    names = [f"{row.rule}, k = {row.num_directions}" if row.num_directions else row.rule for row in rows]
    draws, others = ([1e3 * getattr(row, key) for row in rows] for key in _SECONDS)
    left.barh(names, draws, color=COLOURS[0], label="truncation and draw")
    left.barh(names, others, left=draws, color="0.8", label="model")
    for place, row in enumerate(rows):
        text = f"{draws[place]:.1f} ms"
        if row.num_directions:
            text += f"; {row.asked_per_token:.2f} verdicts a token"
            text += "" if np.isnan(row.accepted) else f", {row.accepted:.0%} accepted"
        left.annotate(
            text, (0.0, place), (4, 0), textcoords="offset points", va="center", fontsize=8,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    left.invert_yaxis()
    left.set_xlabel("milliseconds a token, one text at a time")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    right.set_title("the same programs by both solvers", fontsize=10)
    seconds = [[row.seconds for row in programs], [row.highs_seconds for row in programs]]
    generator = np.random.default_rng(0)
    for place, (values, look) in enumerate(zip(seconds, styles(["ours", "HiGHS"]).values(), strict=True)):
        if values:
            across = place + generator.uniform(-0.2, 0.2, len(values))
            right.scatter(across, values, s=12, color=look.colour, marker=look.marker, alpha=0.6, linewidths=0)
            right.plot([place - 0.3, place + 0.3], [np.median(values)] * 2, color="0.1", linewidth=2)
            right.annotate(f"{np.median(values):.2g} s", (place + 0.32, np.median(values)), va="center", fontsize=9)
    right.set_yscale("log")
    right.set_xticks([0, 1], ["ours", "HiGHS"])
    right.set_xlim(-0.5, 1.75)
    right.set_ylabel("seconds a program; bar: median")
    return figure


_SECONDS = ("seconds_per_token", "model_seconds_per_token")


def rules(rows: Sequence[Rule], contexts: Sequence[ContextRow]) -> Any:
    """How often the true token is kept, and how many tokens a context keeps beside η at equal mean entropy."""
    figure, (axes,) = _panels(2, 10.0, 4.2)
    shares, scatter = axes
    for place, (row, look) in enumerate(zip(rows, styles([row.rule for row in rows]).values(), strict=True)):
        error = (row.true_kept * (1 - row.true_kept) / row.contexts) ** 0.5
        shares.errorbar([row.true_kept], [place], xerr=[error], color=look.colour, marker=look.marker, capsize=3)
    labels = [f"{row.rule}\n{row.entropy_nats:.2f} nats, {row.kept:.0f} tokens" for row in rows]
    shares.set_yticks(range(len(rows)), labels)
    shares.set_ylim(len(rows) - 0.5, -0.5)
    shares.set_title("all but the last at equal mean entropy", fontsize=10)
    scatter.set_title("tokens kept, a point each context", fontsize=10)
    shares.set_xlabel("share of true next tokens kept, ± 1 standard error")
    kept = [(row.kept_eta, row.kept_basis) for row in contexts]
    scatter.scatter(*zip(*kept, strict=True), s=10, color=COLOURS[0], alpha=0.5, linewidths=0)
    ends = [1, max(max(pair) for pair in kept)]
    scatter.plot(ends, ends, color="0.3", linestyle="--", linewidth=1.0)
    scatter.set_xscale("log")
    scatter.set_yscale("log")
    scatter.set_xlabel("by η at equal mean entropy")
    scatter.set_ylabel("by the basis-aware rule")
    return figure


def samples(rows: Sequence[SampleRow], differences: Sequence[Difference]) -> Any:
    """Quality against diversity, and every difference to the basis-aware rule in standard errors."""
    figure, (axes,) = _panels(2, 11.0, 4.6, width_ratios=[1, 1.1])
    plane, errors = axes
    looks = styles([row.rule for row in rows])
    for number, row in enumerate(rows):
        look, gap = looks[row.rule], 0.0 if row.rule == HUMAN else row.nll_gap_se
        plane.errorbar(
            [row.nll_gap], [row.distinct_2], [row.distinct_2_se], [gap], color=look.colour, marker=look.marker,
            capsize=3, label=row.rule, markersize=9 - number, linewidth=1.2,
        )  # fmt: skip
    plane.margins(0.15)
    plane.set_xlabel("NLL a token less that of human text, nats\nnegative: likelier than human text")
    plane.set_ylabel("distinct-2 of 16 texts")
    plane.set_title("quality against diversity, ± 1 standard error", fontsize=10)
    plane.axvline(0.0, color="0.3", linestyle="--", linewidth=1.0)
    _differences(errors, differences, looks)
    figure.legend(*plane.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    return figure


def _differences(axis: Any, differences: Sequence[Difference], looks: dict[str, Style]) -> None:
    """Points in standard errors, and behind them, in grey, as many as a difference needs."""
    others = list(dict.fromkeys(row.rule for row in differences))
    for place, measure in enumerate(MEASURES):
        own = [row for row in differences if row.measure == measure]
        needed = max((row.errors_needed for row in own), default=0.0)
        axis.barh([place], [2.0 * needed], left=[-needed], height=0.9, color="0.92", zorder=0)
        for row in own:
            look, offset = looks[row.rule], 0.18 * (others.index(row.rule) - (len(others) - 1) / 2)
            away = row.difference / row.error if row.error > 0.0 else 0.0 if row.difference == 0.0 else math.nan
            axis.plot([away], [place + offset], color=look.colour, marker=look.marker, markersize=5)
    axis.axvline(0.0, color="0.3", linestyle="--", linewidth=1.0)
    axis.set_xscale("symlog", linthresh=4.0)
    ticks = [tick for tick in (-100, -30, -10, -4, -2, 0, 2, 4, 10, 30, 100) if _is_inside(axis, tick)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(MEASURES)), [LABELS[measure] for measure in MEASURES])
    axis.set_ylim(len(MEASURES) - 0.5, -0.5)
    axis.set_title("difference to the basis-aware rule; grey: no difference seen", fontsize=10)
    axis.set_xlabel("in standard errors")


def _is_inside(axis: Any, tick: float) -> bool:
    low, high = axis.get_xlim()
    return bool(low <= tick <= high)
