"""Single-step problems of the variance laboratory: one categorical with polynomial rewards, and ReinMax's polynomial
programming on 128 binary latents. Their true gradients are exact.

All estimators are given the same samples at the same draw index, so differences between them are less noisy than
each one's own error. Left out: bias, variance and their errors, which the laboratory makes of `Draws`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.estimators.exact import all_sequences
from softrl.estimators.single_step import (
    Relax,
    RewardFunction,
    SingleStepEstimator,
    make_single_step,
    one_hots,
)
from softrl.studies.draws import Draws
from softrl.tokens.noise import sequence_seed

KINDS = ("linear", "quadratic", "cubic")
POWERS = (1.5, 2.0, 3.0)
TARGET = 0.45  # of polynomial programming
NUMBERS_AT_ONCE = 2**20  # of the arrays that a reward is called on: bounds memory, and changes no result


def exact_objective(logits: Float[Tensor, "L V"], reward: RewardFunction) -> Float[Tensor, ""]:
    """`Σ_x π(x) f(x)` over all V^L samples, differentiable in the logits.

    Raises:
        ValueError: more than a million samples.
    """
    sampled, probs = _all_samples(logits)
    return (probs * reward(sampled[:, 0])).sum()


def _all_samples(logits: Float[Tensor, "L V"]) -> tuple[Float[Tensor, "M 1 L V"], Float[Tensor, "M"]]:
    """Every X once, and its probability."""
    tokens, _ = all_sequences(logits.shape[1], logits.shape[0])
    sampled = one_hots(tokens[:, None], logits)
    return sampled, (sampled[:, 0] * logits.log_softmax(-1)).sum((-1, -2)).exp()


def expectation_over_categories(
    estimator: SingleStepEstimator, logits: Float[Tensor, "L V"], reward: RewardFunction
) -> Float[Tensor, "L V"]:
    """The exact mean of an estimator, by enumeration of all V^L samples.

    Raises:
        ValueError: an estimator that depends on more than one sampled X, or more than a million samples.
    """
    if not estimator.noise_free:
        raise ValueError(f"{estimator} depends on other noise than one sampled X, so enumeration gives no mean")
    sampled, probs = _all_samples(logits.detach())
    estimates = replace(estimator, num_samples=1).gradients(
        logits, reward, 0, range(len(sampled)), tokens=sampled.argmax(-1)
    )
    return (probs[:, None, None] * estimates).sum(0)


def separable_objective(logits: Float[Tensor, "L V"], of_value: Callable[[Tensor], Tensor]) -> Float[Tensor, ""]:
    """`mean_l Σ_v π_l(v) h(v)` of binary latents with reward `mean_l h(x_l)`, differentiable in the logits."""
    values = of_value(torch.tensor([0.0, 1.0], dtype=logits.dtype))
    return (logits.softmax(-1) * values).sum(-1).mean()


@dataclass(frozen=True, eq=False)
class OneStepProblem:
    """What the laboratory needs of a problem: parameter groups, the truth, and draws of any estimator.

    Args:
        logits: the parameters θ at which everything is measured, float64, nats.
        reward: f of [..., L, V].
        objective: J of logits, exact and differentiable.
        seed: of all draws.
    """

    name: str
    description: str
    logits: Float[Tensor, "L V"]
    reward: RewardFunction
    objective: Callable[[Tensor], Tensor]
    seed: int = 0

    @property
    def groups(self) -> dict[str, slice]:
        """Parameter groups in the flattened gradient."""
        return {"logits": slice(0, self.logits.numel())}

    def truth(self) -> Float[Tensor, "P"]:
        """∂J/∂θ, exact, float64."""
        leaf = self.logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.objective(leaf), leaf)
        return gradient.flatten()

    def estimator(self, name: str, settings: dict[str, Any] | None = None) -> SingleStepEstimator:
        """The estimator of that name, fitted to this problem where it has something to fit (once, then remembered)."""
        return _fitted(self, name, tuple(sorted((settings or {}).items())))

    def draw(self, estimator_name: str, settings: dict[str, Any], first: int, count: int) -> Draws:
        """Draws `first .. first + count − 1`; draw k has the same numbers (to rounding) however they are asked for.

        Args:
            estimator_name: in `SINGLE_STEP_ESTIMATORS`.
            settings: fields of that estimator, for instance temperature, num_samples (G), num_draws (S), scale.
        Raises:
            ValueError: a count below one, an unknown estimator, settings that it does not have.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        estimator = self.estimator(estimator_name, settings)
        cost = estimator.cost(*self.logits.shape)
        size = max(1, int(NUMBERS_AT_ONCE // (cost.reward_calls * self.logits.numel())))
        started = time.perf_counter()
        parts = [
            estimator.gradients(self.logits, self.reward, self.seed, range(start, min(start + size, first + count)))
            for start in range(first, first + count, size)
        ]
        seconds = (time.perf_counter() - started) / count
        return Draws(torch.cat(parts).flatten(1), cost.reward_calls, seconds)

    def exact_mean(self, estimator_name: str, settings: dict[str, Any] | None = None) -> Float[Tensor, "P"]:
        """The estimator's mean by enumeration; see `expectation_over_categories` for when there is one."""
        return expectation_over_categories(
            self.estimator(estimator_name, settings), self.logits, self.reward
        ).flatten()


@lru_cache(maxsize=32)
def _fitted(problem: OneStepProblem, name: str, settings: tuple[tuple[str, Any], ...]) -> SingleStepEstimator:
    estimator = make_single_step(name, dict(settings))
    if isinstance(estimator, Relax):
        return estimator.fit(problem.logits, problem.reward, problem.seed)
    return estimator


def polynomial_reward(kind: str, num_categories: int, seed: int = 0) -> RewardFunction:
    """A polynomial of that degree in the relaxed vector of one latent, f([..., 1, V]).

    linear: `u·q`; quadratic: `u·q + qᵀAq`; cubic: `u·q + qᵀAq + (w·q)² (u·q)`; u, w, A standard normal.
    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    generator = torch.Generator().manual_seed(sequence_seed(seed, num_categories))
    numbers = torch.randn(num_categories + 2, num_categories, generator=generator, dtype=torch.float64)
    u, w, matrix = numbers[0], numbers[1], numbers[2:]

    def reward(q: Float[Tensor, "*batch 1 V"]) -> Float[Tensor, "*batch"]:
        single = q.squeeze(-2)
        linear = (single * u).sum(-1)
        if kind == "linear":
            return linear
        quadratic = ((single[..., None] * matrix).sum(-2) * single).sum(-1)
        cubic = (single * w).sum(-1).square() * linear if kind == "cubic" else 0.0
        return linear + quadratic + cubic

    return reward


def categorical(kind: str, num_categories: int = 6, seed: int = 0) -> OneStepProblem:
    """One latent with fixed standard normal logits and a reward of that kind, see `polynomial_reward`."""
    reward = polynomial_reward(kind, num_categories, seed)
    generator = torch.Generator().manual_seed(sequence_seed(seed, num_categories, 1))
    logits = torch.randn(1, num_categories, generator=generator, dtype=torch.float64)
    return OneStepProblem(
        f"categorical_{kind}",
        f"one categorical of {num_categories} values, reward {kind} in the relaxed vector",
        logits,
        reward,
        partial(exact_objective, reward=reward),
        seed,
    )


def polynomial_programming(power: float, num_latents: int = 128, seed: int = 0) -> OneStepProblem:
    """Binary latents x_l, reward `−mean_l |x_l − 0.45|^p`, x_l the weight on value 1; logits N(0, 1/4).

    The optimum is x = 0, where the loss is 0.45^p. Source: Liu et al. (2023), arXiv:2304.08612, after
    Tucker et al. (2017), arXiv:1703.07370 (p = 2).
    Raises:
        ValueError: a power that is not above 1, below which the reward has no derivative at 0.45.
    """
    if not power > 1.0:
        raise ValueError(f"power must be above 1, got {power}")

    def of_value(x: Tensor) -> Tensor:
        return -(x - TARGET).abs().pow(power)

    def reward(q: Float[Tensor, "*batch L 2"]) -> Float[Tensor, "*batch"]:
        return of_value(q[..., 1]).mean(-1)

    generator = torch.Generator().manual_seed(sequence_seed(seed, num_latents))
    logits = 0.5 * torch.randn(num_latents, 2, generator=generator, dtype=torch.float64)
    return OneStepProblem(
        f"polynomial_{power:g}",
        f"{num_latents} binary latents, reward -mean |x - {TARGET}|^{power:g}",
        logits,
        reward,
        partial(separable_objective, of_value=of_value),
        seed,
    )


ONE_STEP_PROBLEMS: dict[str, Callable[[], OneStepProblem]] = {
    **{f"categorical_{kind}": partial(categorical, kind) for kind in KINDS},
    **{f"polynomial_{power:g}": partial(polynomial_programming, power) for power in POWERS},
}


def optimal_loss(power: float) -> float:
    """The least expected loss of polynomial programming, at x = 0."""
    return TARGET**power


def optimise(
    estimator_name: str,
    power: float,
    num_steps: int,
    settings: dict[str, Any] | None = None,
    learning_rate: float = 0.1,
    num_latents: int = 128,
    seed: int = 0,
) -> Float[Tensor, "steps"]:
    """Train the logits of polynomial programming with Adam, one draw of the estimator a step.

    Starts from the problem's own logits. RELAX keeps the surrogate that was fitted there.
    Args:
        num_steps: steps of Adam; step k uses draw k.
        settings: of the estimator; the laboratory's comparisons are at equal num_samples.
    Returns:
        The expected loss −J before the first step and after each, exact, shape (num_steps + 1,).
    """
    problem = polynomial_programming(power, num_latents, seed)
    estimator = problem.estimator(estimator_name, settings)
    logits = problem.logits.clone()
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    losses = [-problem.objective(logits)]
    for step in range(num_steps):
        logits.grad = -estimator.gradients(logits, problem.reward, seed, [step])[0]
        optimizer.step()
        losses.append(-problem.objective(logits))
    return torch.stack(losses)


def optimisation_table(
    estimator_names: Sequence[str], num_steps: int, powers: Sequence[float] = POWERS, **arguments: Any
) -> list[dict[str, Any]]:
    """Final expected loss minus the optimum, a row an estimator, a column a power; further arguments to `optimise`."""
    return [
        {"estimator": name}
        | {
            f"p={power:g}": (optimise(name, power, num_steps, **arguments)[-1] - optimal_loss(power)).item()
            for power in powers
        }
        for name in estimator_names
    ]
