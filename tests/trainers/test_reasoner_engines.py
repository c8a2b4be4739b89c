"""ReasonerTrainer on two ranks against one process: same parameters after three steps."""

import pytest
from engines.ranks import outcomes
from trainers.test_engines import TOLERANCE, check_engine, difference, logged

pytestmark = pytest.mark.slow  # imports trl, forks ranks

ROWS = 8  # a step
KINDS = {
    "rloo": {"objective": "rloo", "max_grad_norm": 1.0},
    "control": {"policy_weight": 0.0},  # parameters without a gradient, which DDP must not wait for
    "shared": {"objective": "reparameterised", "weight_groups": "AABA"},
}
PARITY = [("ddp", kind) for kind in KINDS] + [("zero2", "rloo")]


def case(engine, kind):
    world = 1 if engine == "single" else 2
    settings = {**KINDS[kind], "per_device_train_batch_size": ROWS // world}
    return {"name": f"{engine}-{kind}", "engine": engine, "method": "Reasoner", "world": world, "settings": settings}


SURROGATE = {"objective": "surrogate", "per_device_train_batch_size": ROWS // 2}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    cases = [case("single", kind) for kind in KINDS] + [case(*each) for each in PARITY]
    cases.append({"name": "surrogate", "method": "Reasoner", "settings": SURROGATE})
    return outcomes(tmp_path_factory.mktemp("ranks"), cases)


@pytest.mark.parametrize(("engine", "kind"), PARITY)
def test_two_ranks_give_the_parameters_of_one(ranks, engine, kind):
    alone, found = (ranks(case(each, kind)["name"]) for each in ("single", engine))
    check_engine(found, engine)
    assert difference(alone["parameters"], found["parameters"]) < TOLERANCE
    assert difference(alone["parameters"], alone["start"]) > 100 * TOLERANCE
    for name in ("loss", "nll", "base_nll", "reward", "reward_std", "mixing"):  # over all ranks
        assert logged(found, name) == pytest.approx(logged(alone, name), abs=TOLERANCE)


def test_ranks_fit_one_surrogate(ranks):
    first, second = (ranks("surrogate", rank) for rank in (0, 1))
    for name in ("surrogate", "parameters"):
        assert difference(first[name], second[name]) == 0.0
