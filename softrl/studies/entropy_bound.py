"""What an entropy bound on soft tokens buys and costs: coherence against vanishing gradients, as a figure.

A tight bound makes soft tokens nearly one-hot: the policy reads what it was trained on, and ∂p/∂z vanishes. A loose
one lets the feedback explode. For every bound, on the same prompts: how likely the base model finds the hard tokens,
how far the fed embeddings are from those of tokens, what is left of the gradient, and what solving for it costs.
Left out: training at each bound; more than one rollout a bound.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from softrl.assets import write_atomically
from softrl.estimators.pathwise import Estimate, pathwise_estimate, surrogate
from softrl.estimators.system import AdjointSettings
from softrl.masking import per_sequence_mean, token_mean
from softrl.models.policy import Policy, chunk_length, evaluating, evaluation_mode
from softrl.objectives.token_terms import DirectTerms, token_outputs
from softrl.rewards.base import Reward
from softrl.rollouts.soft import soft_rollout
from softrl.studies.hops import draw_adapters
from softrl.studies.tables import write_csv
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import Relaxation, make_relaxation
from softrl.types import HardRollout, Prompts, Rollout

if TYPE_CHECKING:
    from softrl.trainers import SoftRolloutTrainer

BOUNDS_NATS: tuple[float | None, ...] = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, None)
SOLVED = AdjointSettings(tol=1e-2)
TWO_HOPS = AdjointSettings(hops=2)


@dataclass(frozen=True)
class Row:
    """One bound on one rollout; None is no bound. Means are over real tokens.

    `base_nll_nats` is of the hard tokens after hard tokens, at temperature 1, with its standard error over sequences;
    `nearest_distance` is ‖e − w‖ / ‖w‖ for the kept token embedding w nearest to the fed e; `jacobian_norm` the
    Frobenius norm of ∂p/∂z; `cosine_two_hops` compares two feedback edges with the exact gradient; `adjoint_norms`
    are ‖λ_t‖ by position of the exact cotangents; seconds and sweeps those of `parallel` to tol 1e-2.
    """

    relaxation: str
    max_entropy_nats: float | None
    top_k: int
    entropy_nats: float
    base_nll_nats: float
    base_nll_se: float
    nearest_distance: float
    jacobian_norm: float
    gradient_norm: float
    cosine_two_hops: float
    sweeps: float
    solve_seconds: float
    replay_seconds: float
    adjoint_norms: tuple[float, ...]


def measure(
    policy: Policy,
    base: Policy,
    relaxation: Relaxation,
    prompts: Prompts,
    reward: Reward,
    terms: DirectTerms,
    num_steps: int,
    eos_ids: tuple[int, ...] = (),
    seed: int = 0,
    exact: AdjointSettings | None = None,
    columns: dict[str, Sequence] | None = None,
) -> Row:
    """One rollout of one relaxation, and everything that is said about it.

    Args:
        policy: the model; its trainable parameters are those whose gradient is measured.
        base: scores the hard tokens.
        relaxation: with its entropy bound, or without.
        prompts: one sequence each.
        reward, terms: the objective.
        num_steps: T.
        eos_ids: where a sequence ends.
        seed: of the noise; the same one gives every bound the same noise.
        exact: how the gradient that counts as exact is solved for; default: the sequential method.
        columns: data-set columns handed to the reward.
    Raises:
        ValueError: no parameter of the policy is trainable.
    """
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("policy: no parameter requires a gradient, so there is none to measure; add an adapter")
    settings = AdjointSettings("sequential") if exact is None else exact
    random = SequenceRandom.keyed(seed, 0, list(range(len(prompts.ids))), 1)
    rollout = soft_rollout(policy, prompts, relaxation, random, num_steps, eos_ids=eos_ids)

    def estimated(settings: AdjointSettings) -> Estimate:
        return pathwise_estimate(policy, rollout, relaxation, reward, terms, settings, columns or {})

    def gradient(estimate: Estimate, settings: AdjointSettings) -> Float[Tensor, "P"]:
        value = surrogate(policy, relaxation, estimate, terms, settings).value.mean()
        grads = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([grad.double().flatten() for grad in grads])

    reference = estimated(settings)
    true_gradient = gradient(reference, settings)
    truncated_gradient = gradient(estimated(TWO_HOPS), TWO_HOPS)
    started = time.perf_counter()
    solved = estimated(SOLVED)
    solved_at = time.perf_counter()
    gradient(solved, SOLVED)
    replayed_at = time.perf_counter()
    nll = hard_nll(base, rollout)
    return Row(
        relaxation=relaxation.name,
        max_entropy_nats=relaxation.max_entropy_nats,
        top_k=relaxation.truncation.top_k,
        entropy_nats=token_mean(torch.special.entr(rollout.weights).sum(-1), rollout.mask).item(),
        base_nll_nats=token_mean(nll, rollout.mask).item(),
        base_nll_se=_standard_error(per_sequence_mean(nll, rollout.mask)),
        nearest_distance=token_mean(nearest_distance(policy, rollout), rollout.mask).item(),
        jacobian_norm=token_mean(jacobian_norm(policy, rollout, relaxation, reference.embeds), rollout.mask).item(),
        gradient_norm=true_gradient.norm().item(),
        cosine_two_hops=torch.cosine_similarity(truncated_gradient, true_gradient, 0).item(),
        sweeps=solved.cotangents.sweeps,
        solve_seconds=solved_at - started,
        replay_seconds=replayed_at - solved_at,
        adjoint_norms=tuple(reference.cotangents.norm_by_position().tolist()),
    )


@torch.no_grad()
def hard_nll(base: Policy, rollout: Rollout | HardRollout) -> Float[Tensor, "N T"]:
    """NLL in nats of the rollout's hard tokens under the base model, which reads hard tokens too, at temperature 1."""
    scorer = base.at_temperature(1.0)
    with evaluating(scorer.model):
        hidden = scorer.hidden(rollout.prompts, scorer.embed(rollout.tokens))
        outputs = token_outputs(scorer, hidden, rollout.tokens[..., None])
    return outputs.log_normalizer - outputs.kept_logits.squeeze(-1)


@torch.no_grad()
def nearest_distance(policy: Policy, rollout: Rollout) -> Float[Tensor, "N T"]:
    """`min_k ‖E(q) − w_k‖ / ‖w_k*‖` over the kept ids of each step, k* the nearest; 0 for one-hot tokens."""
    ids, fed = rollout.support.ids.flatten(0, 1), rollout.fed.flatten(0, 1)
    embeds = policy.embed_soft(ids, fed)
    pieces = []
    size = chunk_length(ids.shape[-1] * embeds.shape[-1])
    for start in range(0, len(ids), size):
        vectors = policy.embed(ids[start : start + size])
        distances, nearest = (embeds[start : start + size, None] - vectors).norm(dim=-1).min(-1)
        norms = vectors.norm(dim=-1).gather(-1, nearest[:, None]).squeeze(-1)
        pieces.append(distances / norms)
    return torch.cat(pieces).view(rollout.mask.shape)


def jacobian_norm(
    policy: Policy, rollout: Rollout, relaxation: Relaxation, embeds: Float[Tensor, "N T D"]
) -> Float[Tensor, "N T"]:
    """`‖∂p_t/∂z_t‖_F`, z the kept logits at the sampling temperature; the bound's own derivative included."""
    with torch.no_grad(), evaluating(policy.model):
        hidden = policy.hidden(rollout.prompts, embeds).flatten(0, 1)
    support = rollout.support.flat()
    num_kept = support.ids.shape[-1]
    pieces = []
    size = chunk_length(num_kept * num_kept)
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        with torch.no_grad():
            logits = policy.kept_logits(hidden[rows], support.ids[rows])
        # A copy of each position's logits for each of its weights, so that one backward pass gives all of ∂p/∂z.
        copies = support.at(rows).mapped(lambda value: value.repeat_interleave(num_kept, 0))
        with torch.enable_grad():
            leaf = logits.repeat_interleave(num_kept, 0).requires_grad_()
            weights = relaxation.weights(leaf, copies)
        each_weight = torch.eye(num_kept, dtype=weights.dtype, device=weights.device).repeat(len(logits), 1)
        (jacobian,) = torch.autograd.grad(weights, leaf, each_weight)
        pieces.append(jacobian.view(len(logits), -1).norm(dim=-1))
    return torch.cat(pieces).view(rollout.mask.shape)


def _standard_error(values: Float[Tensor, "N"]) -> float:
    return values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")


def run(
    trainer: "SoftRolloutTrainer",
    relaxations: Sequence[str],
    bounds_nats: Sequence[float | None],
    num_prompts: int,
    num_steps: int,
    output: Path,
    figure: Path,
) -> list[Row]:
    """Measure every bound with every relaxation; prints a table as it goes, writes a CSV and a figure.

    Args:
        trainer: gives policy, base model, reward and prompts; its adapters are drawn away from zero.
        relaxations: names of mixtures.
        bounds_nats: entropy bounds, None for none; those of log K or more would be none, and are left out.
        num_prompts, num_steps: N and T.
        output, figure: where CSV and PNG go.
    Raises:
        ValueError: the trainer has no reference model, which is the base here.
    """
    if trainer.reference is None:
        raise ValueError("the trainer has no reference model to score the tokens with; use adapters, or beta > 0")
    evaluation_mode(trainer.model)
    draw_adapters(trainer.model)
    truncation = trainer.relaxation.truncation
    batch = trainer.prompt_batch([trainer.train_dataset[row] for row in range(num_prompts)], num_samples=1)
    bounds = [bound for bound in bounds_nats if bound is None or bound < math.log(truncation.top_k)]
    grid = [(name, bound) for name in relaxations for bound in bounds]
    rows: list[Row] = []
    print(header())
    for name, bound in tqdm(grid, desc="entropy bounds"):
        relaxation = make_relaxation(name, truncation, max_entropy_nats=bound)
        row = measure(
            trainer.policy, trainer.reference, relaxation, batch.prompts, trainer.rewards, trainer.terms, num_steps,
            trainer.eos_ids, columns=batch.columns,
        )  # fmt: skip
        rows.append(row)
        tqdm.write(line(row))
    write_csv(rows, output)
    plot(rows, figure)
    return rows


def header() -> str:
    """Column names of the printed rows."""
    left = f"{'relaxation':>15} {'H_max':>6} {'H':>6} {'base NLL':>15} {'distance':>9} {'|dp/dz|':>9} {'|grad|':>9}"
    return f"{left} {'cos 2 hops':>10} {'|λ_1|':>9} {'sweeps':>6} {'solve s':>8} {'replay s':>8}"


def line(row: Row) -> str:
    """One printed row."""
    bound = "none" if row.max_entropy_nats is None else f"{row.max_entropy_nats:g}"
    return (
        f"{row.relaxation:>15} {bound:>6} {row.entropy_nats:>6.3f} "
        f"{row.base_nll_nats:>7.3f} ± {row.base_nll_se:>5.3f} "
        f"{row.nearest_distance:>9.4f} {row.jacobian_norm:>9.3g} {row.gradient_norm:>9.3g} "
        f"{row.cosine_two_hops:>10.4f} {row.adjoint_norms[0]:>9.3g} {row.sweeps:>6.1f} {row.solve_seconds:>8.1f} "
        f"{row.replay_seconds:>8.1f}"
    )


def plot(rows: list[Row], path: Path) -> None:
    """Coherence and gradient against the bound, and ‖λ_t‖ by position with one curve a bound, as a PNG.

    A rollout without a bound stands at log K, where a bound ceases to be one.
    """
    names = list(dict.fromkeys(row.relaxation for row in rows))
    figure, axes = _panels(2 + len(names))
    coherence, gradient, *by_position = axes
    for name in names:
        of_name = sorted((row for row in rows if row.relaxation == name), key=_position)
        bounds = [_position(row) for row in of_name]
        errors = [row.base_nll_se for row in of_name]
        coherence.errorbar(bounds, [row.base_nll_nats for row in of_name], errors, marker="o", label=name)
        (drawn,) = gradient.plot(bounds, [row.gradient_norm for row in of_name], marker="o", label=f"{name}: ‖dJ/dθ‖")
        jacobians = [row.jacobian_norm for row in of_name]
        gradient.plot(bounds, jacobians, linestyle="--", color=drawn.get_color(), label=f"{name}: ‖∂p/∂z‖")
    _label(coherence, "NLL of the hard tokens under the base model", _BOUND_LABEL, "nats a token")
    _label(gradient, "gradient of the parameters, Jacobian of the weights", _BOUND_LABEL, "norm")
    for axis in (coherence, gradient):
        axis.set_xscale("log")
    gradient.set_yscale("log")
    for axis, name in zip(by_position, names, strict=True):
        of_name = sorted((row for row in rows if row.relaxation == name), key=_position)
        curves = [
            (
                "none" if row.max_entropy_nats is None else f"{row.max_entropy_nats:g} nats",
                dict(enumerate(row.adjoint_norms)),
            )
            for row in of_name
        ]
        _draw_norms(axis, curves, f"‖λ_t‖ by position, {name}")
    _save(figure, path)


def plot_adjoint(norms_by_step: list[tuple[int, dict[int, float]]], path: Path) -> None:
    """‖λ_t‖ by position, one curve a logged training step, as a PNG.

    Args:
        norms_by_step: training steps with their norms by position, which counts from 0.
        path: where the PNG goes.
    """
    figure, (axis,) = _panels(1)
    _draw_norms(axis, [(f"step {step}", norms) for step, norms in norms_by_step], "‖λ_t‖ by position")
    _save(figure, path)


_BOUND_LABEL = "entropy bound, nats (rightmost: none, at log K)"
_MAX_LEGEND = 12


def _position(row: Row) -> float:
    return math.log(row.top_k) if row.max_entropy_nats is None else row.max_entropy_nats


def _panels(count: int) -> tuple[Any, list[Any]]:
    """A figure with that many panels, two a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    num_columns = min(count, 2)
    num_rows = math.ceil(count / num_columns)
    size = (5.0 * num_columns + 1.0, 3.25 * num_rows + 0.25)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, layout="constrained", squeeze=False)
    for unused in axes.flat[count:]:
        unused.remove()
    return figure, list(axes.flat[:count])


def _draw_norms(axis: Any, curves: Sequence[tuple[str, dict[int, float]]], title: str) -> None:
    """Norms by position on a log scale, dark to light in the order given; zeros (the last step's) are left out."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    for index, (label, norms) in enumerate(curves):
        positive = [(position + 1, norm) for position, norm in sorted(norms.items()) if norm > 0.0]
        steps, heights = zip(*positive, strict=True) if positive else ((), ())
        labelled = len(curves) <= _MAX_LEGEND or index in (0, len(curves) - 1)
        colour = colours(index / max(len(curves), 1))
        axis.plot(steps, heights, color=colour, label=label if labelled else None)
    axis.set_yscale("log")
    _label(axis, title, "position t", "root mean square over sequences")


def _label(axis: Any, title: str, across: str, up: str) -> None:
    axis.set_title(title)
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
