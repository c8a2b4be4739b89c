"""Bytes sent in a step, against the volumes of ring collectives."""

from dataclasses import replace

import pytest

from softrl.models.shape import AdapterShape, ModelShape
from softrl.studies.communication import communication, passes
from softrl.studies.step_plan import Precision, Sharding, StepPlan

SHAPE = ModelShape(100, 8, 16, 2, 2, 1, 4, num_parameters=3000, num_embedding=800, num_head=0)
ADAPTER = AdapterShape(120, (("q_proj", 8),), 2)
BFLOAT16 = Precision(2, 2, 2)
PLAN = StepPlan(num_sequences=4, prompt_length=8, num_steps=65)


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2"])
def test_gradients_are_reduced_once(engine):
    sent = communication(SHAPE, PLAN, BFLOAT16, Sharding(engine, 8))
    assert sent.total == sent.gradients == 2 * 7 * 2 * 3000 // 8
    adapted = communication(SHAPE, PLAN, Precision(2, 4, 2), Sharding(engine, 8), ADAPTER)
    assert adapted.total == 2 * 7 * 4 * 120 // 8
    assert communication(SHAPE, PLAN, BFLOAT16, Sharding(engine, 1)).total == 0


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_sharded_weights_are_gathered_for_every_pass(engine):
    sent = communication(SHAPE, PLAN, BFLOAT16, Sharding(engine, 4), hops=2)
    whole = 3 * 2 * 3000 // 4
    assert sent.gradients == whole
    assert (sent.rollout, sent.cotangents, sent.surrogate) == (65 * whole, 3 * whole, 2 * whole)
    assert sent.total == (65 + 3 + 2 + 1) * whole


def test_passes_of_the_methods():
    """64 fed tokens: recorded in 1 + 4 passes of 16, replayed one by one or in two blocks."""
    assert passes(replace(PLAN, method="sequential")).cotangents == 5 + 2 * 64
    assert passes(replace(PLAN, method="blocked")).cotangents == 5 + 2 * (1 + 7)
    assert passes(replace(PLAN, method="blocked", block_length=4)).cotangents == 5 + 16 * (1 + 4)
    assert passes(replace(PLAN, method="score_function")).cotangents == 0
    assert passes(replace(PLAN, checkpointed=True)).surrogate == 3
    assert passes(replace(PLAN, has_kl=True), adapter=True).cotangents == 3 + 2
    assert passes(replace(PLAN, has_kl=True), adapter=False).cotangents == 3, "a copy is whole: nothing to gather"
    assert passes(PLAN).total == 65 + 3 + 2
