"""Engines: each starts several copies of a command (local, SLURM, Ray) and waits for all of them.

An engine does not know what a copy does, and ignores copies that fail: the caller checks the files
that they wrote. A new engine is one function here and a row in `ENGINES`.
"""

import ast
import importlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from diffjax.errors import UserError, nearest

T = TypeVar("T")
# Called regularly while the copies work: updates the display and returns whether to stop.
Pulse = Callable[[], bool]
_PULSE_SECONDS = 0.5
_SQUEUE_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """A command to start several times.

    Attributes:
        command: the words of the command.
        copies: number of copies to start.
        folder: existing folder for the output of the copies.
        options: options of the engine by name.
    """

    command: Sequence[str]
    copies: int
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)


def local(job: Job, pulse: Pulse) -> None:
    """Starts processes on this machine, each with its share of the CPU cores and of any GPUs.

    XLA starts as many threads as the process may use cores, so without shares each copy would use
    all cores.
    """
    gpus = visible_gpus()
    processes = []
    for index in range(job.copies):
        output = job.folder / f"local-{os.getpid()}-{index}.txt"
        with on_cores(share(all_cores(), index, job.copies)), output.open("ab") as file:
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **gpu_share(gpus, index, job.copies)},
                start_new_session=True,  # this process passes Ctrl-C on, once
            )
        processes.append(process)

    def send(number: int) -> None:
        for process in processes:
            process.send_signal(number)

    _wait(
        lambda: all(process.poll() is not None for process in processes),
        pulse,
        stop=lambda: send(signal.SIGTERM),
        stop_now=lambda: send(signal.SIGINT),
    )


class SlurmTask:
    """A copy inside a SLURM job. At the time limit or on preemption it saves and is requeued."""

    def __init__(self, command: Sequence[str]):
        self.command = list(command)

    def __call__(self) -> int:
        # In its own session, otherwise SLURM's warning signal would end it before it saves.
        self.process = subprocess.Popen(self.command, start_new_session=True)
        return self._ended()

    def checkpoint(self) -> Any:
        """Called by submitit on the warning signal; saves and returns the task to requeue."""
        self.process.terminate()
        self._ended()
        helpers = importlib.import_module("submitit.helpers")
        return helpers.DelayedSubmission(SlurmTask(self.command))

    def _ended(self) -> int:
        # Popen.wait() has a lock that would block a signal handler that also waits.
        while (code := self.process.poll()) is None:
            time.sleep(_PULSE_SECONDS)
        return code


def slurm(job: Job, pulse: Pulse) -> None:
    """Submits SLURM jobs with submitit; options are parameters of its `update_parameters`."""
    submitit = _installed("submitit", "slurm")
    names = submitit.SlurmExecutor._equivalence_dict()
    known = {*names, *submitit.SlurmExecutor._valid_parameters()}
    for name in job.options:
        if name not in known:
            raise UserError(f"--slurm has no option {name!r}; {nearest(name, known)}")
    parameters = {
        name if name in names else f"slurm_{name}": value for name, value in job.options.items()
    }
    try:
        executor = submitit.AutoExecutor(job.folder, cluster="slurm")
        executor.update_parameters(**{"name": "sweep", **parameters})
        with executor.batch():
            jobs = [executor.submit(SlurmTask(job.command)) for _ in range(job.copies)]
    except (RuntimeError, ValueError, TypeError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"SLURM refused the job: {error}") from error
    queue = Every(_SQUEUE_SECONDS, lambda: queued(jobs[0].job_id.partition("_")[0]))

    def over() -> bool:
        left = [each for each in jobs if not each.paths.result_pickle.exists()]
        return not left or queue() is False

    def stop() -> None:
        for each in jobs:
            each.cancel(check=False)

    _wait(over, pulse, stop=stop, stop_now=stop)


def queued(job_id: str) -> bool:
    """Whether a job is still in SLURM's queue, from `squeue`, which needs no accounting."""
    command = ["squeue", "--noheader", "--jobs", job_id, "--format", "%i"]
    answer = subprocess.run(command, capture_output=True, text=True)
    # If the controller does not answer, the job may still run.
    return bool(answer.stdout.strip()) or (
        answer.returncode != 0 and "Invalid job id" not in answer.stderr
    )


def ray(job: Job, pulse: Pulse) -> None:
    """Starts Ray tasks; `address` selects the cluster, all other options are those of a task."""
    ray = _installed("ray", "ray")
    options = dict(job.options)

    # A nested function is pickled by value, so the cluster's nodes need not import this file.
    def task(command: list[str], output: str, folder: str) -> int:
        import subprocess
        import time

        with open(output, "ab") as file:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            while process.poll() is None:
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        return process.returncode

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        address = options.pop("address", None)
        remote = ray.remote(task).options(**{"max_retries": 0, **options})
        ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
    except (ValueError, TypeError, ConnectionError, RuntimeError) as error:
        raise UserError(f"Ray refused the job: {error}") from error
    finally:
        for number, handler in handlers.items():  # Ray replaces them by its own.
            signal.signal(number, handler)
    tasks = [
        remote.remote(list(job.command), str(output.absolute()), os.getcwd())
        for output in (job.folder / f"ray-{os.getpid()}-{i}.txt" for i in range(job.copies))
    ]
    try:
        _wait(
            lambda: not ray.wait(tasks, num_returns=len(tasks), timeout=0)[1],
            pulse,
            stop=lambda: [ray.cancel(each) for each in tasks],
            stop_now=lambda: [ray.cancel(each, force=True) for each in tasks],
        )
    finally:
        ray.shutdown()


ENGINES: Mapping[str, Callable[[Job, Pulse], None]] = {"local": local, "slurm": slurm, "ray": ray}


def parse_options(text: str) -> dict[str, Any]:
    """Parses the options of an engine from the text of its flag.

    Raises:
        UserError: a part is not of the form `name=value`.

    Example:
        >>> parse_options("partition=gpu,timeout_min=600,exclude=a1,a2")
        {'partition': 'gpu', 'timeout_min': 600, 'exclude': 'a1,a2'}
    """
    options = {}
    # A comma separates options only where a name follows it.
    for part in filter(None, re.split(r",(?=\w+=)", text)):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"{part!r} is not an option; write name=value,name=value")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def share(items: Sequence[T], index: int, count: int) -> list[T]:
    """The `index`-th of `count` parts of `items`; with fewer items than parts, one item each.

    Example:
        >>> [share("abcde", i, 2) for i in range(2)], [share("ab", i, 3) for i in range(3)]
        ([['a', 'b'], ['c', 'd', 'e']], [['a'], ['b'], ['a']])
    """
    if count > len(items):
        return [items[index % len(items)]] if items else []
    return list(items[index * len(items) // count : (index + 1) * len(items) // count])


def gpu_share(gpus: Sequence[str], index: int, count: int) -> dict[str, str]:
    """Environment variables that assign GPUs to a copy, or a share of one GPU's memory.

    Example:
        >>> gpu_share(["0", "1"], 1, 2)
        {'CUDA_VISIBLE_DEVICES': '1'}
        >>> gpu_share(["0"], 1, 3)
        {'CUDA_VISIBLE_DEVICES': '0', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.30'}
    """
    if not gpus or count == 1:
        return {}
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(share(gpus, index, count))}
    if count > len(gpus):
        together = -(-count // len(gpus))
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / together:.2f}"
    return environment


def visible_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that JAX would use, as in CUDA_VISIBLE_DEVICES."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    try:
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return listed.split()


def all_cores() -> list[int]:
    """Numbers of the CPU cores that this process may use; empty if the system hides them."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Restricts processes that start inside the block to these CPU cores."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Every:
    """Wraps a function so that it is called again only after `seconds`; else the last result."""

    def __init__(self, seconds: float, ask: Callable[[], Any]):
        self.seconds, self.ask = seconds, ask
        self.next = time.monotonic() + seconds
        self.answer: Any = None

    def __call__(self) -> Any:
        if time.monotonic() >= self.next:
            self.answer, self.next = self.ask(), time.monotonic() + self.seconds
        return self.answer


def _wait(
    over: Callable[[], bool],
    pulse: Pulse,
    *,
    stop: Callable[[], object],
    stop_now: Callable[[], object],
) -> None:
    """Waits for the copies. The first signal stops them gently, a second Ctrl-C at once."""
    stopping = False
    try:
        while not over():
            if pulse() and not stopping:
                stop()
                stopping = True
            time.sleep(_PULSE_SECONDS)
    except BaseException:
        (stop_now if stopping else stop)()
        raise


def _installed(package: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"--engine={extra} needs the package {package}: pip install 'diffjax[{extra}]'"
        ) from None
