"""Plain backpropagation through the generation loop: what the solvers are held to. Memory grows with T."""

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.estimators.system import AdjointSettings, Cotangents, Objective, clipped
from softrl.models.policy import Policy
from softrl.models.state import DecodeState, ReplayableState
from softrl.tokens.relaxation import Relaxation
from softrl.types import Rollout


class _ClippedEdge(torch.autograd.Function):
    """Identity whose backward pass bounds the cotangent's norm."""

    @staticmethod
    def forward(ctx, embeds, bound):  # type: ignore[no-untyped-def]
        ctx.bound = bound
        return embeds.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return clipped(grad, ctx.bound), None


def _looped_hidden(policy: Policy, rollout: Rollout, state: DecodeState, embeds: list[Tensor]) -> Float[Tensor, "N D"]:
    """The newest hidden state inside the loop's graph; from the whole prefix where the state is not differentiable."""
    if isinstance(state, ReplayableState):
        return policy.advance(state, embeds[-1][:, None])[:, -1]
    not_fed = embeds[-1]  # `Policy.hidden` never feeds the last embedding it is given
    return policy.hidden(rollout.prompts, torch.stack([*embeds, not_fed], 1))[:, -1]


def unrolled(
    policy: Policy, rollout: Rollout, relaxation: Relaxation, objective: Objective, settings: AdjointSettings
) -> Cotangents:
    """Plain backpropagation through the loop, with the recorded support replayed; memory grows with T."""
    num_steps, gamma = rollout.mask.shape[1], settings.feedback_discount
    weights: list[Tensor] = []
    fed: list[Tensor] = []
    embeds: list[Tensor] = []
    bounded: list[Tensor] = []  # what is really fed: the same values, their cotangents bounded
    first, state = policy.begin(rollout.prompts, 1, capacity=num_steps, growing=True)
    hidden: list[Tensor] = [first]
    with torch.enable_grad():
        for step in range(num_steps):
            if step > 0:
                hidden.append(_looped_hidden(policy, rollout, state, bounded))
            support = rollout.support.at(slice(None), step)
            weights.append(relaxation.weights(policy.kept_logits(hidden[-1], support.ids).requires_grad_(), support))
            # dq := dp: the value is q's, the derivative p's
            fed.append(relaxation.fed(weights[-1], support).detach() + weights[-1] - weights[-1].detach())
            embed = policy.embed_soft(support.ids, fed[-1])
            embeds.append(embed.detach() + gamma * (embed - embed.detach()))
            bounded.append(_ClippedEdge.apply(embeds[-1], settings.adjoint_clip))
        read = [value.clone().requires_grad_() for value in hidden]  # by the direct terms, not by the tokens
        total = objective(torch.stack(fed, 1), torch.stack(read, 1)).sum()
    wanted = weights + embeds + read
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    filled = [torch.zeros_like(value) if grad is None else grad for value, grad in zip(wanted, grads, strict=True)]
    by_weights, by_embeds, by_read = (torch.stack(filled[i * num_steps : (i + 1) * num_steps], 1) for i in range(3))
    return Cotangents(by_weights, by_embeds, by_read, residual=0.0, sweeps=1.0)
