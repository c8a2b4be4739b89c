"""Bytes that one process sends in a training step, by engine and method, computed from shapes alone.

A ring of n processes moves `(n − 1)/n` of an array for an all-gather or a reduce-scatter, and twice that for an
all-reduce. Gradients are reduced once a step. ZeRO-3 and FSDP2 gather the weights for every pass over the layers,
forwards or backwards, and a rollout is T passes: one for each token of the batch.
Left out: scalars that processes agree on, broadcasts of buffers, latency, and overlap with computation.
"""

from dataclasses import dataclass
from math import ceil

from softrl.estimators.blocks import RECORD_BLOCK
from softrl.models.shape import AdapterShape, ModelShape
from softrl.studies.step_plan import Precision, Sharding, StepPlan

BLOCK_SWEEPS = 7  # of a block, measured on SmolLM2-135M with an entropy bound (`softrl bench blocks`, LOG.md)


@dataclass(frozen=True)
class Passes:
    """How often a step goes through the layers, forwards and backwards, by phase."""

    rollout: int
    cotangents: int
    surrogate: int

    @property
    def total(self) -> int:
        return self.rollout + self.cotangents + self.surrogate


@dataclass(frozen=True)
class Communication:
    """Bytes that a process sends in a step."""

    gradients: int
    rollout: int
    cotangents: int
    surrogate: int

    @property
    def total(self) -> int:
        return self.gradients + self.rollout + self.cotangents + self.surrogate


def passes(plan: StepPlan, hops: int = 2, adapter: bool = False) -> Passes:
    """Passes of a step under an engine that shards parameters: there phases 2 and 3 share none.

    Args:
        plan: the micro-batch and its method.
        hops: sweeps of "parallel".
        adapter: the reference is the policy without its adapter, so it is gathered as well; a copy is whole.
    """
    last = max(plan.num_steps - 1, 1)
    recorded = 1 + ceil(last / RECORD_BLOCK)
    cotangents = {
        "parallel": 1 + hops,
        "blocked": recorded + ceil(last / plan.block_length) * (1 + min(BLOCK_SWEEPS, plan.block_length)),
        "sequential": recorded + 2 * last,
        "autograd": 2 * plan.num_steps,
        "score_function": 0,
    }[plan.method]
    if plan.has_kl and adapter:
        cotangents += 1 if plan.method == "score_function" else 2
    surrogate = 3 if plan.checkpointed else 2
    return Passes(plan.num_steps, cotangents, surrogate)


def communication(
    shape: ModelShape,
    plan: StepPlan,
    precision: Precision,
    sharding: Sharding,
    adapter: AdapterShape | None = None,
    hops: int = 2,
) -> Communication:
    """Bytes sent by each process.

    Args:
        shape, plan, precision, sharding, adapter: as of `footprint`.
        hops: sweeps of "parallel".
    """
    part = (sharding.num_processes - 1) / sharding.num_processes
    trained = shape.num_parameters if adapter is None else adapter.num_parameters
    gradient_bytes = trained * precision.trained
    if not sharding.shards_parameters:  # an all-reduce, or ZeRO's reduce-scatter and all-gather of what was updated
        return Communication(int(2 * part * gradient_bytes), 0, 0, 0)
    own = trained * precision.compute if adapter is not None else 0
    gathered = part * (shape.num_parameters * precision.compute + own)
    count = passes(plan, hops, adapter is not None)
    by_phase = (int(gathered * number) for number in (count.rollout, count.cotangents, count.surrogate))
    return Communication(int(part * gradient_bytes), *by_phase)
