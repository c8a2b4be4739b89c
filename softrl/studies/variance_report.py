"""The page of a variance study: rows as CSV and Parquet, figures as PNG, and everything in one HTML file.

The page needs no network and no script, so that it can be mailed, printed, and read on a phone.
"""

import base64
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from softrl.assets import write_atomically
from softrl.studies.tables import write_csv
from softrl.studies.variance import REFERENCE, Row
from softrl.studies.variance_config import VarianceConfig
from softrl.studies.variance_figures import (
    ROUNDING,
    Figure,
    budgets,
    has_bias,
    plane,
    sweeps_of_estimators,
    sweeps_of_problems,
    swept,
)
from softrl.studies.variance_style import styles

TEMPLATE = Path(__file__).with_name("variance_report.html")
LARGEST_Z = 4.0  # beyond it a declaration of unbiasedness is contradicted: 1 in 16,000 by chance
_NO_NOISE = 1e5  # a signal-to-noise ratio beyond it is that of rounding


def number(value: float) -> str:
    """Three significant digits; rounding errors of zero are zero."""
    if value != value:
        return "n/a"
    if abs(value) < ROUNDING:
        return "0"
    if abs(value) == float("inf"):
        return "∞" if value > 0 else "-∞"
    rounded = float(f"{value:.3g}")
    if 1e-3 <= abs(rounded) < 1e5:
        digits = max(2 - int(f"{rounded:e}".split("e")[1]), 0)
        return f"{rounded:.{digits}f}"
    mantissa, exponent = f"{rounded:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


@dataclass(frozen=True)
class Cell:
    """A table's cell: a number, its interval, and whether no other row's is better."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """How a column reads a row. `key` orders its values, the least being best; None for a column without a best."""

    title: str
    text: Callable[[Row], str]
    key: Callable[[Row], float] | None = None
    field: str = ""


def _measured(title: str, field: str, sign: float = 1.0) -> Column:
    return Column(title, lambda row: number(getattr(row, field)), lambda row: sign * getattr(row, field), field)


def _snr(row: Row) -> float:
    return row.snr if row.snr < _NO_NOISE else float("inf")


COLUMNS = (
    Column("estimator", lambda row: row.estimator),
    Column("unbiased for", lambda row: row.unbiased_for),
    Column("draws", lambda row: f"{row.draws:,}"),
    Column("bias²", lambda row: number(row.bias2), lambda row: row.bias2 if has_bias(row) else 0.0, "bias2"),
    _measured("variance", "variance"),
    _measured("mse", "mse"),
    _measured("mse at the best scale", "scaled_mse"),
    Column("signal-to-noise", lambda row: number(_snr(row)), lambda row: -_snr(row)),
    _measured("cosine of a draw", "cosine", -1.0),
    Column("cosine of the mean", lambda row: number(row.mean_cosine), lambda row: -row.mean_cosine),
    Column("reward calls a draw", lambda row: number(row.reward_calls), lambda row: row.reward_calls),
    Column("seconds a draw", lambda row: number(row.seconds), lambda row: row.seconds),
    _measured("mse at equal reward calls", "mse_at_equal_calls"),
    _measured("mse at equal seconds", "mse_at_equal_seconds"),
)
OF_A_GROUP = tuple(COLUMNS[place] for place in (0, 3, 4, 5, 6, 8, 9))  # what differs from group to group
_WITH_INTERVAL = ("bias2", "variance", "mse")


def table(rows: Sequence[Row], shown: Sequence[Column] = COLUMNS) -> list[list[Cell]]:
    """Rows by mse, with the best of every column marked; equal ones are all best."""
    ordered = sorted(rows, key=lambda row: row.mse)
    columns = [_column(column, ordered) for column in shown]
    return [list(cells) for cells in zip(*columns, strict=True)]


def _column(column: Column, rows: Sequence[Row]) -> list[Cell]:
    keys = [None if column.key is None else column.key(row) for row in rows]
    known = [key for key in keys if key is not None and key == key]
    least = min(known) if known else None
    cells = []
    for row, key in zip(rows, keys, strict=True):
        best = least is not None and key is not None and number(key) == number(least)
        cells.append(Cell(column.text(row), _interval(row, column.field), best))
    return cells


def _interval(row: Row, field: str) -> str:
    if field not in _WITH_INTERVAL:
        return ""
    low, high = number(getattr(row, f"{field}_low")), number(getattr(row, f"{field}_high"))
    return "" if low == high else f"[{low}, {high}]"


def contradictions(rows: Sequence[Row]) -> list[Row]:
    """Rows that are declared unbiased for sampled tokens and whose mean is elsewhere."""
    return [row for row in rows if row.unbiased_for == "hard" and _is_off(row)]


def _is_off(row: Row) -> bool:
    without_noise = row.bias_z != row.bias_z and row.variance < ROUNDING
    return abs(row.bias_z) > LARGEST_Z or (without_noise and row.bias2 > 1e-9 and row.truth_noise == 0.0)


MEASURES: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("mse of one draw", lambda row: row.mse),
    ("mse at the best scale", lambda row: row.scaled_mse),
    ("mse at equal reward calls", lambda row: row.mse_at_equal_calls),
    ("mse at equal seconds", lambda row: row.mse_at_equal_seconds),
    ("variance of the unbiased", lambda row: row.variance if row.unbiased_for == "hard" else float("inf")),
)


_NOT_HARD = (
    ("soft", "Declared unbiased for soft tokens only"),
    ("other", "Declared unbiased for another objective than the truth here"),
    ("none", "Not declared unbiased"),
)


def winner(rows: Sequence[Row], measure: Callable[[Row], float]) -> str:
    """Who has the least of it, and how much; all of them where they are equal."""
    least = number(min(measure(row) for row in rows))
    if least == "∞":
        return "n/a"
    names = [row.estimator for row in rows if number(measure(row)) == least]
    return f"{' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))} ({least})"


def summary(rows: Sequence[Row]) -> list[str]:
    """What a table says, in sentences."""
    unit = next((row for row in rows if _name(row) == REFERENCE), rows[0])
    draw, *others = (winner(rows, measure) for _, measure in MEASURES)
    scaled, calls, seconds, steady = ("the same" if other == draw else other for other in others)
    sentences = [
        f"Least error in one draw: {draw}; {unit.estimator}, the unit of budgets, has {number(unit.mse)}.",
        f"If every estimator is first multiplied by the factor that suits it: {scaled}.",
        f"At the reward calls of one draw of {unit.estimator}: {calls}; at its seconds: {seconds}.",
    ]
    if steady != "n/a":
        sentences.append(f"Least variance of those declared unbiased: {steady}.")
    for declared, meaning in _NOT_HARD:
        names = [row.estimator for row in rows if row.unbiased_for == declared]
        if names:
            sentences.append(f"{meaning}: {'; '.join(names)}.")
    return sentences


def _name(row: Row) -> str:
    return json.loads(row.settings)["estimator"]["name"]


def facts(config: VarianceConfig) -> list[tuple[str, str]]:
    """What a reader needs to judge the numbers, and to get them again."""
    import transformers

    from softrl import __version__

    versions = f"softrl {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return [
        ("seed", str(config.seed)),
        ("versions", f"{versions}, Python {platform.python_version()}"),
        ("made on", datetime.now(UTC).strftime("%Y-%m-%d, %H:%M UTC")),
        ("machine", f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores, torch on "
                    f"{torch.get_num_threads()} thread(s); seconds depend on it, and on what else it did"),
    ]  # fmt: skip


def write_report(config: VarianceConfig, rows: Sequence[Row], descriptions: dict[str, str], command: str) -> Path:
    """Write rows.csv, rows.parquet, PNGs and report.html into the study's folder; the page's path.

    Args:
        config: the study.
        rows, descriptions: what `variance.run` returned.
        command: makes the study again, as shown on the page.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(list(rows), folder / "rows.csv")
    _write_parquet(rows, folder / "rows.parquet")
    whole = [row for row in rows if row.group == "all"]
    style = styles([row.estimator for row in whole])
    across = [_kept(swept(sweep, style), sweep.title, folder) for sweep in sweeps_of_problems(config, whole)]
    sections = [
        _section(problem, text, [row for row in rows if row.problem == problem], style, folder)
        for problem, text in descriptions.items()
    ]
    page = _template().render(
        config=config, command=command, facts=facts(config), across=across, sections=sections, columns=COLUMNS,
        of_a_group=OF_A_GROUP,
        measures=MEASURES, contradictions=contradictions(whole), number=number, largest_z=number(LARGEST_Z),
    )  # fmt: skip
    path = folder / "report.html"
    with write_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _section(problem: str, text: str, rows: list[Row], style: dict[str, Any], folder: Path) -> dict[str, Any]:
    whole = [row for row in rows if row.group == "all"]
    groups = list(dict.fromkeys(row.group for row in rows if row.group != "all"))
    figures = [plane(problem, whole, style), budgets(problem, whole, style)]
    figures += [swept(sweep, style) for sweep in sweeps_of_estimators(whole)]
    return {
        "name": problem,
        "anchor": _slug(problem),
        "description": text,
        "summary": summary(whole),
        "winners": [winner(whole, measure) for _, measure in MEASURES],
        "contradictions": contradictions(whole),
        "truth_noise": number(whole[0].truth_noise) if whole[0].truth_noise > 0.0 else "",
        "table": table(whole),
        "groups": [
            (group, table([row for row in rows if row.group == group], OF_A_GROUP)) for group in groups[1:] and groups
        ],
        "figures": [_kept(figure, problem, folder) for figure in figures],
    }


def _kept(figure: Figure, title: str, folder: Path) -> dict[str, str]:
    """A figure as a file of its own and as what the page embeds."""
    with write_atomically(folder / f"{_slug(title)}-{_slug(figure.name)}.png") as temporary:
        temporary.write_bytes(figure.image)
    return {
        "alt": f"{title}: {figure.name}",
        "caption": figure.caption,
        "data": base64.b64encode(figure.image).decode("ascii"),
    }


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-")


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    import pandas

    with write_atomically(path) as temporary:
        pandas.DataFrame([asdict(row) for row in rows]).to_parquet(temporary)


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
