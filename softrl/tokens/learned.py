"""Relaxation settings that are learned with the model: temperature, entropy bound, smooth min-p and smooth top-k.

Each is one raw number behind a function that keeps it inside its range, see `ranges_of`. The gradient comes from the
soft tokens' weights: of the surrogate's `Σ_t ⟨sg a_t, p_t⟩`, whose cotangents a_t are total, it is the derivative of
the whole objective, feedback included. Which ids are kept (K, hard nucleus rules) and the noise stay as they are.

**The guard against the collapse to greedy.** A model that has only ever read tokens may pull these settings to where
its inputs are tokens again, and greedy decoding is a dead end: at temperature 0 nothing flows back. The derivative is
exact, but that of a rugged function of the whole rollout, so it need not lead where the function is better: with a
frozen SmolLM2-135M (`softrl study learned-settings`) a bound of 1.5 nats sank to 0.7 and the likelihood with it,
although larger bounds are better ones; a temperature of 1 rose, as it should. Three measures:

- *Ranges that end before greedy* (`greedy_ends`). On by default: they change nothing far from the end, and without
  one a run cannot recover, since all gradients vanish there. They do not hold a value away from its end, and there the
  raw number's own gradient vanishes, so it comes back slowly.
- *A report* (`report`) of the settings that have come to their end. It costs nothing; it is for trainers to log.
- *A log barrier* (`penalty`). Off unless its weight is given: it moves the optimum, and whether the pull is a
  collapse or what the data want is for whoever trains to say. It is the remedy when the report speaks up early in a
  run.

Left out: settings of straight-through relaxations. What they feed does not depend on them, so neither does the
objective.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softrl.tokens.relaxation import RELAXATIONS, Relaxation, make_relaxation
from softrl.tokens.truncation import SmoothTruncation, Truncation

SETTINGS = ("temperature", "max_entropy_nats", "min_p", "top_k")

_NEAR_LOG_K = 0.999  # rounding must not carry a learned bound to log K itself, where there is nothing to solve
_NO_MIN_P = 1e-4  # the loose end of min-p, which has to be positive: its logarithm is taken


@dataclass(frozen=True)
class Range:
    """Where a setting may be: between the end at which decoding becomes greedy and the loose one, both excluded."""

    greedy: float
    loose: float

    def holds(self, value: float) -> bool:
        """Whether the value lies strictly inside."""
        return min(self.greedy, self.loose) < value < max(self.greedy, self.loose)

    def raw(self, value: float) -> float:
        """The raw number of a value: the exact inverse of `value`."""
        if math.isinf(self.loose):
            distance = value - self.greedy
            return distance + math.log(-math.expm1(-distance))
        share = (value - self.greedy) / (self.loose - self.greedy)
        return math.log(share) - math.log1p(-share)

    def value(self, raw: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """`greedy + softplus(raw)` without a loose end, else `greedy + (loose − greedy) σ(raw)`."""
        if math.isinf(self.loose):
            return self.greedy + nn.functional.softplus(raw)
        return self.greedy + (self.loose - self.greedy) * raw.sigmoid()


def ranges_of(num_kept: int, greedy_ends: Mapping[str, float] | None = None) -> dict[str, Range]:
    """The range of every setting.

    Defaults, ours: temperature (0.1, ∞); entropy bound (0.05 log K, 0.999 log K) nats; min-p (1e-4, 0.5), so that a
    token half as likely as the likeliest always counts; top-k (2, K), or (1.5, 2) for K = 2.

    Args:
        num_kept: K >= 2.
        greedy_ends: other ends at the greedy side, by the setting's name. At the utmost 0, 0, 1 and 1.
    Raises:
        ValueError: K < 2, an unknown name, or an end beyond greedy or beyond the loose end.
    """
    if num_kept < 2:
        raise ValueError(f"learned settings need two kept ids or more, got K={num_kept}; raise the truncation's top_k")
    log_k = math.log(num_kept)
    defaults = {
        "temperature": Range(0.1, math.inf),
        "max_entropy_nats": Range(0.05 * log_k, _NEAR_LOG_K * log_k),
        "min_p": Range(0.5, _NO_MIN_P),
        "top_k": Range(min(2.0, (1.0 + num_kept) / 2), float(num_kept)),
    }
    utmost = {"temperature": 0.0, "max_entropy_nats": 0.0, "min_p": 1.0, "top_k": 1.0}
    for name, end in (greedy_ends or {}).items():
        if name not in defaults:
            raise ValueError(f"greedy_ends: names must be among {SETTINGS}, got {name!r}")
        loose = defaults[name].loose
        if end != utmost[name] and not Range(utmost[name], loose).holds(end):
            raise ValueError(f"greedy_ends[{name!r}] must lie between {utmost[name]} and {loose}, got {end}")
        defaults[name] = Range(end, loose)
    return defaults


class LearnedRelaxation(nn.Module):
    """A relaxation whose settings are parameters; see the top of this file for their gradient and the guard.

    Keep the parameters in float32 or better: bfloat16 has three digits. They want a learning rate of their own, around
    1e-2, far above the model's.

    Args:
        truncation: hard rules, and K, the number of kept ids.
        relaxation: "softmax" or "gumbel_softmax", which feed mixtures.
        temperature: where τ starts; None: not learned, 1.
        max_entropy_nats: where the entropy bound starts; None: no bound. Not together with a temperature.
        min_p: where the smooth min-p starts; None: no such rule.
        top_k: where the smooth top-k starts, among the K kept ids; None: no such rule.
        width_nats: δ of the two smooth rules, not learned.
        greedy_ends: see `ranges_of`.
    Raises:
        ValueError: a start outside its range, nothing to learn, both a temperature and a bound, or a relaxation that
            feeds one-hot tokens.
    """

    def __init__(
        self,
        truncation: Truncation,
        relaxation: str = "softmax",
        temperature: float | None = None,
        max_entropy_nats: float | None = None,
        min_p: float | None = None,
        top_k: float | None = None,
        width_nats: float = SmoothTruncation.width_nats,
        greedy_ends: Mapping[str, float] | None = None,
    ):
        super().__init__()
        given = dict(zip(SETTINGS, (temperature, max_entropy_nats, min_p, top_k), strict=True))
        self.start = {name: float(value) for name, value in given.items() if value is not None}
        self.truncation, self.name, self.width_nats = truncation, relaxation, width_nats
        self.greedy_ends = dict(greedy_ends or {})
        self.ranges = ranges_of(truncation.top_k, greedy_ends)
        self._check()
        self.raw = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in self.start})
        self.set_values(self.start)
        _ = self.relaxation()  # which checks the rest

    def _check(self) -> None:
        if not self.start:
            raise ValueError(f"nothing to learn: give at least one of {SETTINGS} a value to start from")
        if "temperature" in self.start and "max_entropy_nats" in self.start:
            raise ValueError(
                "temperature and max_entropy_nats are both given; a bound sets the temperature itself, keep one"
            )
        if self.name in RELAXATIONS and RELAXATIONS[self.name].feeds_one_hot:
            raise ValueError(
                f"relaxation {self.name!r} feeds one-hot tokens, which do not depend on these settings; use one that "
                "feeds mixtures: 'softmax' or 'gumbel_softmax'"
            )

    @torch.no_grad()
    def set_values(self, values: Mapping[str, float]) -> None:
        """Put learned settings at these values.

        Raises:
            ValueError: a setting that is not learned here, or a value outside its range.
        """
        for name, value in values.items():
            if name not in self.raw:
                raise ValueError(f"{name!r} is not learned here; this one learns {tuple(self.raw)}")
            between = self.ranges[name]
            if not between.holds(value):
                raise ValueError(
                    f"{name} must lie strictly between {between.greedy:g} (greedy_ends) and {between.loose:g} for "
                    f"K={self.truncation.top_k} kept ids, got {value}"
                )
            self.raw[name].fill_(between.raw(value))

    def setting(self, name: str) -> Float[Tensor, ""]:
        """The value of a learned setting, with its graph."""
        return self.ranges[name].value(self.raw[name])

    def values(self) -> dict[str, float]:
        """The learned settings as numbers."""
        return {name: self.setting(name).item() for name in self.raw}

    def relaxation(self) -> Relaxation:
        """The relaxation now, its settings tensors that carry gradients. Make a new one after every backward pass."""
        return self._relaxation({name: self.setting(name) for name in self.raw})

    def frozen(self) -> Relaxation:
        """The relaxation now, its settings plain numbers: for generation and for `soft_decoding.json`."""
        return self._relaxation(self.values())

    def _relaxation(self, values: Mapping[str, Any]) -> Relaxation:
        rules = {name: values[name] for name in ("min_p", "top_k") if name in values}
        return make_relaxation(
            self.name,
            self.truncation,
            values.get("temperature", 1.0),
            values.get("max_entropy_nats"),
            smooth=SmoothTruncation(**rules, width_nats=self.width_nats) if rules else None,
        )

    def penalty(self, weight: float) -> Float[Tensor, ""]:
        """`weight Σ log(1 + d_0 / d)`, d the distance to the greedy end and d_0 the one at the start; to be minimised.

        A log barrier at the end that fades far from it, so that it never rewards ever softer tokens; `weight · log 2`
        a setting at the start. Source: ours.

        Raises:
            ValueError: a negative weight.
        """
        if not weight >= 0.0:
            raise ValueError(f"weight must not be negative, got {weight}; 0 switches the barrier off")
        each = [(self._distance(name, self.start[name]) / self._distance(name)).log1p() for name in self.raw]
        return weight * torch.stack(each).sum()

    def _distance(self, name: str, value: float | None = None) -> Float[Tensor, ""]:
        """From the greedy end, of a value or of the setting now."""
        raw = self.raw[name]
        setting = self.setting(name) if value is None else torch.tensor(value, dtype=raw.dtype, device=raw.device)
        return (setting - self.ranges[name].greedy).abs().clamp(min=torch.finfo(raw.dtype).eps)

    @torch.no_grad()
    def report(self, share: float = 0.05) -> list[str]:
        """A sentence for every setting that has lost all but `share` of its distance to the greedy end."""
        found = []
        for name, value in self.values().items():
            end = self.ranges[name].greedy
            if self._distance(name) < share * self._distance(name, self.start[name]):
                found.append(
                    f"the learned {name} has come from {self.start[name]:g} to {value:.4g}, its greedy end ({end:g}): "
                    "soft decoding is collapsing to greedy; hold it off with penalty(weight), or let the model get "
                    "used to soft tokens before these settings learn"
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything about it, for JSON: `raw` are the parameters, `values` what they mean."""
        return {
            "truncation": asdict(self.truncation), "relaxation": self.name, "width_nats": self.width_nats,
            "greedy_ends": self.greedy_ends, "start": self.start, "values": self.values(),
            "raw": {name: raw.item() for name, raw in self.raw.items()},
        }  # fmt: skip

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "LearnedRelaxation":
        """What `to_dict` gave, to the last digit; its `values` are for the reader alone."""
        learned = cls(
            Truncation(**saved["truncation"]), saved["relaxation"], width_nats=saved["width_nats"],
            greedy_ends=saved["greedy_ends"], **saved["start"],
        )  # fmt: skip
        with torch.no_grad():
            for name, raw in learned.raw.items():
                raw.fill_(saved["raw"][name])
        return learned
