"""Rows of a study as a CSV file."""

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

from softrl.assets import write_atomically


def write_csv(rows: list[Any], path: Path) -> None:
    """Write dataclass objects of one kind, whole or not at all; the folder is made if it is missing.

    None is an empty field; a tuple is one field, its numbers separated by spaces.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in asdict(row).items()})


def _cell(value: Any) -> Any:
    return " ".join(f"{number:.6g}" for number in value) if isinstance(value, tuple) else value
