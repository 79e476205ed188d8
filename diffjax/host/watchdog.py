"""A watchdog that detects a hanging run, reports where it hangs, and ends the process."""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from diffjax.kinds import NotNegative
from diffjax.spec import check_arguments

STACKS = "stacks.txt"
STATUS = 75
"""Exit status of a program that hung: EX_TEMPFAIL, on which schedulers requeue the job."""

_LOG = logging.getLogger("diffjax")
_REMEMBERED = 101
_CHECKS = 4  # checks within the time limit
_WRITE_SECONDS = 10.0


@dataclass(frozen=True)
class Watchdog:
    """When a run counts as hanging: no step began for max(`seconds`, `times` × mean step time).

    The watchdog observes the host, which must begin one step after the other. Reading metrics from
    the devices, saving and sampling count as a step each. Devices that hang block the host within
    two windows of metrics.

    Args:
        seconds: shortest time without a new step that counts as a hang; 1800 (half an hour) is
            typical, 0 disables the watchdog.
        times: the time without a new step that counts as a hang, as a multiple of the mean time
            of the last 101 steps; 100 is typical. The mean is used because the host runs ahead of
            the devices and then waits, so single steps vary much.
        exits: whether a hang ends the process with status 75. If False, each hang is only logged.

    Raises:
        UserError: `seconds` or `times` is negative.

    Example:
        >>> Watchdog(seconds=10.0, times=20.0).limit([0.1, 0.3]), Watchdog().limit([])
        (10.0, 1800.0)
        >>> Watchdog(seconds=10.0, times=20.0).limit([2.0])
        40.0
    """

    seconds: NotNegative[float] = 1800.0
    times: NotNegative[float] = 100.0
    exits: bool = True

    def __post_init__(self) -> None:
        check_arguments(Watchdog, seconds=self.seconds, times=self.times, exits=self.exits)

    def limit(self, step_seconds: list[float]) -> float:
        """Seconds without a new step that count as a hang, given the times of recent steps."""
        return max(self.seconds, self.times * fmean(step_seconds or [0.0]))


@contextmanager
def watched(
    watchdog: Watchdog,
    workdir: Path,
    end: Callable[[int], Any] = os._exit,
    what: str = "step",
) -> Iterator[Callable[[int], None]]:
    """Watches a block; it yields a function to call with the number of each step that begins.

    On a hang, the stacks of all threads are written to `stacks.txt`, and one line to the log. The
    process then ends without the usual cleanup, which would hang as well. Saved files are complete,
    and the system releases the lock.

    Args:
        watchdog: the time limits.
        workdir: folder of `stacks.txt`.
        end: function that ends the process with a status.
        what: name of a step in the log message.
    """
    if not watchdog.seconds:
        yield lambda step: None
        return
    step_times = _StepTimes(time.monotonic())
    over = threading.Event()
    arguments = (watchdog, workdir, end, what, step_times, over)
    thread = threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True)
    thread.start()
    try:
        yield step_times.step
    finally:
        over.set()
        thread.join()


class _StepTimes:
    """Time and number of the last step, and the durations of recent steps."""

    def __init__(self, now: float):
        self.last = (now, -1)
        self.seconds: list[float] = []

    def step(self, number: int) -> None:
        """Records that a step has begun."""
        now = time.monotonic()
        before, last = self.last
        if last >= 0:
            self.seconds = [*self.seconds, now - before][-_REMEMBERED:]
        self.last = (now, number)


def _watch(
    watchdog: Watchdog,
    workdir: Path,
    end: Callable[[int], Any],
    what: str,
    step_times: _StepTimes,
    over: threading.Event,
) -> None:
    reported = None
    while not over.wait(watchdog.limit(step_times.seconds) / _CHECKS):
        last = step_times.last
        idle = time.monotonic() - last[0]
        if idle < watchdog.limit(step_times.seconds) or reported == last:
            continue
        reported = last
        after = f"after {what} {last[1]}" if last[1] >= 0 else f"before the first {what}"
        _report(watchdog, workdir, after, idle)
        if watchdog.exits:
            end(STATUS)
            return


def _report(watchdog: Watchdog, workdir: Path, after: str, idle: float) -> None:
    then = f"ending with status {STATUS}; the same command resumes" if watchdog.exits else "waiting"
    _LOG.error(
        "no progress for %.0f s %s: the stacks of all threads are in %s and below; %s",
        idle,
        after,
        workdir / STACKS,
        then,
    )
    faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
    # A hanging file system may be the cause, and must not delay the end.
    heading = f"{datetime.now(UTC).isoformat(timespec='seconds')}, {idle:.0f} s {after}\n"
    writing = threading.Thread(target=_write, args=(workdir / STACKS, heading), daemon=True)
    writing.start()
    writing.join(_WRITE_SECONDS)


def _write(path: Path, heading: str) -> None:
    with suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(heading)
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
