"""`softrl bench`: measurements that anyone can repeat."""

import argparse
import sys
import warnings
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
    rollout = benchmarks.add_parser("rollout", help="seconds and memory of a step: ours, TRL's RLOO, naive, the floor")
    rollout.add_argument("--model", default="smollm2-135m", help="a model's name or folder, or tiny (smollm2-135m)")
    rollout.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the model (float32)")
    rollout.add_argument("--use_peft", action="store_true", help="LoRA on all linear layers instead of all parameters")
    rollout.add_argument("--beta", type=float, default=0.0, help="KL weight (0; the naive contenders have none)")
    rollout.add_argument("--prompts", type=int, default=4, help="B; there are four samples of each (4)")
    rollout.add_argument("--horizons", nargs="+", type=int, default=[16, 32, 64, 128], help="T (16 32 64 128)")
    rollout.add_argument("--contenders", nargs="+", help="their names (all)")
    rollout.add_argument("--rounds", type=int, default=3, help="measured steps of each, alternating (3)")
    rollout.add_argument("--append", action="store_true", help="keep the rows that the CSV holds already")
    rollout.add_argument("--memory", action="store_true", help="peak memory too, a process for each")
    rollout.add_argument(
        "--output", type=Path, default=Path("runs/rollout.csv"), help="CSV and PNG (runs/rollout.csv)"
    )
    blocks = benchmarks.add_parser("blocks", help="sweeps, error and seconds of the solvers on a long rollout")
    blocks.add_argument("--model", default="smollm2-135m", help="model name or folder (smollm2-135m)")
    blocks.add_argument("--relaxations", nargs="+", help="what is fed back (all four)")
    blocks.add_argument("--steps", type=int, default=256, help="T (256)")
    blocks.add_argument("--sequences", type=int, default=4, help="N (4)")
    blocks.add_argument("--tol", type=float, default=1e-3, help="relative residual to stop at (1e-3)")
    blocks.add_argument("--block_lengths", nargs="+", type=int, default=[8, 16, 32], help="steps a block (8 16 32)")
    blocks.add_argument("--output", type=Path, default=Path("runs/blocks.csv"), help="CSV (runs/blocks.csv)")
    _add_thoughts(benchmarks.add_parser("thoughts", help="thinking after every token: shared prefix against dense"))
    reasoner = benchmarks.add_parser("reasoner", help="without a reasoner: one pass of a text against every prefix")
    reasoner.add_argument("--lengths", nargs="+", type=int, default=[16, 32, 64, 128], help="T (16 32 64 128)")
    given = parser.parse_args(argv)

    from softrl.assets import AssetError

    try:
        runs = {
            "memory": _memory, "hops": _hops, "blocks": _blocks, "rollout": _rollout, "thoughts": _thoughts,
            "reasoner": _reasoner,
        }  # fmt: skip
        return runs[given.benchmark](given)
    except (AssetError, ValueError) as error:
        print(f"softrl bench: {error}", file=sys.stderr)
        return 1


def _add_thoughts(thoughts: argparse.ArgumentParser) -> None:
    thoughts.add_argument(
        "--model", default="small", help="a model's name or folder, or small, a random Llama (small)"
    )
    thoughts.add_argument("--lengths", nargs="+", type=int, help="T, tokens of a text (32 64 128 256)")
    thoughts.add_argument("--thoughts", nargs="+", type=int, help="tokens of a thought (4 12)")
    thoughts.add_argument("--talk", type=int, default=4, help="true tokens that are scored after it (4)")
    thoughts.add_argument("--texts", type=int, default=1, help="N; there is a thought after every token (1)")
    thoughts.add_argument("--rounds", type=int, help="measured runs of each, alternating (5)")
    thoughts.add_argument("--no_memory", action="store_true", help="no peak memory, which takes a process each")
    thoughts.add_argument("--quick", action="store_true", help="one minute: T 16 32, thoughts of 2, one round")
    thoughts.add_argument(
        "--output", type=Path, default=Path("runs/thoughts.json"), help="JSON and PNG (runs/thoughts.json)"
    )


def _memory(given: argparse.Namespace) -> int:
    from softrl.assets import resolve_model
    from softrl.studies.memory import run

    resolve_model(given.model)  # fetched here, with its progress bar, rather than in every measuring process
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


def _blocks(given: argparse.Namespace) -> int:
    from softrl.studies.blocks import RELAXATIONS, run

    names = given.relaxations or list(RELAXATIONS)
    if unknown := set(names) - set(RELAXATIONS):
        raise ValueError(f"--relaxations: {sorted(unknown)} are none of {list(RELAXATIONS)}")
    run(given.model, names, given.steps, given.sequences, given.tol, given.block_lengths, given.output)
    print(f"Written to {given.output}.")
    return 0


def _rollout(given: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    from softrl.studies.rollout import CONTENDERS, Setting
    from softrl.studies.rollout_report import run

    contenders = given.contenders or list(CONTENDERS)
    if unknown := set(contenders) - set(CONTENDERS):
        raise ValueError(f"--contenders: {sorted(unknown)} are none of {list(CONTENDERS)}")
    setting = Setting(given.model, given.dtype, given.use_peft, given.beta, given.prompts)
    run(setting, given.horizons, contenders, given.rounds, given.memory, given.output, given.append)
    print(f"Written to {given.output} and {given.output.with_suffix('.png')}.")
    return 0


def _thoughts(given: argparse.Namespace) -> int:
    from softrl.assets import resolve_model
    from softrl.studies.thought_attention import SMALL, Setting, run

    lengths, thoughts, rounds = ([16, 32], [2], 1) if given.quick else ([32, 64, 128, 256], [4, 12], 5)
    lengths, thoughts = given.lengths or lengths, given.thoughts or thoughts
    if min(lengths) < 2 or min(thoughts) < 0 or given.talk < 1 or given.texts < 1:
        raise ValueError("--lengths start at 2, --thoughts at 0, --talk and --texts at 1")
    if given.model != SMALL:
        resolve_model(given.model)  # fetched here, with its progress bar, rather than in every measuring process
    settings = [Setting(given.model, each, n, given.talk, given.texts) for n in thoughts for each in lengths]
    run(settings, given.rounds or rounds, not given.no_memory, given.output)
    print(f"Written to {given.output} and {given.output.with_suffix('.png')}.")
    return 0


def _reasoner(given: argparse.Namespace) -> int:
    from softrl.studies.reasoner_paths import run

    run(given.lengths)
    return 0
