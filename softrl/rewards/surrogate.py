"""A surrogate of a thought's reward: `r_ψ(h, x) ≈ E_y log p(y | h, x)` by an ensemble that says where to trust it.

It averages over the continuations y that a single text shows one of, costs no pass of the model, and is differentiable
in the embeddings of a thought, mixtures of soft thoughts included. Members start from different weights and see
different Bayesian bootstrap weights of the data, so that they agree where there were data and differ elsewhere. That
says nothing before they have learned: fresh members all say about 0. So estimates count where members agree and the
ensemble's own recent error, on rewards it had not learned from, is as small; and for all thoughts of an anchor or for
none, since rules compare thoughts with their siblings, which takes one scale. The error is of sampled rewards: what a
single continuation y adds to the mean over y is in it, and a gate below that stays shut however good the mean is.

Axes: K members, M anchors, S thoughts an anchor, n tokens a thought, D width. Left out: the optimiser and the data
(ask about texts before it is fitted to them, and refresh it as the policy changes: trainers here fit it to every
training batch after they have used its estimates), thoughts of different lengths.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from softrl.tokens.noise import sequence_seed

Pooling = Literal["mean", "flatten"]
ERROR_DECAY = 0.9  # of the running mean square error: about the last ten batches count; ours


@dataclass(frozen=True)
class SurrogateReward:
    """What the ensemble says of every thought.

    Args:
        estimated: r_ψ, the mean over members, nats; differentiable.
        std_nats: standard deviation over members, with Bessel's correction; constant.
        trusted: the same for all thoughts of an anchor: where every one of them has a spread below the threshold, and
            the ensemble's recent error is below it too; constant.
    """

    estimated: Float[Tensor, "M S"]
    std_nats: Float[Tensor, "M S"]
    trusted: Bool[Tensor, "M S"]


class RewardSurrogate(nn.Module):
    """K perceptrons with one hidden layer, of a context and a thought's embeddings.

    Args:
        width: D, of contexts and embeddings.
        thought_length: n; read with pooling "flatten", where every token has its own weights.
        num_members: K >= 2.
        hidden_units: of every member.
        max_std_nats: estimates are trusted where the disagreement about all thoughts of an anchor is below it, once
            the recent root mean square error on rewards not learned from is below it as well, see `observe`.
        pooling: "mean" over a thought's tokens, any number of them and in any order, or "flatten".
        seed: of the members' weights and of their bootstraps.
    Raises:
        ValueError: settings out of range.
    Source: Lakshminarayanan et al. (2017), arXiv:1612.01474 (ensembles); Rubin (1981) (Bayesian bootstrap); defaults
        are ours.
    """

    def __init__(
        self,
        width: int,
        thought_length: int = 1,
        *,
        num_members: int = 5,
        hidden_units: int = 64,
        max_std_nats: float = 0.1,
        pooling: Pooling = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_members < 2:
            raise ValueError(f"num_members must be at least 2, or nothing can disagree, got {num_members}; 5 is usual")
        if not max_std_nats > 0.0:
            raise ValueError(f"max_std_nats must be positive, or nothing is trusted, got {max_std_nats}")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {get_args(Pooling)}, got {pooling!r}")
        self.width, self.thought_length, self.pooling = width, thought_length, pooling
        self.max_std_nats, self.seed = max_std_nats, seed
        inputs = width * (2 if pooling == "mean" else 1 + thought_length)
        first = torch.empty(num_members, inputs, hidden_units)
        last = torch.empty(num_members, hidden_units)
        for member in range(num_members):  # keyed, and not from the global generator
            generator = torch.Generator().manual_seed(sequence_seed(seed, member))
            first[member].normal_(0.0, inputs**-0.5, generator=generator)
            last[member].normal_(0.0, hidden_units**-0.5, generator=generator)
        self.first, self.last = nn.Parameter(first), nn.Parameter(last)
        self.first_bias = nn.Parameter(torch.zeros(num_members, hidden_units))
        self.last_bias = nn.Parameter(torch.zeros(num_members))
        self.mean_square_error: Tensor  # nats², of recent rewards; nothing is known of a fresh ensemble
        self.register_buffer("mean_square_error", torch.tensor(math.inf))

    def members(self, context: Float[Tensor, "M D"], thoughts: Float[Tensor, "M S n D"]) -> Float[Tensor, "K M S"]:
        """Every member's reward; differentiable in all of it."""
        self._check(context, thoughts)
        pooled = thoughts.mean(-2) if self.pooling == "mean" else thoughts.flatten(-2)
        given = torch.cat([context[:, None].expand(-1, thoughts.shape[1], -1), pooled], -1)
        # In full precision: a half one's error of rewards of some nats is as large as what siblings differ by.
        with torch.autocast(given.device.type, enabled=False):
            hidden = torch.einsum("msi,kih->kmsh", given, self.first) + self.first_bias[:, None, None]
            return torch.einsum("kmsh,kh->kms", nn.functional.gelu(hidden), self.last) + self.last_bias[:, None, None]

    def forward(self, context: Float[Tensor, "M D"], thoughts: Float[Tensor, "M S n D"]) -> SurrogateReward:
        """r_ψ(h, x), and where to trust it."""
        members = self.members(context, thoughts)
        std_nats = members.detach().std(0)  # a gate, not something to be made smaller by choosing thoughts
        agrees = (std_nats < self.max_std_nats) & (self.rmse_nats < self.max_std_nats)
        return SurrogateReward(members.mean(0), std_nats, agrees.all(-1, keepdim=True).expand(agrees.shape))

    @property
    def rmse_nats(self) -> Float[Tensor, ""]:
        """Recent root mean square error, see `observe`; infinite before the first one."""
        return self.mean_square_error.sqrt()

    @torch.no_grad()
    def observe(self, square_errors: Float[Tensor, "*batch"]) -> None:
        """Take note of `(r_ψ − r)²` on rewards that it has not learned from: the only way to become trusted.

        Whoever fits a surrogate calls this with estimates from before the fit's step, or of data kept from the fit.
        `m ← a m + (1 − a) mean`, a = ERROR_DECAY; the first mean is taken whole, and one that follows what is not
        finite.

        Args:
            square_errors: nats², at least one; of several processes the same on each, or they trust differently.
        Raises:
            ValueError: there is none.
        """
        if square_errors.numel() == 0:
            raise ValueError("square_errors must hold at least one error, got none; leave out a batch without rewards")
        seen = square_errors.mean().to(self.mean_square_error)
        known = self.mean_square_error.isfinite()
        running = ERROR_DECAY * self.mean_square_error + (1.0 - ERROR_DECAY) * seen
        self.mean_square_error.copy_(torch.where(known, running, seen))

    def loss(
        self,
        context: Float[Tensor, "M D"],
        thoughts: Float[Tensor, "M S n D"],
        rewards: Float[Tensor, "M S"],
        batch: int = 0,
    ) -> Float[Tensor, ""]:
        """`Σ_k Σ_i b_ki (r_k(h_i, x_i) − r_i)² / (K Σ_i b_ki)`, b ~ Exp(1) drawn for every member and thought.

        Nothing of it reaches the policy: contexts, thoughts and rewards are constants here.

        Args:
            rewards: of sampled continuations, nats.
            batch: key of the weights b: the step where data are fresh, the batch's index where they come again, so
                that a member sees the same weights of the same data.
        """
        if rewards.shape != thoughts.shape[:2]:
            raise ValueError(
                f"rewards must have the shape [M, S] = {list(thoughts.shape[:2])} of thoughts, got "
                f"{list(rewards.shape)}; one reward a thought, log p(y | h, x) summed over y"
            )
        errors = (self.members(context.detach(), thoughts.detach()) - rewards.detach()).square()
        weights = self.bootstrap_weights(rewards, batch)
        total = weights.sum((-1, -2)).clamp(min=torch.finfo(weights.dtype).tiny)  # 0 where there is no thought
        return ((weights * errors).sum((-1, -2)) / total).mean()

    def bootstrap_weights(self, rewards: Float[Tensor, "M S"], batch: int) -> Float[Tensor, "K M S"]:
        """b of a batch: Exp(1) draws keyed by (seed, member, batch), on the rewards' device."""
        drawn = torch.empty(len(self.last), *rewards.shape, dtype=torch.float64)
        for member, row in enumerate(drawn):
            row.exponential_(generator=torch.Generator().manual_seed(sequence_seed(self.seed, member, batch)))
        return drawn.to(rewards)

    def _check(self, context: Tensor, thoughts: Tensor) -> None:
        if thoughts.ndim != 4 or context.ndim != 2 or len(context) != len(thoughts):
            raise ValueError(
                "context and thoughts must have the shapes [M, D] and [M, S, n, D], got "
                f"{list(context.shape)} and {list(thoughts.shape)}; embed a thought's ids first"
            )
        if not context.shape[-1] == thoughts.shape[-1] == self.width:
            raise ValueError(
                f"context and thoughts must have the width {self.width} this surrogate was made for, got "
                f"{context.shape[-1]} and {thoughts.shape[-1]}; make another one with that width"
            )
        if self.pooling == "flatten" and thoughts.shape[2] != self.thought_length:
            raise ValueError(
                f"thoughts must have {self.thought_length} tokens (thought_length) to be flattened, got "
                f"{thoughts.shape[2]}; pooling='mean' takes any number"
            )
