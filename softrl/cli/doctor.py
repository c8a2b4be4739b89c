"""`softrl doctor`: what is installed, which engines run here, and what a recipe takes in memory.

Exit status: 0 when all is well, 1 when something required is missing, or the recipe does not fit or stops in
`--measure`, 2 on bad input.
Left out: launching the engines; a verdict comes from what they need, not from a run.
"""

import argparse
import json
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softrl.cli.machine import EngineCheck, Machine, Package
    from softrl.cli.measured_step import MeasuredStep
    from softrl.cli.recipe_footprint import RecipeFootprint
    from softrl.studies.footprint import Footprint
    from softrl.studies.step_plan import Engine

PROG = "softrl doctor"


def main(argv: list[str]) -> int:
    """Look around; returns the process's exit status."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="With --config RECIPE, or any other argument of `softrl train`: what a step of that takes in memory.",
    )
    parser.add_argument("--measure", action="store_true", help="run two steps of the recipe, and show their peak")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--scale", action="store_true", help="print docs/scale.md: 1B, 8B and 70B policies on paper")
    parser.add_argument(
        "--accelerate_config", default=None, help="the engine that the recipe has to fit (one process)"
    )
    parser.add_argument("--num_processes", type=int, default=None, help="processes of the engines (8)")
    given, recipe = parser.parse_known_args(argv)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated", category=FutureWarning)
    if given.scale:
        from softrl.studies.scale import page

        print(page())
        return 0

    from softrl.assets import AssetError
    from softrl.cli.measured_step import MeasurementError

    try:
        return _look(given, recipe)
    except (ValueError, TypeError, OSError, AssetError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    except MeasurementError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 1


def _look(given: argparse.Namespace, recipe: list[str]) -> int:
    from softrl.cli import machine

    if given.measure and not recipe:
        raise ValueError("--measure runs a recipe: give --config RECIPE, or other arguments of softrl train")
    packages = machine.packages()
    missing = [package.name for package in packages if package.required and package.version is None]
    if missing:  # nothing else would work
        print(
            json.dumps({"missing": missing})
            if given.json
            else f"{PROG}: missing: {', '.join(missing)}; pip install softrl"
        )
        return 1
    # First, so that what is wrong with them is all that is said.
    engine, number = _engine(given)
    with redirect_stdout(sys.stderr):  # the parser's remarks are no part of the tables, nor of the JSON
        found = _found(given, recipe) if recipe else None
    here = machine.machine()
    engines = machine.engine_checks(here)
    report: dict[str, Any] = {
        "machine": asdict(here),
        "packages": [asdict(package) for package in packages],
        "engines": [asdict(engine) for engine in engines],
        "missing": missing,
    }
    if not given.json:
        _print_machine(here, packages, engines)
    if found is not None:
        report["recipe"] = _recipe_report(given, found, here, engine, number)
    if given.measure:
        report["measured"] = _measured(given, recipe, found)
    if given.json:
        print(json.dumps(report, indent=1))
    return int(not report.get("recipe", {}).get("fits", True))


def _found(given: argparse.Namespace, recipe: list[str]) -> "RecipeFootprint | None":
    """The recipe as the formula sees it; None for trainers that can only be measured."""
    from datasets import disable_progress_bars

    from softrl.cli.arguments import WITHOUT_REWARDS
    from softrl.cli.recipe_footprint import recipe_footprint
    from softrl.cli.train import parse

    disable_progress_bars()
    arguments, training_args, model_args = parse(recipe, PROG)
    if given.measure and (arguments.trainer.startswith("trl_") or arguments.trainer in WITHOUT_REWARDS):
        return None
    return recipe_footprint(arguments, training_args, model_args)


def _recipe_report(
    given: argparse.Namespace, found: "RecipeFootprint", here: "Machine", engine: "Engine", number: int
) -> dict[str, Any]:
    from softrl.studies.footprint import PHASES
    from softrl.studies.step_plan import ENGINES

    held = found.under(engine, number)
    processes_here = 1 if here.gpus else number  # GPUs have a memory of their own each
    others = given.num_processes or 8
    report: dict[str, Any] = {
        "plan": asdict(found.plan),
        "engine": engine,
        "num_processes": number,
        "peak": held.peak,
        "peak_phase": held.peak_phase,
        "phases": {phase: held.total(phase) for phase in PHASES},
        "items": {item.name: item.size for item in held.items},
        "fits": held.peak * processes_here <= here.free,
        "free": here.free,
        "by_engine": {name: found.under(name, others).peak for name in ENGINES if name != "single"},
        "by_engine_num_processes": others,
        "notes": list(found.notes),
    }
    if not given.json:
        _print_recipe(found, held, report)
    return report


def _measured(given: argparse.Namespace, recipe: list[str], found: "RecipeFootprint | None") -> dict[str, Any]:
    from softrl.cli.measured_step import measured

    step = measured(recipe)
    if not given.json:
        _print_measured(step, None if found is None else found.under("single", 1))
    return asdict(step)


def _engine(given: argparse.Namespace) -> tuple[Any, int]:
    """The engine to fit into, as the formula calls it, and its number of processes."""
    import yaml

    from softrl.cli.arguments import find_shipped

    if given.num_processes is not None and given.num_processes < 1:
        raise ValueError(f"--num_processes must be at least 1, got {given.num_processes}")
    if given.accelerate_config is None:
        return "single", 1
    path = find_shipped("accelerate_configs", given.accelerate_config, "Accelerate configuration")
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    number = given.num_processes or settings["num_processes"]
    kind = settings["distributed_type"]
    if kind == "DEEPSPEED":
        stage = settings["deepspeed_config"]["zero_stage"]
        return ("ddp" if stage == 0 else f"zero{stage}"), number
    if kind == "FSDP":
        return "fsdp2", number
    return ("single", 1) if number == 1 else ("ddp", number)


# Tables


def _print_machine(here: "Machine", packages: "list[Package]", engines: "list[EngineCheck]") -> None:
    from rich.console import Console

    from softrl.assets import cache_dir
    from softrl.cli.assets import listing

    console = Console()
    installed = _table("installed", "package", "version", "")
    installed.add_row("python", here.python, "")
    for package in packages:
        if package.version is not None:
            installed.add_row(package.name, package.version, "")
        else:
            style = "bold red" if package.required else "dim"
            what = f"{package.purpose}: {package.brought_by}" if package.purpose else package.brought_by
            installed.add_row(package.name, "missing" if package.required else "-", _escaped(what), style=style)
    console.print(installed)
    devices = ", ".join(here.gpus) if here.gpus else "no GPU"
    bf16 = "computes bfloat16" if here.bf16 else "no bfloat16"
    memory = f"{size(here.memory)} of memory, {size(here.free_memory)} of it free"
    console.print(f"{devices}; {here.cores} cores; {memory}; {bf16}", highlight=False)
    table = _table("engines (--accelerate_config)", "name", "runs", "why, how")
    for engine in engines:
        runs = "[green]yes[/]" if engine.runs else "[red]no[/]"
        table.add_row(engine.name, runs, _escaped(engine.reason))
    console.print(table)
    console.print("\n".join(listing(cache_dir())), markup=False, highlight=False)


def _print_recipe(found: "RecipeFootprint", held: "Footprint", report: dict[str, Any]) -> None:
    from rich.console import Console

    from softrl.studies.footprint import PHASES

    console, plan = Console(), found.plan
    where = (
        f"{report['engine']}, {report['num_processes']} processes" if report["num_processes"] > 1 else "one process"
    )
    table = _table(f"memory of one process, by phase ({where})", "", *PHASES)
    for item in held.items:
        table.add_row(item.name, *(size(item.size[phase]) if item.size.get(phase) else "" for phase in PHASES))
    table.add_section()
    table.add_row("together", *(size(held.total(phase)) for phase in PHASES), style="bold")
    console.print()
    console.print(table)
    trained = found.shape.num_parameters if found.adapter is None else found.adapter.num_parameters
    console.print(
        f"{found.shape.num_parameters / 1e6:.1f}M parameters, {trained / 1e6:.1f}M trained; {plan.num_sequences} "
        f"sequences of {plan.prompt_length}+{plan.num_steps} tokens; method {plan.method}",
        highlight=False,
    )
    peaks = ", ".join(f"{name} {size(peak)}" for name, peak in report["by_engine"].items())
    number = report["by_engine_num_processes"]
    console.print(f"Peak of each of {number} processes (--num_processes) by engine: {peaks}", highlight=False)
    for note in found.notes:
        console.print(f"Note: {note}.", markup=False, highlight=False)
    together = "" if report["num_processes"] == 1 else f", {report['num_processes']} processes"
    verdict = "It fits" if report["fits"] else "It does NOT fit"
    console.print(
        f"{verdict}: {size(held.peak)} at most (in the {held.peak_phase}){together}, {size(report['free'])} free. "
        "Not counted: libraries (some 0.5 GB a process), what the allocator loses, activations of rewards, texts.",
        style="bold green" if report["fits"] else "bold red",
        highlight=False,
    )


def _print_measured(step: "MeasuredStep", held: "Footprint | None") -> None:
    from rich.console import Console

    beyond = "beyond the idle process" if step.device == "cpu" else "allocated by torch"
    text = f"Measured on one process ({step.device}, {beyond}): peak {size(step.peak)} in the second step, "
    estimate = "" if held is None else f"; estimate {size(held.peak)}, {held.peak / step.peak - 1.0:+.1%}"
    Console().print(f"{text}{step.seconds:.1f} s{estimate}", highlight=False)


def _table(title: str, *columns: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or len(columns) == 3 else "right", overflow="fold")
    return table


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def size(number: float) -> str:
    """Bytes for people to read, in powers of 1000."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
