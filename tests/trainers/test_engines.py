"""Two ranks under every engine against one process: same parameters after three steps, and what is refused."""

from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from engines.ranks import RANKED, outcomes

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
METHODS = {
    "SoftRollout": {},
    "Reinforce": {"num_generations": 2, "estimator": "rloo"},
    RANKED: {"beta": 1.0},  # so that it moves as far as the others
}
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

PPO = {"num_ppo_epochs": 2, "value_learning_rate": 0.05}
NO_TERMS = {"beta": 0.0, "entropy_coef": 0.0}
# Each process draws from its own buffer; here every update is on all of it, so one process does the same.
WHOLE_BUFFER = {
    **NO_TERMS, "discriminator_warmup_samples": 16, "discriminator_warmup_steps": 3, "discriminator_steps": 2,
    "discriminator_batch_size": 64, "discriminator_buffer_size": 64, "discriminator_width": 6,
    "discriminator_learning_rate": 0.01, "gradient_penalty": 0.0,
}  # fmt: skip
SAMPLED_BUFFER = {
    **WHOLE_BUFFER, "discriminator_batch_size": 4, "discriminator_buffer_size": 16, "gradient_penalty": 0.1,
    "per_device_eval_batch_size": 4,
}  # fmt: skip
GAN = {"reward": "discriminator", "rows": 16}
SPECIAL = {
    "no terms": {"lora": True, "settings": NO_TERMS},  # the head is called in a recomputed chunk alone
    "ppo": {"method": "PPO", "settings": PPO},
    # Without clipping: DeepSpeed clips policy and value head together.
    "ppo unclipped": {"method": "PPO", "settings": {**PPO, "max_grad_norm": 0.0}},
    "ppo lora": {"method": "PPO", "lora": True, "settings": {**PPO, "max_grad_norm": 0.0, "learning_rate": 0.01}},
    "gan": {**GAN, "method": "TextGAN", "settings": WHOLE_BUFFER},
    "reinforce gan": {**GAN, "method": "ReinforceGAN", "settings": {**WHOLE_BUFFER, **METHODS["Reinforce"]}},
    "classifier": {"reward": "classifier"},
    "bf16": {"bf16": True},
    "basis-aware": {
        "settings": {
            "basis_aware": 0.06, "basis_aware_rule": "tau", "basis_aware_directions": 8, "basis_aware_candidates": 6,
        },
    },
    # No case of one process has these settings:
    "checkpointing": {"settings": {"gradient_checkpointing": True}},
    "classifier, checkpointing": {"reward": "classifier", "settings": {"gradient_checkpointing": True}},
    "chunks": {
        "settings": {"surrogate_chunks": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    },
    "ppo in parts": {"method": "PPO", "settings": {**PPO, "num_mini_batches": 2}},
    "gan of samples": {**GAN, "rows": 17, "method": "TextGAN", "settings": SAMPLED_BUFFER},
    "gan saved": {
        **GAN, "method": "TextGAN", "settings": {**SAMPLED_BUFFER, "save_strategy": "steps", "save_steps": 2},
    },
    "gan resumed": {**GAN, "method": "TextGAN", "settings": SAMPLED_BUFFER, "resume": "gan saved"},
}  # fmt: skip
SPECIAL_PARITY = [  # the engine, what it runs, and what one process runs
    ("zero3", "no terms", "no terms"),
    ("ddp", "ppo", "ppo"),
    ("fsdp2", "ppo", "ppo"),
    ("zero1", "ppo unclipped", "ppo unclipped"),
    ("zero3", "ppo unclipped", "ppo unclipped"),
    ("zero2", "ppo lora", "ppo lora"),
    ("ddp", "gan", "gan"),
    ("zero3", "gan", "gan"),
    ("zero2", "reinforce gan", "reinforce gan"),
    ("fsdp2", "reinforce gan", "reinforce gan"),
    ("ddp", "basis-aware", "basis-aware"),
    ("zero2", "basis-aware", "basis-aware"),
    ("ddp", "checkpointing", None),
    ("zero2", "checkpointing", None),
    *((engine, "chunks", None) for engine in ("ddp", "zero2", "zero3", "fsdp2")),
    ("zero3", "classifier, checkpointing", "classifier"),
    ("fsdp2", "classifier, checkpointing", "classifier"),
]
AGREEING = [("ddp", "ppo in parts"), ("zero3", "gan of samples")]
RESUMED = [("zero2", "gan saved"), ("zero2", "gan resumed")]
BF16_ENGINES = ("ddp", "zero2", "fsdp2")


def special(engine, what):
    """A case of `SPECIAL`; None is the plain one."""
    if what is None:
        return case(engine)
    changes, plain = dict(SPECIAL[what]), case(engine)
    if "resume" in changes:
        changes["resume"] = f"{special(engine, changes['resume'])['name']}-run/checkpoint-2"
    settings = plain["settings"] | changes.get("settings", {})
    return {**plain, **changes, "name": f"{engine}-{what.replace(' ', '-')}", "settings": settings}


def special_cases():
    found = [(engine, what) for engine, what, _ in SPECIAL_PARITY] + AGREEING + RESUMED
    found += [("single", alone) for alone in dict.fromkeys(alone for *_, alone in SPECIAL_PARITY) if alone]
    found += [(engine, "bf16") for engine in ("single", *BF16_ENGINES)] + [("fsdp2", "basis-aware")]
    return [special(*each) for each in found]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the ranks of every case wrote: one process imports once and forks them all."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [case("single", method, lora) for method in METHODS for lora in (False, True)]
    cases += [case(*settings) for settings in PARITY]
    cases += [case(engine, naive=True) for engine in ("single", "zero2")] + special_cases()
    for each in cases:
        if each.get("resume"):
            each["resume"] = str(folder / each["resume"])
    return outcomes(folder, cases)


def difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def logged(found, key):
    return [row[key] for row in found["logs"] if key in row]


def check_engine(found, engine):
    assert found["world"] == 2
    assert found["engine"] == EXPECTED[engine][0]
    assert found["wrapper"].startswith(EXPECTED[engine][1])


def check_parity(alone, found, engine):
    check_engine(found, engine)
    assert (alone["world"], alone["engine"]) == (1, "NO")
    assert difference(alone["parameters"], found["parameters"]) < TOLERANCE
    for name in ("reward", "loss", "rewards/margins"):  # over all ranks
        assert logged(found, name) == pytest.approx(logged(alone, name), abs=TOLERANCE)


@pytest.mark.parametrize(("engine", "method", "lora", "accumulation"), PARITY)
def test_two_ranks_give_the_parameters_of_one_process(ranks, engine, method, lora, accumulation):
    alone = ranks(case("single", method, lora)["name"])
    check_parity(alone, ranks(case(engine, method, lora, accumulation)["name"]), engine)
    assert difference(alone["parameters"], alone["start"]) > 100 * TOLERANCE


@pytest.mark.parametrize(("engine", "what", "alone"), SPECIAL_PARITY)
def test_so_they_do_with_other_methods_and_settings(ranks, engine, what, alone):
    """Where a value head or a discriminator is trained beside the policy, they have that of one process as well."""
    alone, found = ranks(special("single", alone)["name"]), ranks(special(engine, what)["name"])
    check_parity(alone, found, engine)
    if what.startswith("ppo"):
        head = next(value for name, value in found["parameters"].items() if "value_head.linear.weight" in name)
        assert head.abs().max() > 100 * TOLERANCE  # it starts from zero
    if what.endswith("gan"):
        check_discriminators(ranks, special(engine, what), alone)
        for name in ("loss", "accuracy", "accuracy_unseen"):
            own = logged(alone, f"discriminator/{name}")
            assert logged(found, f"discriminator/{name}") == pytest.approx(own, abs=TOLERANCE)


def check_discriminators(ranks, case, alone=None):
    first, second = (ranks(case["name"], rank)["discriminator"] for rank in (0, 1))
    assert difference(first, second) == 0.0
    assert difference(first, ranks(case["name"])["untrained"]) > 100 * TOLERANCE
    if alone is not None:
        assert difference(first, alone["discriminator"]) < TOLERANCE


@pytest.mark.parametrize(("engine", "what"), AGREEING)
def test_processes_agree_where_one_would_do_something_else(ranks, engine, what):
    """PPO's parts are of each process's own sequences, and a discriminator's batches of its own buffer."""
    found = ranks(special(engine, what)["name"])
    check_engine(found, engine)
    assert all(value.isfinite().all() for value in found["parameters"].values())
    assert difference(found["parameters"], found["start"]) > 100 * TOLERANCE
    if "gan" in what:
        check_discriminators(ranks, special(engine, what))
    else:
        assert difference(found["parameters"], ranks(special(engine, what)["name"], 1)["parameters"]) == 0.0


def test_a_text_gan_goes_on_with_its_discriminator_under_deepspeed(ranks):
    """DeepSpeed's checkpoints are loaded by other means than the others."""
    whole, resumed = (ranks(special(*each)["name"]) for each in RESUMED)
    check_engine(resumed, "zero2")
    assert difference(whole["parameters"], resumed["parameters"]) == 0.0
    assert difference(whole["discriminator"], resumed["discriminator"]) == 0.0
    assert len(resumed["draws"]) == 1  # of the last step


@pytest.mark.parametrize("engine", BF16_ENGINES)
def test_bfloat16_takes_the_steps_of_float32_roughly(ranks, engine):
    """One process under autocast is 0.07 away from its own steps in float32, relatively; ZeRO rounds weights, too.

    An unrelated step of the same length would be 1.4 away.
    """
    full, alone = ranks(case("single")["name"]), ranks(special("single", "bf16")["name"])
    found = ranks(special(engine, "bf16")["name"])
    check_engine(found, engine)
    assert relative_distance(full, alone) > 0.01  # it is another computation
    assert relative_distance(full, found) < 0.2
    if engine == "ddp":  # the same kernels on halves of the batch
        assert relative_distance(alone, found) < 0.05


def test_basis_aware_truncation_is_of_engines_that_keep_weights_whole(ranks):
    accepted = logged(ranks(special("ddp", "basis-aware")["name"]), "basis_aware/accepted")
    assert all(0.0 < count < 6.0 for count in accepted)
    alone = logged(ranks(special("single", "basis-aware")["name"]), "basis_aware/accepted")
    assert accepted == pytest.approx(alone, abs=TOLERANCE)
    with pytest.raises(AssertionError, match="needs the whole output embedding on every process, and FSDP shards it"):
        ranks(special("fsdp2", "basis-aware")["name"])


def relative_distance(one, other):
    """Of the changes that training has made, all parameters together."""
    names = sorted(one["parameters"].keys() & other["parameters"].keys())
    changes = [
        torch.cat([(each["parameters"][name] - each["start"][name]).flatten() for name in names])
        for each in (one, other)
    ]
    return ((changes[0] - changes[1]).norm() / changes[0].norm()).item()


def test_ranks_draw_different_prompts_and_noise_and_the_same_ones_again(ranks):
    alone, again = ranks(case("single")["name"])["draws"], case("zero2")["name"]
    both = [ranks(case("ddp")["name"], rank)["draws"] for rank in (0, 1)]
    for step, whole in enumerate(alone):
        halves = [draws[step] for draws in both]
        assert sorted(halves[0]["prompts"] + halves[1]["prompts"]) == sorted(whole["prompts"])
        assert len(set(whole["prompts"])) == ROWS
        noise = torch.cat([half["noise"] for half in halves])
        assert len(set(noise.flatten().tolist())) == noise.numel()
        order = [whole["prompts"].index(prompt) for half in halves for prompt in half["prompts"]]
        assert torch.equal(noise, whole["noise"][order])
        for rank, half in enumerate(halves):
            other_run = ranks(again, rank)["draws"][step]
            assert other_run["prompts"] == half["prompts"]
            assert torch.equal(other_run["noise"], half["noise"])
            assert torch.equal(other_run["tokens"], half["tokens"])


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
