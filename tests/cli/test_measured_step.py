"""The estimate of memory against the measured peak of real steps of SmolLM2-135M, each in a process of its own."""

import pytest

pytestmark = pytest.mark.slow  # trains the real model

COMMON = (
    "--judge", "none", "--use_cpu", "true", "--bf16", "false", "--temperature", "0.7", "--num_train_prompts", "64",
    "--report_to", "none",
)  # fmt: skip
LORA = ("--use_peft", "--lora_target_modules", "all-linear")
SETTINGS = {
    "LoRA, parallel": (
        *LORA, "--dtype", "float32", "--hops", "2", "--beta", "0", "--max_completion_length", "32",
        "--per_device_train_batch_size", "4",
    ),
    "all parameters, sequential, bfloat16": (
        "--dtype", "bfloat16", "--cotangent_method", "sequential", "--beta", "0", "--max_completion_length", "16",
        "--per_device_train_batch_size", "4",
    ),
    "LoRA, parallel, KL": (
        *LORA, "--dtype", "bfloat16", "--hops", "2", "--beta", "0.05", "--max_completion_length", "16",
        "--per_device_train_batch_size", "4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(name, tmp_path, monkeypatch):
    from softrl.cli.arguments import parse
    from softrl.cli.measured_step import measured
    from softrl.cli.recipe_footprint import recipe_footprint

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = [*COMMON, *SETTINGS[name], "--output_dir", str(tmp_path)]
    found = measured(argv)
    estimate = recipe_footprint(*parse(argv)).under("single", 1)
    assert estimate.peak == pytest.approx(found.peak, rel=0.2)
    assert found.resident < found.peak


def test_a_step_that_fails_says_why(tmp_path):
    from softrl.cli.measured_step import MeasurementError, measured

    with pytest.raises(MeasurementError, match=r"the measured step failed \(exit status 1\): .*num_generations"):
        measured([*COMMON, "--num_generations", "3", "--output_dir", str(tmp_path)])
