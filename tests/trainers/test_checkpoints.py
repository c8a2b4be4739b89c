"""Checkpoints are whole or absent; what is damaged is named; signals save one; a killed run loses nothing."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from helpers import llama
from peft import LoraConfig
from trainers.tiny import logs_of, make, numbers_of, parameters_of, word_tokenizer
from transformers import TrainerCallback, TrainerControl

from softrl.trainers.callbacks import InterruptCallback
from softrl.trainers.checkpoints import (
    MANIFEST,
    CheckpointError,
    NotResumableError,
    RunFacts,
    damage,
    latest_checkpoint,
    restricted_unpickling,
    write_manifest,
)

pytestmark = pytest.mark.slow  # imports trl

TESTS = Path(__file__).parent.parent
SAVING = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-3}


def steps_in(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of three steps with a checkpoint each."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = make(folder, word_tokenizer(), **SAVING)
    trainer.train()
    return folder, trainer


@pytest.fixture
def copy_of(saved, tmp_path):
    subprocess.run(["cp", "-r", str(saved[0]), str(tmp_path / "run")], check=True)
    return tmp_path / "run"


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def bit_flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth", MANIFEST]
)
@pytest.mark.parametrize(
    ("harm", "words"), [(truncated, "bytes and was"), (bit_flipped, "SHA-256"), (Path.unlink, "is missing")]
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_taken(copy_of, tokenizer, name, harm, words, capsys):
    harm(copy_of / "checkpoint-3" / name)
    if name == MANIFEST:  # a flipped bit of it gives another hash, another name, or no JSON
        words = ""
    wrong = damage(copy_of / "checkpoint-3")
    assert name in wrong or (name == MANIFEST and harm is bit_flipped)
    assert words in wrong
    trainer = make(copy_of, tokenizer, **SAVING)
    with pytest.raises(NotResumableError, match="cannot be resumed from"):
        trainer.train(resume_from_checkpoint=str(copy_of / "checkpoint-3"))
    assert latest_checkpoint(copy_of) == str(copy_of / "checkpoint-2")
    assert f"passing over {copy_of / 'checkpoint-3'}" in capsys.readouterr().err
    trainer.train(resume_from_checkpoint=True)
    assert damage(copy_of / "checkpoint-3") is None  # it was made again


def test_a_run_goes_on_exactly(tmp_path, tokenizer):
    """In float32, as users train."""

    def run(name):
        return make(tmp_path / name, tokenizer, llama().float(), max_steps=6, **SAVING)

    straight, half, resumed = run("straight"), run("stopped"), run("stopped")
    straight.train()
    half.add_callback(Signal(3, signal.SIGTERM))
    half.add_callback(InterruptCallback())
    half.train()
    assert half.state.global_step == 3
    resumed.train(resume_from_checkpoint=True)
    assert numbers_of(resumed) == numbers_of(straight)
    torch.testing.assert_close(parameters_of(resumed), parameters_of(straight), rtol=0.0, atol=0.0)


def test_nothing_to_resume_from(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer)
    with pytest.raises(NotResumableError, match="holds no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(NotResumableError, match="is not a folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_another_step_size_is_refused_unless_the_data_start_anew(copy_of, tokenizer):
    settings = {**SAVING, "max_steps": 4, "gradient_accumulation_steps": 2}
    with pytest.raises(NotResumableError, match="4 sequences a step and this one has 8"):
        make(copy_of, tokenizer, **settings).train(resume_from_checkpoint=True)
    make(copy_of, tokenizer, **settings, ignore_data_skip=True).train(resume_from_checkpoint=True)
    split = make(copy_of, tokenizer, **{**settings, "max_steps": 5}, per_device_train_batch_size=2)
    with pytest.raises(NotResumableError, match="8 sequences a step and this one has 4"):
        split.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"engine": "zero2", "num_processes": 1}, "written under zero2 and this run is replicated"),
        ({"engine": "fsdp", "num_processes": 1}, "written under fsdp and this run is replicated"),
    ],
)
def test_another_engine_is_refused(copy_of, tokenizer, run, message):
    path = copy_of / "checkpoint-3" / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "run": {**manifest["run"], **run}}))
    with pytest.raises(NotResumableError, match=message):
        make(copy_of, tokenizer, **SAVING).train(resume_from_checkpoint=True)


class Limit(TrainerCallback):
    """From a step on no file may grow beyond so many bytes: the system's own refusal, as of a full disk."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("share", [0.5, 1.5], ids=["in the model", "in the optimizer"])
def test_a_full_disk_ends_the_run_and_leaves_what_was_there(tmp_path, tokenizer, saved, share):
    size = (saved[0] / "checkpoint-3" / "model.safetensors").stat().st_size
    trainer = make(tmp_path, tokenizer, **SAVING)
    trainer.add_callback(Limit(2, int(share * size)))
    try:
        with pytest.raises(CheckpointError, match="checkpoint 3 could not be written into"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert steps_in(tmp_path) == [1, 2]
    assert not (tmp_path / ".unfinished").exists()
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = make(tmp_path, tokenizer, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert logs_of(resumed, "loss") == logs_of(saved[1], "loss")


def test_the_oldest_goes_when_the_newest_is_whole(tmp_path, tokenizer, monkeypatch):
    from softrl.trainers import checkpoints

    present = []
    rotate = checkpoints.rotate_checkpoints
    monkeypatch.setattr(
        checkpoints, "rotate_checkpoints", lambda *settings, **more: (present.append(steps_in(tmp_path)),
                                                                      rotate(*settings, **more)))  # fmt: skip
    make(tmp_path, tokenizer, **SAVING, save_total_limit=1).train()
    assert present == [[1], [1, 2], [2, 3]]
    assert steps_in(tmp_path) == [3]


def test_the_best_checkpoint_is_known_by_its_place(tmp_path, tokenizer):
    trainer = make(
        tmp_path, tokenizer, **SAVING, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_reward", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


class Signal(TrainerCallback):
    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_a_checkpoint_and_stop(tmp_path, tokenizer, number):
    trainer, interrupt = make(tmp_path, tokenizer, max_steps=9), InterruptCallback()
    trainer.add_callback(interrupt)
    trainer.add_callback(Signal(2, number))
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    trainer.train()
    assert interrupt.signal == number
    assert interrupt.exit_code == 128 + number
    assert trainer.state.global_step == 2
    assert damage(tmp_path / "checkpoint-2") is None
    assert {each: signal.getsignal(each) for each in before} == before


def test_a_run_killed_twenty_times_logs_the_losses_of_one_that_was_not(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "engines" / "killed.py"), str(tmp_path), "20", "0"],
        env=environment, check=True, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    seen = json.loads(done.stdout)
    assert len(seen["killed_at"]) == 20
    assert seen["while_writing"] > 0
    assert seen["killed"] == seen["straight"]
    assert len(set(seen["straight"])) == len(seen["straight"])


def test_the_final_model_is_written_file_by_file_into_place(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, peft_config=LoraConfig(r=2, target_modules="all-linear"))
    (tmp_path / "mine.txt").write_text("stays")
    trainer.save_model(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "mine.txt").read_text() == "stays"
    assert not (tmp_path / ".unfinished").exists()


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("engine", [DistributedType.DEEPSPEED, DistributedType.NO])
def test_an_engine_that_asks_for_any_pickle_does_not_get_it(tmp_path, monkeypatch, engine):
    monkeypatch.chdir(tmp_path)
    torch.save({"state": Bomb()}, tmp_path / "states.pt")
    accelerator = SimpleNamespace(distributed_type=engine)
    with restricted_unpickling(accelerator):
        if engine is DistributedType.DEEPSPEED:
            with pytest.raises(pickle.UnpicklingError):
                torch.load("states.pt", weights_only=False)
            assert not Path("exploded").exists()
    torch.load("states.pt", weights_only=False)  # what others load outside is their own affair
    assert Path("exploded").exists()


def test_the_host_refuses_a_checkpoint_that_would_run_code(copy_of, tokenizer, monkeypatch, tmp_path):
    """Whoever can change files can change the manifest too; what is loaded must not run code."""
    monkeypatch.chdir(tmp_path)
    folder = copy_of / "checkpoint-3"
    torch.save({"state": Bomb()}, folder / "optimizer.pt")
    write_manifest(folder, RunFacts("replicated", 1, 4), SimpleNamespace(
        wait_for_everyone=lambda: None, process_index=0, num_processes=1, is_main_process=True))  # fmt: skip
    with pytest.raises(pickle.UnpicklingError):
        make(copy_of, tokenizer, **SAVING).train(resume_from_checkpoint=str(folder))
    assert not Path("exploded").exists()


def test_a_signal_that_comes_while_processes_agree_counts_at_the_next_step(monkeypatch):
    """Looked at at once it would stop one process a step before the others, which then wait for it."""
    from softrl.trainers import callbacks

    interrupt, arguments = InterruptCallback(), SimpleNamespace(world_size=2)

    def gathered(received):
        interrupt._on_signal(signal.SIGTERM, None)
        return [*received, 0]

    monkeypatch.setattr(callbacks, "gather_object", gathered)
    for expected in (False, True):
        control = TrainerControl()
        interrupt.on_step_end(arguments, None, control)
        assert control.should_training_stop == control.should_save == expected
        assert (interrupt.signal == signal.SIGTERM) == expected
