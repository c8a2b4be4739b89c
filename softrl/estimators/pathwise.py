"""The pathwise estimator: objective, cotangents (phase 2) and the surrogate whose gradient is the estimate (phase 3).

`J = R(q_1..q_T) + Σ_t F_t` is maximised. The surrogate is
`S(θ) = Σ_t ⟨sg a_t, p_t(θ, sg e)⟩ + Σ_t F_t(θ, sg e) + γ Σ_t ⟨sg λ_t, E(sg q_t; W)⟩`; at γ = 1 and exact cotangents
its gradient is dJ/dθ, the input embedding's part included. Source: ours (softrl maths, section 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.estimators.adjoint import solve_cotangents
from softrl.estimators.base import Cost, Problem, UnbiasedFor
from softrl.estimators.system import AdjointSettings, Cotangents, ForwardPass, recorded_embeds
from softrl.masking import survival_sum
from softrl.models.policy import Policy, chunk_length, evaluating, recomputed
from softrl.objectives.token_terms import DirectTerms, token_outputs, token_values
from softrl.rewards.base import Reward, checked_soft
from softrl.tokens.relaxation import Relaxation
from softrl.types import Rollout, rows_of


def unbiased_for(relaxation: Relaxation, settings: AdjointSettings) -> UnbiasedFor:
    """Which objective's gradient the estimate is unbiased for: that of soft tokens, or none.

    A mixture that is scored and fed back as it is, with exact cotangents, gives the exact derivative for the noise
    drawn. Straight-through takes q's derivative to be p's, and truncated or discounted cotangents leave paths out.
    """
    if relaxation.feeds_one_hot or relaxation.detach_temperature or not settings.is_exact:
        return None
    return "soft"


@dataclass
class PathwiseObjective:
    """J of every sequence: the reward of the fed tokens, if there is one, plus the direct terms.

    The reference reads the fed tokens through its own embedding, so J depends on q through it as well. Its hidden
    states and the KL of every position stay behind, for phase 3 and for logs; so does log π of true tokens.
    """

    policy: Policy
    rollout: Rollout
    reward: Reward | None
    terms: DirectTerms
    columns: dict[str, Sequence]
    reference_hidden: Float[Tensor, "N T E"] | None = None
    kl: Float[Tensor, "N T"] | None = None
    target_log_probs: Float[Tensor, "N T"] | None = None

    def __call__(self, fed: Float[Tensor, "N T K"], hidden: Float[Tensor, "N T D"]) -> Float[Tensor, "N"]:
        """J [N] from q and the policy's hidden states, differentiable in both."""
        tokens = self.rollout.soft_tokens.with_weights(fed)
        if self.reward is None:
            total = torch.zeros_like(hidden[:, 0, 0])
        else:
            total = checked_soft(self.reward, tokens, **self.columns)
        if self.terms.are_zero:
            return total
        reference_hidden = None
        if self.terms.kl_weight > 0.0:
            reference_hidden = hidden_of_reference(self.terms, self.rollout, fed)
            self.reference_hidden = None if reference_hidden is None else reference_hidden.detach()
        values = token_values(self.terms, self.policy, hidden, reference_hidden, self.rollout.targets)
        self.kl, self.target_log_probs = values.kl, values.target_log_probs
        return total + survival_sum(values.value, tokens.survival.to(values.value.dtype)).to(total.dtype)


def hidden_of_reference(
    terms: DirectTerms, rollout: Rollout, fed: Float[Tensor, "N T K"]
) -> Float[Tensor, "N T E"] | None:
    """The reference model's hidden states on the fed tokens, differentiable in q; None without a reference."""
    if terms.reference is None:
        return None
    with evaluating(terms.reference.model):
        ids = rollout.support.ids.flatten(0, 1)
        embeds = terms.reference.embed_soft(ids, fed.flatten(0, 1)).unflatten(0, rollout.mask.shape)
        return terms.reference.hidden(rollout.prompts, embeds)


@dataclass(frozen=True)
class Estimate:
    """What phase 3 needs; nothing in it carries a graph.

    `kl` is that of each position, nats, None without a KL; `target_log_probs` is log π of its true token.
    """

    rollout: Rollout
    cotangents: Cotangents
    embeds: Float[Tensor, "N T D"]
    reference_hidden: Float[Tensor, "N T E"] | None
    kl: Float[Tensor, "N T"] | None
    target_log_probs: Float[Tensor, "N T"] | None = None

    def split(self, count: int) -> list["Estimate"]:
        """The same for `count` equal parts of the sequences, one after the other."""
        size = len(self.embeds) // count
        return [rows_of(self, slice(start, start + size)) for start in range(0, len(self.embeds), size)]


def pathwise_estimate(
    policy: Policy,
    rollout: Rollout,
    relaxation: Relaxation,
    reward: Reward | None,
    terms: DirectTerms,
    settings: AdjointSettings,
    columns: dict[str, Sequence] | None = None,
    forward: ForwardPass | None = None,
) -> Estimate:
    """Phase 2: the cotangents of `J = R + ΣF` for a recorded rollout.

    Args:
        policy, rollout, relaxation: phase 1's model, record and relaxation.
        reward: its soft face is differentiated; None where the direct terms are all of J.
        terms: KL and entropy terms, and the likelihood of the rollout's true tokens.
        settings: how cotangents are solved for.
        columns: data-set columns handed to the reward, one entry a sequence.
        forward: see `solve_cotangents`.
    Raises:
        ValueError: the reward's value has a wrong shape, is not finite or not differentiable.
    """
    objective = PathwiseObjective(policy, rollout, reward, terms, columns or {})
    cotangents = solve_cotangents(policy, rollout, relaxation, objective, settings, forward)
    embeds = recorded_embeds(policy, rollout)
    kl = objective.kl if terms.kl_weight > 0.0 else None
    scores = objective.target_log_probs if terms.target_weight > 0.0 else None
    return Estimate(rollout, cotangents, embeds, objective.reference_hidden, kl, scores)


@dataclass(frozen=True)
class SurrogateOutput:
    """S of every sequence, and the replay's largest error in p."""

    value: Float[Tensor, "N"]
    replay_error: Float[Tensor, ""]


def surrogate(
    policy: Policy,
    relaxation: Relaxation,
    estimate: Estimate,
    terms: DirectTerms,
    settings: AdjointSettings,
    forward: ForwardPass | None = None,
) -> SurrogateOutput:
    """Phase 3: one ordinary forward pass whose gradient is the estimate. Call it inside the wrapped model's forward.

    Args:
        policy: the model with gradients.
        relaxation, terms, settings: those of phases 1 and 2.
        estimate: phase 2's result.
        forward: the forward pass that phase 2 used, if parameters were not frozen in it: phase 3 then runs none.
    Returns:
        S, to be maximised, shape (N,); its value has no meaning beyond its gradient.
    """
    rollout, cotangents = estimate.rollout, estimate.cotangents
    hidden = policy.hidden(rollout.prompts, estimate.embeds) if forward is None else forward.hidden
    if terms.are_zero:
        direct = torch.zeros_like(hidden[:, 0, 0])
        kept = _kept_logits(policy, hidden, rollout)
    elif policy.trains_head:
        outputs = token_outputs(
            policy, hidden, rollout.support.ids, terms.reference, estimate.reference_hidden, targets=rollout.targets
        )
        direct, kept = terms.total(outputs, rollout.soft_tokens.survival), outputs.kept_logits
    else:  # F reaches the parameters through the hidden states alone, and its derivative by them is known
        direct = (cotangents.by_hidden.detach().to(hidden.dtype) * hidden).sum((-2, -1))
        kept = _kept_logits(policy, hidden, rollout)
    weights = relaxation.weights(kept, rollout.support)
    value = (cotangents.weights.detach().to(weights.dtype) * weights).sum((-2, -1)) + direct
    if policy.trains_embedding and settings.feedback_discount > 0.0:
        value = value + settings.feedback_discount * _embedding_term(policy, estimate).to(value.dtype)
    # Padding after the end replays nothing anybody uses.
    replay_error = (weights - rollout.weights).detach().abs().amax(-1).masked_fill(~rollout.mask, 0.0).max()
    return SurrogateOutput(value, replay_error)


def _kept_logits(policy: Policy, hidden: Float[Tensor, "N T D"], rollout: Rollout) -> Float[Tensor, "N T K"]:
    """Logits of the kept ids, in chunks that are recomputed in the backward pass."""
    flat, ids = hidden.flatten(0, 1), rollout.support.ids.flatten(0, 1)
    size = chunk_length(ids.shape[-1] * hidden.shape[-1])
    pieces = [recomputed(policy.kept_logits, *piece) for piece in zip(flat.split(size), ids.split(size), strict=True)]
    return torch.cat(pieces).view(rollout.support.ids.shape)


def _embedding_term(policy: Policy, estimate: Estimate) -> Float[Tensor, "N"]:
    """`Σ_t ⟨sg λ_t, E(sg q_t; W)⟩`: the input embedding's own gradient through the fed tokens, in chunks."""
    rollout = estimate.rollout
    ids, fed = rollout.support.ids.flatten(0, 1), rollout.fed.flatten(0, 1)
    adjoint = estimate.cotangents.embeds.flatten(0, 1)

    def piece_of(start: int, stop: int) -> Float[Tensor, "M"]:
        embeds = policy.embed_soft(ids[start:stop], fed[start:stop])
        return (adjoint[start:stop].to(embeds.dtype) * embeds).sum(-1)

    size = chunk_length(ids.shape[-1] * adjoint.shape[-1])
    bounds = [(start, min(start + size, len(ids))) for start in range(0, len(ids), size)]
    pieces = [recomputed(piece_of, start, stop) for start, stop in bounds]
    return torch.cat(pieces).view(rollout.mask.shape).sum(-1)


@dataclass(frozen=True)
class Pathwise:
    """The pathwise estimator of one relaxation, as trainers and the laboratory use it."""

    relaxation: Relaxation
    settings: AdjointSettings = field(default_factory=AdjointSettings)

    @property
    def unbiased_for(self) -> UnbiasedFor:
        return unbiased_for(self.relaxation, self.settings)

    @property
    def cost(self) -> Cost:
        """NaN backward passes where a residual decides how many sweeps there are."""
        sweeps = float("nan") if self.settings.hops is None else self.settings.hops
        return Cost(reward_calls=1, forwards=2, backwards=sweeps + 1, gradient_calls=1)

    def estimate(
        self,
        problem: Problem,
        rollout: Rollout,
        rewards: Float[Tensor, "N"] | None = None,
        forward: ForwardPass | None = None,
    ) -> Estimate:
        """Phase 2; the reward's soft face is called here, so `rewards` is not read. `forward`: see `surrogate`."""
        columns = dict(problem.columns)
        return pathwise_estimate(
            problem.policy, rollout, self.relaxation, problem.reward, problem.terms, self.settings, columns, forward
        )

    def surrogate(
        self, problem: Problem, estimate: Estimate, forward: ForwardPass | None = None
    ) -> Float[Tensor, "N"]:
        return surrogate(problem.policy, self.relaxation, estimate, problem.terms, self.settings, forward).value
