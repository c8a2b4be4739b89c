"""What an estimator is: a rule from a rollout and its rewards to cotangents (phase 2), and a surrogate whose gradient
is the estimate (phase 3). Trainers and the laboratory use the same objects, so that they compare the same thing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from softrl.models.policy import Policy
from softrl.objectives.token_terms import DirectTerms
from softrl.rewards.base import Reward
from softrl.tokens.relaxation import Relaxation
from softrl.tokens.truncation import Truncation

# "hard": the gradient of J over sampled tokens; "soft": that of J over the relaxation's soft tokens; None: of neither.
UnbiasedFor = Literal["hard", "soft"] | None


@dataclass(frozen=True)
class Cost:
    """Work for one sequence of an estimate: calls of the reward, passes over the sequence forwards and backwards.

    A rollout is one forward pass, a sweep of the cotangents one backward pass. `gradient_calls` are those of the
    reward calls that are differentiated too. NaN where the work depends on a residual.
    """

    reward_calls: float | int
    forwards: float | int
    backwards: float | int
    gradient_calls: float | int = 0


@dataclass(frozen=True)
class Problem:
    """`J = R + ΣF` of one policy: what every method maximises, and how completions are sampled.

    Args:
        policy: the model and its sampling temperature.
        reward: score-function methods are given its values, pathwise ones differentiate its soft face.
        terms: KL and entropy.
        truncation: the sampler's nucleus rules.
        num_samples: G, samples a prompt, side by side in a rollout.
        columns: data-set columns handed to the reward, one entry a sequence.
    """

    policy: Policy
    reward: Reward
    terms: DirectTerms
    truncation: Truncation
    num_samples: int = 1
    columns: dict[str, Sequence] = field(default_factory=dict)


@runtime_checkable
class Estimator(Protocol):
    """A gradient estimator.

    `relaxation` says what it is estimated from: the soft rollout of that relaxation, or sampled tokens if None.
    """

    @property
    def relaxation(self) -> Relaxation | None: ...

    @property
    def unbiased_for(self) -> UnbiasedFor: ...

    @property
    def cost(self) -> Cost: ...

    def estimate(self, problem: Problem, rollout: Any, rewards: Float[Tensor, "N"]) -> Any:
        """Phase 2: what the surrogate needs; nothing in it carries a graph.

        Args:
            problem: what is maximised.
            rollout: a `HardRollout`, or a `Rollout` of `relaxation`.
            rewards: R of the rollout: the hard face of sampled tokens, the soft face of mixtures.
        """
        ...

    def surrogate(self, problem: Problem, estimate: Any) -> Float[Tensor, "N"]:
        """Phase 3: S of every sequence, whose mean's gradient is the estimate. Call it inside the wrapped forward."""
        ...
