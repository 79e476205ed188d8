"""What a tracker is, and how a run reaches it: beside the training, which it never holds up."""

import json
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, SupportsFloat

from ml_collections import ConfigDict

from diffjax.errors import UserError
from diffjax.host.files import write_json
from diffjax.host.processes import is_first
from diffjax.host.run_files import read_json
from diffjax.spec import build, to_json

_LOG = logging.getLogger("diffjax")
NAMES = "trackers.json"
"""The file of a run with the names that trackers have for it."""
_MOST_WAITING = 10_000
_SECONDS_TO_END = 30.0
Track = Callable[[int, Mapping[str, float], Mapping[str, Path]], Any]
"""`(step, numbers by name, files of pictures by name) -> anything`."""


@dataclass(frozen=True)
class Tracked:
    """A run as a tracker sees it.

    Attributes:
        name: the name of the run: that of its folder.
        workdir: its folder.
        config: its config, plain JSON.
        known: what `remember` got when the run was tracked before; "" for a new run.
        remember: stores the tracker's own name of this run, so that a resumed run goes on with it.
    """

    name: str
    workdir: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    known: str = ""
    remember: Callable[[str], Any] = lambda known: None


class Tracker(Protocol):
    """A frozen dataclass of settings; a call opens the record of a run.

    It may have a method `check()` as well, which raises a `UserError` before step 1 if its library
    is missing.
    """

    def __call__(self, run: Tracked) -> AbstractContextManager[Track]:
        """A context that yields a function for numbers and pictures, and closes the record.

        All of it is called in one thread, and steps never fall. What it raises is a warning.
        """
        ...


def trackers_of(config: ConfigDict) -> dict[str, Tracker]:
    """The trackers of a config by name.

    Raises:
        UserError: one can't be built, is not a tracker, or its library is missing.
    """
    built = build(config.trackers, dict, "config.trackers")
    for name, tracker in built.items():
        if not callable(tracker):
            raise UserError(f"config.trackers.{name}={tracker!r} is no tracker: nobody can call it")
        getattr(tracker, "check", lambda: None)()
    return built


def check_library(name: str) -> None:
    """Refuses a tracker whose library is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    if find_spec(name) is None:
        raise UserError(f"the tracker {name} needs its library: pip install {name}")


def library(name: str) -> Any:
    """A library that is imported when it is used; the modules here have the same names."""
    return import_module(name)


class Tracking:
    """Passes lines and pictures on to a tracker, in a thread: it may be slow, fail or hang.

    A failure is one warning, and what failed is left out. More than ten thousand lines that wait
    are left out too.

    Args:
        name: the name of the tracker, for warnings.
        tracker: opened in the thread.
        run: what it tracks.
        seconds_to_end: how long `close` waits for what has not been passed on.
    """

    def __init__(
        self, name: str, tracker: Tracker, run: Tracked, seconds_to_end: float = _SECONDS_TO_END
    ):
        self._name, self._tracker, self._run = name, tracker, run
        self._seconds_to_end = seconds_to_end
        self._waiting: queue.Queue = queue.Queue(_MOST_WAITING)
        self._lost = 0
        self._thread = threading.Thread(target=self._pass_on, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        """Takes the numbers of a step."""
        self._put((step, {name: float(value) for name, value in scalars.items()}, {}))

    def picture(self, step: int, path: Path) -> None:
        """Takes the picture of a step."""
        self._put((step, {}, {"samples": path}))

    def close(self) -> None:
        """Waits a while for what has not been passed on."""
        self._put(None)
        self._thread.join(self._seconds_to_end)
        if self._thread.is_alive():
            seconds = f"{self._seconds_to_end:g} s"
            _LOG.warning("tracker %s did not end within %s: left behind", self._name, seconds)
        elif self._lost:
            _LOG.warning("tracker %s lacks %d lines or pictures", self._name, self._lost)

    def _put(self, line: tuple | None) -> None:
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def _pass_on(self) -> None:
        try:
            with self._tracker(self._run) as track:
                while (line := self._waiting.get()) is not None:
                    try:
                        track(*line)
                    except Exception as error:
                        self._failed(error)
        except Exception as error:
            self._failed(error)
            while self._waiting.get() is not None:
                self._lost += 1

    def _failed(self, error: Exception) -> None:
        self._lost += 1
        if self._lost == 1:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            _LOG.warning("tracker %s: %s; the training goes on without", self._name, why)


@contextmanager
def tracking(config: ConfigDict, workdir: Path) -> Iterator[Sequence[Tracking]]:
    """The trackers of a run, open within the block; of several processes the first has them."""
    trackers = trackers_of(config) if is_first() else {}
    names: dict[str, str] = (read_json(workdir / NAMES) or {}) if trackers else {}
    one_at_a_time = threading.Lock()

    def opened(name: str, tracker: Tracker) -> Tracking:
        def remember(known: str) -> None:
            with one_at_a_time:
                names[name] = known
                write_json(workdir / NAMES, names)

        plain, own = json.loads(to_json(config)), workdir.resolve().name
        return Tracking(name, tracker, Tracked(own, workdir, plain, names.get(name, ""), remember))

    with ExitStack() as stack:
        yield [stack.enter_context(closing(opened(*each))) for each in trackers.items()]


class Onwards:
    """A writer to trackers, which stay open for what is written after it.

    Args:
        trackers: the trackers of the run.
    """

    def __init__(self, trackers: Sequence[Tracking]):
        self._trackers = trackers

    def write(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        """Passes the numbers of a step on to all."""
        for each in self._trackers:
            each.write(step, scalars)

    def close(self) -> None:
        """Closes none of them."""
