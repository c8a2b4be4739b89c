"""`softrl study basis-aware`: where basis-aware truncation is sound, what it costs, and what it accepts and writes.

Parts, in their order, with minutes (scaling and cost measured on two cores, the others from processor time of one):

| part | what is measured | minutes |
|---|---|---|
| tiny | a model whose true distributions are known: accepted and false tokens, nestedness | 1 |
| scaling | seconds a verdict against V and k, ours and HiGHS | 1.3 |
| cost | SmolLM2: seconds a drawn token by k; verdicts and seconds beside HiGHS | 4.9 |
| rules | behind human text: BA-η beside η and top-p at equal entropy; examples | 3 |
| samples | texts written under these rules: quality and diversity | 10 |

A finished part is kept as `parts/<part>.json` and not made again; tables, figures and page are written from these.
Left out: ratings by people.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from softrl.assets import write_atomically
from softrl.studies.basis_bench import Bench, Settings
from softrl.studies.basis_real import Cost, Program, costs
from softrl.studies.basis_report import Part, Tables, summary_lines, write_report
from softrl.studies.basis_rules import ContextRow, Example, Rule, context_rows, examples
from softrl.studies.basis_samples import Difference, SampleRow, TextRow, samples
from softrl.studies.basis_scaling import Scaling, scaling
from softrl.studies.basis_tiny import Nested, TinyResult, tiny_check
from softrl.studies.tables import write_csv

__all__ = ["PARTS", "Settings", "run"]

_ROWS: dict[str, type] = {
    "tiny": TinyResult, "nested": Nested, "scaling": Scaling, "cost": Cost, "programs": Program, "rules": Rule,
    "contexts": ContextRow, "examples": Example, "samples": SampleRow, "differences": Difference, "texts": TextRow,
}  # fmt: skip
_RULE = ("model", "epsilon", "rule", "num_directions", "representation", "texts", "tokens")


def _tiny(bench: Bench) -> Tables:
    results: list[Any] = []
    nested: list[Any] = []
    runs = [(norm, seed) for norm in ("none", "rms", "layer") for seed in range(bench.settings.seeds)]
    for norm, seed in tqdm(runs, desc="tiny models"):
        found = tiny_check(norm, seed=seed)  # type: ignore[arg-type]
        results += found[0]
        nested += found[1]
    return {"tiny": results, "nested": nested}


def _scaling(bench: Bench) -> Tables:
    return {"scaling": scaling(bench)}


def _cost(bench: Bench) -> Tables:
    cost, programs = costs(bench)
    return {"cost": cost, "programs": programs}


def _rules(bench: Bench) -> Tables:
    found = bench.comparison
    given = (bench.contexts, found, bench.rule, bench.tokenizer)
    return {"rules": found.rows, "examples": examples(*given), "contexts": context_rows(*given)}


def _samples(bench: Bench) -> Tables:
    rows, differences, texts = samples(bench)
    return {"samples": rows, "differences": differences, "texts": texts}


# What makes a part, and the settings that its numbers depend on.
_PARTS: dict[str, tuple[Callable[[Bench], Tables], tuple[str, ...]]] = {
    "tiny": (_tiny, ("seeds",)),
    "scaling": (_scaling, (
        *_RULE, "vocab_sizes", "scaled_directions", "scaled_programs", "highs_programs", "time_limit_seconds",
    )),
    "cost": (_cost, (*_RULE, "cost_directions", "programs", "time_limit_seconds")),
    "rules": (_rules, _RULE),
    "samples": (_samples, (*_RULE, "samples")),
}  # fmt: skip
PARTS = tuple(_PARTS)


def run(settings: Settings, parts: Sequence[str], folder: Path, command: str = "") -> list[str]:
    """Make the parts that are missing; write every table as CSV, the figures and `report.html`.

    Args:
        settings: what is measured.
        parts: names in PARTS.
        folder: keeps finished parts; a rerun with the same one goes on, and the page shows all that are there.
        command: how the study was started, for the page.
    Returns:
        Lines for the terminal.
    Raises:
        ValueError: an unknown part, or a part that was made with other settings.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"parts must be among {PARTS}, got {unknown}")
    wanted = [part for part in PARTS if part in parts]
    for part in wanted:
        _check(part, settings, folder)
    bench = Bench(settings)
    for part in wanted:
        if not _path(part, folder).is_file():
            started = time.monotonic()
            tables = _PARTS[part][0](bench)
            _save(part, settings, tables, time.monotonic() - started, folder)
    found = {part: _load(part, folder) for part in PARTS if _path(part, folder).is_file()}
    for part in found.values():
        for name, rows in part.tables.items():
            if rows:
                write_csv(rows, folder / f"{name}.csv")
    write_report(found, command, folder)
    return [line for part in wanted for line in summary_lines(found[part].tables)]


def _path(part: str, folder: Path) -> Path:
    return folder / "parts" / f"{part}.json"


def _own_settings(part: str, settings: Settings) -> dict[str, Any]:
    values = json.loads(json.dumps(asdict(settings)))
    return {name: values[name] for name in _PARTS[part][1]}


def _check(part: str, settings: Settings, folder: Path) -> None:
    path = _path(part, folder)
    if not path.is_file():
        return
    record, wanted = json.loads(path.read_text(encoding="utf-8"))["settings"], _own_settings(part, settings)
    other = {name: (record.get(name), value) for name, value in wanted.items() if record.get(name) != value}
    if other:
        differing = "; ".join(f"{name}: {found!r}, now {now!r}" for name, (found, now) in other.items())
        raise ValueError(f"{path} was made with other settings ({differing}); give another --output_dir or delete it")


def _save(part: str, settings: Settings, tables: Tables, seconds: float, folder: Path) -> None:
    rows = {name: [asdict(row) for row in own] for name, own in tables.items()}
    record = {"settings": _own_settings(part, settings), "seconds": seconds, "tables": rows}
    path = _path(part, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")


def _load(part: str, folder: Path) -> Part:
    record = json.loads(_path(part, folder).read_text(encoding="utf-8"))
    tables = {name: [_ROWS[name](**row) for row in rows] for name, rows in record["tables"].items()}
    return Part(record["settings"], record["seconds"], tables)
