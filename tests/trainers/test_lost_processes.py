"""Two launched processes: one dies, or the cluster asks them to stop. Neither hangs, neither loses what was saved."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from softrl.trainers.checkpoints import damage, latest_checkpoint

pytestmark = pytest.mark.slow  # launches two processes

TESTS = Path(__file__).parent.parent
CONFIG = TESTS.parent / "accelerate_configs" / "ddp_cpu.yaml"
START_S, END_S = 240, 60  # importing beside another test takes a while; ending must not


@pytest.fixture
def launched(tmp_path):
    """Start a run that saves every so many steps, and wait until both ranks have made a step."""
    processes = []

    def start(save_steps):
        environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        process = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(CONFIG),
             str(TESTS / "engines" / "endless.py"), str(tmp_path), str(save_steps)],
            stdout=subprocess.DEVNULL, stderr=(tmp_path / "errors").open("w"), env=environment, start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        deadline = time.monotonic() + START_S
        wanted = [tmp_path / "rank-0", tmp_path / "rank-1", tmp_path / "step"]
        while not all(path.is_file() and path.read_text() for path in wanted):
            assert process.poll() is None, (tmp_path / "errors").read_text()
            assert time.monotonic() < deadline, "no step was made"
            time.sleep(0.2)
        return process, [int((tmp_path / f"rank-{rank}").read_text()) for rank in (0, 1)]

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def gone(pids):
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_rank_dies_the_other_ends_with_an_error(launched, tmp_path, rank):
    process, ranks = launched(save_steps=1)
    while latest_checkpoint(tmp_path / "run") is None:
        time.sleep(0.1)
    os.kill(ranks[rank], signal.SIGKILL)
    assert process.wait(timeout=END_S) != 0
    assert gone(ranks)
    newest = latest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert damage(Path(newest)) is None


@pytest.mark.parametrize("to", ["the launcher", "one rank"])
def test_sigterm_saves_on_all_ranks_at_the_same_step(launched, tmp_path, to):
    process, ranks = launched(save_steps=10**5)
    os.kill(process.pid if to == "the launcher" else ranks[1], signal.SIGTERM)
    assert process.wait(timeout=END_S) != 0
    assert gone(ranks)
    steps = {(tmp_path / f"stopped-{rank}").read_text() for rank in (0, 1)}
    assert latest_checkpoint(tmp_path / "run") == str(tmp_path / "run" / f"checkpoint-{steps.pop()}")
    assert not steps
