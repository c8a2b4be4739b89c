"""How the trials of a sweep are run: here, in threads that wait for processes, or as jobs of a cluster by submitit.

Left out: sharing out the GPUs of one machine, which a cluster does, and processes that outlive the sweep.
"""

import math
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import yaml

Values = dict[str, Any]
Run = Callable[[Values], Any]
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_SECONDS_TO_STOP = 60.0  # for a checkpoint, before a process is killed
_LARGEST_ARRAY = 1000  # Slurm's default MaxArraySize, less one


class TrialError(RuntimeError):
    """A trial did not reach its metric; the others go on."""


class Job(Protocol):
    """A trial that has been started."""

    def done(self) -> bool:
        """Whether it has ended."""

    def result(self) -> Any:
        """Its numbers, or what it raised."""


@runtime_checkable
class Launcher(Protocol):
    """Starts trials.

    Attributes:
        capacity: how many may be started before one has ended.
        poll_seconds: how long to wait before looking again.
    """

    capacity: int
    poll_seconds: float

    def submit(self, trials: Sequence[Values]) -> list[Job]:
        """Start trials."""

    def stop(self) -> None:
        """End all that run, and wait until they have."""


class Here:
    """One trial after the other, in this thread."""

    capacity, poll_seconds = 1, 0.0

    def __init__(self, run: Run):
        self._run = run

    def submit(self, trials: Sequence[Values]) -> list[Job]:
        jobs: list[Job] = []
        for values in trials:
            job: Future[Any] = Future()
            try:
                job.set_result(self._run(values))
            except TrialError as error:
                job.set_exception(error)
            jobs.append(job)
        return jobs

    def stop(self) -> None:
        """There is nothing that runs when this is called."""


class Threads:
    """Several at a time, each in a thread, which waits for a process.

    Args:
        run: a trial.
        workers: how many at a time.
        stop: ends the processes that trials wait for.
    Raises:
        ValueError: fewer than one worker.
    """

    poll_seconds = 0.05

    def __init__(self, run: Run, workers: int, stop: Callable[[], None] = lambda: None):
        if workers < 1:
            raise ValueError(f"--workers must be at least 1, got {workers}")
        self.capacity = workers
        self._run, self._stop = run, stop
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="trial")

    def submit(self, trials: Sequence[Values]) -> list[Job]:
        return [self._pool.submit(self._run, values) for values in trials]

    def stop(self) -> None:
        self._stop()
        self._pool.shutdown(wait=True, cancel_futures=True)


class Processes:
    """Runs commands as processes that share nothing: a number of threads each, and on Linux cores of their own.

    Args:
        workers: how many at a time.
        threads: of each; None leaves threads and cores to the process.
    Raises:
        ValueError: fewer than one thread.
    """

    def __init__(self, workers: int = 1, threads: int | None = None):
        if threads is not None and threads < 1:
            raise ValueError(f"--threads must be at least 1, got {threads}")
        self._threads = threads
        self._slots: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
        for cores in _shares(workers, threads):
            self._slots.put(cores)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run(self, command: Sequence[str], log: Path) -> int:
        """Its exit status; what it writes goes to the end of the log.

        Raises:
            TrialError: `stop` has been called.
        """
        cores = self._slots.get()
        try:
            with log.open("ab") as file:
                process = self._started(command, file, cores)
            try:
                _wait(process)
                return process.returncode
            finally:
                _end([process])  # where Ctrl-C came while this thread waited
                self._running.discard(process)
        finally:
            self._slots.put(cores)

    def _started(self, command: Sequence[str], log: Any, cores: set[int]) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._stopped:
                raise TrialError("the sweep was stopped")
            # A session of its own: Ctrl-C goes to the sweep alone, which then asks each process to stop.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self._environment(),
                start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
        if cores:
            with suppress(OSError):  # it has ended, or the cores have been taken from us: then it is not pinned
                os.sched_setaffinity(process.pid, cores)
        return process

    def _environment(self) -> dict[str, str]:
        if self._threads is None:
            return dict(os.environ)
        few = dict.fromkeys(_THREAD_VARIABLES, str(self._threads))
        return {**os.environ, **few, "TOKENIZERS_PARALLELISM": "false"}

    def stop(self) -> None:
        """Ask every process to save a checkpoint and stop; kill what has not after a minute. Starts no more."""
        with self._lock:
            self._stopped = True
        _end(list(self._running))


def _shares(workers: int, threads: int | None) -> list[set[int]]:
    """Cores of each worker; none where there are too few for all, or the system does not say."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if threads is None or workers * threads > len(cores):
        return [set() for _ in range(workers)]
    return [set(cores[worker * threads : (worker + 1) * threads]) for worker in range(workers)]


def _wait(process: "subprocess.Popen[bytes]", seconds: float = math.inf) -> None:
    """Until it has ended. Not `Popen.wait`: it holds a lock, which a signal's handler then waits for in vain."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            _wait(process, _SECONDS_TO_STOP)
    finally:  # also at a second Ctrl-C
        for process in processes:
            process.kill()
            _wait(process, 5.0)


class SubmittedTrial:
    """A trial as submitit runs it: on the machine of the job, whose processes it stops when the job's time is up.

    Args:
        run: a trial, given what runs its command; it has to be one that can be pickled.
        threads: see `Processes`.
    """

    def __init__(self, run: Callable[[Values, Processes], Any], threads: int | None):
        self.run, self.threads = run, threads
        self._processes: Processes | None = None

    def __call__(self, values: Values) -> Any:
        self._processes = Processes(1, self.threads)
        return self.run(values, self._processes)

    def checkpoint(self, values: Values) -> Any:
        """Called by submitit before the job is preempted or out of time; it is then put in line again."""
        from submitit.helpers import DelayedSubmission

        if self._processes is not None:
            self._processes.stop()
        return DelayedSubmission(SubmittedTrial(self.run, self.threads), values)


@dataclass(frozen=True)
class _SubmittedJob:
    job: Any

    def __hash__(self) -> int:
        return id(self.job)

    def done(self) -> bool:
        return bool(self.job.done())

    def result(self) -> Any:
        """Raises a TrialError for whatever ended the job; its own message is the last line of the trace."""
        error = self.job.exception()
        if error is None:
            return self.job.result()
        marked = [line for line in str(error).splitlines() if "TrialError: " in line]
        why = marked[-1].partition("TrialError: ")[2] if marked else str(error)
        raise TrialError(why)


class Jobs:
    """Every trial as a job of one array, by submitit.

    Args:
        run: see `SubmittedTrial`.
        cluster: "slurm", or "local" for processes of this machine.
        folder: of submitit's logs and pickles; it has to be one that all machines see.
        workers: jobs at a time; None is up to Slurm.
        options: of sbatch as submitit names them (`partition`, `time` in minutes, `cpus_per_task`, `mem`, ...).
        threads: see `Processes`.
    Raises:
        ValueError: submitit is missing, does not know an option, or there is no Slurm here.
    """

    def __init__(
        self, run: Callable[[Values, Processes], Any], cluster: str, folder: Path, workers: int | None,
        options: Mapping[str, Any], threads: int | None,
    ):  # fmt: skip
        parameters = {f"slurm_{key}" if cluster == "slurm" else key: value for key, value in options.items()}
        if cluster == "slurm" and workers is not None:
            parameters["slurm_array_parallelism"] = workers
        self.poll_seconds = 5.0 if cluster == "slurm" else 0.2
        self.capacity = _LARGEST_ARRAY if cluster == "slurm" else workers or 1  # the local one starts all at once
        self._executor = _executor(cluster, folder, parameters)
        self._trial, self._jobs = SubmittedTrial(run, threads), list[Any]()

    def submit(self, trials: Sequence[Values]) -> list[Job]:
        if not trials:
            return []
        jobs = self._executor.map_array(self._trial, trials)
        self._jobs += jobs
        return [_SubmittedJob(job) for job in jobs]

    def stop(self) -> None:
        for job in self._jobs:
            if not job.done():
                job.cancel(check=False)


def _executor(cluster: str, folder: Path, parameters: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ValueError("--launcher slurm needs submitit; install it: pip install 'softrl[slurm]'") from error
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster)
        executor.update_parameters(**parameters)
    except (RuntimeError, NameError, AssertionError) as error:
        raise ValueError(f"--launcher {cluster}: {error}") from error
    return executor


def parsed_options(text: str) -> Values:
    """Of `key=value,key=value`.

    Raises:
        ValueError: a part without `=`.
    """
    parts = [part.partition("=") for part in text.split(",") if part]
    if any(not found or not key for key, found, _ in parts):
        raise ValueError(f"--slurm {text!r}: expected key=value,key=value, such as partition=cpu,time=60")
    return {key.strip(): yaml.safe_load(value) for key, _, value in parts}


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, as a cluster and `timeout` send it; in a thread other than the main one, nothing."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
