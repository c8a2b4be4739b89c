"""The loss that a model learns to think by, from recorded thoughts: base, talk, policy and entropy parts.

Sampled thoughts learn by a rule (`thought_base`), soft ones by cotangents (`soft_thoughts`). All parts come from one
pass of the model, so that an engine sees one forward and one backward pass.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from softrl.estimators.soft_thoughts import soft_thought_pass
from softrl.estimators.system import AdjointSettings
from softrl.estimators.thought_base import ScoredThoughts, ThoughtRule
from softrl.masking import per_sequence_sum, token_mean
from softrl.models.branches import BranchAttention
from softrl.models.thinking import ThinkingLM
from softrl.rewards.surrogate import RewardSurrogate
from softrl.rollouts.anchors import can_follow
from softrl.rollouts.thoughts import ThoughtPass, ThoughtSource, text_log_probs, thought_embeds, thought_pass
from softrl.tokens.relaxation import Relaxation
from softrl.types import Texts, Thoughts


@dataclass(frozen=True)
class ThoughtObjective:
    """What is minimised: `b · base + t · talk + p · policy − h · entropy`.

    `base` is the NLL of all (counted) true tokens without thoughts, `talk` that of the n_talk tokens after each
    thought, both means over tokens, nats. `policy` is the mean over anchors of the rule's losses, or minus the soft
    thoughts' surrogate; a thought's reward is a sum over its tokens. `entropy` is the mean over thought tokens.

    Args:
        n_talk: true tokens that a thought is scored by.
        rule: how sampled thoughts learn; None with a relaxation.
        relaxation: that of soft thoughts; None for sampled ones.
        adjoint: how far and how strongly gradients go through soft thoughts.
        base_weight, talk_weight, policy_weight, entropy_weight: b, t, p, h.
        source: what was fed; thoughts that are not the policy's teach it nothing.
        attention: see `models.branches`.
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
        uniforms: random numbers of rules that draw.
        surrogate: where it trusts itself about all thoughts of an anchor, they learn from its estimates of their
            rewards; soft ones through it.
    """

    log_proposal: Float[Tensor, "N A S"] | None = None
    log_prior: Float[Tensor, "N A S"] | None = None
    uniforms: Float[Tensor, "N A S"] | None = None
    surrogate: RewardSurrogate | None = None


@dataclass(frozen=True)
class ThoughtLoss:
    """The loss and its parts, means with graphs, the pass that they come from, and the embeddings that it was fed."""

    loss: Float[Tensor, ""]
    base: Float[Tensor, ""]
    talk: Float[Tensor, ""]
    policy: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    passed: ThoughtPass
    embeds: Float[Tensor, "N A S n D"]


def thought_loss(
    model: ThinkingLM,
    texts: Texts,
    thoughts: Thoughts,
    objective: ThoughtObjective,
    extras: ThoughtExtras,
    others: Texts | None = None,
) -> ThoughtLoss:
    """See `ThoughtObjective`. Call it inside the wrapped model's forward.

    Args:
        others: texts of the same batch that are not thought about; `base` counts them too.
    Raises:
        ValueError: what `thought_pass` and the rule raise.
    """
    with_entropy = objective.entropy_weight > 0.0
    if objective.relaxation is None or objective.source != "policy":
        embeds = thought_embeds(model, thoughts, objective.source)
        passed = thought_pass(model, texts, thoughts, objective.n_talk, embeds, objective.attention, with_entropy)
        talk, policy = _by_rule(model, thoughts, objective, extras, passed, embeds)
    else:
        value = None if extras.surrogate is None else partial(trusted_value, extras.surrogate, thoughts)
        soft = soft_thought_pass(
            model, texts, thoughts, objective.n_talk, objective.relaxation, objective.adjoint, value,
            objective.attention, with_entropy,
        )  # fmt: skip
        passed, valid, embeds = soft.passed, is_valid(soft.passed), soft.embeds
        talk, policy = -soft.talk.mean(-1)[valid], -soft.thought.mean(-1)[valid]
    parts = [(texts, passed.text_log_probs)]
    if others is not None:
        parts.append((others, text_log_probs(model, others)[0]))
    base = _base_loss(parts)
    talk_mean = talk.sum() / passed.is_talk.sum().clamp(min=1)
    policy_mean = policy.sum() / max(len(policy), 1)
    thinking = thoughts.is_anchor[..., None, None].expand(passed.entropy.shape)
    spread = token_mean(passed.entropy.flatten(1), thinking.flatten(1))
    loss = objective.base_weight * base + objective.talk_weight * talk_mean
    if objective.teaches_thoughts:
        loss = loss + objective.policy_weight * policy_mean
    if with_entropy:
        loss = loss - objective.entropy_weight * spread
    return ThoughtLoss(loss, base, talk_mean, policy_mean, spread, passed, embeds.detach())


def text_loss(model: ThinkingLM, texts: Texts) -> Float[Tensor, ""]:
    """The base part alone, of a model that does not think."""
    return _base_loss([(texts, text_log_probs(model, texts)[0])])


def _base_loss(parts: list[tuple[Texts, Tensor]]) -> Float[Tensor, ""]:
    """Mean NLL of all counted tokens, from texts and log p of their tokens 2..T."""
    nlls, counts = [], []
    for texts, log_probs in parts:
        counted = can_follow(texts)[:, :-1]
        if texts.counted is not None:
            counted = counted & texts.counted[:, 1:]
        nlls.append(per_sequence_sum(-log_probs, counted).sum())
        counts.append(counted.sum())
    return torch.stack(nlls).sum() / torch.stack(counts).sum().clamp(min=1)


def is_valid(passed: ThoughtPass) -> Bool[Tensor, "N A"]:
    """The anchors that a true token follows."""
    return passed.is_talk[..., 0]


def scored_thoughts(
    model: ThinkingLM,
    thoughts: Thoughts,
    passed: ThoughtPass,
    extras: ThoughtExtras,
    embeds: Float[Tensor, "N A S n D"],
) -> ScoredThoughts:
    """The thoughts of all valid anchors, as a rule reads them."""
    valid = is_valid(passed)
    log_probs = passed.log_probs.sum(-1)[valid]

    def of_valid(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[valid].to(log_probs.dtype)

    log_z = estimated = trusted = None
    if model.log_z is not None:
        log_z = of_valid(model.log_z(context_at_anchors(thoughts, passed)))
    if extras.surrogate is not None:
        said = extras.surrogate(*surrogate_inputs(thoughts, passed, embeds.detach()))
        estimated, trusted = of_valid(said.estimated.view_as(passed.rewards)), said.trusted.view_as(passed.rewards)
        trusted = trusted[valid]
    proposal = of_valid(extras.log_proposal)
    return ScoredThoughts(
        passed.rewards[valid], log_probs, log_probs.detach() if proposal is None else proposal,
        of_valid(extras.log_prior), log_z, estimated, trusted, of_valid(extras.uniforms),
    )  # fmt: skip


def context_at_anchors(thoughts: Thoughts, passed: ThoughtPass) -> Float[Tensor, "N A D"]:
    """The text's hidden states at the anchors, constants."""
    at_anchor = thoughts.anchors[..., None].expand(-1, -1, passed.base_hidden.shape[-1])
    return passed.base_hidden.gather(1, at_anchor).detach()


def surrogate_inputs(
    thoughts: Thoughts, passed: ThoughtPass, embeds: Float[Tensor, "N A S n D"]
) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M S n D"]]:
    """Context and thoughts of all anchors, M = N * A; the context normalised, since its scale differs by model."""
    context = context_at_anchors(thoughts, passed).flatten(0, 1)
    return nn.functional.layer_norm(context.float(), context.shape[-1:]), embeds.flatten(0, 1).float()


def trusted_value(
    surrogate: RewardSurrogate, thoughts: Thoughts, passed: ThoughtPass, embeds: Float[Tensor, "N A S n D"]
) -> Float[Tensor, "N A S"]:
    """r_ψ where it is trusted, else the reward itself."""
    said = surrogate(*surrogate_inputs(thoughts, passed, embeds))
    shape = passed.rewards.shape
    return torch.where(said.trusted.view(shape), said.estimated.view(shape).to(passed.rewards.dtype), passed.rewards)


def _by_rule(
    model: ThinkingLM,
    thoughts: Thoughts,
    objective: ThoughtObjective,
    extras: ThoughtExtras,
    passed: ThoughtPass,
    embeds: Float[Tensor, "N A S n D"],
) -> tuple[Float[Tensor, "M"], Float[Tensor, "M"]]:
    """Talk and policy losses of the valid anchors."""
    valid = is_valid(passed)
    if not objective.teaches_thoughts or objective.rule is None or thoughts.length == 0 or not valid.any():
        talk = -passed.rewards[valid].mean(-1)
        return talk, torch.zeros_like(talk)
    scored = scored_thoughts(model, thoughts, passed, extras, embeds)
    talk = -(objective.rule.talk_weights(scored) * scored.rewards).sum(-1)
    return talk, objective.rule.thought_losses(scored)


def log_proposal(own: Float[Tensor, "N A S"], prior: Float[Tensor, "N A S"], proposal: str) -> Float[Tensor, "N A S"]:
    """log q of thoughts: "policy" π, "prior" π_ref, "mixture" half of each, `log ((π + π_ref) / 2)`.

    A mixture whose halves are drawn in fixed numbers keeps importance weights unbiased (Veach and Guibas 1995), but
    not baselines made of the other thoughts after a token: `QuietSTaRConfig` refuses those rules.
    """
    if proposal == "mixture":
        return torch.logaddexp(own.detach(), prior) - torch.tensor(2.0, dtype=own.dtype).log()
    return own.detach() if proposal == "policy" else prior
