"""What a rule of learning from thoughts (Quiet-STaR) is, and the record that it reads.

An anchor is a position of a text; S thoughts h are sampled there, and a thought's reward is the log-likelihood of the
true tokens that follow. A rule says which thoughts become likelier, and how much each teaches the talk part: of every
anchor a trainer minimises `thought_losses(scored) − Σ_s talk_weights(scored)_s · r_s`. The first part's gradient goes
through log π (and log Z) only, the second's through the rewards r = log p(y | h, x) only. What that gradient is in
expectation, over thoughts drawn independently from the proposal, a rule declares as `unbiased_for`:

    "mean"      J = E_h r(h), over the policy's thoughts
    "log_mean"  E log (1/S) Σ_s exp r(h_s), over the policy's too: a bound on log p(y | x) that nears it as S grows
    None        neither; the docstring says what else, where there is something to say

Declarations are about the rewards that are given: where a surrogate's estimates replace them, the thought part is that
of the estimates. Thoughts of another proposal q count by their importance weight w = π/q, a constant.

Axes: M anchors, S thoughts an anchor. Left out: how thoughts are sampled and scored.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

UnbiasedFor = Literal["mean", "log_mean"] | None
OPTIONAL_SETS = ("log_prior", "estimated", "trusted", "uniforms")  # of shape [M, S] where they are given


@dataclass(frozen=True)
class ScoredThoughts:
    """S thoughts at each of M anchors.

    Args:
        rewards: r = log p(y | h, x) of the true tokens that follow, nats; carries the talk part's graph.
        log_probs: log π(h | x) at the sampling temperature, summed over the thought's tokens; with its graph.
        log_proposal: log q(h | x) of the distribution that thoughts were drawn from, without a graph; on-policy it is
            `log_probs.detach()`.
        log_prior: log π_ref(h | x), without a graph.
        log_z: learned log Z(x), with its graph.
        estimated: a surrogate's reward r_ψ(h, x).
        trusted: where `estimated` replaces the reward: for all thoughts of an anchor or for none, since rules compare
            them, see `rewards.surrogate`.
        uniforms: of [0, 1), one a thought, for rules that draw (`trice`): the caller's generator, kept out of here.
    Raises:
        ValueError: shapes that do not fit, no thought, or `estimated` without `trusted`.
    """

    rewards: Float[Tensor, "M S"]
    log_probs: Float[Tensor, "M S"]
    log_proposal: Float[Tensor, "M S"]
    log_prior: Float[Tensor, "M S"] | None = None
    log_z: Float[Tensor, "M"] | None = None
    estimated: Float[Tensor, "M S"] | None = None
    trusted: Bool[Tensor, "M S"] | None = None
    uniforms: Float[Tensor, "M S"] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.rewards.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f"rewards must have the shape [M anchors, S thoughts], both at least 1, got {list(shape)}; one "
                "thought an anchor is rewards[:, None]"
            )
        for name in ("log_probs", "log_proposal", *OPTIONAL_SETS):
            _check_shape(name, getattr(self, name), shape)
        _check_shape("log_z", self.log_z, shape[:1])
        if (self.estimated is None) != (self.trusted is None):
            missing = "estimated" if self.estimated is None else "trusted"
            raise ValueError(f"estimated and trusted belong together, and {missing} is missing; pass both or neither")
        if self.trusted is not None and self.trusted.dtype != torch.bool:
            raise ValueError(f"trusted must be boolean, got {self.trusted.dtype}; compare it with a threshold first")

    @property
    def num_thoughts(self) -> int:
        """S."""
        return self.rewards.shape[1]

    def used_rewards(self) -> Float[Tensor, "M S"]:
        """What rules learn thoughts from: `where(trusted, estimated, rewards)`, a constant."""
        # A thought's gradient is that of log π alone; the reward's own gradient is the talk part's business.
        rewards = self.rewards.detach()
        if self.estimated is None or self.trusted is None:
            return rewards
        return torch.where(self.trusted, self.estimated.detach().to(rewards.dtype), rewards)

    def log_ratio(self) -> Float[Tensor, "M S"]:
        """`log π − log π_ref` with the gradient, or log π where there is no reference."""
        return self.log_probs if self.log_prior is None else self.log_probs - self.log_prior.detach()

    def log_importance(self) -> Float[Tensor, "M S"]:
        """`log π − log q`, a constant; zero on-policy."""
        return (self.log_probs - self.log_proposal).detach()


def _check_shape(name: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is not None and tuple(value.shape) != shape:
        axes = "[M, S]" if len(shape) == 2 else "[M]"
        raise ValueError(
            f"{name} must have the shape {axes} = {list(shape)} of rewards, got {list(value.shape)}; sum it over a "
            "thought's tokens, and keep the thoughts of an anchor in one row"
        )


@dataclass(frozen=True)
class ThoughtRule(ABC):
    """Common part of the rules: a declaration and two functions."""

    name: ClassVar[str]

    @property
    def unbiased_for(self) -> UnbiasedFor:
        """What the expected gradient of both parts together is the gradient of."""
        return None

    @property
    def least_thoughts(self) -> int:
        """S from which the rule tells thoughts apart."""
        return 2

    def thought_losses(self, scored: ScoredThoughts) -> Float[Tensor, "M"]:
        """Minimised; differentiable in `log_probs` and `log_z`, and in nothing else.

        Raises:
            ValueError: too few thoughts, or something missing that the rule reads.
        """
        self._check(scored)
        return self._losses(scored)

    def talk_weights(self, scored: ScoredThoughts) -> Float[Tensor, "M S"]:
        """Constant weights of −r, the talk part's negative log-likelihood.

        Rows sum to 1 on the policy's own thoughts. Off-policy those of a rule with importance weights sum to 1 in
        expectation only, without which they would not be unbiased.
        """
        self._check(scored)
        return self._talk_weights(scored).detach()

    @abstractmethod
    def _losses(self, scored: ScoredThoughts) -> Float[Tensor, "M"]: ...

    @abstractmethod
    def _talk_weights(self, scored: ScoredThoughts) -> Float[Tensor, "M S"]: ...

    def _check(self, scored: ScoredThoughts) -> None:
        if scored.num_thoughts < self.least_thoughts:
            raise ValueError(
                f"rewards: rule {self.name!r} needs at least {self.least_thoughts} thoughts an anchor, got "
                f"{list(scored.rewards.shape)}; sample more, or use 'reinforce' with baseline='batch', which takes one"
            )

    def _needed(self, name: str, value: Tensor | None, remedy: str) -> Tensor:
        if value is None:
            raise ValueError(f"{name}: rule {self.name!r} needs it, got None; {remedy}")
        return value
