"""How far gradients have to reach: truncated, discounted and iterated cotangents against the exact ones.

One rollout of a recipe's policy, the gradient of its trainable parameters by every setting, cosine and relative error
against the sequential method. The adapters are drawn away from their zero start, so that all of their parts count.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from softrl.estimators.pathwise import pathwise_estimate, surrogate
from softrl.estimators.system import AdjointSettings
from softrl.models.policy import evaluation_mode
from softrl.rollouts.soft import soft_rollout
from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import make_relaxation

if TYPE_CHECKING:
    from softrl.trainers import SoftRolloutTrainer

SETTINGS = {
    "exact": AdjointSettings("sequential"),
    "hops 0": AdjointSettings(hops=0),
    "hops 1": AdjointSettings(hops=1),
    "hops 2": AdjointSettings(hops=2),
    "hops 4": AdjointSettings(hops=4),
    "tol 1e-2": AdjointSettings(tol=1e-2),
    "discount 0.5": AdjointSettings("sequential", feedback_discount=0.5),
}


@dataclass(frozen=True)
class Row:
    """One setting on one rollout; `first_adjoint` is the root mean square of ‖λ_1‖ over sequences."""

    relaxation: str
    setting: str
    sweeps: float
    cosine: float
    relative_error: float
    norm: float
    first_adjoint: float
    seconds: float


def compare(trainer: "SoftRolloutTrainer", relaxation_name: str, num_prompts: int, num_steps: int) -> list[Row]:
    """Gradients of one rollout under every setting, printed as they come."""
    evaluation_mode(trainer.model)
    draw_adapters(trainer.model)
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    batch = trainer.prompt_batch([trainer.train_dataset[row] for row in range(num_prompts)], num_samples=1)
    relaxation = make_relaxation(relaxation_name, trainer.relaxation.truncation)
    random = SequenceRandom.keyed(0, 0, batch.indices, 1)
    rollout = soft_rollout(trainer.policy, batch.prompts, relaxation, random, num_steps, eos_ids=trainer.eos_ids)
    rows: list[Row] = []
    exact: torch.Tensor | None = None
    for setting, settings in SETTINGS.items():
        started = time.perf_counter()
        estimate = pathwise_estimate(
            trainer.policy, rollout, relaxation, trainer.rewards, trainer.terms, settings, batch.columns
        )
        seconds = time.perf_counter() - started
        value = surrogate(trainer.policy, relaxation, estimate, trainer.terms, settings).value.mean()
        gradient = torch.cat([grad.double().flatten() for grad in torch.autograd.grad(value, parameters)])
        exact = gradient if exact is None else exact
        rows.append(
            Row(
                relaxation_name,
                setting,
                estimate.cotangents.sweeps,
                torch.cosine_similarity(gradient, exact, 0).item(),
                ((gradient - exact).norm() / exact.norm()).item(),
                gradient.norm().item(),
                estimate.cotangents.norm_by_position()[0].item(),
                seconds,
            )
        )
        row = rows[-1]
        print(
            f"{row.relaxation:>16} {row.setting:>13} {row.sweeps:>6.1f} {row.cosine:>8.4f} "
            f"{row.relative_error:>11.4f} {row.norm:>9.4g} {row.first_adjoint:>9.4g} {row.seconds:>8.1f}",
            flush=True,
        )
    return rows


def draw_adapters(model: torch.nn.Module) -> None:
    """LoRA's second matrices start at zero, where the first ones have no gradient; draw them, the same every time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.01, generator=generator)


def header() -> str:
    """Column names of the printed rows."""
    columns = f"{'relaxation':>16} {'setting':>13} {'sweeps':>6} {'cosine':>8} {'rel. error':>11} {'norm':>9}"
    return f"{columns} {'|λ_1|':>9} {'seconds':>8}"
