"""Log lines of what a program is doing when that takes long, with an estimate of the time left."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_LOG = logging.getLogger("diffjax")


class Progress:
    """The progress of a piece of work: what it is, how much is done, and since when.

    Args:
        what: a phrase such as "drawing 64 samples".
        total: the amount of work, in any unit; 0 if it is unknown.
        clock: a clock in seconds.

    Example:
        >>> seconds = iter([0.0, 10.0, 14.0, 16.0])
        >>> progress = Progress("reading", total=5, clock=lambda: next(seconds))
        >>> progress.at(1)  # After 10 s, of which most may be compiling.
        >>> progress.at(2)
        >>> progress.line()
        'reading, 00:10 left'
    """

    def __init__(
        self, what: str, total: float = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._total, self._clock = what, total, clock
        self._began = (clock(), 0.0)
        self._since = self._began[0]
        self._first: tuple[float, float] | None = None
        self._last = self._began

    def at(self, done: float, what: str = "") -> None:
        """Records how much is done, and a new phrase for what comes now."""
        new = what not in ("", self._what)
        if not new and done <= self._last[1]:
            return
        now = self._clock()
        if new:
            self._what, self._since = what, now
        if done > self._last[1]:
            self._last = (now, done)
            self._first = self._first or self._last

    def line(self) -> str:
        """The phrase with an estimate of the time left, or with the time since it began.

        The estimate leaves out the first part once there is a second one, because the first may
        include compilation. It is dropped when a part takes longer than all of the estimated time.
        """
        now, (last, done) = self._clock(), self._last
        so_far = f"{self._what}, {tqdm.format_interval(round(now - self._since))} so far"
        if not self._total or not done:
            return so_far
        begin = self._first if self._first and done > self._first[1] else self._began
        rate = (last - begin[0]) / (done - begin[1])
        left = (self._total - done) * rate - (now - last)
        return so_far if left < 0 else f"{self._what}, {tqdm.format_interval(round(left))} left"


@contextmanager
def progress(
    what: str,
    total: float = 0,
    *,
    after_seconds: float = 3.0,
    every_seconds: float = 10.0,
    log: Callable[[str], Any] = _LOG.info,
) -> Iterator[Progress]:
    """Logs what a block does: once if it takes longer than some seconds, then now and then.

    Args:
        what: a phrase such as "compiling the training step".
        total: as in `Progress`; call `at` of what this yields to count.
        after_seconds: the time without a line, so that quick blocks have none.
        every_seconds: from one line to the next.
        log: receives the lines.

    Example:
        >>> with progress("adding", total=2) as adding:
        ...     adding.at(1)
    """
    block = Progress(what, total)
    wait = [after_seconds]

    def show() -> None:
        log(block.line())
        wait[0] = every_seconds

    with repeated(show, lambda: wait[0]):
        yield block


@contextmanager
def repeated(action: Callable[[], Any], seconds: Callable[[], float]) -> Iterator[None]:
    """Calls an action again and again beside a block, each time after as many seconds."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(seconds()):
            action()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
