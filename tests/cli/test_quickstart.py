"""The main job, small, on the real model: interrupted, resumed, and under accelerate launch."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import softrl

pytestmark = pytest.mark.slow

ROOT = Path(softrl.__file__).parents[1]
SMALL = [
    "--max_completion_length",
    "6",
    "--per_device_train_batch_size",
    "2",
    "--num_eval_prompts",
    "4",
    "--num_train_prompts",
    "8",
    "--save_steps",
    "1",
    "--top_k",
    "8",
    "--hops",
    "1",
]


def command(*arguments):
    return [sys.executable, "-u", "-m", "softrl", *arguments]


def test_quickstart_interrupted_and_resumed_ends_in_the_table(tmp_path):
    arguments = [*SMALL, "--max_steps", "4", "--output_dir", str(tmp_path / "run")]
    with subprocess.Popen(
        command("quickstart", *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line.startswith("step    1/4"):
                process.send_signal(signal.SIGINT)
        status = process.wait(timeout=300)
    assert status == 130, "".join(seen)
    assert any("softrl quickstart --resume" in line for line in seen)
    assert list((tmp_path / "run").glob("checkpoint-*"))

    finished = subprocess.run(
        command("quickstart", "--resume", *arguments), capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "reward (hard, trained on)" in finished.stdout
    assert "judge (never trained on)" in finished.stdout
    assert "4 steps" in finished.stdout
    assert "step    1/4" not in finished.stdout  # it went on, it did not start again
    for name in ("curves.png", "before.json", "after.json", "adapter_model.safetensors"):
        assert (tmp_path / "run" / name).is_file(), name
    assert len(json.loads((tmp_path / "run" / "after.json").read_text())) == 4


def test_train_under_accelerate_launch(tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_configs/cpu.yaml"),
    ]
    arguments = [*SMALL, "--max_steps", "1", "--judge", "none", "--output_dir", str(tmp_path / "run")]
    finished = subprocess.run(
        [*launch, "-m", "softrl", "train", "--config", "quickstart", *arguments],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "Model saved to" in finished.stdout
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
