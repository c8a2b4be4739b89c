"""QuietSTaRTrainer on two ranks against one process: same parameters after three steps; what is refused."""

import pytest
from engines.ranks import outcomes
from trainers.test_engines import TOLERANCE, check_engine, difference, logged

pytestmark = pytest.mark.slow  # imports trl, forks ranks

ROWS = 8  # a step
KINDS = {
    "reinforce": {},
    "rloo": {"estimator": "rloo", "think_every": 2, "max_grad_norm": 1.0},
    # All ids are kept: with fewer, a tie of the last two in float32 may keep another one. Small steps: larger ones of
    # this steep model raise rounding above 1e-5; in float64 parts of a step agree to 1e-10 (`test_quietstar_trainer`).
    "soft": {"estimator": "soft", "relaxation": "gumbel_softmax", "top_k": 23, "learning_rate": 0.002},
    "surrogate": {"reward_surrogate": True, "surrogate_spread": 100.0},
    "mixture": {"estimator": "listwise", "proposal": "mixture", "relative_to_prior": True},
    "trice": {"estimator": "trice"},
    "none": {"thoughts": "none"},
    "saved": {"reward_surrogate": True, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2},
}
PARITY = [
    ("ddp", "reinforce", False, 1), ("ddp", "reinforce", False, 2), ("ddp", "reinforce", True, 1),
    ("single", "reinforce", False, 2), ("single", "soft", False, 2), ("ddp", "rloo", False, 1),
    ("ddp", "soft", False, 1), ("ddp", "soft", True, 2), ("ddp", "mixture", False, 1),
    ("ddp", "trice", False, 1), ("ddp", "none", False, 1),
    ("zero1", "reinforce", False, 1), ("zero1", "rloo", False, 2), ("zero2", "reinforce", False, 1),
    ("zero2", "reinforce", True, 2), ("zero2", "mixture", False, 1),
]  # fmt: skip
SURROGATES = ("ddp", "zero2")
REFUSED = {
    ("zero3", "reinforce"): "QuietSTaRTrainer runs alone, under DDP and under ZeRO-1 and 2",
    ("fsdp2", "reinforce"): "QuietSTaRTrainer runs alone, under DDP and under ZeRO-1 and 2",
    ("zero2", "soft"): "estimator='soft' differentiates a pass twice, which DeepSpeed does not allow",
}


def case(engine, kind, lora=False, accumulation=1, **changes):
    world = 1 if engine == "single" else 2
    rows = {"per_device_train_batch_size": ROWS // world // accumulation, "gradient_accumulation_steps": accumulation}
    name = f"{engine}-{kind}-{'lora' if lora else 'full'}-{accumulation}{'-resumed' if changes else ''}"
    return {
        "name": name, "engine": engine, "method": "QuietSTaR", "lora": lora, "world": world,
        "settings": {**KINDS[kind], **rows}, **changes,
    }  # fmt: skip


def resumed(engine):
    return case(engine, "saved", resume=f"{case(engine, 'saved')['name']}-run/checkpoint-2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    alone = dict.fromkeys((kind, lora) for _, kind, lora, _ in PARITY)
    cases = [case("single", *each) for each in alone] + [case(*each) for each in PARITY]
    cases += [case(*each) for each in REFUSED] + [case(engine, "surrogate") for engine in ("single", *SURROGATES)]
    for engine in ("ddp", "zero2"):
        again = resumed(engine)
        cases += [case(engine, "saved"), {**again, "resume": str(folder / again["resume"])}]
    return outcomes(folder, cases)


@pytest.mark.parametrize(("engine", "kind", "lora", "accumulation"), PARITY)
def test_two_ranks_or_two_parts_give_the_parameters_of_one(ranks, engine, kind, lora, accumulation):
    alone = ranks(case("single", kind, lora)["name"])
    found = ranks(case(engine, kind, lora, accumulation)["name"])
    if engine != "single":
        check_engine(found, engine)
    assert difference(alone["parameters"], found["parameters"]) < TOLERANCE
    assert difference(alone["parameters"], alone["start"]) > 100 * TOLERANCE
    for name in ("loss", "base_nll", "nll", "reward", "mixing"):  # over all ranks
        assert logged(found, name) == pytest.approx(logged(alone, name), abs=TOLERANCE)


@pytest.mark.parametrize("engine", SURROGATES)
def test_ranks_fit_one_surrogate(ranks, engine):
    """Each draws bootstraps for its own thoughts, so that one process fits another one."""
    first, second = (ranks(case(engine, "surrogate")["name"], rank) for rank in (0, 1))
    check_engine(first, engine)
    for name in ("surrogate", "parameters"):
        assert difference(first[name], second[name]) == 0.0
    alone = ranks(case("single", "surrogate")["name"])
    assert 0.0 < difference(alone["surrogate"], first["surrogate"]) < 0.01
    assert difference(alone["parameters"], first["parameters"]) < 0.05


@pytest.mark.parametrize(("engine", "kind"), REFUSED)
def test_engines_that_it_cannot_run_under_are_refused(ranks, folder, engine, kind):
    for rank in range(2):
        said = (folder / f"{case(engine, kind)['name']}-{rank}.txt").read_text()
        assert said.splitlines()[-1].startswith("ValueError: ")
        assert REFUSED[engine, kind] in said


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_run_goes_on_from_a_checkpoint_of_two_ranks(ranks, engine):
    whole, again = (ranks(each["name"]) for each in (case(engine, "saved"), resumed(engine)))
    assert difference(whole["parameters"], again["parameters"]) == 0.0
    assert difference(whole["surrogate"], again["surrogate"]) == 0.0
    assert logged(again, "nll") == logged(whole, "nll")
