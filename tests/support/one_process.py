"""What programs do in processes of their own, done in the process of the tests.

A process takes seconds to import what this one has.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from diffjax.sweeps.engines import Job
from diffjax.sweeps.worker import OUTPUT, Runner, listed
from experiments import sweep
from experiments.flags import cli


class Here:
    """Stands in for a ProcessPoolExecutor: calls what it is given at once, and initializes nothing.

    Example:
        >>> with Here() as pool:
        ...     pool.submit(pow, 2, 3).result()
        8
    """

    def __init__(self, *how: Any, **more: Any):
        del how, more

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def sweeps_here(patch: pytest.MonkeyPatch) -> None:
    """The cells of a sweep are built and trained in this process, by one worker in it."""
    patch.setattr(sweep, "ProcessPoolExecutor", Here)
    patch.setattr(sweep, "ENGINES", {"local": _work})
    patch.setattr(sweep, "in_subprocess", _trains)


def _run(arguments: Sequence[str]) -> int:
    return cli.run(sweep.main, sweep.FLAGS, usage="", argv=arguments)


def _work(job: Job, pulse: Callable[[], bool]) -> None:
    del pulse
    _run(job.command[3:])  # after `python -m experiments.sweep`


def _trains(command: Sequence[str], folder: Path) -> Runner:
    def run(unit, locks, should_stop):
        del locks, should_stop
        names = f"--cells={listed(cell.name for cell in unit)}"
        outputs = [folder / cell.name / OUTPUT for cell in unit]
        with outputs[0].open("w") as output, redirect_stdout(output), redirect_stderr(output):
            status = _run([*command[3:], names])
        for copy in outputs[1:]:
            copy.write_bytes(outputs[0].read_bytes())
        return status

    return run
