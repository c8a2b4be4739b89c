"""`softrl doctor`: its verdicts on machines that we make up, what it prints, and how it ends."""

import json
from dataclasses import replace
from importlib import metadata

import pytest

from softrl.cli import doctor, machine, main
from softrl.cli.machine import Machine, Package

BARE = Machine("3.11", (), 2, 24 * 10**9, 20 * 10**9, 0, True)
EIGHT = replace(BARE, gpus=("H100",) * 8, device_memory=80 * 10**9)


@pytest.fixture
def with_nccl(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)


def verdicts(here):
    return {check.name: check for check in machine.engine_checks(here)}


def without(monkeypatch, *missing):
    real = metadata.version

    def version(name):
        if name in missing:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_without_a_gpu_only_the_engines_of_processors_run():
    found = verdicts(BARE)
    assert {name for name, check in found.items() if check.runs} == {"cpu", "ddp_cpu"}
    assert found["ddp"].reason == "no GPU (on a CPU: ddp_cpu)"
    assert found["ddp_cpu"].reason == "2 processes"


def test_with_gpus_all_run_and_fewer_of_them_need_an_option(with_nccl):
    assert all(check.runs for check in verdicts(EIGHT).values())
    assert verdicts(EIGHT)["fsdp2"].reason == "8 processes"
    two = verdicts(replace(EIGHT, gpus=("H100",) * 2))
    assert two["zero3"].runs
    assert two["zero3"].reason == "with --num_processes 2: the file says 8"


def test_what_stands_in_the_way_is_named(with_nccl, monkeypatch):
    old = verdicts(replace(EIGHT, bf16=False))
    assert not old["ddp"].runs
    assert "no bfloat16" in old["ddp"].reason
    without(monkeypatch, "deepspeed")
    found = verdicts(EIGHT)
    assert found["zero2"].reason == "deepspeed is not installed: pip install 'softrl[deepspeed]'"
    assert found["fsdp2"].runs
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    assert verdicts(EIGHT)["fsdp2"].reason == "this torch is built without NCCL"


def test_packages_that_are_missing_name_what_brings_them(monkeypatch):
    without(monkeypatch, "deepspeed", "vllm", "peft")
    found = {package.name: package for package in machine.packages()}
    assert found["torch"].version == metadata.version("torch")
    assert found["deepspeed"] == Package("deepspeed", None, False, "ZeRO", "pip install 'softrl[deepspeed]'")
    assert found["vllm"].version is None
    assert not found["vllm"].required
    assert found["peft"].version is None
    assert found["peft"].required


def test_a_missing_requirement_is_exit_1_before_anything_is_imported(monkeypatch, capsys):
    without(monkeypatch, "peft", "gguf")
    monkeypatch.setattr(machine, "machine", lambda: pytest.fail("looked at the devices"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out == "softrl doctor: missing: peft, gguf; pip install softrl\n"
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"missing": ["peft", "gguf"]}


def test_the_tables_and_the_same_as_json(monkeypatch, capsys):
    monkeypatch.setattr(machine, "machine", lambda: BARE)
    without(monkeypatch, "bitsandbytes")
    assert main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "no GPU; 2 cores; 24.00 GB of memory, 20.00 GB of it free; computes bfloat16" in lines
    assert "zero2 no no GPU (on a CPU: ddp_cpu)" in lines
    assert any("'trl[quantization]'" in line for line in lines), "square brackets are no markup here"
    assert any("SmolLM2-135M-Instruct" in line for line in lines)
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["missing"] == []
    assert {engine["name"]: engine["runs"] for engine in report["engines"]}["cpu"]
    assert report["machine"]["memory"] == 24 * 10**9
    assert "recipe" not in report


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--measure"], "--measure runs a recipe: give --config RECIPE"),
        (["--config", "nope"], "no recipe 'nope'"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(argv, message, capsys):
    assert main(["doctor", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"softrl doctor: {message}")
    assert captured.out == ""


def test_sizes_are_decimal():
    assert [doctor.size(number) for number in (20e9, 999e6, 1.5e9)] == ["20.00 GB", "999 MB", "1.50 GB"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "quickstart", "--lora_rr", "2"], "unknown key 'lora_rr'"),
        (["--config", "quickstart", "--accelerate_config", "zero9"], "no Accelerate configuration 'zero9'"),
        (["--config", "quickstart", "--num_processes", "0"], "--num_processes must be at least 1, got 0"),
        (["--config", "reviews/trl_rloo"], "trainer='trl_rloo' is TRL's own"),
        (["--config", "listwise/reviews"], "trainer='listwise' samples nothing"),
        (["--config", "quickstart", "--model_name_or_path", "/nowhere"], "model_name_or_path='/nowhere'"),
    ],
)
def test_bad_recipes_are_one_message_and_exit_2(argv, message, capsys):
    assert main(["doctor", *argv]) == 2
    captured = capsys.readouterr()
    assert f"softrl doctor: {message}" in captured.err
    assert captured.out == ""


@pytest.mark.slow
def test_a_recipe_fits_or_does_not(monkeypatch, capsys):
    monkeypatch.setattr(machine, "machine", lambda: BARE)
    argv = ["doctor", "--config", "quickstart", "--json"]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)["recipe"]
    assert report["plan"]["num_steps"] == 24
    assert report["plan"]["method"] == "parallel"
    assert report["plan"]["prompt_length"] > 8, "the prefix counts"
    assert report["peak"] == max(report["phases"].values())
    assert report["items"]["rewards and judge"]["rollout"] > 90e6
    assert report["by_engine"]["zero3"] < report["by_engine"]["ddp"]
    monkeypatch.setattr(machine, "machine", lambda: replace(BARE, free_memory=report["peak"] - 1))
    assert main(argv) == 1
    capsys.readouterr()
    both = replace(BARE, free_memory=report["peak"] * 3 // 2)
    monkeypatch.setattr(machine, "machine", lambda: both)
    assert main(["doctor", "--config", "quickstart"]) == 0
    assert "It fits" in capsys.readouterr().out
    assert main(["doctor", "--config", "quickstart", "--accelerate_config", "ddp_cpu"]) == 1
    assert "It does NOT fit" in capsys.readouterr().out, "two processes on one machine take twice as much"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["--config", "reviews/rloo"], {"method": "score_function"}),
        (["--config", "quickstart", "--cotangent_method", "sequential"], None),
        (["--relaxation", "gumbel_softmax"], {"method": "sequential", "has_kl": True, "states_per_parameter": 2.0}),
        (["--relaxation", "gumbel_softmax", "--max_entropy_nats", "1.0", "--max_completion_length", "64"],
         {"method": "blocked", "block_length": 32}),
        (["--beta", "0", "--optim", "sgd", "--gradient_accumulation_steps", "2", "--gradient_checkpointing", "true"],
         {"method": "parallel", "has_kl": False, "states_per_parameter": 0.0, "accumulates": True,
          "checkpointed": True}),
    ],
)  # fmt: skip
def test_plans_follow_the_recipe(keys, expected, tmp_path, capsys):
    status = main(["doctor", "--json", *keys, "--output_dir", str(tmp_path), "--num_train_prompts", "8"])
    captured = capsys.readouterr()
    if expected is None:
        assert status == 2
        assert "hops" in captured.err
        return
    plan = json.loads(captured.out)["recipe"]["plan"]
    assert {key: plan[key] for key in expected} == expected
