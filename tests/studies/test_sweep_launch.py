"""How trials are run: processes with threads and cores of their own, jobs by submitit, and ends that lose nothing."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest
import submitit

from softrl.studies.sweep_launch import (
    Jobs,
    Processes,
    SubmittedTrial,
    TrialError,
    _executor,
    parsed_options,
)

SAY = "import json, os; print(json.dumps([os.environ.get('OMP_NUM_THREADS'), sorted(os.sched_getaffinity(0))]))"


def wait_until(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_processes_have_their_threads_and_cores_that_no_other_has(tmp_path):
    """The child looks after a moment: it is pinned when it has been started."""
    cores = sorted(os.sched_getaffinity(0))
    processes, together = Processes(len(cores), threads=1), threading.Barrier(len(cores))
    code = f"import time; time.sleep(0.3); {SAY}"

    def run(number):
        together.wait(10.0)
        assert processes.run([sys.executable, "-c", code], tmp_path / str(number)) == 0

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(cores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = [json.loads((tmp_path / str(number)).read_text()) for number in range(len(cores))]
    assert {few for few, _ in said} == {"1"}
    assert sorted(pinned for _, pinned in said) == [[core] for core in cores]


def test_processes_are_not_pinned_where_there_are_too_few_cores(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    processes = Processes(len(cores) + 1, threads=2)
    assert processes.run([sys.executable, "-c", SAY], tmp_path / "log") == 0
    assert json.loads((tmp_path / "log").read_text()) == ["2", cores]


def test_a_process_that_does_not_stop_is_killed_and_no_more_are_started(tmp_path, monkeypatch):
    monkeypatch.setattr("softrl.studies.sweep_launch._SECONDS_TO_STOP", 0.2)
    stubborn = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    )
    processes, statuses = Processes(), []
    waiting = threading.Thread(
        target=lambda: statuses.append(processes.run([sys.executable, "-c", stubborn], tmp_path / "log"))
    )
    waiting.start()
    wait_until(lambda: (tmp_path / "log").is_file() and (tmp_path / "log").read_text())
    processes.stop()
    waiting.join()
    assert statuses == [-9]
    with pytest.raises(TrialError, match="was stopped"):
        processes.run([sys.executable, "-c", "1"], tmp_path / "log")


# Stops at SIGTERM; the second time it finds what it has left.
INTERRUPTED = """
import os, signal, sys, time
def stop(*_):
    open('saved', 'w').close()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
time.sleep(0 if os.path.exists('saved') else 60)
"""


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a job cannot import this file


class InFolder:
    """A trial that can be pickled: a command in a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __call__(self, values, processes):
        code = f"import os; os.chdir({self.folder!r}); exec({INTERRUPTED!r})"
        status = processes.run([sys.executable, "-c", code], Path(self.folder) / "log")
        if status != 0:
            raise TrialError(f"status {status}")
        return {"m": float(values["a"])}


def test_a_job_out_of_time_saves_is_put_in_line_again_and_goes_on(tmp_path, monkeypatch):
    """submitit's local executor warns a job as Slurm does, here 2 seconds after its start, and starts it again."""

    def short(cluster, folder, parameters):
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(timeout_min=0.4, signal_delay_s=20)
        return executor

    monkeypatch.setattr("softrl.studies.sweep_launch._executor", short)
    jobs = Jobs(InFolder(tmp_path), "local", tmp_path / "logs", 1, {}, 1)
    (job,) = jobs.submit([{"a": 5}])
    wait_until(job.done)
    assert (tmp_path / "saved").is_file()
    assert job.result() == {"m": 5.0}
    assert jobs.submit([]) == []


def test_jobs_that_fail_say_why_and_jobs_that_run_are_cancelled(tmp_path):
    (tmp_path / "one").mkdir()
    jobs = Jobs(InFolder(tmp_path / "one"), "local", tmp_path / "logs", 2, {"timeout_min": 1}, 1)
    (job,) = jobs.submit([{}])  # no value "a"; runs until it is stopped
    wait_until((tmp_path / "one" / "log").is_file)
    time.sleep(0.5)
    assert not job.done()
    jobs.stop()
    wait_until((tmp_path / "one" / "saved").is_file)
    (second,) = jobs.submit([{}])
    with pytest.raises(TrialError, match="KeyError: 'a'"):
        second.result()


def test_what_submitit_is_asked_to_do_before_the_time_is_up(tmp_path):
    trial, stopped = SubmittedTrial(InFolder(tmp_path), 1), []
    trial._processes = SimpleNamespace(stop=lambda: stopped.append(True))
    again = trial.checkpoint({"a": 1})
    assert stopped == [True]  # before the job is put in line again, which ends this one
    assert isinstance(again.function, SubmittedTrial)
    assert again.args == ({"a": 1},)


def test_slurm_is_given_an_array_and_its_options(tmp_path, monkeypatch):
    """sbatch is a stub that keeps its script: one array of three tasks, two at a time, with what was asked for."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in {"sbatch": f"cp $1 {tmp_path}/script; echo Submitted batch job 12", "srun": ":"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    options = parsed_options("partition=cpu,time=90,cpus_per_task=1,mem=2GB")
    jobs = Jobs(InFolder(tmp_path), "slurm", tmp_path / "logs", 2, options, 1)
    assert len(jobs.submit([{"a": 1}, {"a": 2}, {"a": 3}])) == 3
    script = (tmp_path / "script").read_text()
    assert "#SBATCH --array=0-2%2" in script
    for line in ("--partition=cpu", "--time=90", "--cpus-per-task=1", "--mem=2GB", "--signal=USR2@90"):
        assert f"#SBATCH {line}" in script
    with pytest.raises(ValueError, match="partion"):
        _executor("slurm", tmp_path / "logs", {"slurm_partion": "cpu"})
    assert subprocess.run(["sh", "-n", tmp_path / "script"], check=False).returncode == 0
