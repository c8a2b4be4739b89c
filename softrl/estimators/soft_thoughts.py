"""Soft thoughts: the gradient of what follows a thought, taken through the thought's own soft tokens.

With e_1..e_n the fed embeddings of a thought and r its reward, `λ_t = ∂r/∂e_t + Σ_{j>t} (∂p_j/∂e_t)ᵀ a_j` and
`a_t = γ (∂e_t/∂q_t)ᵀ λ_t`. The reward reads a thought through its embeddings alone, so there is no direct derivative
on q; all else is as for rollouts (`estimators.system`). One forward pass with a graph serves the sweeps (n are
exact) and the surrogate. Source: ours (softrl maths, section 2).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.estimators.system import AdjointSettings, clipped
from softrl.models.branches import BranchAttention
from softrl.models.policy import chunk_length, recomputed
from softrl.models.thinking import ThinkingLM
from softrl.rollouts.thoughts import ThoughtPass, thought_embeds, thought_pass
from softrl.tokens.relaxation import Relaxation
from softrl.types import Texts, Thoughts

# What cotangents are taken of instead of the reward itself: [N, A, S] from a pass and the embeddings that it was fed.
ThoughtValue = Callable[[ThoughtPass, Float[Tensor, "N A S n D"]], Float[Tensor, "N A S"]]


@dataclass(frozen=True)
class SoftThoughtPass:
    """A pass, and the two parts of the surrogate of every thought, shape (N, A, S); values mean nothing but r's.

    `talk` is r, whose gradient is that at fixed thoughts; the gradient of `thought` is that through them. Together
    they are the total derivative (at γ = 1, all sweeps, and without a bound). `adjoint` are the λ_t, `embeds` the e_t.
    """

    passed: ThoughtPass
    talk: Float[Tensor, "N A S"]
    thought: Float[Tensor, "N A S"]
    adjoint: Float[Tensor, "N A S n D"]
    embeds: Float[Tensor, "N A S n D"]


def soft_thought_pass(
    model: ThinkingLM,
    texts: Texts,
    thoughts: Thoughts,
    n_talk: int,
    relaxation: Relaxation,
    settings: AdjointSettings,
    value: ThoughtValue | None = None,
    attention: BranchAttention = "shared",
    with_entropy: bool = False,
) -> SoftThoughtPass:
    """Run recorded soft thoughts through the model and differentiate through them.

    Args:
        model, texts, thoughts, n_talk, attention, with_entropy: see `thought_pass`.
        relaxation: that which made the thoughts.
        settings: `hops` sweeps at most (paths of so many feedback edges; 1 reaches the reward and no further), γ and
            the bound of λ. The method is always "parallel".
        value: what is differentiated instead of the reward.
    Raises:
        ValueError: a method other than "parallel" (or "auto").
    """
    if settings.method not in ("auto", "parallel"):
        raise ValueError(f"thoughts are solved for by method='parallel', got {settings.method!r}")
    fed = thought_embeds(model, thoughts, "policy")
    leaf = fed.detach().requires_grad_()
    passed = thought_pass(model, texts, thoughts, n_talk, leaf, attention, with_entropy)
    if thoughts.length == 0:
        return SoftThoughtPass(passed, passed.rewards, torch.zeros_like(passed.rewards), leaf.detach(), leaf.detach())
    weights = _weights(model, thoughts, relaxation, passed)
    target = passed.rewards if value is None else value(passed, leaf)
    adjoint, cotangents = torch.zeros_like(leaf), torch.zeros_like(weights)
    for _ in range(thoughts.length if settings.hops is None else min(settings.hops, thoughts.length)):
        total = target.sum() + (cotangents.to(weights.dtype) * weights).sum()
        (adjoint,) = torch.autograd.grad(total, leaf, retain_graph=True)
        adjoint = clipped(adjoint, settings.adjoint_clip)
        cotangents = settings.feedback_discount * _feedback(model, thoughts, adjoint)
    through = (cotangents.to(weights.dtype) * weights).sum((-2, -1))
    if not model.policy.trains_embedding:
        return SoftThoughtPass(passed, passed.rewards, through, adjoint, leaf.detach())
    # The embedding's own part: of r at fixed thoughts, and what later thought tokens add to that of the value.
    (of_reward,) = torch.autograd.grad(passed.rewards.sum(), leaf, retain_graph=True)
    talk = passed.rewards + (of_reward * (fed - leaf.detach())).sum((-2, -1))
    direct = of_reward
    if value is not None:
        (direct,) = torch.autograd.grad(target.sum(), leaf, retain_graph=True)
    own = ((settings.feedback_discount * adjoint - direct) * fed).sum((-2, -1))
    return SoftThoughtPass(passed, talk, through + own, adjoint, leaf.detach())


def _weights(
    model: ThinkingLM, thoughts: Thoughts, relaxation: Relaxation, passed: ThoughtPass
) -> Float[Tensor, "N A S n K"]:
    """p of every thought token, with a graph; heads' rows are read in chunks, again in the backward pass."""
    hidden, ids = passed.thought_hidden.flatten(0, 3), thoughts.support.ids.flatten(0, 3)
    size = chunk_length(ids.shape[-1] * hidden.shape[-1])
    if len(ids) <= size:
        kept = model.policy.kept_logits(hidden, ids)
    else:
        pieces = zip(hidden.split(size), ids.split(size), strict=True)
        kept = torch.cat([recomputed(model.policy.kept_logits, *piece) for piece in pieces])
    return relaxation.weights(kept.view_as(thoughts.support.ids), thoughts.support)


def _feedback(
    model: ThinkingLM, thoughts: Thoughts, adjoint: Float[Tensor, "N A S n D"]
) -> Float[Tensor, "N A S n K"]:
    """`(∂e/∂q)ᵀ λ`."""
    ids, fed = thoughts.support.ids, thoughts.fed
    return model.policy.feedback(ids.flatten(0, 3), fed.flatten(0, 3), adjoint.flatten(0, 3)).view_as(ids)
