"""What training logs: TRL's metric names from numbers a sequence, and their averages between two logs."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def named_metrics(values: dict[str, Tensor], num_samples: int) -> dict[str, float]:
    """TRL's metric keys, and ours.

    Args:
        values: numbers of N sequences by name, the samples of a prompt side by side. `reward/hard`, `length` and
            `clipped` are required; `rewards/<name>` and `advantages` become a mean and a standard deviation, others
            a mean.
        num_samples: G.
    """
    lengths, hard = values["length"], values["reward/hard"]
    spread = hard.view(-1, num_samples).std(-1, unbiased=False)
    metrics = {
        "reward": hard.mean().item(),
        "reward_std": sample_std(hard),
        "frac_reward_zero_std": (spread == 0).float().mean().item() if num_samples > 1 else 0.0,
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": values["clipped"].mean().item(),
    }
    for name, value in values.items():
        if name.startswith("rewards/") or name == "advantages":
            metrics |= {f"{name}/mean": value.mean().item(), f"{name}/std": sample_std(value)}
        elif name not in ("length", "clipped"):
            metrics[name] = value.mean().item()
    return metrics


def check_counted(num_tokens: int, num_texts: int) -> None:
    """Raise ValueError where held-out texts have no token to measure."""
    if not num_tokens:
        raise ValueError(
            f"none of the {num_texts} texts of eval_dataset has a token that counts behind another one, so there is "
            "nothing to measure; pass other texts, or another completion_mask"
        )


def sample_std(values: Tensor) -> float:
    """Standard deviation with Bessel's correction, as TRL logs it; 0 for a single number."""
    return values.std().item() if len(values) > 1 else 0.0


def _now() -> float:
    """Seconds, with the GPU's queue empty: its work belongs to the phase that asked for it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class MetricLog:
    """Metrics of the micro-batches since the last log, and where their seconds went."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start again from nothing."""
        self._values: dict[str, list[float]] = defaultdict(list)
        self._phase_seconds: dict[str, float] = defaultdict(float)
        self._total_seconds = 0.0
        self._micro_batches = 0

    def __bool__(self) -> bool:
        return bool(self._values)

    def add(self, metrics: dict[str, float]) -> None:
        """The metrics of one micro-batch."""
        for name, value in metrics.items():
            self._values[name].append(value)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Time a phase of a micro-batch."""
        started = _now()
        yield
        self._phase_seconds[phase] += _now() - started

    @contextmanager
    def timed_step(self) -> Iterator[None]:
        """Time a whole micro-batch."""
        started = _now()
        yield
        self._total_seconds += _now() - started
        self._micro_batches += 1

    def drained(self, micro_batches_per_step: int, last_phase: str) -> dict[str, float]:
        """Averages over the micro-batches, and seconds an optimizer step; everything starts again from nothing.

        Args:
            micro_batches_per_step: gradient accumulation.
            last_phase: what the seconds are called that no `timed` accounts for.
        """
        averages = {name: sum(values) / len(values) for name, values in self._values.items()}
        steps = max(1, self._micro_batches // micro_batches_per_step)
        seconds = {"step_time": self._total_seconds} | {
            f"step_time/{phase}": value for phase, value in self._phase_seconds.items()
        }
        seconds[f"step_time/{last_phase}"] = self._total_seconds - sum(self._phase_seconds.values())
        self.clear()
        return averages | {name: value / steps for name, value in seconds.items()}
