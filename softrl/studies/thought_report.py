"""The page of `softrl thoughts compare`: what each way to think reached, its controls, and thoughts to read."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from softrl.studies.html import embedded, number, with_error, write_page
from softrl.studies.tables import write_csv
from softrl.studies.thought_config import ThoughtStudyConfig
from softrl.studies.thought_figures import draw
from softrl.studies.thought_tables import MethodRow, Record, finished, group_rows, method_rows

_BODY = """
<p>{{ config.question }}</p>
<ul>{% for line in summary %}<li>{{ line }}</li>{% endfor %}</ul>
<pre>{{ command }}</pre>
{% if config.notes %}<p>{{ config.notes }}</p>{% endif %}
<h2>At the end of {{ config.max_seconds | number }} seconds of training</h2>
{{ table(columns, rows) }}
<p class="note">Means over seeds ± one standard error. NLL: of held-out true tokens after thoughts, nats; "without":
the same model's on the same tokens without thinking. Difference: to "{{ reference }}", seed by seed. Seconds and
thoughts until the NLL was first below {{ target }} are medians over seeds; a dash: the median seed never got there.
Controls do not learn what to think.</p>
{% if figures.curves is defined %}
{{ figure(figures.curves, "NLL by seconds and by thoughts sampled; dashed: controls; bands: one standard error") }}
{% endif %}
{% if figures.positions is defined %}
{{ figure(figures.positions, "Mixing weight and gain by position, means over seeds") }}
{% endif %}
{% if groups %}<h2>By difficulty</h2>
{{ table(["method", "difficulty", "NLL", "accuracy"], groups, 2) }}{% endif %}
{% for name, thoughts in read %}
<h2>Thoughts of “{{ name }}”</h2>
<p class="note">Those that helped most first, then those that harmed most, of seed {{ first_seed }}. Gain: nats by
which the true token became likelier.</p>
{{ table(["before", "thought", "true token", "gain", "NLL without", "NLL with", "weight"], thoughts, 3) }}
{% endfor %}
{% if failed %}<h2>Runs that failed</h2>{{ table(["method", "seed", "why"], failed, 3) }}{% endif %}
"""
_COLUMNS = [
    "method", "kind", "seeds", "NLL", "without", "accuracy", "difference", "weight", "steps", "thoughts", "reached",
    "seconds to target", "thoughts to target",
]  # fmt: skip
_READ_AT_MOST = 4
_SHOWN = ("base", "mixed", "mixing")


def write_report(config: ThoughtStudyConfig, records: list[Record], command: str) -> Path:
    """Write tables, figures and the page; returns the page's path."""
    folder = Path(config.output_dir)
    rows = method_rows(records, config.reference_name, config.target_nll)
    write_csv(rows, folder / "rows.csv")
    figures = {name: embedded(path) for name, path in draw(records, folder).items()}
    page = folder / "report.html"
    values: dict[str, Any] = {
        "config": config, "command": command, "columns": _COLUMNS, "rows": [_cells(row) for row in rows],
        "reference": config.reference_name, "target": number(config.target_nll), "figures": figures,
        "summary": summary_lines(rows, config), "groups": [_group_cells(row) for row in group_rows(records)],
        "read": _read(records, rows), "first_seed": min(record["seed"] for record in records),
        "failed": [(r["method"], r["seed"], r["status"]) for r in records if r["status"] != "done"],
    }  # fmt: skip
    write_page(page, "Learning to think", _BODY, values)
    (folder / "rows.json").write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    return page


def summary_lines(rows: list[MethodRow], config: ThoughtStudyConfig) -> list[str]:
    """What the table says, in sentences."""
    done = [row for row in rows if row.seeds]
    if not done:
        return ["No run has ended as it should."]
    best = min(done, key=lambda row: row.nll[0])
    lines = [f"The least NLL has “{best.method}”: {with_error(*best.nll)} nats."]
    controls, ways = [row for row in done if row.is_control], [row for row in done if not row.is_control]
    if controls and ways:
        beaten = min(controls, key=lambda row: row.nll[0])
        better = [row.method for row in ways if row.nll[0] + 2.0 * _error(row) < beaten.nll[0] - 2.0 * _error(beaten)]
        who = ", ".join(f"“{name}”" for name in better) if better else "no way to think"
        lines.append(
            f"Below the best control, “{beaten.method}” ({with_error(*beaten.nll)}), by more than two standard errors "
            f"of each: {who}."
        )
    there = sorted((row for row in ways if row.seconds_to_target is not None), key=lambda row: row.seconds_to_target)
    if config.target_nll is not None:
        found = ", ".join(f"“{row.method}” {row.seconds_to_target:.0f} s" for row in there) or "nobody"
        lines.append(f"First below {config.target_nll} nats, median over seeds: {found}.")
    return lines


def _error(row: MethodRow) -> float:
    return row.nll[1] if row.nll[1] == row.nll[1] else 0.0  # NaN of a single seed


def _cells(row: MethodRow) -> list[Any]:
    seconds, thoughts = row.seconds_to_target, row.thoughts_to_target
    numbers = [with_error(*pair) for pair in (row.nll, row.base_nll, row.accuracy)]
    return [
        row.method,
        "control" if row.is_control else "learns",
        f"{row.seeds}, {row.failed} failed" if row.failed else row.seeds,
        *numbers,
        with_error(*row.against, signed=True),
        number(row.mixing),
        f"{row.steps:,}",
        f"{row.thoughts:,}",
        f"{row.reached} of {row.seeds}",
        number(seconds),
        "–" if thoughts is None else f"{thoughts:,.0f}",  # noqa: RUF001
    ]


def _group_cells(row: tuple[str, str, tuple[float, float], tuple[float, float]]) -> list[Any]:
    return [row[0], row[1], with_error(*row[2]), with_error(*row[3])]


def _read(records: list[Record], rows: list[MethodRow]) -> list[tuple[str, list[list[Any]]]]:
    """Thoughts of the methods that gained most, from their first seed."""
    gained = sorted((row for row in rows if row.seeds and not row.is_control), key=lambda row: row.nll[0])
    found = []
    for row in gained[:_READ_AT_MOST]:
        run = next(record for record in finished(records) if record["method"] == row.method)
        cells = [
            [t["before"], t["thought"], t["next"], f"{t['gain']:+.2f}", *(number(t[key]) for key in _SHOWN)]
            for t in run["thoughts"]
        ]
        if cells:
            found.append((row.method, cells))
    return found
