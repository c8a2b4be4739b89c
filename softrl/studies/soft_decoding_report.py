"""Tables, figures and page of `softrl study soft-decoding`: soft against hard decoding, before and after tuning."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softrl.assets import write_atomically
from softrl.studies.html import embedded, mean_and_error, with_error, write_page
from softrl.studies.soft_decoding_config import SoftDecodingStudyConfig
from softrl.studies.tables import write_csv
from softrl.studies.variance_style import png, pyplot, styles

Record = dict[str, Any]
Pair = tuple[float, float]  # mean over seeds, its standard error

_BODY = """
<p>{{ config.question }}</p>
<ul>{% for line in summary %}<li>{{ line }}</li>{% endfor %}</ul>
<pre>{{ command }}</pre>
{% if config.notes %}<p>{{ config.notes }}</p>{% endif %}
<h2>Decodings</h2>
{{ table(columns, rows, 2) }}
<p class="note">Means over seeds ± one standard error; “untuned” has no seeds. Base NLL: of the text that was
written, under the model that all begin from, nats a token; low with much repetition is a loop. Repetition:
share of equal pairs of bigrams. Own NLL: of held-out text behind what the model feeds itself, nats a token.</p>
<h2>What soft decoding loses against “{{ hard }}”</h2>
{{ table(gap_columns, gaps, 2) }}
<p class="note">Differences to “{{ hard }}” of the same model, seed by seed. Closer to zero: the two decodings do
the same. Change: of the distance from zero, to that of the untuned model.</p>
{{ figure(figures.entropy, "Entropy by step: of the policy (lines), of what it was fed (dashed); means over texts") }}
<h2>What the tuning changed besides</h2>
{{ table(["tuning", "NLL of held-out reviews", "NLL of Shakespeare", "seconds of training"], besides) }}
<p class="note">Behind true tokens, nats a token. Shakespeare is in no tuning: what is forgotten shows there.</p>
{% for title, texts in read %}<h2>{{ title }}</h2>{{ table(["decoding", "text"], texts, 2) }}{% endfor %}
{% if failed %}<h2>Runs that failed</h2>{{ table(["tuning", "seed", "why"], failed, 3) }}{% endif %}
"""
_MEASURES = ("accuracy", "base_nll", "own_nll", "distinct_1", "distinct_2", "repetition", "entropy", "length")
_GAPS = ("accuracy", "base_nll", "own_nll", "distinct_2", "repetition")


@dataclass(frozen=True)
class DecodingRow:
    """One tuning decoded one way; pairs are a mean over seeds and its standard error."""

    tuning: str
    decoding: str
    seeds: int
    accuracy: Pair
    base_nll: Pair
    own_nll: Pair
    distinct_1: Pair
    distinct_2: Pair
    repetition: Pair
    entropy: Pair
    length: Pair


@dataclass(frozen=True)
class GapRow:
    """What a soft decoding differs by from the hard one of the same model, seed by seed."""

    tuning: str
    decoding: str
    measure: str
    gap: Pair
    change: Pair  # of |gap| to that of the untuned model; NaN for itself


def write_report(config: SoftDecodingStudyConfig, records: list[Record], command: str) -> Path:
    """Write tables, figures and the page; returns the page's path.

    Raises:
        ValueError: no run has been finished.
    """
    done = [record for record in records if record["status"] == "done"]
    if not done:
        raise ValueError(f"{config.output_dir} has no finished run to report")
    folder = Path(config.output_dir)
    rows, gaps = decoding_rows(done), gap_rows(done, _untuned(config))
    write_csv(rows, folder / "rows.csv")
    write_csv(gaps, folder / "gaps.csv")
    entropy = folder / "entropy.png"
    with write_atomically(entropy) as temporary:
        temporary.write_bytes(png(_entropies(done), dpi=110))
    names = ["tuning", "decoding", "seeds", *(name.replace("_", " ") for name in _MEASURES)]
    values: dict[str, Any] = {
        "config": config, "command": command, "columns": names, "rows": [_cells(row) for row in rows],
        "hard": next(iter(config.decodings)), "gap_columns": ["tuning", "decoding", "measure", "gap", "change"],
        "gaps": [_gap_cells(row) for row in gaps], "figures": {"entropy": embedded(entropy)},
        "besides": _besides(done), "read": _read(done), "summary": summary_lines(gaps),
        "failed": [(r["tuning"], r["seed"], r["status"]) for r in records if r["status"] != "done"],
    }  # fmt: skip
    page = folder / "report.html"
    write_page(page, "Soft against hard decoding", _BODY, values)
    return page


def decoding_rows(records: list[Record]) -> list[DecodingRow]:
    """A row for every tuning and decoding, in the order of the records."""
    rows = []
    for tuning, runs in _by_tuning(records).items():
        for decoding in runs[0]["decodings"]:
            numbers = [run["decodings"][decoding] for run in runs]
            pairs = {name: mean_and_error(each[name] for each in numbers) for name in _MEASURES}
            rows.append(DecodingRow(tuning, decoding, len(runs), **pairs))
    return rows


def gap_rows(records: list[Record], untuned: str | None) -> list[GapRow]:
    """Differences of every soft decoding to the first one, which is hard."""
    by_tuning = _by_tuning(records)
    hard = next(iter(records[0]["decodings"]))
    soft = [name for name in records[0]["decodings"] if name != hard]
    rows = []
    for measure in _GAPS:
        for decoding in soft:
            before = [_gap(run, decoding, hard, measure) for run in by_tuning.get(untuned or "", [])]
            for tuning, runs in by_tuning.items():
                gaps = [_gap(run, decoding, hard, measure) for run in runs]
                tuned = before and tuning != untuned
                changes = [abs(gap) - abs(before[0]) for gap in gaps] if tuned else []
                rows.append(GapRow(tuning, decoding, measure, mean_and_error(gaps), mean_and_error(changes)))
    return rows


def summary_lines(gaps: list[GapRow]) -> list[str]:
    """Whose gaps shrank, and whose grew, by more than two standard errors."""
    lines = []
    for row in gaps:
        mean, error = row.change
        if math.isnan(mean) or math.isnan(error) or abs(mean) <= 2.0 * error:
            continue
        verb = "shrank" if mean < 0 else "grew"
        lines.append(
            f"“{row.tuning}”, “{row.decoding}”: the gap in {row.measure.replace('_', ' ')} {verb} by "
            f"{with_error(abs(mean), error)}."
        )
    return lines or ["No gap changed by more than two standard errors over seeds."]


def _untuned(config: SoftDecodingStudyConfig) -> str | None:
    return next((tuning.name for tuning in config.tunings if tuning.is_none), None)


def _by_tuning(records: list[Record]) -> dict[str, list[Record]]:
    names = dict.fromkeys(record["tuning"] for record in records)
    return {name: [record for record in records if record["tuning"] == name] for name in names}


def _gap(run: Record, decoding: str, hard: str, measure: str) -> float:
    return float(run["decodings"][decoding][measure] - run["decodings"][hard][measure])


def _cells(row: DecodingRow) -> list[Any]:
    return [row.tuning, row.decoding, row.seeds, *(with_error(*getattr(row, name)) for name in _MEASURES)]


def _gap_cells(row: GapRow) -> list[Any]:
    name = row.measure.replace("_", " ")
    return [row.tuning, row.decoding, name, with_error(*row.gap, signed=True), with_error(*row.change, signed=True)]


def _besides(records: list[Record]) -> list[list[Any]]:
    return [
        [name, *(with_error(*mean_and_error(run[key] for run in runs)) for key in ("hard_nll", "other_nll")),
         with_error(*mean_and_error(run["seconds"] for run in runs), decimals=0)]
        for name, runs in _by_tuning(records).items()
    ]  # fmt: skip


def _read(records: list[Record]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The first texts of every tuning's first seed."""
    return [
        (f"Texts of “{name}”", [(decoding, text) for decoding, found in runs[0]["decodings"].items()
                                 for text in found["shown"][:3]])
        for name, runs in _by_tuning(records).items()
    ]  # fmt: skip


def _entropies(records: list[Record]) -> Any:
    """A panel for every tuning: entropy by step of the policy, and of what was fed, by decoding."""
    plt = pyplot()
    by_tuning = _by_tuning(records)
    looks = styles(list(records[0]["decodings"]))
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        size = (4.2 * len(by_tuning) + 0.6, 4.4)
        figure, axes = plt.subplots(1, len(by_tuning), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, (tuning, runs) in zip(axes[0], by_tuning.items(), strict=True):
        for decoding, look in looks.items():
            policy, fed = (_mean_steps(runs, decoding, key) for key in ("entropy_by_step", "fed_by_step"))
            axis.plot(*policy, color=look.colour, linewidth=1.5, label=decoding)
            if max(fed[1], default=0.0) > 0.0:
                axis.plot(*fed, "--", color=look.colour, linewidth=1.2)
        axis.set_title(tuning)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("entropy, nats")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _mean_steps(runs: list[Record], decoding: str, key: str) -> tuple[list[int], list[float]]:
    """Steps that some text got to, and the mean over runs there."""
    columns = zip(*(run["decodings"][decoding][key] for run in runs), strict=True)
    means: Callable[[Any], list[float]] = lambda column: [value for value in column if value is not None]  # noqa: E731
    found = [(step, mean_and_error(means(column))[0]) for step, column in enumerate(columns, 1) if means(column)]
    return [step for step, _ in found], [mean for _, mean in found]
