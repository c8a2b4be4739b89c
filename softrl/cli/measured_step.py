"""`python -m softrl.cli.measured_step TRAIN-ARGUMENTS`: peak memory of a recipe's second step, as one line of JSON.

`softrl doctor --measure` and the test of the estimate start it: a process that has not trained anything before. The
first step is left out, since optimiser states do not exist before its end. Completions do not end early; nothing is
saved, reported or evaluated. On a CPU the figures are resident memory beyond that of the idle process, which
has imported the libraries and loaded tokenizer and prompts, and no model; on a GPU they are what torch has allocated.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

_QUIET = {
    "max_steps": 2, "save_strategy": "no", "eval_strategy": "no", "report_to": [], "log_completions": False,
    "disable_tqdm": True, "load_best_model_at_end": False,
}  # fmt: skip


class MeasurementError(RuntimeError):
    """The process that measures ended early."""


@dataclass(frozen=True)
class MeasuredStep:
    """Bytes beyond the idle process: before the step (models, optimiser's states), and at most during it."""

    device: str
    resident: int
    peak: int
    seconds: float


def measured(argv: list[str]) -> MeasuredStep:
    """Measure a recipe in a process of its own.

    Args:
        argv: arguments of `softrl train`.
    Raises:
        MeasurementError: the process failed, for instance for want of memory; the message is its last line.
    """
    from softrl.studies.memory import glibc_environment

    command = [sys.executable, "-m", "softrl.cli.measured_step", *argv]
    finished = subprocess.run(command, capture_output=True, text=True, env=glibc_environment(), check=False)
    if finished.returncode != 0:
        said = finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}"]
        raise MeasurementError(f"the measured step failed (exit status {finished.returncode}): {said[-1]}")
    return MeasuredStep(**json.loads(finished.stdout.splitlines()[-1]))


def measure_here(argv: list[str]) -> MeasuredStep:
    """Two steps in this process."""
    from softrl.cli.train import build_trainer, parse

    arguments, training_args, model_args = parse(argv)
    for name, value in _QUIET.items():
        setattr(training_args, name, value)
    meter = _Meter(training_args.device.type)
    kept = _loaded_without_models(arguments, model_args)
    idle = meter.now()
    trainer = build_trainer(arguments, training_args, model_args)
    trainer.eos_ids = ()
    probe = _probe(meter)
    trainer.add_callback(probe)
    trainer.train()
    del kept
    return MeasuredStep(meter.device, probe.resident - idle, probe.peak - idle, probe.seconds)


class _Meter:
    """Bytes in use on a device, and at most since the last look at what is in use."""

    def __init__(self, device: str):
        self.device = device

    def now(self) -> int:
        import torch

        from softrl.studies.memory import reset_peak_bytes

        if self.device != "cuda":
            return reset_peak_bytes()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        import torch

        from softrl.studies.memory import peak_bytes

        return torch.cuda.max_memory_allocated() if self.device == "cuda" else peak_bytes()


def _loaded_without_models(arguments: Any, model_args: Any) -> Any:
    """Tokenizer and prompts; on the way, what training imports late: backward pass, optimiser, checkpointing."""
    import torch
    from transformers import AutoTokenizer

    from softrl.assets import resolve_model
    from softrl.cli.train import load_prompts

    tokenizer = AutoTokenizer.from_pretrained(
        resolve_model(model_args.model_name_or_path), revision=model_args.model_revision
    )
    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(8, 64)).sum().backward()
    optimizer.step()
    return tokenizer, load_prompts(arguments, tokenizer)


def _probe(meter: _Meter) -> Any:
    from transformers import TrainerCallback

    class Probe(TrainerCallback):
        """What the last step that began has taken."""

        resident = peak = 0
        seconds = started = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.resident = meter.now()
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.peak = meter.peak()
            self.seconds = time.perf_counter() - self.started

    return Probe()


if __name__ == "__main__":
    print(json.dumps(asdict(measure_here(sys.argv[1:]))))
