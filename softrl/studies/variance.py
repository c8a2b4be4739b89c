"""`softrl variance`: bias, variance and price of gradient estimators at fixed parameters, from a recipe to a table.

Every estimator of a problem is drawn many times on the same samples; finished draws are kept in the output folder, so
that an interrupted run goes on where it stopped. The figures and the page are made by `variance_report`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from softrl.assets import write_atomically
from softrl.estimators.moments import Interval, Moments, Truth, moments
from softrl.estimators.score_function import RLOO
from softrl.studies.draws import Draws
from softrl.studies.lab_problems import LabProblem, MakeTrainer, make_problems
from softrl.studies.methods import Method
from softrl.studies.variance_config import ProblemSpec, VarianceConfig, expanded

_CHUNKS = 8  # how often the draws of one estimator are saved on the way
REFERENCE = "rloo"  # the estimator whose cost is the unit of budgets, where a problem has it


@dataclass(frozen=True)
class Row:
    """One estimator on one problem, for one group of parameters or "all"; errors over ‖∇J‖²."""

    problem: str
    estimator: str
    unbiased_for: str
    group: str
    draws: int
    bias2: float
    bias2_low: float
    bias2_high: float
    variance: float
    variance_low: float
    variance_high: float
    mse: float
    mse_low: float
    mse_high: float
    scaled_mse: float
    scaled_mse_low: float
    scaled_mse_high: float
    snr: float
    snr_low: float
    snr_high: float
    cosine: float
    cosine_low: float
    cosine_high: float
    mean_cosine: float
    bias_z: float
    truth_noise: float
    reward_calls: float
    seconds: float
    mse_at_equal_calls: float
    mse_at_equal_seconds: float
    settings: str


def run(config: VarianceConfig, make_trainer: MakeTrainer) -> tuple[list[Row], dict[str, str]]:
    """All rows of a study and the problems' descriptions; finished draws are taken from the output folder."""
    rows: list[Row] = []
    descriptions: dict[str, str] = {}
    folder = Path(config.output_dir) / "draws"
    for spec in config.problems:
        for settings, problem in make_problems(spec, config.seed, make_trainer):
            descriptions[problem.name] = problem.description
            methods = _methods(spec)
            store = Store(folder, {"kind": spec.kind, "settings": settings})
            rows += _of_problem(problem, methods, spec.draws or config.draws, store, settings)
    return rows, descriptions


def _methods(spec: ProblemSpec) -> list[Method]:
    """One of every estimator of an entry; ValueError where two have one label."""
    every = [each for given in spec.estimators for each in (expanded(given) if isinstance(given, dict) else [given])]
    methods = [Method.parsed(each) for each in every]
    labels = [method.label for method in methods]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(
            f"problem {spec.name!r}, estimators: {twice} come more than once; give them labels that differ"
        )
    return methods


@dataclass(frozen=True)
class Store:
    """Draws on disk, by problem and estimator; a file whose settings differ has another name."""

    folder: Path
    problem: dict[str, Any]

    def path(self, method: Method | str) -> Path:
        """Where the draws of an estimator lie, or those of the truth."""
        named = method if isinstance(method, str) else {"name": method.name, "settings": method.settings}
        text = json.dumps({"problem": self.problem, "estimator": named}, sort_keys=True, default=str)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.pt"

    def load(self, method: Method | str) -> Any:
        """What was saved, or None."""
        path = self.path(method)
        return torch.load(path, weights_only=True) if path.is_file() else None

    def save(self, method: Method | str, value: Any) -> None:
        """Whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(self.path(method)) as temporary:
            torch.save(value, temporary)


def _of_problem(
    problem: LabProblem, methods: list[Method], count: int, store: Store, settings: dict[str, Any]
) -> list[Row]:
    truth = _truth(problem, store)
    drawn: list[tuple[Method, str, Draws]] = []
    for method in methods:
        estimator = problem.make(method)
        draws = _drawn(problem, estimator, method, count, store)
        drawn.append((method, estimator.unbiased_for or "none", draws))
        print(f"{problem.name}: {method.label}, {count} draws, {draws.seconds:.3g} s each", flush=True)
    unit = next((draws for method, _, draws in drawn if method.name == REFERENCE), drawn[0][2])
    rows = []
    for method, unbiased_for, draws in drawn:
        for group, where in {"all": slice(None), **problem.groups}.items():
            part = truth.part(where)
            measured = moments(draws.gradients[:, where], part)
            rows.append(_row(problem.name, method, unbiased_for, group, measured, part, draws, unit, settings))
    return rows


def _truth(problem: LabProblem, store: Store) -> Truth:
    """Exact, or from draws that are kept as all others are."""
    run = problem.long_run()
    if run is not None:
        longer, count = run
        print(f"{problem.name}: the true gradient, from {count} draws of RLOO ...", flush=True)
        return Truth.from_draws(_drawn(longer, RLOO, Method("truth", {}, "truth"), count, store).gradients)
    saved = store.load("truth")
    if saved is None:
        print(f"{problem.name}: the true gradient ...", flush=True)
        truth = problem.truth()
        store.save("truth", vars(truth))
        return truth
    return Truth(**saved)


def _drawn(problem: LabProblem, estimator: Any, method: Method, count: int, store: Store) -> Draws:
    """`count` draws, those on disk first."""
    saved = store.load(method) or {"gradients": torch.zeros(0), "reward_calls": 0.0, "seconds": []}
    have, seconds = len(saved["gradients"]), saved["seconds"]
    gradients = [saved["gradients"].double()] if have else []
    calls = saved["reward_calls"]
    chunk = problem.batch * -(-count // (_CHUNKS * problem.batch))
    with tqdm(total=count, initial=min(have, count), desc=method.label, unit="draw", leave=False, disable=None) as bar:
        while have < count:
            size = min(chunk, count - have)
            more = problem.draws(estimator, have, size)
            gradients.append(more.gradients)
            seconds = [*seconds, more.seconds]
            calls, have = more.reward_calls, have + size
            stacked = torch.cat(gradients)
            store.save(method, {"gradients": stacked.float() if stacked.numel() > 2**22 else stacked,
                                "reward_calls": calls, "seconds": seconds})  # fmt: skip
            bar.update(size)
    # The median: the first chunk warms up, and on a shared machine some other job slows one or two down.
    return Draws(torch.cat(gradients)[:count], calls, median(seconds))


def _row(
    problem: str,
    method: Method,
    unbiased_for: str,
    group: str,
    measured: Moments,
    truth: Truth,
    draws: Draws,
    unit: Draws,
    settings: dict[str, Any],
) -> Row:
    def spread(name: str, interval: Interval) -> dict[str, float]:
        return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}

    bias2, variance = measured.bias2.value, measured.variance.value
    return Row(
        problem=problem, estimator=method.label, unbiased_for=unbiased_for, group=group, draws=measured.draws,
        **spread("bias2", measured.bias2), **spread("variance", measured.variance), **spread("mse", measured.mse),
        **spread("scaled_mse", measured.scaled_mse),
        **spread("snr", measured.snr), **spread("cosine", measured.cosine),
        mean_cosine=measured.mean_cosine, bias_z=measured.bias_z, truth_noise=truth.variance / truth.squared_norm,
        reward_calls=draws.reward_calls, seconds=draws.seconds,
        mse_at_equal_calls=bias2 + variance * draws.reward_calls / unit.reward_calls,
        mse_at_equal_seconds=bias2 + variance * draws.seconds / unit.seconds,
        settings=json.dumps({"problem": settings, "estimator": asdict(method)}, default=str),
    )  # fmt: skip
