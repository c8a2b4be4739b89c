"""`softrl variance`: bias, variance and price of gradient estimators, from a recipe to a table, figures and a page."""

import argparse
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softrl.studies.variance import Row
    from softrl.studies.variance_config import VarianceConfig

PROG = "softrl variance"


def main(argv: list[str]) -> int:
    """Run a study; what was drawn before is taken from its folder."""
    given = _parser().parse_args(argv)

    from softrl.assets import AssetError

    try:
        return _run(given, argv)
    except (AssetError, ValueError, OSError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="a recipe's path, or the name of a shipped one: studies/quick")
    parser.add_argument("--output_dir", help="where draws, rows, figures and report.html go (the recipe's)")
    parser.add_argument("--draws", type=int, help="draws of every estimator (the recipe's; its problems may say more)")
    parser.add_argument("--seed", type=int, help="of models, rewards and draws (the recipe's)")
    parser.add_argument("--fresh", action="store_true", help="throw finished draws away instead of reusing them")
    return parser


def _run(given: argparse.Namespace, argv: list[str]) -> int:
    from softrl.cli.arguments import find_recipe
    from softrl.studies.variance import run
    from softrl.studies.variance_config import load_config

    overrides = {"output_dir": given.output_dir, "draws": given.draws, "seed": given.seed}
    config = load_config(find_recipe(given.config), overrides)
    if given.draws is not None:
        config = _with_draws(config, given.draws)
    drawn = Path(config.output_dir) / "draws"
    if given.fresh:
        shutil.rmtree(drawn, ignore_errors=True)
    _use_one_thread_for_tiny_models(config)
    command = shlex.join(["softrl", "variance", *(word for word in argv if word != "--fresh")])
    try:
        rows, descriptions = run(config, _make_trainer)
    except KeyboardInterrupt:
        print(f"\nStopped. Finished draws are in {drawn}; to go on: {command}", file=sys.stderr)
        return 130
    from softrl.studies.variance_report import write_report

    _print_tables(rows)
    print(f"Report: {write_report(config, rows, descriptions, command)}")
    return 0


def _with_draws(config: "VarianceConfig", draws: int) -> "VarianceConfig":
    """The command line's number goes before that of a problem."""
    from dataclasses import replace

    return replace(config, problems=[replace(spec, draws=draws) for spec in config.problems])


def _use_one_thread_for_tiny_models(config: "VarianceConfig") -> None:
    """Tiny tensors gain nothing from threads, and threads that wait for each other on a busy machine cost a lot."""
    import torch

    if all(spec.kind != "trained_lm" for spec in config.problems):
        torch.set_num_threads(1)


def _make_trainer(words: list[str]) -> Any:
    """Imports trl, which takes a while: only for problems that train a real model."""
    from softrl.cli.train import build_trainer, parse

    return build_trainer(*parse(words, PROG))


def _print_tables(rows: "list[Row]") -> None:
    from rich.console import Console

    from softrl.studies.variance_report import contradictions, summary

    console = Console()
    for problem in dict.fromkeys(row.problem for row in rows):
        whole = [row for row in rows if row.problem == problem and row.group == "all"]
        console.print(_table(problem, whole))
        console.print(" ".join(summary(whole)[:3]), markup=False, highlight=False)
        for row in contradictions(whole):
            text = f"CONTRADICTION: {row.estimator} is declared unbiased, z = {row.bias_z:.1f}"
            console.print(text, style="bold red", markup=False)
        console.print()
    console.print("Errors are over ‖∇J‖², the least first; the report explains every column.")


def _table(problem: str, rows: "list[Row]") -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from softrl.studies.variance_figures import has_bias
    from softrl.studies.variance_report import number

    table = Table(title=escape(problem), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("estimator", overflow="fold", min_width=12)
    titles = (
        "unbi-\nased",
        "\nbias²",
        "vari-\nance",
        "\nmse",
        "best\nscale",
        "equal\ncalls",
        "equal\nsecs",
        "co-\nsine",
    )
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row.mse):
        bias2 = number(row.bias2) if has_bias(row) else "≈ 0"
        errors = (row.variance, row.mse, row.scaled_mse, row.mse_at_equal_calls, row.mse_at_equal_seconds, row.cosine)
        table.add_row(escape(row.estimator), row.unbiased_for, bias2, *map(number, errors))
    return table
