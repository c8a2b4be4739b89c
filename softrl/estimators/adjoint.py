"""Phase 2: the total cotangents of a soft rollout's weights and fed embeddings.

Solvers: `parallel` (sweeps on one forward pass), `blocked` and `sequential` (blocks of steps, last to first, flat
memory), `autograd` (plain backpropagation through the loop; the reference). `system.py` states what they solve.
"""

from dataclasses import replace

from softrl.estimators.blocks import blocked
from softrl.estimators.sweeps import parallel
from softrl.estimators.system import AdjointSettings, Cotangents, ForwardPass, Objective, System
from softrl.estimators.unrolled import unrolled
from softrl.models.policy import Policy, evaluating, frozen
from softrl.tokens.relaxation import Relaxation
from softrl.types import Rollout


def chosen_method(settings: AdjointSettings, relaxation: Relaxation, num_steps: int, replayable: bool) -> str:
    """What "auto" stands for, by the measurements of `softrl bench blocks` and `softrl bench rollout` (LOG.md).

    - "parallel" with `hops`, and where a state cannot be replayed: nothing else can do it;
    - "parallel" for one-hot tokens, which settle within a dozen sweeps however long the rollout;
    - "sequential" for mixtures without an entropy bound: their sweeps grow with T, and the 12 to 19 of a block
      cost more than going through its steps one by one;
    - with a bound, "parallel" up to one block and "blocked" beyond: some seven sweeps, at the memory of one block.
    """
    if settings.method != "auto":
        return settings.method
    if settings.hops is not None or relaxation.feeds_one_hot or not replayable:
        return "parallel"
    if relaxation.max_entropy_nats is None:
        return "sequential"
    return "blocked" if num_steps > settings.block_length else "parallel"


def solve_cotangents(
    policy: Policy,
    rollout: Rollout,
    relaxation: Relaxation,
    objective: Objective,
    settings: AdjointSettings,
    forward: ForwardPass | None = None,
) -> Cotangents:
    """Total cotangents of a recorded rollout.

    Args:
        policy: the model that made the rollout, at the same parameters.
        rollout: phase 1's record.
        relaxation: the one that made it.
        objective: J [N] of the fed weights and the hidden states; everything that J depends on.
        settings: method and its numbers.
        forward: a forward pass over this rollout that "parallel" may differentiate, for instance the one that phase 3
            differentiates too; left out, "parallel" runs one of its own.
    Raises:
        ValueError: method "blocked" or "sequential" on an architecture whose state can be neither recorded nor
            replayed.
    """
    method = chosen_method(settings, relaxation, rollout.mask.shape[1], policy.is_replayable)
    settings = replace(settings, method=method)
    with evaluating(policy.model), frozen(policy.model):
        if method == "autograd":
            return unrolled(policy, rollout, relaxation, objective, settings)
        if method in ("blocked", "sequential"):
            return blocked(policy, rollout, relaxation, objective, settings)
        if forward is None:
            forward = ForwardPass.of(policy, rollout)
        system = System.linearised(policy, rollout, relaxation, settings, objective, forward.hidden)
        return parallel(system, forward)
