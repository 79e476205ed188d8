"""Engines: each starts several copies of a command somewhere, and waits for all of them.

What a copy does is no matter of theirs, nor is one that dies: whoever starts them looks at what
they left. A new engine is one function here and a row in `ENGINES`.
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
# Calls between which the copies work: shows how things are, and says whether to stop.
Pulse = Callable[[], bool]
_PULSE_SECONDS = 0.5
_SQUEUE_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """What to start.

    Attributes:
        command: the words of the command.
        copies: how many of it.
        folder: where the copies' output goes; it exists.
        options: of the engine.
    """

    command: Sequence[str]
    copies: int
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)


def local(job: Job, pulse: Pulse) -> None:
    """Processes of this machine; each has its share of the cores, and of the GPUs if any.

    XLA's threads are as many as the cores that a process may use, so that without shares each
    copy would want all of them.
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
                start_new_session=True,  # Ctrl-C is passed on from here, once
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
    """A copy inside a SLURM job. At the time limit or on preemption it saves and is queued anew."""

    def __init__(self, command: Sequence[str]):
        self.command = list(command)

    def __call__(self) -> int:
        # In a session of its own, else SLURM's warning signal would end it unsaved.
        self.process = subprocess.Popen(self.command, start_new_session=True)
        return self._ended()

    def checkpoint(self) -> Any:
        """What submitit calls on the warning signal; gives what to queue."""
        self.process.terminate()
        self._ended()
        helpers = importlib.import_module("submitit.helpers")
        return helpers.DelayedSubmission(SlurmTask(self.command))

    def _ended(self) -> int:
        # Popen.wait() has a lock that would block a signal handler which waits as well.
        while (code := self.process.poll()) is None:
            time.sleep(_PULSE_SECONDS)
        return code


def slurm(job: Job, pulse: Pulse) -> None:
    """Jobs of SLURM, by submitit, whose `update_parameters` takes the options."""
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
        raise UserError(f"SLURM does not take the job: {error}") from error
    queue = Every(_SQUEUE_SECONDS, lambda: queued(jobs[0].job_id.partition("_")[0]))

    def over() -> bool:
        left = [each for each in jobs if not each.paths.result_pickle.exists()]
        return not left or queue() is False

    def stop() -> None:
        for each in jobs:
            each.cancel(check=False)

    _wait(over, pulse, stop=stop, stop_now=stop)


def queued(job_id: str) -> bool:
    """Whether SLURM still has anything of a job, by `squeue`, which needs no accounting."""
    command = ["squeue", "--noheader", "--jobs", job_id, "--format", "%i"]
    answer = subprocess.run(command, capture_output=True, text=True)
    # A controller that does not answer has not ended the job.
    return bool(answer.stdout.strip()) or (
        answer.returncode != 0 and "Invalid job id" not in answer.stderr
    )


def ray(job: Job, pulse: Pulse) -> None:
    """Tasks of Ray; `address` says which cluster, all other options are the tasks'."""
    ray = _installed("ray", "ray")
    options = dict(job.options)

    # Inside this function it travels by value: a cluster's nodes need not import this file.
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
        raise UserError(f"Ray does not take the job: {error}") from error
    finally:
        for number, handler in handlers.items():  # Ray puts its own in their place.
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
    """Options of an engine as one flag has them.

    Raises:
        UserError: a part is no `name=value`.

    Example:
        >>> parse_options("partition=gpu,timeout_min=600,exclude=a1,a2")
        {'partition': 'gpu', 'timeout_min': 600, 'exclude': 'a1,a2'}
    """
    options = {}
    # A comma separates options only where a name follows it.
    for part in filter(None, re.split(r",(?=\w+=)", text)):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"{part!r} is no option; write name=value,name=value")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def share(items: Sequence[T], index: int, count: int) -> list[T]:
    """The part of `items` that is the `index`-th of `count`; if they are too few, one in turn.

    Example:
        >>> [share("abcde", i, 2) for i in range(2)], [share("ab", i, 3) for i in range(3)]
        ([['a', 'b'], ['c', 'd', 'e']], [['a'], ['b'], ['a']])
    """
    if count > len(items):
        return [items[index % len(items)]] if items else []
    return list(items[index * len(items) // count : (index + 1) * len(items) // count])


def gpu_share(gpus: Sequence[str], index: int, count: int) -> dict[str, str]:
    """The environment that gives a copy its GPUs; if they are too few, a part of one's memory.

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
    """The NVIDIA GPUs that JAX would use, as CUDA_VISIBLE_DEVICES names them."""
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
    """The cores that this process may use; none where the system can't say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Processes started inside use these cores alone."""
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
    """A function whose answer is asked for anew only after some time."""

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
    """Waits for the copies, which are asked to stop once; a second Ctrl-C stops them at once."""
    asked = False
    try:
        while not over():
            if pulse() and not asked:
                stop()
                asked = True
            time.sleep(_PULSE_SECONDS)
    except BaseException:
        (stop_now if asked else stop)()
        raise


def _installed(package: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"--engine={extra} needs the package {package}: pip install 'diffjax[{extra}]'"
        ) from None
