"""`softrl quickstart`: the main job, from nothing to a table, on a real model and real text."""

import sys
import time
from pathlib import Path
from typing import Any

from softrl.cli.train import build_trainer, checkpoint_to_resume, parse, train

USAGE = """usage: softrl quickstart [--resume] [--seed N] [--output_dir DIR] [--key value ...]

Trains SmolLM2-135M to continue the openings of film reviews favourably: straight-through Gumbel tokens, a sentiment
reward backpropagated through them, a KL penalty, LoRA. Prints hard reward, judge, KL, diversity and perplexity on
held-out prompts before and after, and completions; writes curves.png, adjoint.png, before.json, after.json and the
adapter.

  --resume          go on from the last checkpoint of an interrupted run
  --output_dir DIR  where to write (runs/quickstart)
  --accelerate_config NAME
                    several processes: ddp, fsdp2, zero1, zero2, zero3, ddp_cpu, or a file; --num_processes N
  --key value       any key of `softrl train`; the recipe is recipes/quickstart.yaml
"""


def main(argv: list[str]) -> int:
    """Train from the quickstart recipe and print before and after."""
    if "-h" in argv or "--help" in argv:
        print(USAGE, end="")
        return 0
    import datasets
    from transformers.utils import logging

    from softrl.assets import AssetError
    from softrl.cli.launch import launch

    datasets.disable_progress_bars()  # of data and weights that load in a blink; training has a bar of its own
    logging.disable_progress_bar()
    resume = ["--resume_from_checkpoint", "latest"] if "--resume" in argv else []
    argv = [argument for argument in argv if argument != "--resume"]
    try:
        if (status := launch("quickstart", argv)) is not None:
            return status
        arguments, training_args, model_args = parse(["--config", "quickstart", *argv, *resume], "softrl quickstart")
        checkpoint = checkpoint_to_resume(training_args)
        started = time.perf_counter()
        trainer = build_trainer(arguments, training_args, model_args)
    except (ValueError, TypeError, OSError, AssetError) as error:
        print(f"softrl quickstart: {error}", file=sys.stderr)
        return 2
    status = run(trainer, checkpoint, argv, started)
    trainer.accelerator.end_training()
    return status


def run(trainer: Any, checkpoint: str | None, argv: list[str], started: float) -> int:
    """Evaluate, train, evaluate, report."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from softrl.studies.report import load_samples, plot_run, print_report, save_samples
    from softrl.trainers.callbacks import InterruptCallback, RewardProgressCallback

    folder, interrupt = Path(trainer.args.output_dir), InterruptCallback()
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(interrupt)
    trainer.add_callback(RewardProgressCallback())
    is_main, say = trainer.is_world_process_zero(), trainer.accelerator.print
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None and (folder / "before.json").is_file():
        before = load_samples(folder / "before.json")
    else:
        before = evaluated(trainer, "before training")
        if is_main:
            save_samples(before, folder / "before.json")
    if (status := train(trainer, checkpoint, "softrl quickstart")) is not None:
        return status
    if interrupt.signal is not None:
        say(
            f"Stopped at step {trainer.state.global_step}. Go on with: "
            f"{' '.join(['softrl quickstart --resume', *argv])}"
        )
        return interrupt.exit_code
    after = evaluated(trainer, "after training")
    trainer.save_model(str(folder))
    trainer.save_state()
    if not is_main:
        return 0
    save_samples(after, folder / "after.json")
    figures = plot_run(trainer.state.log_history, folder)
    print_report(before, after)
    print(
        f"{time.perf_counter() - started:.0f} s in all, {trainer.state.global_step} steps. "
        f"Curves: {', '.join(map(str, figures))}; all completions: {folder / 'before.json'}, {folder / 'after.json'}; "
        f"adapter: {folder}"
    )
    return 0


def evaluated(trainer: Any, when: str) -> list[Any]:
    """The samples of an evaluation, which takes a while and says so."""
    trainer.accelerator.print(f"sampling {len(trainer.eval_dataset)} held-out prompts {when} ...", flush=True)
    trainer.evaluate()
    return trainer.last_evaluation
