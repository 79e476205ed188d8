"""A run that stands still says so, instead of being silent for days."""

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
"""What a program that hung ends with: EX_TEMPFAIL, which schedulers are told to requeue."""

_LOG = logging.getLogger("diffjax")
_REMEMBERED = 101
_CHECKS = 4  # in the time that makes a hang
_WRITE_SECONDS = 10.0


@dataclass(frozen=True)
class Watchdog:
    """When nothing happens for `times` the usual time of a step, and at least for `seconds`.

    What is watched is the host: that it begins one step after the other, where reading metrics
    from the devices, saving and drawing count as a step each. Devices that stand still hold up the
    host no later than two windows of metrics on.

    Args:
        seconds: the shortest silence that is a hang; 0 watches nothing.
        times: of the mean of the last 101 steps; the host runs ahead of the devices and waits for
            them in turn, so that one step by itself says little.
        exits: whether the process ends, with status 75; else it is only told, once for each hang.

    Raises:
        UserError: a negative number, or none.

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
        """The silence, in seconds, that is a hang."""
        return max(self.seconds, self.times * fmean(step_seconds or [0.0]))


@contextmanager
def watched(
    watchdog: Watchdog,
    workdir: Path,
    end: Callable[[int], Any] = os._exit,
    what: str = "step",
) -> Iterator[Callable[[int], None]]:
    """Watches a block, which is to call what it is given with each step that it begins.

    A hang leaves the stacks of all threads in `stacks.txt` and one line in the log. The process
    is ended without any of the usual tidying, which would hang as well; what was saved is whole,
    and the system drops the lock.

    Args:
        watchdog: what a hang is.
        workdir: where the stacks go.
        end: ends the process.
        what: what a step is called.
    """
    if not watchdog.seconds:
        yield lambda step: None
        return
    heard = _Heard(time.monotonic())
    over = threading.Event()
    arguments = (watchdog, workdir, end, what, heard, over)
    thread = threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True)
    thread.start()
    try:
        yield heard.step
    finally:
        over.set()
        thread.join()


class _Heard:
    """When the last step was, which one, and how long the ones before it took."""

    def __init__(self, now: float):
        self.last = (now, -1)
        self.seconds: list[float] = []

    def step(self, number: int) -> None:
        """Takes note that a step has begun."""
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
    heard: _Heard,
    over: threading.Event,
) -> None:
    told = None
    while not over.wait(watchdog.limit(heard.seconds) / _CHECKS):
        last = heard.last
        silence = time.monotonic() - last[0]
        if silence < watchdog.limit(heard.seconds) or told == last:
            continue
        told = last
        after = f"after {what} {last[1]}" if last[1] >= 0 else f"before the first {what}"
        _tell(watchdog, workdir, after, silence)
        if watchdog.exits:
            end(STATUS)
            return


def _tell(watchdog: Watchdog, workdir: Path, after: str, silence: float) -> None:
    then = f"ending with status {STATUS}; the same command goes on" if watchdog.exits else "waiting"
    _LOG.error(
        "nothing has happened for %.0f s %s: the stacks of all threads are in %s and below; %s",
        silence,
        after,
        workdir / STACKS,
        then,
    )
    faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
    # A file system that hangs may be the cause, and may not hold up the end.
    heading = f"{datetime.now(UTC).isoformat(timespec='seconds')}, {silence:.0f} s {after}\n"
    writing = threading.Thread(target=_write, args=(workdir / STACKS, heading), daemon=True)
    writing.start()
    writing.join(_WRITE_SECONDS)


def _write(path: Path, heading: str) -> None:
    with suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(heading)
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
