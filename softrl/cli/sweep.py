"""`softrl sweep`: one recipe at many values of its keys; a rerun does what is missing and what failed."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softrl.studies.sweep import Search, Trial

PROG = "softrl sweep"
_RUN = "import sys; from softrl.cli.sweep import train_trial; sys.exit(train_trial(sys.argv[1:]))"


def main(argv: list[str]) -> int:
    """Run a sweep; 0 if every trial finished, 1 if one failed, 2 for a mistake."""
    given = _parser().parse_args(argv)

    from softrl.assets import AssetError

    try:
        return _run(given)
    except KeyboardInterrupt:
        print(f"\nStopped. To go on: {shlex.join(['softrl', 'sweep', *argv])}", file=sys.stderr)
        return 130
    except (AssetError, ValueError, TypeError, OSError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="a recipe of `softrl train` or of `softrl variance`")
    parser.add_argument("--grid", action="append", required=True, metavar="KEY=V,V", help="a key and its values")
    parser.add_argument("--output_dir", required=True, type=Path, help="where trials, table and figure go")
    parser.add_argument("--sampler", default="grid", help="grid (every combination), random or tpe")
    parser.add_argument("--trials", type=int, help="how many in all (the whole grid)")
    parser.add_argument("--seed", type=int, default=0, help="of random and tpe (0)")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--minimize", metavar="METRIC", help="mse, variance, LABEL:mse, ...; eval_loss, ... of training")
    goal.add_argument("--maximize", metavar="METRIC", help="eval_reward, snr, ...")
    return parser


def _run(given: argparse.Namespace) -> int:
    from softrl.cli.arguments import find_recipe
    from softrl.studies.sweep import Axis, Search, best, sweep
    from softrl.studies.sweep_recipes import is_variance_recipe

    recipe = find_recipe(given.config)
    of_variance = is_variance_recipe(recipe)
    metric = given.minimize or given.maximize or ("mse" if of_variance else "eval_reward")
    maximize = bool(given.maximize) or (not given.minimize and not of_variance)
    axes = tuple(map(Axis.parsed, given.grid))
    search = Search(axes, metric, maximize, given.sampler, given.trials, given.seed)
    make = _variance_objective if of_variance else _train_objective
    trials = sweep(search, make(recipe, search, given.output_dir), given.output_dir)
    _print_table(search, trials)
    print(f"Written to {given.output_dir / 'results.csv'} and {given.output_dir / 'sweep.png'}.")
    if best(search, trials) is None or any(trial.metric is None for trial in trials):
        print(f"{PROG}: some trials failed, see above; the same command tries them again", file=sys.stderr)
        return 1
    return 0


def _variance_objective(recipe: Path, search: "Search", folder: Path) -> Callable[[dict[str, Any]], float]:
    import torch

    from softrl.cli.variance import _make_trainer
    from softrl.studies.sweep_recipes import variance_objective, with_values
    from softrl.studies.variance_config import load_config

    config = load_config(recipe)
    for values in search.grid():  # a key that nothing has is refused before the first trial
        with_values(config, values)
    if all(spec.kind != "trained_lm" for spec in config.problems):
        torch.set_num_threads(1)
    return variance_objective(recipe, search.metric, folder, _make_trainer)


def _train_objective(recipe: Path, search: "Search", folder: Path) -> Callable[[dict[str, Any]], float]:
    """A trial is a run of its own, in a process and a folder of its own."""
    from softrl.studies.sweep import TrialError

    check_keys(recipe, search.grid()[0])

    def objective(values: dict[str, Any]) -> float:
        where = folder / "trials" / folder_name(values)
        log = where / "log.txt"
        where.mkdir(parents=True, exist_ok=True)
        if not (where / "metrics.json").is_file():
            with log.open("w", encoding="utf-8") as file:
                words = [*words_of(recipe, values), "--output_dir", str(where), *resuming(where)]
                command = [sys.executable, "-c", _RUN, *words]
                done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
            if done.returncode != 0:
                raise _failed(TrialError, values, f"the run ended with status {done.returncode}; see {log}")
        metrics = json.loads((where / "metrics.json").read_text(encoding="utf-8"))
        if search.metric not in metrics:
            raise ValueError(f"a run has no metric {search.metric!r}; it has {sorted(metrics)}")
        return float(metrics[search.metric])

    return objective


def _failed(kind: type[Exception], values: dict[str, Any], why: str) -> Exception:
    message = f"{values}: {why}"
    print(f"{PROG}: {message}", file=sys.stderr)
    return kind(message)


def check_keys(recipe: Path, values: dict[str, Any]) -> None:
    """Refuse a key that no trainer has, before the first run."""
    from softrl.cli.arguments import parse

    parse([*words_of(recipe, values), "--output_dir", "unused"], PROG)


def words_of(recipe: Path, values: dict[str, Any]) -> list[str]:
    """The command line of `softrl train` for a trial; null leaves a key as the recipe has it."""
    given = [(key, str(value)) for key, value in values.items() if value is not None]
    return ["--config", str(recipe), *(word for key, value in given for word in (f"--{key}", value))]


def resuming(folder: Path) -> list[str]:
    """An interrupted run goes on from its last checkpoint."""
    return ["--resume_from_checkpoint", "latest"] if any(folder.glob("checkpoint-*")) else []


def folder_name(values: dict[str, Any]) -> str:
    """A folder for a trial, readable."""
    return re.sub(r"[^A-Za-z0-9._=,-]+", "_", ",".join(f"{key}={value}" for key, value in values.items()))


def train_trial(argv: list[str]) -> int:
    """Train, evaluate, and write metrics.json: the last of everything that was logged, and the final evaluation."""
    from softrl.cli.train import build_trainer, checkpoint_to_resume, parse

    arguments, training_args, model_args = parse(argv, PROG)
    trainer = build_trainer(arguments, training_args, model_args)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args))
    metrics: dict[str, Any] = {}
    for row in trainer.state.log_history:
        metrics |= row
    if trainer.eval_dataset is not None:
        metrics |= trainer.evaluate()
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    path = Path(training_args.output_dir) / "metrics.json"
    path.write_text(json.dumps(numbers, indent=1, sort_keys=True), encoding="utf-8")
    return 0


def _print_table(search: "Search", trials: "list[Trial]") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from softrl.studies.sweep import best

    table = Table(title="the best first", title_justify="left")
    for title in (*(axis.key for axis in search.axes), search.metric, "seconds"):
        table.add_column(escape(title), justify="right")
    sign, winner = -1.0 if search.maximize else 1.0, best(search, trials)
    for trial in sorted(trials, key=lambda t: (t.metric is None, sign * (t.metric or 0.0))):
        cells = [str(trial.values[axis.key]) for axis in search.axes]
        shown = "failed" if trial.metric is None else f"{trial.metric:.4g}"
        style = "bold" if trial is winner else None
        table.add_row(*map(escape, cells), shown, f"{trial.seconds:.3g}", style=style)
    Console().print(table)
