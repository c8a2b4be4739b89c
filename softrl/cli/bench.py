"""`softrl bench`: measurements that anyone can repeat."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="softrl bench", description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    memory = benchmarks.add_parser("memory", help="memory of the cotangents by method and horizon")
    memory.add_argument("--model", default="smollm2-135m", help="model name or folder (smollm2-135m)")
    memory.add_argument(
        "--methods", nargs="+", default=["sequential", "autograd"], help="sequential autograd parallel"
    )
    memory.add_argument("--horizons", nargs="+", type=int, default=[16, 64, 256], help="T (16 64 256)")
    memory.add_argument("--sequences", type=int, default=4, help="N (4)")
    memory.add_argument("--output", type=Path, default=Path("runs/memory.csv"), help="CSV (runs/memory.csv)")
    hops = benchmarks.add_parser("hops", help="truncated and discounted cotangents against the exact ones")
    hops.add_argument("--relaxations", nargs="+", default=["st_gumbel", "gumbel_softmax"], help="what is fed back")
    hops.add_argument("--prompts", type=int, default=8, help="N (8)")
    hops.add_argument("--steps", type=int, default=24, help="T (24)")
    given = parser.parse_args(argv)

    from softrl.assets import AssetError

    try:
        return _memory(given) if given.benchmark == "memory" else _hops(given)
    except (AssetError, ValueError) as error:
        print(f"softrl bench: {error}", file=sys.stderr)
        return 1


def _memory(given: argparse.Namespace) -> int:
    from softrl.assets import resolve_model
    from softrl.studies.memory import run

    resolve_model(given.model)  # fetched here, with its progress bar, rather than in every measuring process
    given.output.parent.mkdir(parents=True, exist_ok=True)
    run(given.model, given.methods, given.horizons, given.sequences, given.output)
    print(f"Written to {given.output}.")
    return 0


def _hops(given: argparse.Namespace) -> int:
    from softrl.cli.train import build_trainer, parse
    from softrl.studies.hops import compare, header

    recipe = ["--config", "quickstart", "--judge", "none", "--dtype", "float32"]
    trainer = build_trainer(*parse(recipe, "softrl bench"))
    print(header())
    for relaxation in given.relaxations:
        compare(trainer, relaxation, given.prompts, given.steps)
    return 0
