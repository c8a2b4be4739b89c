"""Real launches of two processes: the quickstart's recipe under DDP and DeepSpeed, and launches that are refused."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from softrl.cli import launch

TESTS = Path(__file__).parent.parent
CONFIGS = TESTS.parent / "accelerate_configs"
SHORT = (
    "--max_steps", "2", "--per_device_train_batch_size", "2", "--max_completion_length", "3", "--num_train_prompts",
    "16", "--num_eval_prompts", "4", "--dtype", "float32", "--bf16", "false", "--judge", "none", "--lora_r", "2",
)  # fmt: skip


def test_options_of_the_launch_are_told_from_the_commands_own(monkeypatch):
    called = []
    monkeypatch.setattr(launch, "_accelerate", lambda words: called.append(words) or 0)
    for name in ("SOFTRL_NUM_PROCESSES", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "")  # so that it is put back after the test
    argv = ["--config", "quickstart", "--accelerate_config=zero2", "--num_processes", "4", "--seed", "1"]
    assert launch.launch("train", argv) == 0
    start, path, end = called[0][:2], called[0][2], called[0][3:]
    assert start == ["launch", "--config_file"]
    assert Path(path).samefile(CONFIGS / "zero2.yaml")
    assert end == ["--num_processes", "4", "-m", "softrl", "train", "--config", "quickstart", "--seed", "1"]
    assert (os.environ["SOFTRL_NUM_PROCESSES"], os.environ["ACCELERATE_USE_CPU"]) == ("4", "")
    assert launch.launch("train", ["--accelerate_config", "ddp_cpu"]) == 0
    assert (os.environ["SOFTRL_NUM_PROCESSES"], os.environ["ACCELERATE_USE_CPU"]) == ("2", "true")
    assert launch.launch("train", ["--seed", "1"]) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--accelerate_config", "zero9"], r"no Accelerate configuration 'zero9': it is neither a file nor one of"),
        (["--accelerate_config"], "--accelerate_config needs a value"),
        (["--num_processes", "2"], "--num_processes belongs to a launch; give --accelerate_config"),
        (["--accelerate_config", str(TESTS.parent / "recipes" / "quickstart.yaml")], "says no num_processes"),
    ],
)
def test_what_cannot_be_launched_is_named(argv, message):
    with pytest.raises(ValueError, match=re.escape(message) if message.startswith("-") else message):
        launch.launch("train", argv)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_what_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes == settings["num_processes"]
    stage = re.fullmatch(r"zero(\d)", path.stem)
    if stage:
        assert loaded.deepspeed_config["zero_stage"] == int(stage.group(1))


def run(words, tmp_path, more=(), **environment):
    command = [*words, *SHORT, *more, "--output_dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=450)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        raise
    return subprocess.CompletedProcess(command, process.returncode, *output)


def accelerate(*words):
    return [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *words]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "num_steps"), [("zero2", 2), ("zero3", 1)])
def test_the_quickstart_under_deepspeed_from_the_configuration_for_gpus(tmp_path, engine, num_steps):
    config = ["--config_file", str(CONFIGS / f"{engine}.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    command = accelerate(*config, "-m", "engines.shimmed", "train", "--config", "quickstart")
    # Under ZeRO-3 each pass gathers half a gigabyte through gloo, hence the one step.
    result = run(command, tmp_path, ["--max_steps", str(num_steps)], DS_ACCELERATOR="cpu")
    check(result, tmp_path, num_steps)


@pytest.mark.slow
def test_the_quickstart_under_ddp(tmp_path):
    command = [sys.executable, "-m", "softrl", "quickstart", "--accelerate_config", "ddp_cpu"]
    result = run(command, tmp_path)
    check(result, tmp_path)
    assert result.stdout.count("held-out prompts, sampled completions") == 1  # the table, by one of the two


def check(result, tmp_path, num_steps=2):
    """It trained so many steps on two processes, and saved an adapter."""
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-3000:]
    checkpoint = tmp_path / "run" / f"checkpoint-{num_steps}"
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == num_steps
    # A step is the rows of two processes: four sequences of eight tokens of prompt at least.
    assert state["num_input_tokens_seen"] >= num_steps * 4 * 8
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_launch_that_starts_one_process_of_two_is_refused(tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one, and says nothing."""
    command = accelerate("--cpu", "--num_processes", "2", "-m", "softrl", "train", "--config", "quickstart")
    result = run(command, tmp_path)
    assert result.returncode != 0
    assert "2 processes were asked for and this run has 1" in result.stderr
