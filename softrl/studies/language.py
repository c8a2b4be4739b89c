"""Draws of gradient estimates of one language model at fixed parameters, every method on the same samples.

One draw is one whole estimate: B prompts with G samples each. Methods that read sampled tokens, and those that feed
one-hot tokens, are given the same tokens of every draw; mixtures are rolled out with the same noise. Gradients of
small models are kept whole, those of large ones as count sketches, one a parameter group.
"""

import time
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softrl.estimators.adjoint import chosen_method
from softrl.estimators.base import Estimator, Problem
from softrl.estimators.exact import exact_objective
from softrl.estimators.moments import Truth
from softrl.estimators.pathwise import Pathwise
from softrl.estimators.score_function import RLOO
from softrl.estimators.sketch import CountSketch
from softrl.estimators.system import ForwardPass
from softrl.models.policy import evaluating
from softrl.rewards.base import checked_hard, checked_soft
from softrl.rollouts.given import rollout_of
from softrl.rollouts.hard import hard_rollout
from softrl.rollouts.soft import soft_rollout
from softrl.studies.draws import Draws, consecutive, whole_gradients
from softrl.tokens.noise import SequenceRandom, sequence_seed
from softrl.types import HardRollout, Prompts, Rollout

TRUTH_SEED = 1_000_003  # of the long run that stands for the truth: other samples than any draw
PILOT_SEED = 2_000_003  # of what is fitted before the draws: baselines, values, combination weights
POSTERIOR_SEED = 3_000_017  # of the noise that straight-through methods draw afterwards

_GROUPS = (("embedding", ("embed", "wte", "wpe", "lm_head")), ("attention", ("attn", "attention")), ("mlp", ("mlp",)))


def parameter_group(name: str) -> str:
    """ "embedding", "attention", "mlp" or "other", by a parameter's name."""
    return next((group for group, parts in _GROUPS if any(part in name for part in parts)), "other")


@dataclass(frozen=True)
class Sampled:
    """A draw's tokens, their rewards, and what sampling them took."""

    rollout: HardRollout
    rewards: Float[Tensor, "N"]
    seconds: float


@dataclass
class LanguageProblem:
    """A policy at fixed parameters, prompts, and `J = R + ΣF`.

    Args:
        name, description: for tables and reports.
        problem: what is maximised; its columns hold one entry a prompt.
        prompts: B rows.
        num_steps: T.
        eos_ids: a sequence ends at the first of these.
        seed: of all draws.
        batch: draws that share one forward pass; more than one pays for tiny models only.
        sketched: keep sketches instead of whole gradients.
        truth_draws: how many RLOO draws stand for the truth; None enumerates all sequences.
        truth_samples: G of these draws: many samples at once cost less than many draws.
    """

    name: str
    description: str
    problem: Problem
    prompts: Prompts
    num_steps: int
    eos_ids: tuple[int, ...] = ()
    seed: int = 0
    batch: int = 16
    sketched: bool = False
    truth_draws: int | None = None
    truth_samples: int = 16

    def __post_init__(self) -> None:
        self._sampled: dict[tuple[int, int], Sampled] = {}
        self._sketch = CountSketch()

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters, group by group."""
        named = [(name, p) for name, p in self.problem.policy.model.named_parameters() if p.requires_grad]
        return dict(sorted(named, key=lambda item: parameter_group(item[0])))

    @cached_property
    def groups(self) -> dict[str, slice]:
        """Where each group of parameters lies in a gradient, or in its sketches."""
        sizes: dict[str, int] = {}
        for name, parameter in self.parameters.items():
            group = parameter_group(name)
            sizes[group] = self._sketch.size if self.sketched else sizes.get(group, 0) + parameter.numel()
        return consecutive(sizes)

    def truth(self) -> Truth:
        """∇J by enumeration, or the mean of a long RLOO run of other samples, with its error."""
        if self.truth_draws is not None:
            return Truth.from_draws(self.long_run().draws(RLOO, 0, self.truth_draws).gradients)
        with evaluating(self.problem.policy.model):
            values = [
                exact_objective(self._of_prompt(row), self._prompt(row), self.num_steps, self.eos_ids)
                for row in range(len(self.prompts.ids))
            ]
            (gradient,) = self._gradients(torch.stack(values).mean()[None])
        return Truth(gradient)

    def long_run(self) -> "LanguageProblem":
        """The problem whose first `truth_draws` RLOO draws stand for the truth: other samples, and more a prompt."""
        problem = replace(self.problem, num_samples=self.truth_samples)
        return replace(self, problem=problem, batch=1, seed=TRUTH_SEED)

    def _prompt(self, row: int) -> Prompts:
        return Prompts(self.prompts.ids[row : row + 1], self.prompts.mask[row : row + 1])

    def _of_prompt(self, row: int) -> Problem:
        columns = {key: values[row : row + 1] for key, values in self.problem.columns.items()}
        return replace(self.problem, columns=columns)

    def draws(self, estimator: Estimator, first: int, count: int, seed: int | None = None) -> Draws:
        """Estimates number `first` to `first + count - 1`; the same numbers whatever is drawn beside them.

        `seed` other than the problem's own gives other samples: for pilots and for the truth.
        """
        gradients, seconds = [], 0.0
        for start in range(first, first + count, self.batch):
            numbers = range(start, min(start + self.batch, first + count))
            piece, took = self._batch(estimator, numbers, self.seed if seed is None else seed)
            gradients.append(piece)
            seconds += took
        calls = estimator.cost.reward_calls * self.problem.num_samples * len(self.prompts.ids)
        return Draws(torch.cat(gradients), calls, seconds / count)

    def _batch(self, estimator: Estimator, numbers: range, seed: int) -> tuple[Float[Tensor, "D P"], float]:
        problem = self._repeated(len(numbers))
        rollout, rewards, seconds = self._rollout(problem, estimator, numbers, seed)
        with evaluating(problem.policy.model):
            started = time.perf_counter()
            if isinstance(estimator, Pathwise) and _shares_a_pass(estimator, problem, rollout):
                forward = ForwardPass.of(problem.policy, rollout)
                estimate = estimator.estimate(problem, rollout, rewards, forward)
                values = estimator.surrogate(problem, estimate, forward)
            else:
                values = estimator.surrogate(problem, estimator.estimate(problem, rollout, rewards))
            gradients = self._gradients(values.view(len(numbers), -1).mean(1))
            return gradients, seconds + time.perf_counter() - started

    def _repeated(self, count: int) -> Problem:
        """The problem of `count` draws side by side: columns with an entry a sequence."""
        times = self.problem.num_samples
        columns = {
            key: [value for value in values for _ in range(times)] * count
            for key, values in self.problem.columns.items()
        }
        return replace(self.problem, columns=columns)

    def random(self, numbers: range, seed: int) -> SequenceRandom:
        """The streams of some draws: keyed by draw, prompt and sample."""
        prompts, samples = range(len(self.prompts.ids)), range(self.problem.num_samples)
        keys = [(seed, number, prompt, sample) for number in numbers for prompt in prompts for sample in samples]
        return SequenceRandom([sequence_seed(*key) for key in keys])

    def _batched_prompts(self, count: int) -> Prompts:
        return Prompts(self.prompts.ids.repeat(count, 1), self.prompts.mask.repeat(count, 1))

    def sampled(self, numbers: range, seed: int) -> Sampled:
        """The tokens of some draws; kept, so that every method is given the same without sampling them again."""
        key = (seed, numbers.start)
        if key not in self._sampled or len(self._sampled[key].rewards) != len(numbers) * self._sequences:
            problem, started = self._repeated(len(numbers)), time.perf_counter()
            rollout = hard_rollout(
                problem.policy, self._batched_prompts(len(numbers)), problem.truncation, self.random(numbers, seed),
                self.num_steps, problem.num_samples, self.eos_ids,
            )  # fmt: skip
            with torch.no_grad():
                rewards = checked_hard(problem.reward, rollout.tokens, rollout.mask, **problem.columns)
            self._sampled[key] = Sampled(rollout, rewards, time.perf_counter() - started)
        return self._sampled[key]

    @property
    def _sequences(self) -> int:
        return self.problem.num_samples * len(self.prompts.ids)

    def _rollout(
        self, problem: Problem, estimator: Estimator, numbers: range, seed: int
    ) -> tuple[HardRollout | Rollout, Float[Tensor, "N"], float]:
        """What an estimator is given, the rewards of it, and the seconds that a run would spend on it."""
        relaxation = estimator.relaxation
        if relaxation is not None and not relaxation.feeds_one_hot:
            started = time.perf_counter()
            rollout = soft_rollout(
                problem.policy, self._batched_prompts(len(numbers)), relaxation, self.random(numbers, seed),
                self.num_steps, problem.num_samples, self.eos_ids, soft_stopping=bool(self.eos_ids),
            )  # fmt: skip
            with torch.no_grad():
                rewards = checked_soft(problem.reward, rollout.soft_tokens, **problem.columns)
            return rollout, rewards, time.perf_counter() - started
        sampled = self.sampled(numbers, seed)
        if relaxation is None:
            return sampled.rollout, sampled.rewards, sampled.seconds
        # Not timed: a training run records this while it samples.
        posterior = self.random(numbers, seed + POSTERIOR_SEED)
        rollout = rollout_of(problem.policy, sampled.rollout, relaxation, posterior, self.eos_ids)
        return rollout, sampled.rewards, sampled.seconds

    def _gradients(self, values: Float[Tensor, "D"]) -> Float[Tensor, "D P"]:
        """The gradient of every value, or its sketches."""
        parameters = list(self.parameters.values())
        if not self.sketched:
            return whole_gradients(values, parameters)
        rows = []
        for index, value in enumerate(values):
            more = index + 1 < len(values)
            grads = torch.autograd.grad(value, parameters, retain_graph=more, allow_unused=True)
            rows.append(torch.cat([self._sketch.of(named) for named in self._by_group(grads).values()]))
        return torch.stack(rows)

    def _by_group(self, grads: tuple[Tensor | None, ...]) -> dict[str, dict[str, Tensor]]:
        grouped: dict[str, dict[str, Tensor]] = {group: {} for group in self.groups}
        for name, grad in zip(self.parameters, grads, strict=True):
            if grad is not None:
                grouped[parameter_group(name)][name] = grad
        return grouped


def _shares_a_pass(estimator: Pathwise, problem: Problem, rollout: HardRollout | Rollout) -> bool:
    steps, replayable = rollout.mask.shape[1], problem.policy.is_replayable
    return chosen_method(estimator.settings, estimator.relaxation, steps, replayable) == "parallel"
