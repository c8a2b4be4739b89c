"""The report of `softrl compare`: rows as files."""

from pathlib import Path
from typing import Any

import pandas as pd

from softrl.assets import write_atomically
from softrl.studies.compare_config import CompareConfig
from softrl.studies.compare_tables import Row, rows_of
from softrl.studies.tables import write_csv


def write_report(config: CompareConfig, records: list[dict[str, Any]], command: str) -> list[Path]:
    """Rows of every run and evaluation.

    Returns:
        What was written.
    Raises:
        ValueError: there is no run yet.
    """
    if not records:
        raise ValueError(f"no run of this recipe is finished in {config.output_dir}; run it without --only_report")
    folder = Path(config.output_dir)
    return _write_rows(rows_of(records), folder)


def _write_rows(rows: list[Row], folder: Path) -> list[Path]:
    table, columns = folder / "rows.csv", folder / "rows.parquet"
    write_csv(rows, table)
    with write_atomically(columns) as temporary:
        pd.DataFrame(rows).to_parquet(temporary)
    return [table, columns]
