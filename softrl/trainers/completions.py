"""Completions for people to read: a table on the terminal, in trackio and wandb, and a parquet file a log."""

import importlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from softrl.trainers._bridge import print_prompt_completions_sample

_TABLE_BACKENDS = ("wandb", "trackio")


class CompletionLog:
    """The completions of the last optimizer step, with their scores.

    Args:
        size: how many a step makes, over micro-batches and processes.
    """

    def __init__(self, size: int):
        self._rows: deque[dict[str, Any]] = deque(maxlen=size)

    def add(self, prompts: list[Any], completions: list[str], scores: dict[str, list[float]]) -> None:
        """Completions of a micro-batch, from all processes; prompts are text or conversations."""
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            of_this_one = {name: values[i] for name, values in scores.items()}
            self._rows.append({"prompt": prompt, "completion": completion, **of_this_one})

    def report(self, step: int, num_to_print: int, folder: Path, report_to: list[str]) -> None:
        """Print some, write all to `folder`, and log them where `report_to` says so; then forget them.

        File names and the table's columns are those of TRL's GRPOTrainer.
        """
        if not self._rows:
            return
        table = pd.DataFrame([{"step": step, **row} for row in self._rows])
        self._rows.clear()
        prompts, completions = table["prompt"].tolist(), table["completion"].tolist()
        scores = {name: table[name].tolist() for name in table.columns[3:]}
        print_prompt_completions_sample(prompts, completions, scores, None, step, num_to_print)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / f"completions_{step:05d}.parquet")
        for backend in _running(report_to):
            backend.log({"completions": backend.Table(dataframe=table)})


def _running(report_to: list[str]) -> Iterator[Any]:
    """The modules that take tables; imported only if a run reports to them."""
    for name in _TABLE_BACKENDS:
        if name in report_to:
            backend = importlib.import_module(name)
            if name != "wandb" or backend.run is not None:
                yield backend
