"""What a latent reasoner minimises: its parts from one pass of the model, and the rewards of its thoughts.

A thought h after a text x has the reward

    R(h, x) = value + β H[π(y | h, x)],

where π(y | h, x) is what the model predicts after it, and `value` is log π(y*|h, x) of the true next token, or, with
a frozen language model D in the place of the data, `Σ_y π(y | h, x) log D(y | x)`, or the forward form
`Σ_y D(y | x) [log π(y | h, x) − log D(y | x)]` (`objectives.proxy`).

Predictions learn from the gradient of R itself; the reasoner by a rule on log π(h | x) (`thought_base`), from what a
search found, or, where latents are reparameterised, through R. Axes: N texts, T tokens, M anchors (tokens that a
target follows), S thoughts, E elites, V vocabulary. Left out: how thoughts are drawn or searched for, and the fit of a
surrogate.
"""

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float
from torch import Tensor

from softrl.estimators.cross_entropy_method import SearchSettings
from softrl.estimators.latent_thoughts import predicted_value, scored_latents, with_thought_entropy
from softrl.estimators.thought_base import ScoredThoughts, ThoughtRule
from softrl.models.reasoner import ReasonerOutput
from softrl.objectives.proxy import ProxyDivergence


@dataclass(frozen=True)
class LatentObjective:
    """What is minimised: `−(b · base + i · interpreter + talk) + p · policy`, each a mean over anchors.

    `base` is R of the base LM's prediction, `interpreter` that of the interpreter's, `talk` R of the mixed ones,
    weighted as the rule says. Mixed ones alone teach whoever predicts worse ever less, until the mixture leaves it
    out. `policy` are the rule's losses, or −log π of a search's elites.

    Args:
        rule: how the reasoner learns; None: from a search, or by reparameterised thoughts.
        search: settings of the search; None for none.
        beta: β, weight of H[π(y | h, x)].
        beta_2: β₂, weight of H[π(h | x)]: by the reward `R − β₂ log π(h | x)` of a rule, or directly where thoughts
            are reparameterised.
        base_weight, interpreter_weight, policy_weight: b, i, p; the former two only where there is a mixture.
        proxy_divergence: of R with a proxy: "reverse", −KL(π‖D) with β = 1, or "forward", −KL(D‖π) with β = 0.
    Raises:
        ValueError: a negative weight, a rule and a search, or a search with β₂.
    """

    rule: ThoughtRule | None
    search: SearchSettings | None = None
    beta: float = 0.0
    beta_2: float = 0.0
    base_weight: float = 1.0
    interpreter_weight: float = 1.0
    policy_weight: float = 1.0
    proxy_divergence: ProxyDivergence = "reverse"

    def __post_init__(self) -> None:
        for name in ("beta", "beta_2", "base_weight", "interpreter_weight", "policy_weight"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.search is not None and (self.rule is not None or self.beta_2 > 0.0):
            raise ValueError(
                f"a search finds the thoughts to learn from, without rule={self.rule} and beta_2={self.beta_2}; leave "
                "them out"
            )

    @property
    def reparameterises(self) -> bool:
        """Whether thoughts are drawn as functions of the reasoner."""
        return self.rule is None and self.search is None and self.policy_weight > 0.0

    @property
    def searches(self) -> bool:
        """Whether thoughts are searched for."""
        return self.search is not None and self.policy_weight > 0.0


@dataclass(frozen=True)
class LatentExtras:
    """What some rules read beside the model's pass, of all positions; None where it is not read.

    Args:
        log_proxy: log D(y | x) at every position.
        log_prior, uniforms, estimated, trusted: see `ScoredThoughts`.
        log_proposal: see there; None where the policy drew the thoughts.
        elite_log_probs: log π of what a search found, with its graph.
    """

    log_proxy: Float[Tensor, "N T V"] | None = None
    log_prior: Float[Tensor, "N T S"] | None = None
    log_proposal: Float[Tensor, "N T S"] | None = None
    uniforms: Float[Tensor, "N T S"] | None = None
    estimated: Float[Tensor, "N T S"] | None = None
    trusted: Bool[Tensor, "N T S"] | None = None
    elite_log_probs: Float[Tensor, "N T E"] | None = None


@dataclass(frozen=True)
class LatentLoss:
    """The loss and its parts, scalars with their graphs, and R of every anchor's thoughts, constants.

    `entropy` is Σ_i H[π(h_i | h_<i, x)], a mean over thoughts.
    """

    loss: Float[Tensor, ""]
    base: Float[Tensor, ""]
    interpreter: Float[Tensor, ""]
    talk: Float[Tensor, ""]
    policy: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    rewards: Float[Tensor, "M S"]


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
    proxy = None if extras.log_proxy is None else extras.log_proxy[at]

    def value(log_probs: Tensor) -> Tensor:
        """R of predictions [M, S, V]."""
        true = targets[at][:, None].expand(log_probs.shape[:2])
        of_proxy = None if proxy is None else proxy[:, None].expand(log_probs.shape)
        return predicted_value(log_probs, true, objective.beta, of_proxy, objective.proxy_divergence)

    rewards = value(output.talk_log_probs[at])
    nothing = rewards.new_zeros(())
    base = interpreter = policy = spread = nothing
    if output.base_log_probs is not None:
        assert output.interpreter_log_probs is not None
        base = _mean(value(output.base_log_probs[at][:, None])[:, 0])
        if objective.interpreter_weight > 0.0:
            interpreter = _mean(value(output.interpreter_log_probs[at]).mean(-1))
    talk = _mean(rewards.mean(-1))
    if output.thought_values is not None and output.thought_values.shape[3] and len(rewards):
        assert output.thought_entropy is not None
        spread = _mean(output.thought_entropy[at].mean(-1))
        if extras.elite_log_probs is not None:
            policy = -_mean(extras.elite_log_probs[at].mean(-1))
        elif objective.rule is not None and objective.policy_weight > 0.0:
            scored = scored_by(output, rewards, objective.beta_2, extras)
            talk = _mean((objective.rule.talk_weights(scored) * rewards).sum(-1))
            policy = _mean(objective.rule.thought_losses(scored))
        elif objective.reparameterises:
            policy = -objective.beta_2 * spread
    loss = objective.policy_weight * policy - talk
    loss = loss - objective.base_weight * base - objective.interpreter_weight * interpreter
    return LatentLoss(loss, base, interpreter, talk, policy, spread, rewards.detach())


def scored_by(
    output: ReasonerOutput, rewards: Float[Tensor, "M S"], beta_2: float, extras: LatentExtras
) -> ScoredThoughts:
    """The thoughts of all anchors as a rule reads them, with these rewards."""
    at = output.is_target
    assert at is not None

    def of_anchors(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[at]

    own = scored_latents(output)
    proposal = own.log_proposal if extras.log_proposal is None else extras.log_proposal[at]
    scored = replace(
        own, rewards=rewards, log_proposal=proposal, log_prior=of_anchors(extras.log_prior),
        uniforms=of_anchors(extras.uniforms), estimated=of_anchors(extras.estimated),
        trusted=of_anchors(extras.trusted),
    )  # fmt: skip
    return with_thought_entropy(scored, beta_2) if beta_2 > 0.0 else scored


def _mean(values: Float[Tensor, "M"]) -> Float[Tensor, ""]:
    """0, with a graph, where no token has a target."""
    return values.sum() / max(len(values), 1)
