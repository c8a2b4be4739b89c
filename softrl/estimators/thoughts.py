"""The loss that a model learns to think by, from recorded thoughts: base, talk, policy and entropy parts.

Sampled thoughts learn by a rule (`thought_base`), soft ones by cotangents (`soft_thoughts`). All parts come from one
pass of the model, so that an engine sees one forward and one backward pass.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softrl.estimators.soft_thoughts import ThoughtValue, soft_thought_pass
from softrl.estimators.system import AdjointSettings
from softrl.estimators.thought_base import ScoredThoughts, ThoughtRule
from softrl.masking import token_mean
from softrl.models.branches import BranchAttention
from softrl.models.thinking import ThinkingLM
from softrl.rollouts.anchors import can_follow
from softrl.rollouts.thoughts import ThoughtPass, ThoughtSource, thought_embeds, thought_pass
from softrl.tokens.relaxation import Relaxation
from softrl.types import Texts, Thoughts


@dataclass(frozen=True)
class ThoughtObjective:
    """What is minimised: `b · base + t · talk + p · policy − h · entropy`.

    `base` is the NLL of all true tokens without thoughts, `talk` that of the n_talk tokens after each thought, both
    means over tokens, nats. `policy` is the mean over anchors of the rule's losses, or minus the soft thoughts'
    surrogate; a thought's reward is a sum over its tokens. `entropy` is the mean over thought tokens.

    Args:
        n_talk: true tokens that a thought is scored by.
        rule: how sampled thoughts learn; None with a relaxation.
        relaxation: that of soft thoughts; None for sampled ones.
        adjoint: how far and how strongly gradients go through soft thoughts.
        base_weight, talk_weight, policy_weight, entropy_weight: b, t, p, h.
        source: what was fed; thoughts that are not the policy's teach it nothing.
        attention: see `models.branches`.
        base_after_thoughts: let `base` count the tokens that follow a thought only.
    Raises:
        ValueError: both or neither of rule and relaxation, or a negative weight.
    """

    n_talk: int = 1
    rule: ThoughtRule | None = None
    relaxation: Relaxation | None = None
    adjoint: AdjointSettings = field(default_factory=AdjointSettings)
    base_weight: float = 1.0
    talk_weight: float = 1.0
    policy_weight: float = 1.0
    entropy_weight: float = 0.0
    source: ThoughtSource = "policy"
    attention: BranchAttention = "shared"
    base_after_thoughts: bool = False

    def __post_init__(self) -> None:
        if (self.rule is None) == (self.relaxation is None):
            raise ValueError("thoughts are sampled and learn by a rule, or soft, by a relaxation: give one of the two")
        for name in ("base_weight", "talk_weight", "policy_weight", "entropy_weight"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def teaches_thoughts(self) -> bool:
        """Whether the policy part counts."""
        return self.policy_weight > 0.0 and self.source == "policy"


@dataclass(frozen=True)
class ThoughtExtras:
    """What some objectives read beside the model; shapes are those of all thoughts, [N, A, S].

    Args:
        log_proposal: of the distribution that thoughts were drawn from; None: the policy itself.
        log_prior: of a reference that scores are relative to.
        estimated, trusted: a surrogate's rewards and where they are used, for sampled thoughts.
        uniforms: random numbers of rules that draw.
        value: what is differentiated through soft thoughts instead of the reward.
    """

    log_proposal: Float[Tensor, "N A S"] | None = None
    log_prior: Float[Tensor, "N A S"] | None = None
    estimated: Float[Tensor, "N A S"] | None = None
    trusted: Bool[Tensor, "N A S"] | None = None
    uniforms: Float[Tensor, "N A S"] | None = None
    value: ThoughtValue | None = None


@dataclass(frozen=True)
class ThoughtLoss:
    """The loss and its parts, means with graphs, and the pass that they come from."""

    loss: Float[Tensor, ""]
    base: Float[Tensor, ""]
    talk: Float[Tensor, ""]
    policy: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    passed: ThoughtPass


def thought_loss(
    model: ThinkingLM, texts: Texts, thoughts: Thoughts, objective: ThoughtObjective, extras: ThoughtExtras
) -> ThoughtLoss:
    """See `ThoughtObjective`. Call it inside the wrapped model's forward.

    Raises:
        ValueError: what `thought_pass` and the rule raise.
    """
    with_entropy = objective.entropy_weight > 0.0
    if objective.relaxation is None or objective.source != "policy":
        embeds = thought_embeds(model, thoughts, objective.source)
        passed = thought_pass(model, texts, thoughts, objective.n_talk, embeds, objective.attention, with_entropy)
        talk, policy = _by_rule(model, thoughts, objective, extras, passed)
    else:
        soft = soft_thought_pass(
            model, texts, thoughts, objective.n_talk, objective.relaxation, objective.adjoint, extras.value,
            objective.attention, with_entropy,
        )  # fmt: skip
        passed, valid = soft.passed, is_valid(soft.passed)
        talk, policy = -soft.talk.mean(-1)[valid], -soft.thought.mean(-1)[valid]
    base = _base_loss(texts, passed, objective)
    talk_mean = talk.sum() / passed.is_talk.sum().clamp(min=1)
    policy_mean = policy.sum() / max(len(policy), 1)
    thinking = thoughts.is_anchor[..., None, None].expand(passed.entropy.shape)
    spread = token_mean(passed.entropy, thinking)
    loss = objective.base_weight * base + objective.talk_weight * talk_mean
    if objective.teaches_thoughts:
        loss = loss + objective.policy_weight * policy_mean
    if with_entropy:
        loss = loss - objective.entropy_weight * spread
    return ThoughtLoss(loss, base, talk_mean, policy_mean, spread, passed)


def _base_loss(texts: Texts, passed: ThoughtPass, objective: ThoughtObjective) -> Float[Tensor, ""]:
    if objective.base_after_thoughts:
        return token_mean(-passed.base_log_probs.flatten(1), passed.is_talk.flatten(1))
    return token_mean(-passed.text_log_probs, can_follow(texts)[:, :-1])


def is_valid(passed: ThoughtPass) -> Bool[Tensor, "N A"]:
    """The anchors that a true token follows."""
    return passed.is_talk[..., 0]


def scored_thoughts(
    model: ThinkingLM, thoughts: Thoughts, passed: ThoughtPass, extras: ThoughtExtras
) -> ScoredThoughts:
    """The thoughts of all valid anchors, as a rule reads them."""
    valid = is_valid(passed)
    log_probs = passed.log_probs.sum(-1)[valid]
    of_valid = {
        name: None if value is None else value[valid].to(log_probs.dtype if value.is_floating_point() else value.dtype)
        for name, value in (
            ("log_prior", extras.log_prior), ("estimated", extras.estimated), ("trusted", extras.trusted),
            ("uniforms", extras.uniforms),
        )
    }  # fmt: skip
    log_z = None
    if model.log_z is not None:
        at_anchor = thoughts.anchors[..., None].expand(-1, -1, passed.base_hidden.shape[-1])
        log_z = model.log_z(passed.base_hidden.gather(1, at_anchor).detach())[valid].to(log_probs.dtype)
    proposal = log_probs.detach() if extras.log_proposal is None else extras.log_proposal[valid].to(log_probs.dtype)
    return ScoredThoughts(passed.rewards[valid], log_probs, proposal, log_z=log_z, **of_valid)


def _by_rule(
    model: ThinkingLM, thoughts: Thoughts, objective: ThoughtObjective, extras: ThoughtExtras, passed: ThoughtPass
) -> tuple[Float[Tensor, "M"], Float[Tensor, "M"]]:
    """Talk and policy losses of the valid anchors."""
    valid = is_valid(passed)
    if not objective.teaches_thoughts or objective.rule is None or thoughts.length == 0:
        talk = -passed.rewards[valid].mean(-1)
        return talk, torch.zeros_like(talk)
    scored = scored_thoughts(model, thoughts, passed, extras)
    talk = -(objective.rule.talk_weights(scored) * scored.rewards).sum(-1)
    return talk, objective.rule.thought_losses(scored)


def log_proposal(own: Float[Tensor, "N A S"], prior: Float[Tensor, "N A S"], proposal: str) -> Float[Tensor, "N A S"]:
    """log q of thoughts: "policy" π, "prior" π_ref, "mixture" half of each, `log ((π + π_ref) / 2)`.

    A mixture whose halves are drawn in fixed numbers keeps importance weights unbiased (Veach and Guibas 1995).
    """
    if proposal == "mixture":
        return torch.logaddexp(own.detach(), prior) - torch.tensor(2.0, dtype=own.dtype).log()
    return own.detach() if proposal == "policy" else prior
