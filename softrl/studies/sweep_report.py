"""All that a sweep writes: results.csv, summary.csv, summary.md, sweep.png and report.html."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softrl.studies.html import embedded, write_page
from softrl.studies.sweep import ARM, Search, Trial, best
from softrl.studies.sweep_figures import plot_question, plot_search
from softrl.studies.sweep_question import Question
from softrl.studies.sweep_summary import Setting, cells, findings, header, settings, word, write_results, write_summary

_BODY = """
<p>{{ question.question }}</p>
{% if found %}<ul>{% for line in found %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
<pre>{{ command }}</pre>
{% if question.notes %}<p>{{ question.notes }}</p>{% endif %}
{{ figure(picture, caption) }}
<h2>Settings</h2>
{{ table(columns, rows, text_columns) }}
<p class="note">Means over seeds ± one standard error. {% if compared %}Differences are taken seed by seed; better: in
how many seeds. {% endif %}{{ question.metric }}: {{ goal }}. Seconds: of a trial, its start-up included.</p>
<h2>What all trials share</h2>
<pre>{{ shared }}</pre>
{% if failed %}<h2>Trials that failed</h2>{{ table(["setting", "why"], failed, 2) }}{% endif %}
"""
FILES = ("results.csv", "summary.csv", "summary.md", "sweep.png", "report.html")


def write_report(
    question: Question, search: Search, trials: Sequence[Trial], folder: Path, command: str
) -> list[Setting]:
    """Write what there is; without a finished trial that is results.csv alone.

    Returns:
        The settings, in the grid's order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_results(search, trials, folder / "results.csv", (*question.measures, *question.columns))
    rows = settings(question, trials)
    if best(search, trials) is None:
        return rows
    write_summary(question, rows, folder)
    picture = folder / "sweep.png"
    if search.sampler == "grid":
        plot_question(question, rows, picture)
    else:
        plot_search(search.keys, search.metric, [t for t in trials if t.metric is not None], picture)
    write_page(folder / "report.html", question.title, _BODY, _values(question, rows, trials, picture, command))
    return rows


def _values(
    question: Question, rows: Sequence[Setting], trials: Sequence[Trial], picture: Path, command: str
) -> dict[str, Any]:
    failed = [
        (", ".join(f"{key}={word(value)}" for key, value in trial.values.items()), trial.error)
        for trial in trials
        if trial.metric is None
    ]
    return {
        "question": question, "found": findings(question, rows), "command": command, "picture": embedded(picture),
        "caption": f"{question.metric}: dots are seeds, bars one standard error of the mean",
        "columns": header(question), "rows": [cells(question, row) for row in rows],
        "text_columns": len(question.keys), "compared": bool(question.report.baseline),
        "goal": "more is better" if question.direction == "maximize" else "less is better",
        "shared": shared_lines(question), "failed": failed,
    }  # fmt: skip


def shared_lines(question: Question) -> str:
    """The recipe, the keys that all trials set, and those of each arm."""
    lines = [f"recipe: {question.recipe}", *(f"{key}: {word(value)}" for key, value in question.set.items())]
    lines += [f"{key}: {', '.join(keys)} together" for key, keys in question.together.items()]
    for arm in question.search().arms:
        fixed = ", ".join(f"{key}: {word(value)}" for key, value in arm.fixed.items())
        lines.append(f"{ARM} {arm.label!r}: {fixed or 'nothing of its own'}")
    return "\n".join(lines)
