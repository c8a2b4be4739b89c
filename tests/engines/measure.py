"""Seconds a step and peak memory a rank on SmolLM2, by engine: `python tests/engines/measure.py [ENGINE ...]`.

The same sequences a step and the same number of threads in all: one process has two, each of two has one. Sets run
one after the other, `--rounds` times. Prints a table, and writes rows to `--output`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SEQUENCES, STEPS = 8, 4
ENGINES = ("single", "ddp_cpu", "zero1", "zero2", "zero3", "fsdp2")
RECIPE = (
    "--config", "quickstart", "--max_steps", str(STEPS), "--dtype", "float32", "--bf16", "false", "--judge", "none",
    "--num_train_prompts", "64", "--num_eval_prompts", "4", "--save_strategy", "no", "--eval_strategy", "no",
    "--logging_steps", "1",
)  # fmt: skip


def on_rank(output, argv):
    """What a rank does: train, write down the seconds of each step and the largest memory that it held."""
    from engines import cpu_shim

    cpu_shim.install()
    from softrl.cli.train import build_trainer, parse

    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer = build_trainer(*parse(argv))
    trainer.train()
    seconds = [row["step_time"] for row in trainer.state.log_history if "step_time" in row]
    facts = {
        "seconds": seconds[1:],  # the first one allocates
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "idle_mb": idle / 1024,
        "world": trainer.accelerator.num_processes,
        "engine": trainer.accelerator.distributed_type.value,
    }
    (output / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(facts))
    trainer.accelerator.end_training()


def measured(engine, length, more):
    """One run: the facts of its ranks."""
    world = 1 if engine == "single" else 2
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable]
        if world > 1:
            config = ROOT / "accelerate_configs" / f"{engine}.yaml"
            launch += ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
            launch += ["--num_processes", "2", "--mixed_precision", "no"]
        rows = ["--per_device_train_batch_size", str(SEQUENCES // world), "--max_completion_length", str(length)]
        command = [*launch, str(Path(__file__)), "--rank-of", folder, *RECIPE, *rows, *more]
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": str(2 // world), **({"ACCELERATE_USE_CPU": "true"} if engine == "ddp_cpu" else {}),
        }  # fmt: skip
        done = subprocess.run(
            [*command, "--output_dir", f"{folder}/run"], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{engine} failed:\n{done.stderr[-3000:]}")
        facts = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    assert all(each["world"] == world for each in facts)
    return facts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="*", default=ENGINES)
    parser.add_argument("--length", type=int, default=16, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="train all parameters, not LoRA")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    more = ["--use_peft", "false", "--learning_rate", "1e-5"] if options.full else []
    rows = {engine: {"seconds": [], "peak_mb": 0.0} for engine in options.engines}
    for _ in range(options.rounds):
        for engine, row in rows.items():
            facts = measured(engine, options.length, more)
            row["seconds"] += facts[0]["seconds"]
            row["peak_mb"] = max(row["peak_mb"], *(each["peak_mb"] for each in facts))
            row |= {"idle_mb": facts[0]["idle_mb"], "world": facts[0]["world"], "engine": facts[0]["engine"]}
            print(f"  {engine}: {[round(each, 2) for each in facts[0]['seconds']]} s", file=sys.stderr, flush=True)
    print("| engine | processes | seconds a step | peak memory a rank, MB | of which idle |\n|---|---|---|---|---|")
    for engine, row in rows.items():
        median = statistics.median(row["seconds"])
        print(f"| {engine} | {row['world']} | {median:.2f} | {row['peak_mb']:.0f} | {row['idle_mb']:.0f} |")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "--rank-of":
        on_rank(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
