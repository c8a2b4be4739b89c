"""`softrl sweep`: one question by one command. A recipe at many values of its keys, as one table and one figure."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softrl.studies.sweep import Search, Trial
    from softrl.studies.sweep_launch import Launcher
    from softrl.studies.sweep_question import Question

PROG = "softrl sweep"
LAUNCHERS = ("processes", "slurm", "submitit_local")
_EPILOG = (
    "Finished trials are kept in OUTPUT_DIR and not run again; Ctrl-C lets those that run save a checkpoint, from "
    "which the same command goes on. It also tries again what failed."
)


def main(argv: list[str]) -> int:
    """Run a sweep; 0 if every trial finished, 1 if one failed, 2 for a mistake."""
    given = _parser().parse_args(argv)

    from softrl.assets import AssetError
    from softrl.studies.sweep_launch import interrupted_by_sigterm

    command = shlex.join(["softrl", "sweep", *(word for word in argv if word != "--only_report")])  # what made it
    try:
        with interrupted_by_sigterm():
            return _run(given, command)
    except KeyboardInterrupt:
        print(f"\nStopped. Finished trials are kept. To go on: {command}\n"
              "Add --only_report for the table and the figure of what there is.", file=sys.stderr)  # fmt: skip
        return 130
    except (AssetError, ValueError, TypeError, OSError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument(
        "--config", required=True, help="a sweep recipe, or a recipe of `softrl train` or `softrl variance`"
    )
    parser.add_argument(
        "--grid", action="append", default=[], metavar="KEY=V,V", help="a key and its values, instead of the recipe's"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=V", help="a key of all trials, instead of the recipe's"
    )
    parser.add_argument("--arms", nargs="+", metavar="LABEL", help="run these of the recipe only")
    parser.add_argument("--output_dir", type=Path, help="where all goes (runs/sweeps/NAME for a sweep recipe)")
    parser.add_argument("--only_report", action="store_true", help="run nothing; report what has been run")
    parser.add_argument("--sampler", default="grid", help="grid (every combination), random or tpe")
    parser.add_argument("--trials", type=int, help="how many in all (the whole grid)")
    parser.add_argument("--seed", type=int, default=0, help="of random and tpe (0)")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--minimize", metavar="METRIC", help="mse, variance, LABEL:mse, ...; eval_loss, ... of training")
    goal.add_argument("--maximize", metavar="METRIC", help="eval_reward, snr, ...")
    parser.add_argument("--workers", type=int, help="trials at a time (1), each in a process of its own")
    parser.add_argument("--threads", type=int, help="of each (1 with several workers; all the cores without)")
    parser.add_argument(
        "--launcher", default=LAUNCHERS[0], choices=LAUNCHERS, help="slurm: a job array by submitit (softrl[slurm])"
    )
    parser.add_argument(
        "--slurm", default="", metavar="KEY=V,KEY=V", help="sbatch's options as submitit names them: partition=cpu,"
        "time=60 (minutes), cpus_per_task=1, mem=4GB, gpus_per_node=1"
    )  # fmt: skip
    parser.add_argument("--slurm_folder", type=Path, help="submitit's logs, on a disk all see (OUTPUT_DIR/submitit)")
    return parser


def _run(given: argparse.Namespace, command: str) -> int:
    from softrl.cli import sweep_trial
    from softrl.cli.arguments import find_recipe
    from softrl.studies.sweep import best, finished, sweep
    from softrl.studies.sweep_launch import Processes
    from softrl.studies.sweep_recipes import is_variance_recipe
    from softrl.studies.sweep_record import source_of
    from softrl.studies.sweep_report import FILES, write_report

    question = _question(given, find_recipe(given.config))
    recipe = find_recipe(question.recipe)
    folder = given.output_dir or Path("runs/sweeps") / Path(given.config).stem
    search = question.search(given.sampler, given.trials, given.seed, given.arms)
    if given.only_report:
        trials = finished(search, folder)
    else:
        of_variance = is_variance_recipe(recipe)
        models = {} if of_variance else question.prepare
        launch: Any = (_variance_launcher if of_variance else _train_launcher)(given, recipe, search, folder)
        prepare = partial(sweep_trial.prepare, recipe, models, folder.resolve(), Processes(1, given.threads))
        trials = sweep(search, launch, folder, source_of(recipe, models, search.set_by_all()), prepare)
    write_report(question, search, trials, folder, command)
    _print_table(question, search, trials)
    failed = sum(trial.metric is None for trial in trials)
    none = best(search, trials) is None
    print(f"Written to {folder}: {'results.csv' if none else ', '.join(FILES)}.")
    if none or failed:
        print(f"{PROG}: some trials failed, see above; the same command tries them again", file=sys.stderr)
        return 1
    return 0


def _question(given: argparse.Namespace, path: Path) -> "Question":
    from dataclasses import replace

    from softrl.studies.sweep import Axis
    from softrl.studies.sweep_question import asked_on_the_command_line, is_sweep_recipe, load_question
    from softrl.studies.sweep_recipes import is_variance_recipe

    axes = [Axis.parsed(text) for text in given.grid]
    fixed = [Axis.parsed(text, "--set") for text in given.set]
    if several := [axis.key for axis in fixed if len(axis.values) > 1]:
        raise ValueError(f"--set takes one value a key, {several} have several; --grid varies a key")
    metric, maximize = given.minimize or given.maximize, bool(given.maximize)
    if is_sweep_recipe(path):
        question = load_question(path).with_grid(axes, fixed)
        return (
            replace(question, metric=metric, direction="maximize" if maximize else "minimize") if metric else question
        )
    if not axes or given.output_dir is None:
        raise ValueError(f"{given.config} is a recipe of one run; --grid KEY=V,V and --output_dir are needed")
    of_variance = is_variance_recipe(path)
    metric, maximize = metric or ("mse" if of_variance else "eval_reward"), maximize if metric else not of_variance
    return asked_on_the_command_line(given.config, axes, metric, maximize).with_grid([], fixed)


def _variance_launcher(given: argparse.Namespace, recipe: Path, search: "Search", folder: Path) -> Callable[..., Any]:
    import torch

    from softrl.cli.variance import _make_trainer
    from softrl.studies.sweep_recipes import variance_objective, with_values
    from softrl.studies.variance_config import load_config

    if given.workers not in (None, 1) or given.launcher != LAUNCHERS[0]:
        raise ValueError("trials of a variance recipe share their draws and run here; leave out --workers, --launcher")
    config = load_config(recipe)
    for values in search.grid():  # a key that nothing has is refused before the first trial
        with_values(config, search.given(values))
    if all(spec.kind != "trained_lm" for spec in config.problems):
        torch.set_num_threads(1)
    objective = variance_objective(recipe, search.metric, folder, _make_trainer)
    return lambda values: objective(search.given(values))


def _train_launcher(given: argparse.Namespace, recipe: Path, search: "Search", folder: Path) -> "Launcher":
    """A trial is a run of its own, in a process and a folder of its own."""
    from softrl.cli import sweep_trial
    from softrl.studies.sweep_launch import Jobs, Processes, Threads, parsed_options

    every = search.every()
    first_of_arm = {values.get("arm"): values for values in reversed(every)}
    for values in first_of_arm.values():
        sweep_trial.check_keys(recipe, search.given(values))
    folder = folder.resolve()
    named = {
        sweep_trial.folder_name(values): sweep_trial.with_prepared(search.given(values), folder) for values in every
    }
    if len(named) < len(every):
        raise ValueError("two trials would have the same folder; their values differ in special characters only")
    run = sweep_trial.TrainTrials(recipe.resolve(), folder, named, sweep_trial._RUN)
    if given.launcher == LAUNCHERS[0]:
        workers = 1 if given.workers is None else given.workers
        threads = given.threads or (1 if workers > 1 else None)
        processes = Processes(workers, threads)
        return Threads(lambda values: run(values, processes), workers, processes.stop)
    options = parsed_options(given.slurm)
    slurm = given.launcher == "slurm"
    options = {"time": 60, "cpus_per_task": 1, "name": "softrl-sweep", **options} if slurm else _WEEK | options
    threads = given.threads or int(options.get("cpus_per_task", 1))
    logs = given.slurm_folder or folder / "submitit"
    jobs = Jobs(run, "slurm" if slurm else "local", logs, given.workers, options, threads)
    if search.sampler == "tpe":  # it chooses by what has been finished, so not all at once
        jobs.capacity = given.workers or 1
    return jobs


_WEEK = {"timeout_min": 7 * 24 * 60}  # submitit's own default is two minutes


def _print_table(question: "Question", search: "Search", trials: "Sequence[Trial]") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from softrl.studies.sweep_summary import cells, findings, header, settings

    rows = settings(question, trials)
    table = Table(title=escape(question.title), title_justify="left")
    for title in header(question):
        table.add_column(escape(title), justify="right", overflow="fold")
    sign = -1.0 if search.maximize else 1.0
    known = [row for row in rows if row.metrics]
    winner = min(known, key=lambda row: sign * row.metric[0], default=None)
    for row in sorted(rows, key=lambda row: (not row.metrics, sign * row.metric[0] if row.metrics else 0.0)):
        table.add_row(*map(escape, cells(question, row)), style="bold" if row is winner else None)
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)  # a file has no width
    for line in findings(question, rows) if known else []:
        print(line)
