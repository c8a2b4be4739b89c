"""Two ranks under every engine: resumed exactly, steps that are not finite left out, exported for everybody."""

import pytest
import torch
from engines.ranks import outcomes
from helpers import llama
from trainers.test_exports import IDS, exported

pytestmark = pytest.mark.slow  # imports trl, forks ranks

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
# DeepSpeed's ZeRO-3 adds up in another order in its first steps, while it learns in which order parameters are used.
RESUME_TOLERANCE = {"zero3": 1e-6}
SETTINGS = {
    "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3,
    "per_device_train_batch_size": 4, "lr_scheduler_type": "linear",
}  # fmt: skip
CONSTANT = {"lr_scheduler_type": "constant"}  # DeepSpeed holds a schedule at a step that it left out, others do not
ALONE = {"engine": "single", "world": 1, "settings": {**SETTINGS, "per_device_train_batch_size": 8}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")

    def checkpoint(run):
        return str(folder / run / "checkpoint-2")

    cases = [{"name": "alone-nan", **ALONE, "poisoned": 2, "settings": {**ALONE["settings"], **CONSTANT}}]
    for engine in ENGINES:
        common = {"engine": engine, "settings": SETTINGS}
        cases += [
            {"name": f"{engine}", **common, "folder": f"{engine}-run", "export": True},
            {
                "name": f"{engine}-resumed",
                **common,
                "folder": f"{engine}-again",
                "resume": checkpoint(f"{engine}-run"),
            },
            {"name": f"{engine}-nan", "engine": engine, "settings": {**SETTINGS, **CONSTANT}, "poisoned": 2},
        ]
    lora = {"engine": "zero3", "lora": True, "settings": SETTINGS}
    cases += [
        {"name": "lora", **lora, "folder": "lora-run"},
        {"name": "lora-resumed", **lora, "folder": "lora-again", "resume": checkpoint("lora-run")},
        {"name": "ddp-to-one", **ALONE, "folder": "one", "resume": checkpoint("ddp-run")},
        {"name": "zero2-to-ddp", "engine": "ddp", "settings": SETTINGS, "resume": checkpoint("zero2-run")},
        {"name": "zero2-to-one", **ALONE, "engine": "zero2", "resume": checkpoint("zero2-run")},
    ]
    return folder, outcomes(folder, cases)


def difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("run", [*ENGINES, "lora"])
def test_resuming_gives_the_same_losses(ranks, run):
    straight, resumed = ranks[1](run), ranks[1](f"{run}-resumed")
    tolerance = RESUME_TOLERANCE.get("zero3" if run == "lora" else run, 0.0)
    assert straight["world"] == resumed["world"] == 2
    assert len(set(straight["losses"])) == 4
    assert resumed["losses"] == pytest.approx(straight["losses"], abs=tolerance, rel=0.0)
    assert difference(straight["parameters"], resumed["parameters"]) <= tolerance


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_is_not_finite_on_one_rank_is_taken_by_none(ranks, engine):
    alone, found = ranks[1]("alone-nan")["parameters"], ranks[1](f"{engine}-nan")["parameters"]
    assert all(value.isfinite().all() for value in found.values())
    assert difference(alone, found) < 1e-5
    assert difference(alone, ranks[1](engine)["parameters"]) > 1e-4  # with the step they are others


def test_a_replicated_run_goes_on_with_another_number_of_processes(ranks):
    one, two = ranks[1]("ddp-to-one"), ranks[1]("ddp")
    assert (one["world"], two["world"]) == (1, 2)
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-5)
    assert difference(one["parameters"], two["parameters"]) < 1e-5


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("zero2-to-ddp", "was written under zero2 and this run is replicated"),
        ("zero2-to-one", "was written by 2 processes under zero2, each with its part"),
    ],
)
def test_a_sharded_run_does_not_and_says_so(ranks, case, message):
    assert message in (ranks[0] / f"{case}-0.txt").read_text()


def test_what_an_engine_saves_loads_without_softrl(ranks):
    folders = [ranks[0] / f"{engine}-model" for engine in ENGINES]
    for engine, (logits, text) in zip(ENGINES, exported(folders, ranks[0] / "out"), strict=True):
        model = llama().double()
        model.load_state_dict(ranks[1](engine)["parameters"])
        with torch.no_grad():
            torch.testing.assert_close(model(torch.tensor(IDS)).logits, logits, rtol=0.0, atol=1e-6)
        assert text.shape == (1, len(IDS[0]) + 4)
