"""Settings that change over training: schedules by step or by epoch, and a KL weight that holds the KL at a target.

A schedule is what a recipe can say, a number or a string such as "cosine:2.0->0.5@200". Both are pure functions of
what they are given, so that a resumed run goes on where it stopped. Left out: warm-up, chained and periodic shapes.
"""

import math
import re
from dataclasses import dataclass

SHAPES = ("linear", "cosine", "exponential")

GRAMMAR = (
    'a number, or "<shape>:<first>-><last>" with shape linear, cosine or exponential, over the whole run or, with '
    '"@200" (steps) or "@0.3" (fraction of the run) at its end, over its beginning: "linear:2.0->0.5", '
    '"cosine:1.0->0.1@200"'
)

BY_EPOCH = "epochs"
EPOCH_GRAMMAR = '"epochs:1.0,0.7,0.3", a value an epoch, the last one from then on'

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SCHEDULE = re.compile(
    rf"\s*(?P<shape>\w+)\s*:\s*(?P<first>{_NUMBER})\s*->\s*(?P<last>{_NUMBER})\s*(?:@\s*(?P<span>{_NUMBER})\s*)?"
)


@dataclass(frozen=True)
class Schedule:
    """A value that goes from `first` to `last`, monotonically, and stays there.

    With x = step / duration, clipped to [0, 1]: linear `first + (last − first) x`; cosine `last + (first − last)
    (1 + cos πx) / 2`; exponential `first (last / first)^x`. The ends are exact.

    Args:
        first: value at step 0.
        last: value from the end of the duration on.
        shape: "linear", "cosine" or "exponential"; the latter needs two positive ends.
        span: the duration: an int in steps, a float as a fraction of the run.
        is_integer: round to the nearest integer; both ends must be integers.
    Raises:
        ValueError: an unknown shape, or a number outside its range.
    """

    first: int | float
    last: int | float
    shape: str = "linear"
    span: int | float = 1.0
    is_integer: bool = False

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {SHAPES}, got {self.shape!r}")
        if not (math.isfinite(self.first) and math.isfinite(self.last)):
            raise ValueError(f"both ends must be finite, got {self.first} and {self.last}")
        if self.shape == "exponential" and not (self.first > 0.0 and self.last > 0.0):
            raise ValueError(f"an exponential needs two positive ends, got {self.first} and {self.last}")
        if isinstance(self.span, int) and self.span < 1:
            raise ValueError(f"a span in steps must be at least 1, got {self.span}")
        if isinstance(self.span, float) and not 0.0 < self.span <= 1.0:
            raise ValueError(f"a span as a fraction must lie in (0, 1], got {self.span}; steps have no decimal point")
        if self.is_integer and not all(float(end).is_integer() for end in self.ends()):
            raise ValueError(f"both ends must be integers, got {self.first} and {self.last}")

    @property
    def is_constant(self) -> bool:
        """Whether every step has the same value."""
        return self.first == self.last

    def ends(self) -> tuple[int | float, int | float]:
        """First and last value. Every other one lies between them, so a range need only be checked for these two."""
        return self.first, self.last

    def at(self, step: int, max_steps: int) -> int | float:
        """The value of a step; an int where `is_integer`.

        Args:
            step: finished optimiser steps, from 0; at `max_steps` the run is over.
            max_steps: steps of the whole run.
        Raises:
            ValueError: a step below 0; max_steps below 1 where the value depends on it.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        value = self._between(self._progress(step, max_steps))
        return round(value) if self.is_integer else value

    def _progress(self, step: int, max_steps: int) -> float:
        if step == 0 or self.is_constant:
            return 0.0
        if isinstance(self.span, int):
            return min(1.0, step / self.span)
        if max_steps < 1:
            raise ValueError(
                f"max_steps must be at least 1 for a schedule over a fraction of the run, got {max_steps}; give the "
                'schedule a length in steps ("@200") where the run has none'
            )
        return min(1.0, step / (self.span * max_steps))

    def _between(self, progress: float) -> int | float:
        first, last = self.ends()
        if progress in (0.0, 1.0):  # exactly, whatever rounding would make of it
            return last if progress else first
        if self.shape == "exponential":
            value = first * (last / first) ** progress
        else:
            share = progress if self.shape == "linear" else (1.0 - math.cos(math.pi * progress)) / 2.0
            value = first + (last - first) * share
        return min(max(value, min(first, last)), max(first, last))


@dataclass(frozen=True)
class EpochSchedule:
    """A value an epoch, rising or falling throughout; the last one from then on.

    Args:
        values: at least one.
    Raises:
        ValueError: none, one that is not finite, or values that rise and fall.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values or not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"a schedule by epoch needs finite values, got {list(self.values)}")
        if list(self.values) not in (sorted(self.values), sorted(self.values, reverse=True)):
            raise ValueError(f"values of a schedule must rise or fall throughout, got {list(self.values)}")

    @property
    def is_constant(self) -> bool:
        """Whether every epoch has the same value."""
        return self.values[0] == self.values[-1]

    @property
    def first(self) -> float:
        """The value of the first epoch."""
        return self.values[0]

    def ends(self) -> tuple[float, float]:
        """First and last value; every other one lies between them."""
        return self.values[0], self.values[-1]

    def at(self, epoch: float) -> float:
        """The value of an epoch, from 0; within one it does not change."""
        # Epochs are counted in fractions, whose sum may stay a rounding error below a whole number.
        return self.values[min(int(epoch + 1e-6), len(self.values) - 1)]


def parse_epoch_schedule(value: int | float | str, name: str) -> Schedule | EpochSchedule:
    """As `parse_schedule`, where values by epoch have a meaning as well."""
    if not isinstance(value, str) or value.partition(":")[0].strip() != BY_EPOCH:
        return parse_schedule(value, name)
    try:
        return EpochSchedule(tuple(float(each) for each in value.partition(":")[2].split(",")))
    except ValueError as error:
        raise ValueError(f"{name}={value!r}: {error}. Expected {GRAMMAR}, or {EPOCH_GRAMMAR}") from error


def parse_schedule(value: int | float | str, name: str, is_integer: bool = False) -> Schedule:
    """The schedule that a recipe's value means; a number is a constant.

    Args:
        value: a number, or text by the grammar that the error shows.
        name: the argument's name, for errors.
        is_integer: whether the argument is a whole number, such as top_k.
    Raises:
        ValueError: the text is none of that, or describes an impossible schedule.
    """
    try:
        if not isinstance(value, str):
            return Schedule(value, value, is_integer=is_integer)
        if re.fullmatch(_NUMBER, value.strip()):
            return Schedule(_number(value), _number(value), is_integer=is_integer)
        matched = _SCHEDULE.fullmatch(value)
        if matched is None:
            raise ValueError("it does not follow the grammar")
        shape, first, last, span = matched.group("shape", "first", "last", "span")
        duration = 1.0 if span is None else _number(span)
        return Schedule(_number(first), _number(last), shape, duration, is_integer)
    except ValueError as error:
        raise ValueError(f"{name}={value!r}: {error}. Expected {GRAMMAR}") from error


def _number(text: str) -> int | float:
    """An int where the text has neither a point nor an exponent, so that "@1" is a step and "@1.0" the whole run."""
    return float(text) if re.search(r"[.eE]", text) else int(text)


class AdaptiveKL:
    """A KL weight that is raised while the KL is above its target and lowered while it is below.

    `e = clip((KL − target) / target, −0.2, 0.2)`, `β ← β (1 + e / horizon)` after every step.

    Args:
        init: β of the first step, > 0: a weight of zero could never grow.
        target_nats_per_token: the KL to hold, > 0.
        horizon: 1 / K_β in steps, at least 1; the source's K_β = 0.1 is a horizon of 10. A deviation of 20% or more
            moves β by a factor e^0.2 in that many steps.
    Raises:
        ValueError: a number outside its range.
    Source: Ziegler et al. (2019), arXiv:1909.08593, section 2.2.
    """

    max_error = 0.2

    def __init__(self, init: float, target_nats_per_token: float, horizon: int | float = 10):
        for name, value, least in (("init", init, 0.0), ("target_nats_per_token", target_nats_per_token, 0.0)):
            if not least < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 1.0 <= horizon < math.inf:
            raise ValueError(f"horizon must be at least 1 step, got {horizon}")
        self.weight = float(init)
        self.target_nats_per_token = target_nats_per_token
        self.horizon = horizon

    def update(self, kl: float) -> float:
        """The weight of the next step.

        Args:
            kl: the KL that this step measured, in nats a token, mean over all processes.
        Raises:
            ValueError: the KL is NaN or infinite; the weight stays as it was.
        """
        if not math.isfinite(kl):
            raise ValueError(f"kl must be finite, got {kl}; the policy has diverged, lower the learning rate")
        error = (kl - self.target_nats_per_token) / self.target_nats_per_token
        self.weight *= 1.0 + min(max(error, -self.max_error), self.max_error) / self.horizon
        return self.weight

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps. The target and the horizon are the recipe's, and may change on resuming."""
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: the state is not of this class, or its weight is not positive.
        """
        if set(state) != {"weight"} or not 0.0 < state["weight"] < math.inf:
            raise ValueError(f"state must be {{'weight': a positive number}} as `state_dict` gives it, got {state}")
        self.weight = float(state["weight"])
