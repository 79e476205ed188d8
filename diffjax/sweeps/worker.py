"""A worker of a sweep: it trains one unit (a cell or an ensemble) after another until none is free.

Workers do not communicate. A worker claims a unit by locking a file in the folder of each of its
cells. The system releases such a lock when the last process that holds it ends for any reason. So
any number of workers, of one or several commands, on one or several machines that share the folder,
never train a cell twice at the same time, and the cells of a killed worker are free for the others.
"""

import csv
import fcntl
import io
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from diffjax.comparison.results import STATUS
from diffjax.errors import UserError
from diffjax.host.files import write_json
from diffjax.host.lock import LOCK
from diffjax.host.run_files import read_json
from diffjax.sweeps.cells import is_finished
from diffjax.sweeps.sweep import Cell

OUTPUT = "output.txt"
TAKEN = "worker.lock"
_POLL_SECONDS = 0.1
# Another worker that only checks a unit holds its lock for less than this time.
_RECHECK_SECONDS = 1.0

Unit = tuple[Cell, ...]
# Trains a unit, holding the given locks, until it is done or should stop; returns the exit status.
Runner = Callable[[Unit, Sequence[int], Callable[[], bool]], int]


def units(cells: Sequence[Cell], ensembles: Sequence[Sequence[str]]) -> list[Unit]:
    """Groups cells into units: the cells that train as one program, which one worker trains."""
    by_name = {cell.name: cell for cell in cells}
    return [tuple(by_name[name] for name in names) for names in ensembles]


def work(
    todo: Sequence[Unit],
    folder: Path,
    run: Runner,
    *,
    since: datetime,
    should_stop: Callable[[], bool] = lambda: False,
    is_finished: Callable[[Cell, Path], bool] = is_finished,
) -> None:
    """Trains units in order until all others are finished or claimed, or it should stop.

    Args:
        todo: all units of the sweep; none is trained twice.
        folder: the sweep's folder.
        run: trains a unit.
        since: cells that failed in an attempt after this time are not tried again.
        should_stop: checked between units; `run` has to check it itself.
        is_finished: whether a cell in its folder is trained and evaluated.

    Raises:
        UserError: the folder's file system has no locks.
    """
    left, idle_rounds = list(todo), 0
    while left and not should_stop():
        for unit in left:
            with taken(unit, folder) as locks:
                if locks is None:
                    continue
                wanted = tuple(
                    cell
                    for cell in unit
                    if not _failed_since(folder / cell.name, since)
                    and not is_finished(cell, folder / cell.name)
                )
                if wanted:
                    _attempt(wanted, folder, lambda w=wanted, k=locks: run(w, k, should_stop))
            left.remove(unit)
            idle_rounds = 0
            break
        else:
            idle_rounds += 1
            if idle_rounds > 1:
                return
            time.sleep(_RECHECK_SECONDS)


@contextmanager
def taken(unit: Unit, folder: Path) -> Iterator[list[int] | None]:
    """Claims a unit; yields locks that a child process may inherit, or None if it is claimed.

    Raises:
        UserError: the folder's file system has no locks.
    """
    with ExitStack() as stack:
        locks = []
        for cell in unit:
            workdir = folder / cell.name
            workdir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(_locked(workdir / TAKEN))
            if lock is None or training(workdir):
                yield None
                return
            locks.append(lock)
        yield locks


def training(workdir: Path) -> bool:
    """Whether a process is training in a run's folder, started by a worker or by hand."""
    return _is_held(workdir / LOCK)


def busy(workdir: Path) -> bool:
    """Whether a worker has claimed a cell, or a process trains it."""
    return _is_held(workdir / TAKEN) or training(workdir)


def _is_held(path: Path) -> bool:
    if not path.exists():
        return False
    with _locked(path) as lock:
        return lock is None


@contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except PermissionError:
        raise UserError(f"{path} can't be written: another user began this sweep") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except (BlockingIOError, PermissionError):
        held = False
    except OSError as error:
        os.close(handle)
        raise UserError(
            f"{path} can't be locked ({error.strerror}), so a cell might be trained twice at the "
            "same time: choose a --workdir on a file system with locks"
        ) from error
    try:
        yield handle if held else None
    finally:
        os.close(handle)


def _attempt(unit: Unit, folder: Path, run: Callable[[], int]) -> None:
    """Runs a unit, and writes the status of its cells before and after."""
    began = datetime.now(UTC)
    before = {cell.name: read_json(folder / cell.name / STATUS) or {} for cell in unit}
    facts = {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": began.isoformat(),
    }

    def write(cell: Cell, state: str, error: str) -> None:
        last = before[cell.name]
        spent = (datetime.now(UTC) - began).total_seconds()
        seconds = round(last.get("seconds", 0.0) + spent, 1)
        attempts = last.get("attempts", 0) + 1
        status = {"state": state, "attempts": attempts, "error": error, **facts, "seconds": seconds}
        write_json(folder / cell.name / STATUS, status)

    for cell in unit:
        write(cell, "running", "")
    code = run()
    errors = {cell.name: _own_error(folder / cell.name, cell.name) for cell in unit}
    for cell in unit:
        if code in (130, 143):  # It was stopped and has saved; it did not fail.
            write(cell, "running", "")
        elif code == 0 or (code == 2 and any(errors.values()) and not errors[cell.name]):
            write(cell, "done", "")
        else:
            write(cell, "failed", errors[cell.name] or _last_words(folder / cell.name, code))


def _failed_since(workdir: Path, since: datetime) -> bool:
    status = read_json(workdir / STATUS) or {}
    return status.get("state") == "failed" and datetime.fromisoformat(status["started"]) >= since


def _own_error(workdir: Path, name: str) -> str:
    """The error that the command printed for a cell; "" if it printed none."""
    start = f"error: {name}: "
    found = [line for line in _output_lines(workdir) if line.startswith(start)]
    return found[-1].removeprefix(start) if found else ""


def _last_words(workdir: Path, code: int) -> str:
    """The best one-line explanation of why a process ended: its signal, or its last line."""
    if code < 0:
        name = signal.Signals(-code).name
        reason = ", perhaps because memory ran out" if name == "SIGKILL" else ""
        return f"ended by {name}{reason}"
    lines = _output_lines(workdir)
    return lines[-1].removeprefix("error: ") if lines else f"exit status {code}, without output"


def _output_lines(workdir: Path) -> list[str]:
    try:
        text = (workdir / OUTPUT).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


def in_subprocess(command: Sequence[str], folder: Path) -> Runner:
    """A runner that trains a unit in a subprocess, whose output goes to each cell's `output.txt`.

    Args:
        command: the words of a command that trains the cells which a further flag `--cells=…`
            lists. It prints the error of a cell as the line `error: NAME: …`.
        folder: the sweep's folder.
    """

    def run(unit: Unit, locks: Sequence[int], should_stop: Callable[[], bool]) -> int:
        words = [*command, f"--cells={listed(cell.name for cell in unit)}"]
        outputs = [folder / cell.name / OUTPUT for cell in unit]
        with outputs[0].open("wb") as output:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Its cells stay claimed while it runs, even if this worker is killed.
                pass_fds=locks,
                # Ctrl-C in a terminal reaches only the sweep, which passes it on once.
                start_new_session=True,
            )
            code = _wait(child, should_stop)
        for copy in outputs[1:]:
            copy.write_bytes(outputs[0].read_bytes())
        return code

    return run


def _wait(child: subprocess.Popen, should_stop: Callable[[], bool]) -> int:
    terminated = False
    try:
        while child.poll() is None:
            if should_stop() and not terminated:
                child.terminate()
                terminated = True
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:  # the second one: at once
        child.send_signal(signal.SIGINT)
        child.wait()
        raise
    # SIGTERM kills a process that has not installed its handler yet.
    return 143 if terminated and child.returncode == -signal.SIGTERM else child.returncode


def listed(names: Iterator[str] | Sequence[str]) -> str:
    """Joins names with commas (and quotes) for a list flag.

    Example:
        >>> print(listed(["a", "channels=(32, 64)"]))
        a,"channels=(32, 64)"
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(names)
    return text.getvalue()
