"""Sentences, tables and page of `softrl study basis-aware`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from softrl.assets import write_atomically
from softrl.studies import basis_figures
from softrl.studies.basis_figures import LABELS, NAMES, NORMS
from softrl.studies.basis_real import Cost, Program
from softrl.studies.basis_rules import Rule
from softrl.studies.basis_samples import FALSE_ALARMS, HUMAN, Difference, SampleRow
from softrl.studies.basis_scaling import Scaling
from softrl.studies.basis_tiny import Nested, TinyResult
from softrl.studies.html import embedded, number, with_error, write_page
from softrl.studies.variance_style import png

Tables = dict[str, list[Any]]  # rows by the name of their CSV


@dataclass(frozen=True)
class Part:
    """What a finished part has kept.

    Args:
        settings: that its numbers depend on.
        seconds: that it took.
        tables: its rows.
    """

    settings: dict[str, Any]
    seconds: float
    tables: Tables


TITLES = {
    "tiny": "A model whose true distributions are known",
    "scaling": "Seconds a program against V and k",
    "cost": "Seconds a drawn token",
    "rules": "What is kept behind human text",
    "samples": "What is written",
}
_CAPTIONS = {
    "tiny": "Accepted tokens by constraint set, sums over seeds; an impossible token has true probability 0. "
    "Below: with the k leading directions.",
    "scaling": "Seconds a program: rows of the model's output embedding, beyond its own V with noise.",
    "cost": "Milliseconds a token of draws, one text at a time; right: the same programs by both solvers.",
    "rules": "Left: true next tokens kept, matched in mean entropy but for the last. Right: kept tokens beside η.",
    "samples": "Left: quality against diversity. Right: paired differences in standard errors; "
    "grey: too few for a t-test at 5% over all of them.",
}
_BODY = """
<p>Basis-aware truncation accepts a token of low probability where the softmax bottleneck proves that its true
probability is not zero. Where is that sound, what does it cost, and what does it change?</p>
<pre>{{ command }}</pre>
<p class="note">{{ settings }}</p>
{% for part in parts %}
<h2>{{ part.title }}</h2>
<ul>{% for line in part.lines %}<li>{{ line }}</li>{% endfor %}</ul>
{{ figure(part.figure, part.caption) }}
{% for columns, rows, text_columns, note in part.tables %}
{{ table(columns, rows, text_columns) }}
{% if note %}<p class="note">{{ note }}</p>{% endif %}
{% endfor %}
<p class="note">Took {{ part.minutes }} minutes.</p>
{% endfor %}
"""


def write_report(parts: Mapping[str, Part], command: str, folder: Path) -> Path:
    """A PNG of every part, and `report.html` with all of them; returns the page's path."""
    shown = []
    for name, part in parts.items():
        path = folder / f"{name}.png"
        with write_atomically(path) as temporary:
            temporary.write_bytes(png(_figure(name, part.tables), dpi=100))
        shown.append({
            "title": TITLES[name], "lines": summary_lines(part.tables), "figure": embedded(path),
            "caption": _CAPTIONS[name], "tables": _tables(part.tables), "minutes": f"{part.seconds / 60:.1f}",
        })  # fmt: skip
    settings: dict[str, Any] = {}
    for part in parts.values():
        settings |= part.settings
    listed = ", ".join(f"{key}: {_plain(value)}" for key, value in settings.items())
    page = folder / "report.html"
    write_page(page, "Basis-aware truncation", _BODY, {"parts": shown, "command": command, "settings": listed})
    return page


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _figure(part: str, tables: Tables) -> Any:
    own = {
        "tiny": ("tiny", "nested"), "scaling": ("scaling",), "cost": ("cost", "programs"),
        "rules": ("rules", "contexts"), "samples": ("samples", "differences"),
    }[part]  # fmt: skip
    return getattr(basis_figures, part)(*(tables[name] for name in own))


def summary_lines(tables: Tables) -> list[str]:
    """What a part's numbers say."""
    makers = {
        "tiny": _tiny_lines, "nested": _nested_lines, "scaling": _scaling_lines, "cost": _cost_lines,
        "rules": _rules_lines, "differences": _samples_lines,
    }  # fmt: skip
    lines = [line for name, maker in makers.items() if tables.get(name) for line in maker(tables[name])]
    if tables.get("programs"):
        lines += program_lines(tables["programs"], tables["cost"][0])
    return lines


def _sums(rows: Sequence[TinyResult]) -> dict[tuple[str, str], list[int]]:
    """Accepted, false, above τ, settled by HiGHS and contexts by norm and set, over seeds."""
    keys = ("accepted", "false", "by_threshold", "settled_by_highs", "num_contexts")
    return {
        (norm, name): [sum(getattr(row, key) for row in rows if (row.norm, row.constraints) == (norm, name))
                       for key in keys]
        for norm, name in dict.fromkeys((row.norm, row.constraints) for row in rows)
    }  # fmt: skip


def _tiny_lines(rows: Sequence[TinyResult]) -> list[str]:
    sums = _sums(rows)
    return [
        f"{NORMS[norm]}: " + "; ".join(
            f"{NAMES[name].replace(chr(10), ' ')} {own[0]} accepted, {own[1]} false"
            for (each, name), own in sums.items() if each == norm
        )
        for norm in dict.fromkeys(norm for norm, _ in sums)
    ]  # fmt: skip


def _nested_lines(rows: Sequence[Nested]) -> list[str]:
    violations, tokens = sum(row.violations for row in rows), sum(row.tokens_smaller for row in rows)
    return [f"Nested as theory says: {violations} violations among {tokens} tokens of {len(rows)} pairs of sets."]


def _scaling_lines(rows: Sequence[Scaling]) -> list[str]:
    lines = []
    for solver in dict.fromkeys(row.solver for row in rows):
        own = [row for row in rows if row.solver == solver]
        least, most = min(own, key=lambda row: row.seconds), max(own, key=lambda row: row.seconds)
        ends = (
            f"{number(row.seconds)} s at V = {row.vocab_size:,}, k = {row.num_directions}" for row in (least, most)
        )
        stopped = sum(row.timeouts for row in own)
        lines.append(
            f"{solver}: medians from {' to '.join(ends)}" + (f"; {stopped} programs stopped" if stopped else "")
        )
    return lines


def _cost_lines(rows: Sequence[Cost]) -> list[str]:
    lines = []
    for row in rows:
        what = f"{row.rule}, k = {row.num_directions}" if row.num_directions else row.rule
        line = (
            f"{what}: {1e3 * row.seconds_per_token:.2f} ms a token beside the model's "
            f"{1e3 * row.model_seconds_per_token:.1f} ms"
        )
        if row.num_directions:
            line += (
                f"; {row.asked_per_token:.3f} verdicts and {row.solved_per_token:.3f} programs a token, "
                f"{number(100 * row.accepted)}% accepted, {row.failed} failed"
            )
        lines.append(line)
    return lines


def program_lines(programs: Sequence[Program], cost: Cost) -> list[str]:
    """Verdicts, certificates and seconds of both solvers on the same programs."""
    ended = [row for row in programs if not math.isnan(row.highs)]
    same = sum(row.accepted == row.highs_accepts for row in ended)
    gaps = [abs(row.ours - row.highs) / row.tau for row in ended]
    proved = sum(row.certified < row.level for row in programs if row.accepted)
    ours, highs = (float(np.mean([getattr(row, key) for row in programs])) for key in ("seconds", "highs_seconds"))
    median = float(np.median([row.highs_seconds for row in programs]))
    return [
        f"programs: {len(programs)}, of which HiGHS ended {len(ended)} in time; same verdict {same} of {len(ended)}; "
        f"largest distance of thresholds {max(gaps, default=0.0):.1e} tau",
        f"certificates that the independent checker verifies: {proved} of {sum(row.accepted for row in programs)}",
        f"seconds a program: ours {ours:.4f}, HiGHS {highs:.2f} (median {median:.2f}); "
        f"HiGHS amortised {highs * cost.solved_per_token:.3f} s a token",
    ]


def _rules_lines(rows: Sequence[Rule]) -> list[str]:
    basis = rows[0]
    lines = [
        f"{basis.rule} keeps {basis.kept:.1f} tokens a context, of which η at the same mean entropy rejects "
        f"{basis.beyond_eta:.2f}, top-p {basis.beyond_top_p:.2f}, both {basis.beyond_both:.2f}"
    ]
    for row in rows[1:]:
        gained, lost = (round(row.contexts * share) for share in (row.true_gained, row.true_lost))
        p_value = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        is_clear = p_value < FALSE_ALARMS / (len(rows) - 1)  # a sign test, Bonferroni's bound
        lines.append(
            f"{row.rule}: keeps {row.true_kept:.1%} of {row.contexts} true next tokens, {basis.rule} "
            f"{basis.true_kept:.1%}; {gained} only it keeps, {lost} only {basis.rule}: "
            + ("they differ" if is_clear else "no difference seen")
        )
    return lines


def _samples_lines(rows: Sequence[Difference]) -> list[str]:
    """What differs beyond errors; human text is a reference and not a rule."""
    lines = []
    for name in dict.fromkeys(row.rule for row in rows if row.rule != HUMAN):
        own = [row for row in rows if row.rule == name]
        found = "; ".join(
            f"{LABELS[row.measure]} {with_error(row.difference, row.error, signed=True)}" for row in own if row.differs
        )
        lines.append(f"{name} less the basis-aware rule: {found or f'no difference seen in {len(own)} measures'}")
    return lines


def _tables(tables: Tables) -> list[tuple[list[str], list[list[Any]], int, str]]:
    """Columns, rows, how many columns hold text, and a note."""
    found = []
    if tables.get("tiny"):
        rows = [
            [NORMS[norm], NAMES[name].replace("\n", " "), *own] for (norm, name), own in _sums(tables["tiny"]).items()
        ]
        columns = ["norm", "constraints", "accepted", "false", "above τ", "settled by HiGHS", "contexts"]
        found.append((columns, rows, 2, "Sums over seeds. τ of every context is the least one that is valid."))
    for name, text_columns in (("scaling", 0), ("cost", 1), ("rules", 1), ("examples", 3)):
        if tables.get(name):
            found.append((*_all_columns(tables[name]), text_columns, _NOTES[name]))
    if tables.get("samples"):
        found.append((*_sample_rows(tables["samples"]), 1, _NOTES["samples"]))
    if tables.get("texts"):
        columns, rows = _all_columns(tables["texts"])
        found.append((columns, rows, 3, ""))
    return found


_NOTES = {
    "scaling": "Low and high: quartiles.",
    "cost": "Accepted: share of the tokens below τ that a verdict was asked for.",
    "rules": "Counts and mass of the basis-aware rule are unbiased estimates; whether it keeps the true token is "
    "exact; sign tests at 5% over all rules. True gained, true lost: contexts in which the rule keeps the true token "
    "and the basis-aware one does not, and the other way round. Beyond: kept tokens a context that η, top-p, both at "
    "the same mean entropy reject.",
    "examples": "Tokens that the basis-aware rule accepts and both others reject. The proof: the probability is above "
    "the certified bound, though below τ.",
    "samples": "± one standard error, over beginnings for NLL, gap and repetition, over groups of 16 for the others. "
    "Same texts: share that is the basis-aware rule's token by token; random streams are shared. "
    "Self-BLEU: low is diverse. Fréchet distance: to human continuations, low is alike.",
}


def _all_columns(rows: Sequence[Any]) -> tuple[list[str], list[list[Any]]]:
    values = [asdict(row) for row in rows]
    cells = [[number(cell) if isinstance(cell, float) else cell for cell in row.values()] for row in values]
    return [name.replace("_", " ") for name in values[0]], cells


def _sample_rows(rows: Sequence[SampleRow]) -> tuple[list[str], list[list[Any]]]:
    measures = ("nll_nats", "nll_gap", *(name for name in LABELS if name != "nll_nats"))
    columns = [
        "rule",
        "parameter",
        "nats",
        "texts",
        "same texts",
        *(LABELS.get(name, "NLL less human") for name in measures),
    ]
    cells = [
        [row.rule, number(row.parameter), number(row.entropy_nats), row.texts, f"{row.same_as_basis:.0%}",
         *(with_error(getattr(row, name), getattr(row, f"{name}_se")) for name in measures)]
        for row in rows
    ]  # fmt: skip
    return columns, cells
