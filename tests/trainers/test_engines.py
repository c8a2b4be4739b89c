"""Two ranks under every engine against one process: same parameters after three steps, and what is refused."""

from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from engines.ranks import outcomes

from softrl.trainers import engines

pytestmark = pytest.mark.slow  # imports trl, forks ranks

TESTS = Path(__file__).parent.parent
TOLERANCE = 1e-5  # float32; two processes add gradients in another order
EXPECTED = {
    "ddp": ("MULTI_CPU", "DistributedDataParallel"),
    "zero1": ("DEEPSPEED", "DeepSpeedEngine"),
    "zero2": ("DEEPSPEED", "DeepSpeedEngine"),
    "zero3": ("DEEPSPEED", "DeepSpeedEngine"),
    "fsdp2": ("FSDP", "FSDP"),
}
METHODS = {"SoftRollout": {}, "Reinforce": {"num_generations": 2, "estimator": "rloo"}}
ROWS = 8  # a step


def case(engine, method="SoftRollout", lora=False, accumulation=1, naive=False):
    world = 1 if engine == "single" else 2
    rows = {"per_device_train_batch_size": ROWS // world // accumulation, "gradient_accumulation_steps": accumulation}
    name = f"{engine}-{method}-{'lora' if lora else 'full'}-{accumulation}{'-naive' if naive else ''}"
    return {
        "name": name, "engine": engine, "method": method, "lora": lora, "world": world, "naive": naive,
        "settings": {**METHODS[method], **rows},
    }  # fmt: skip


PARITY = [
    (engine, method, lora, accumulation)
    for engine in EXPECTED
    for method in METHODS
    for lora in (False, True)
    for accumulation in (1, 2)
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the ranks of every case wrote: one process imports once and forks them all."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [case("single", method, lora) for method in METHODS for lora in (False, True)]
    cases += [case(*settings) for settings in PARITY]
    cases += [case(engine, naive=True) for engine in ("single", "zero2")]
    return outcomes(folder, cases)


def difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize(("engine", "method", "lora", "accumulation"), PARITY)
def test_two_ranks_give_the_parameters_of_one_process(ranks, engine, method, lora, accumulation):
    alone = ranks(case("single", method, lora)["name"])
    found = ranks(case(engine, method, lora, accumulation)["name"])
    assert found["world"] == 2
    assert found["engine"] == EXPECTED[engine][0]
    assert found["wrapper"].startswith(EXPECTED[engine][1])
    assert (alone["world"], alone["engine"]) == (1, "NO")
    assert difference(alone["parameters"], found["parameters"]) < TOLERANCE
    assert found["rewards"] == pytest.approx(alone["rewards"], abs=TOLERANCE)  # metrics are over all ranks


def test_a_step_of_several_plain_backward_passes_fails_the_same_test(ranks):
    """One process may do so; under ZeRO every one of them is a step of its own."""
    alone = ranks(case("single")["name"])["parameters"]
    assert difference(alone, ranks(case("single", naive=True)["name"])["parameters"]) < TOLERANCE
    assert difference(alone, ranks(case("zero2", naive=True)["name"])["parameters"]) > 100 * TOLERANCE


class Alone:
    num_processes, distributed_type = 1, DistributedType.NO

    def unwrap_model(self, model):
        return model


def test_one_process_where_two_were_asked_for_is_an_error(monkeypatch):
    engines.check_engine(Alone())
    monkeypatch.setenv(engines.ASKED_FOR, "2")
    with pytest.raises(ValueError, match="2 processes were asked for and this run has 1"):
        engines.check_engine(Alone())


def test_another_engine_than_the_one_asked_for_is_an_error(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="the launch asked for FSDP and got NO"):
        engines.check_engine(Alone())


def test_two_processes_and_no_wrapper_are_an_error(monkeypatch):
    monkeypatch.setattr(Alone, "num_processes", 2)
    with pytest.raises(RuntimeError, match="2 processes train a Linear that no engine has wrapped"):
        engines.check_wrapped(Alone(), torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "softrl"], 2),
        (["/bin/accelerate", "launch", "--num_processes=3", "train.py"], 3),
        (["python", "/bin/accelerate", "launch", "--config_file", "CONFIG", "-m", "softrl"], 8),
        (["bash", "run.sh"], None),
    ],
)
def test_what_a_launch_asked_for_is_read_off_its_command_line(monkeypatch, words, count):
    config = TESTS.parent / "accelerate_configs" / "zero2.yaml"
    parent = type("Parent", (), {"cmdline": lambda self: [word.replace("CONFIG", str(config)) for word in words]})
    monkeypatch.setattr(engines.psutil, "Process", lambda: type("Self", (), {"parent": lambda self: parent()})())
    monkeypatch.delenv(engines.ASKED_FOR, raising=False)
    assert engines.processes_asked_for() == count
