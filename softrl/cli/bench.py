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
    given = parser.parse_args(argv)

    from softrl.assets import AssetError, resolve_model
    from softrl.studies.memory import run

    try:
        resolve_model(given.model)  # fetched here, with its progress bar, rather than in every measuring process
    except AssetError as error:
        print(f"softrl bench: {error}", file=sys.stderr)
        return 1
    given.output.parent.mkdir(parents=True, exist_ok=True)
    run(given.model, given.methods, given.horizons, given.sequences, given.output)
    print(f"Written to {given.output}.")
    return 0
