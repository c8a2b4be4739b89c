"""The blocked solver: blocks of steps from the last to the first, sweeps inside each.

Each block is recomputed from the recorded state of the steps before it, with a graph of its own; what it asks of that
state is booked for the blocks still to come. So the activations are those of one block, and the number of sweeps is at
most the block's length, whatever T. Blocks of one step need no second sweep: that is `sequential`, the adjoint method
of optimal control. Sweeps after the first propagate only the change of the cotangents, which keeps the booking exact.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from softrl.estimators.system import (
    AdjointSettings,
    Cotangents,
    Objective,
    System,
    clipped,
    recorded_embeds,
    relative_change,
)
from softrl.models.policy import Policy
from softrl.models.state import ReplayableState
from softrl.tokens.relaxation import Relaxation
from softrl.types import Rollout

RECORD_BLOCK = 16  # steps recorded at a time: keeps the recording pass's activations flat in T


def blocked(
    policy: Policy, rollout: Rollout, relaxation: Relaxation, objective: Objective, settings: AdjointSettings
) -> Cotangents:
    """Solve block by block; `settings.method` "sequential" means blocks of one step.

    Raises:
        ValueError: the architecture's state can be neither recorded nor replayed.
    """
    length = 1 if settings.method == "sequential" else settings.block_length
    embeds = recorded_embeds(policy, rollout)
    state, hidden = _recorded(policy, rollout, embeds, settings.method)
    system = System.linearised(policy, rollout, relaxation, settings, objective, hidden)
    state.start_replay()
    adjoint, weights = torch.zeros_like(embeds), system.direct.clone()
    residual, passes, last = 0.0, 0, embeds.shape[1] - 1
    for stop in range(last, 0, -length):
        start = max(0, stop - length)
        with torch.enable_grad():
            leaf = embeds[:, start:stop].detach().requires_grad_()
            replayed = policy.replay(state, start, leaf)
        found, block_residual, sweeps = _block(system, state, leaf, replayed, weights[:, stop : stop + 1], start)
        adjoint[:, start:stop] = found
        weights[:, start:stop] += system.feedback(found, start)
        residual, passes = max(residual, block_residual), passes + sweeps * (stop - start)
    return Cotangents(weights, adjoint, system.by_hidden, residual, passes / max(last, 1))


def _recorded(
    policy: Policy, rollout: Rollout, embeds: Float[Tensor, "N T D"], method: str
) -> tuple[ReplayableState, Float[Tensor, "N T D"]]:
    """The state after the rollout, and the hidden states on the way."""
    with torch.no_grad():
        first, state = policy.begin(rollout.prompts, 1, capacity=embeds.shape[1])
        if not isinstance(state, ReplayableState):
            raise ValueError(
                f"method={method!r} needs a state that can be replayed (keys and values, or a recurrent step); "
                f"{type(policy.causal_lm).__name__} keeps neither. Use method='parallel'"
            )
        hidden = [first[:, None]]
        for piece in embeds[:, :-1].split(RECORD_BLOCK, dim=1):
            if piece.shape[1]:
                hidden.append(policy.advance(state, piece))
    return state, torch.cat(hidden, 1)


def _block(
    system: System,
    state: ReplayableState,
    embeds: Float[Tensor, "N L D"],
    hidden: Float[Tensor, "N L D"],
    after_block: Float[Tensor, "N 1 K"],
    start: int,
) -> tuple[Float[Tensor, "N L D"], float, int]:
    """λ of the steps from `start` on, given all later ones; its last residual and the number of sweeps.

    Embedding t predicts step t+1, so a block's hidden states belong to the steps one later. Of these only the last
    one's total cotangent is known, `after_block`.
    """
    length, settings = embeds.shape[1], system.settings
    after = slice(start + 1, start + 1 + length)
    weights = torch.cat([system.direct[:, after][:, :-1], after_block], 1)
    cotangents = system.by_hidden[:, after] + system.pulled(weights, start + 1)
    raw = state.pull(hidden, embeds, cotangents.to(hidden.dtype), is_last=length == 1)
    found = clipped(raw, settings.adjoint_clip)
    change, residual, sweeps = found, 0.0, 1
    while sweeps < length:
        increment = torch.zeros_like(weights)
        increment[:, :-1] = system.feedback(change[:, 1:], start + 1)
        cotangents = system.pulled(increment, start + 1)
        is_last = sweeps + 1 == length
        raw = raw + state.pull(hidden, embeds, cotangents.to(hidden.dtype), with_later=False, is_last=is_last)
        new = clipped(raw, settings.adjoint_clip)
        residual = system.policy.largest(relative_change(new, found))
        change, found, sweeps = new - found, new, sweeps + 1
        if residual <= system.tol:
            return found, residual, sweeps
    return found, 0.0, sweeps  # as many sweeps as steps: exact
