"""Guidance: how much of a text's true token is fed beside a model's own soft token.

A guided soft token has K + 1 kept ids, those of a relaxation and the true one, so that it is an ordinary sparse soft
token: the fed embedding is that of its weights, and rollouts, cotangents and surrogates take it as it is. Scheduled
sampling is guidance of amount 1 at some steps, see `coin_amounts`.
Source: ours (softrl maths, section 8); scheduled sampling: Bengio et al. (2015), arXiv:1506.03099.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.tokens.noise import SequenceRandom
from softrl.tokens.relaxation import Relaxation
from softrl.types import Support

GuidanceRule = Literal["mix", "floor"]


def mixed(
    weights: Float[Tensor, "*batch K"], is_true: Bool[Tensor, "*batch K"], amount: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch K"]:
    """`α 1_true + (1 − α) p`: the true token's embedding and the soft one's, mixed.

    Args:
        weights: p on the kept ids, the true one among them, summing to 1, shape (*batch, K).
        is_true: where the true id is; once a row.
        amount: α in [0, 1].
    """
    share = amount[..., None].to(weights.dtype)
    return share * is_true.to(weights.dtype) + (1.0 - share) * weights


def floored(
    weights: Float[Tensor, "*batch K"], is_true: Bool[Tensor, "*batch K"], amount: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch K"]:
    """`p_true' = max(p_true, α)`, every other weight times `(1 − p_true') / (1 − p_true)`: they still sum to 1.

    Where the true token has its α already nothing changes, which holds for p_true = 1 too. Arguments as in `mixed`.
    """
    share = amount[..., None].to(weights.dtype)
    too_small = (weights * is_true).sum(-1, keepdim=True) < share
    # 1 − p_true as the sum of the others: a nearly certain true token would leave rounding in the difference.
    others = weights.masked_fill(is_true, 0.0).sum(-1, keepdim=True)
    divisor = torch.where(too_small & (others > 0.0), others, 1.0)  # nothing divides by zero, in no gradient either
    lifted = torch.where(is_true, share, weights * ((1.0 - share) / divisor))
    return torch.where(too_small, lifted, weights)


_RULES = {"mix": mixed, "floor": floored}


@dataclass(frozen=True)
class Guide:
    """The text that a rollout is made along.

    Args:
        tokens: the true token of every step, shape (N, T).
        amount: how much of it is fed, in [0, 1], shape (N, T): 0 nothing of it, 1 nothing else.
    """

    tokens: Int[Tensor, "N T"]
    amount: Float[Tensor, "N T"]

    def joined(self, support: Support, step: int) -> Support:
        """A step's support with the true id as its last one; it is not kept there where it is among the others."""
        true = self.tokens[:, step, None]
        missing = ~((support.ids == true) & support.kept).any(-1, keepdim=True)
        return replace(
            support,
            ids=torch.cat([support.ids, true], -1),
            noise=_padded(support.noise),
            kept=torch.cat([support.kept, missing], -1),
            draws=None if support.draws is None else _padded(support.draws),
            guidance=self.amount[:, step],
        )


@dataclass(frozen=True)
class GuidedRelaxation(Relaxation):
    """A relaxation whose soft tokens are guided by true ones; roll it out with a `Guide`.

    What is fed and what is differentiated are guided alike, so the derivative of q stays that of p where the base
    feeds one-hot tokens. Make it with `guided`.

    Args:
        base: the relaxation of the model's own soft token; its settings may be tensors that carry gradients.
        rule: "mix" or "floor".
        others: those of the base.
    Raises:
        ValueError: an unknown rule.
    """

    base: Relaxation = field(kw_only=True)
    rule: GuidanceRule = field(default="mix", kw_only=True)

    name = "guided"

    def __post_init__(self) -> None:  # the base has checked the numbers
        if self.rule not in _RULES:
            raise ValueError(f"guidance must be one of {get_args(GuidanceRule)}, got {self.rule!r}")

    @property
    def feeds_one_hot(self) -> bool:  # type: ignore[override]
        """Whether the base does: what is fed has then two tokens at most, and its cotangents settle as quickly."""
        return self.base.feeds_one_hot

    def draw(
        self, logits: Float[Tensor, "N V"], random: SequenceRandom, tokens: Int[Tensor, "N"] | None = None
    ) -> Support:
        """The base's support; `Guide.joined` adds the true token."""
        return self.base.draw(logits, random, tokens)

    def weights(self, kept_logits: Float[Tensor, "*batch K"], support: Support) -> Float[Tensor, "*batch K"]:
        return self._guided(self.base.weights(kept_logits[..., :-1], _own(support)), support)

    def fed(self, weights: Float[Tensor, "*batch K"], support: Support) -> Float[Tensor, "*batch K"]:
        if not self.base.feeds_one_hot:
            return weights
        return self._guided(self.base.fed(weights[..., :-1], _own(support)), support)

    def _guided(self, weights: Float[Tensor, "*batch L"], support: Support) -> Float[Tensor, "*batch K"]:
        assert support.guidance is not None
        is_true = (support.ids == support.ids[..., -1:]) & support.kept
        return _RULES[self.rule](_padded(weights), is_true, support.guidance)


def guided(base: Relaxation, rule: GuidanceRule) -> GuidedRelaxation:
    """A relaxation guided by a rule, "mix" or "floor"."""
    settings = {each.name: getattr(base, each.name) for each in fields(Relaxation)}
    return GuidedRelaxation(**settings, base=base, rule=rule)


def _padded(values: Float[Tensor, "*batch L"]) -> Float[Tensor, "*batch K"]:
    """With a zero for the true token."""
    return torch.cat([values, torch.zeros_like(values[..., :1])], -1)


def _own(support: Support) -> Support:
    """A guided support without what guides it."""
    draws = None if support.draws is None else support.draws[..., :-1]
    ids, noise, kept = support.ids[..., :-1], support.noise[..., :-1], support.kept[..., :-1]
    return Support(ids, noise, kept, support.choice, draws)


def coin_amounts(
    amount: float, probability: float, num_steps: int, random: SequenceRandom, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "N T"]:
    """Scheduled sampling: guidance of 1 with some probability at each step, of `amount` otherwise.

    Args:
        amount: α, where the coin says that the model's own token is fed.
        probability: of the true token, p in [0, 1].
        num_steps: T.
        random: one stream a sequence; T numbers of each are drawn, whatever the probability.
    """
    uniform = random.exponential(num_steps, torch.float64).neg().exp()
    return torch.where(uniform < probability, 1.0, amount).to(dtype)
