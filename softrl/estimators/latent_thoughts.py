"""What a latent reasoner learns by: the loss from one pass of the model, its parts, and the rewards of its thoughts.

A thought h after a text x has the reward

    R(h, x) = value + β H[π(y | h, x)],

where π(y | h, x) is what the model predicts after it, and `value` is log π(y*|h, x) of the true next token, or, with
a frozen language model D in the place of the data, `Σ_y π(y | h, x) log D(y | x)`, summed exactly. With D and β = 1, R
is minus the reverse Kullback-Leibler divergence from D; with β = 0 the best prediction is D's mode.

Predictions learn from the gradient of R itself; the reasoner by a rule on log π(h | x) (`thought_base`), or, where
latents are reparameterised, through R. Axes: N texts, T tokens, M anchors (tokens that a target follows), S thoughts,
V vocabulary. Left out: how thoughts are drawn, and the fit of a surrogate.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softrl.estimators.thought_base import ScoredThoughts, ThoughtRule
from softrl.models.reasoner import ReasonerOutput
from softrl.tokens.divergences import entropy


@dataclass(frozen=True)
class LatentObjective:
    """What is minimised: `−(b · base + talk) + p · policy − β₂ · entropy`, each a mean over anchors.

    `base` is R of the base LM's prediction, `talk` R of the mixed ones, weighted as the rule says, `policy` the rule's
    losses, `entropy` that of thoughts, Σ_i H[π(h_i | h_<i, x)].

    Args:
        rule: how the reasoner learns; None: by reparameterised thoughts alone.
        beta: β, weight of H[π(y | h, x)].
        beta_2: β₂. Of several latents a thought, its gradient leaves out what earlier ones do to later ones' entropy.
        base_weight, policy_weight: b, p.
    Raises:
        ValueError: a negative weight.
    """

    rule: ThoughtRule | None
    beta: float = 0.0
    beta_2: float = 0.0
    base_weight: float = 1.0
    policy_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beta", "beta_2", "base_weight", "policy_weight"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")

    @property
    def reparameterises(self) -> bool:
        """Whether thoughts are drawn as functions of the reasoner."""
        return self.rule is None and self.policy_weight > 0.0


@dataclass(frozen=True)
class LatentExtras:
    """What some rules read beside the model's pass, of all positions; None where it is not read.

    Args:
        log_proxy: log D(y | x) at every position.
        log_prior, uniforms, estimated, trusted: see `ScoredThoughts`.
    """

    log_proxy: Float[Tensor, "N T V"] | None = None
    log_prior: Float[Tensor, "N T S"] | None = None
    uniforms: Float[Tensor, "N T S"] | None = None
    estimated: Float[Tensor, "N T S"] | None = None
    trusted: Bool[Tensor, "N T S"] | None = None


@dataclass(frozen=True)
class LatentLoss:
    """The loss and its parts, scalars with their graphs, and R of every anchor's thoughts, constants."""

    loss: Float[Tensor, ""]
    base: Float[Tensor, ""]
    talk: Float[Tensor, ""]
    policy: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    rewards: Float[Tensor, "M S"]


def predicted_value(
    log_probs: Float[Tensor, "*batch V"],
    targets: Int[Tensor, "*batch"],
    beta: float = 0.0,
    log_proxy: Float[Tensor, "*batch V"] | None = None,
) -> Float[Tensor, "*batch"]:
    """R of predictions, nats; differentiable in them.

    Args:
        log_probs: log π(y | h, x), normalised.
        targets: the true next tokens, which a proxy makes unread.
        beta: β.
        log_proxy: log D(y | x), finite; its shape may be broadcast.
    """
    if log_proxy is None:
        value = log_probs.gather(-1, targets[..., None]).squeeze(-1)
    else:
        value = (log_probs.exp() * log_proxy.detach()).sum(-1)
    if beta == 0.0:
        return value
    return value + beta * entropy(log_probs.flatten(0, -2)).view(value.shape)


def latent_loss(output: ReasonerOutput, objective: LatentObjective, extras: LatentExtras) -> LatentLoss:
    """See `LatentObjective`.

    Args:
        output: of a pass with labels; with `reparameterised` where the objective has no rule.
        objective, extras: see there.
    Raises:
        ValueError: what the rule raises.
    """
    at, targets = output.is_target, output.targets
    assert at is not None
    assert targets is not None
    assert output.talk_log_probs is not None
    count = output.talk_log_probs.shape[2]
    proxy = None if extras.log_proxy is None else extras.log_proxy[at]
    rewards = predicted_value(
        output.talk_log_probs[at], targets[at][:, None].expand(-1, count), objective.beta,
        None if proxy is None else proxy[:, None],
    )  # fmt: skip
    nothing = rewards.new_zeros(())
    base = nothing
    if output.base_log_probs is not None:
        base = _mean(predicted_value(output.base_log_probs[at], targets[at], objective.beta, proxy))
    talk, policy, spread = _mean(rewards.mean(-1)), nothing, nothing
    if output.thought_log_probs is not None and output.thought_values is not None and output.thought_values.shape[3]:
        assert output.thought_entropy is not None
        spread = _mean(output.thought_entropy[at].mean(-1))
        if objective.rule is not None and objective.policy_weight > 0.0 and len(rewards):
            scored = scored_thoughts(output, rewards, extras)
            talk = _mean((objective.rule.talk_weights(scored) * rewards).sum(-1))
            policy = _mean(objective.rule.thought_losses(scored))
    loss = objective.policy_weight * policy - talk - objective.base_weight * base
    if objective.beta_2 > 0.0:
        loss = loss - objective.beta_2 * spread
    return LatentLoss(loss, base, talk, policy, spread, rewards.detach())


def scored_thoughts(output: ReasonerOutput, rewards: Float[Tensor, "M S"], extras: LatentExtras) -> ScoredThoughts:
    """The thoughts of all anchors, drawn from the policy, as a rule reads them."""
    at = output.is_target
    assert at is not None
    assert output.thought_log_probs is not None
    log_probs = output.thought_log_probs[at]

    def of_anchors(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[at]

    return ScoredThoughts(
        rewards, log_probs, log_probs.detach(), of_anchors(extras.log_prior), of_anchors(output.log_z),
        of_anchors(extras.estimated), of_anchors(extras.trusted), of_anchors(extras.uniforms),
    )  # fmt: skip


def _mean(values: Float[Tensor, "M"]) -> Float[Tensor, ""]:
    """0, with a graph, where no token has a target."""
    return values.sum() / max(len(values), 1)


def thought_nll(rewards: Float[Tensor, "M S"]) -> Float[Tensor, "M"]:
    """`−log (1/S) Σ_s π(y* | h_s, x)` from log-probabilities: NLL of the mixture over thoughts, nats."""
    return torch.tensor(float(rewards.shape[1])).log() - rewards.logsumexp(-1)
