"""`softrl compare`: learning curves and the frontier of reward against KL, for several training methods."""

import argparse
import sys
from typing import Any


def main(argv: list[str]) -> int:
    """Run what a recipe asks for and has not been run, and write the report of all that has."""
    parser = argparse.ArgumentParser(prog="softrl compare", description=__doc__, epilog=_EPILOG)
    parser.add_argument("--config", required=True, help="a recipe's path, or its name, e.g. compare-quick")
    parser.add_argument("--output_dir", help="where to write (the recipe's)")
    parser.add_argument("--methods", nargs="+", help="run these methods only")
    parser.add_argument("--betas", nargs="+", type=float, help="run these KL weights only")
    parser.add_argument("--seeds", nargs="+", type=int, help="run these seeds only")
    parser.add_argument("--only_report", action="store_true", help="run nothing; report what has been run")
    given = parser.parse_args(argv)

    from softrl.assets import AssetError

    try:
        return _run(given, argv)
    except (ValueError, TypeError, OSError, AssetError) as error:
        print(f"softrl compare: {error}", file=sys.stderr)
        return 2


_EPILOG = (
    "Finished runs are kept in OUTPUT_DIR/runs and not run again; Ctrl-C loses the current one only. "
    "The report covers all finished runs of the recipe, whichever this command was restricted to."
)


def _run(given: argparse.Namespace, argv: list[str]) -> int:
    import dataclasses

    import datasets
    from transformers.utils import logging

    from softrl.cli.arguments import find_study
    from softrl.cli.train import build_trainer, find_recipe, load_judge, load_prompts, parse
    from softrl.studies.compare import Study, Tools
    from softrl.studies.compare_config import load_config
    from softrl.studies.compare_report import write_report

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    config = load_config(find_study(given.config), find_recipe)
    if given.output_dir is not None:
        config = dataclasses.replace(config, output_dir=given.output_dir)
    methods = _chosen(given.methods, {method.name: method for method in config.methods}, "--methods")
    seeds = _chosen(given.seeds, {seed: seed for seed in config.seeds}, "--seeds")
    _chosen(given.betas, {beta: beta for method in config.methods for beta in method.betas}, "--betas")
    tools = Tools(lambda words: parse(words, "softrl compare"), build_trainer, load_prompts, load_judge)
    study = Study(config, tools)
    if not given.only_report:
        try:
            study.train(methods, given.betas, seeds)
        except KeyboardInterrupt:
            print(
                f"Stopped. Finished runs are kept; go on with: softrl compare {' '.join(argv)}\n"
                "Add --only_report for the report of what there is."
            )
            return 130
    written = write_report(config, study.records(), f"softrl compare {' '.join(argv)}")
    print(f"Written to {', '.join(map(str, written))}.")
    return 0


def _chosen(wanted: list[Any] | None, known: dict[Any, Any], option: str) -> list[Any]:
    """The values of the names that an option gives; all without it."""
    if wanted is None:
        return list(known.values())
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"{option}: {unknown} are not in the recipe, which has {list(known)}")
    return [known[name] for name in wanted]
