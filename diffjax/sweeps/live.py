"""The status table of a sweep, read only from its files, on any machine that has access."""

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from diffjax.comparison.results import STATUS, SWEEP, cells_of
from diffjax.errors import UserError
from diffjax.evaluation.tables import three_digits
from diffjax.host.run_files import read_json
from diffjax.runs import workdirs
from diffjax.sweeps.worker import OUTPUT, busy

_TAIL_BYTES = 1 << 16
_REDRAW_SECONDS = 2.0
_LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Row:
    """Status of one cell.

    Attributes:
        name: name of the cell.
        state: waiting, running, stopped (begun, but no process works on it), done or failed.
        step: the last step in its metrics.
        num_steps: total number of steps; None if the plan does not contain it.
        loss: loss at that step; None before the first.
        distance: Fréchet distance; None until it is evaluated.
        seconds: total seconds of all its attempts that were recorded.
        note: the error of a cell that failed; the last line of output of one that runs.
    """

    name: str
    state: str
    step: int
    num_steps: int | None
    loss: float | None
    distance: float | None
    seconds: float
    note: str


def read_plan(folder: Path) -> dict[str, Any]:
    """Reads the `sweep.json` that a sweep writes when it begins.

    Raises:
        UserError: no sweep has begun in that folder.
    """
    plan = read_json(folder / SWEEP)
    if plan is None:
        raise UserError(f"no sweep has begun in {folder}: there is no {SWEEP}")
    return plan


def rows(folder: Path) -> list[Row]:
    """The status of each cell, in the order of the plan."""
    return [
        _row(cell["name"], cell.get("num_steps"), folder / (cell.get("folder") or cell["name"]))
        for cell in cells_of(read_plan(folder), folder)
    ]


def progress_table(cells: Sequence[Row], height: int | None = None) -> str:
    """Formats the status of cells as aligned columns, with a last line of counts by state.

    Args:
        cells: the status of each cell.
        height: largest number of lines; running cells have priority. None shows all cells.
    """
    room = len(cells) if height is None else max(height - 3, 1)
    shown = sorted(cells, key=lambda row: _ORDER.index(row.state))[:room]
    shown = [row for row in cells if row in shown]
    lines = [("cell", "state", "step", "loss", "Fréchet", "time")]
    for row in shown:
        lines.append(
            (
                row.name,
                row.state,
                f"{row.step:,}/{'?' if row.num_steps is None else f'{row.num_steps:,}'}",
                "" if row.loss is None else f"{row.loss:.4g}",
                "" if row.distance is None else three_digits(row.distance),
                tqdm.format_interval(round(row.seconds)) if row.seconds else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line, row in zip(lines, [None, *shown], strict=True):
        cut = [
            word.ljust(width) if i < 2 else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join([*cut, row.note if row else ""]).rstrip())
    if len(shown) < len(cells):
        text.append(f"… {len(cells) - len(shown)} more")
    return "\n".join([*text, _counts(cells)])


class Live:
    """Shows the progress of a sweep: a table on a terminal, else lines.

    Without a terminal each change of state is a line, and every ten seconds each running cell has
    one, with what it does, if that has changed. While none runs, the line counts cells by state.

    Args:
        folder: the sweep's folder.
        stream: output stream; standard error by default.
    """

    def __init__(self, folder: Path, stream: TextIO | None = None):
        self._folder, self._stream = folder, stream or sys.stderr
        self._drawn = 0
        self._printed: dict[str, Row] = {}
        self._next = 0.0
        self._next_lines = 0.0

    def draw(self, *, now: bool = False) -> None:
        """Updates the display, at most every two seconds unless `now` is True."""
        if not now and time.monotonic() < self._next:
            return
        cells = rows(self._folder)
        if self._stream.isatty():
            self._redraw(cells)
        else:
            self._print_changes(cells)
        self._next = time.monotonic() + _REDRAW_SECONDS

    def _redraw(self, cells: Sequence[Row]) -> None:
        width, height = shutil.get_terminal_size()
        lines = [line[: width - 1] for line in progress_table(cells, height - 1).splitlines()]
        # Moves the cursor to the start of the last table and erases it.
        up = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
        self._stream.write(up + "\n".join(lines) + "\n")
        self._stream.flush()
        self._drawn = len(lines)

    def _print_changes(self, cells: Sequence[Row]) -> None:
        again = time.monotonic() >= self._next_lines
        for row in cells:
            before = self._printed.get(row.name)
            changed = row.state != (before.state if before else "waiting")
            runs_on = before is not None and (row.step, row.note) != (before.step, before.note)
            if changed or (again and runs_on and row.state == "running"):
                self._stream.write(_line(row) + "\n")
                self._printed[row.name] = row
                self._next_lines = time.monotonic() + _LINE_SECONDS
        states = {row.state for row in cells}
        idle = states & {"waiting", "stopped"} and "running" not in states
        if idle and time.monotonic() >= self._next_lines:
            self._stream.write(f"no cell is running: {_counts(cells)}\n")
            self._next_lines = time.monotonic() + _LINE_SECONDS
        self._stream.flush()


_ORDER = ("running", "failed", "stopped", "waiting", "done")


def _counts(cells: Sequence[Row]) -> str:
    counts = Counter(row.state for row in cells)
    return ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])


def _line(row: Row) -> str:
    parts = [f"{row.name}: {row.state}"]
    if row.state in ("running", "stopped") and row.step:
        parts.append(f"step {row.step} of {row.num_steps or '?'}")
    if row.state == "done" and row.distance is not None:
        parts.append(f"Fréchet distance {three_digits(row.distance)}")
    if row.state in ("done", "failed"):
        parts.append(tqdm.format_interval(round(row.seconds)))
    return ", ".join(parts) + (f": {row.note}" if row.note else "")


def _row(name: str, num_steps: int | None, workdir: Path) -> Row:
    status = read_json(workdir / STATUS) or {}
    state, seconds = status.get("state", "waiting"), status.get("seconds", 0.0)
    if state != "done" and busy(workdir):
        if state == "running":
            since = datetime.now(UTC) - datetime.fromisoformat(status["started"])
            seconds += since.total_seconds()
        state = "running"
    elif state == "running":
        state = "stopped"
    last = _last_record(workdir / workdirs.METRICS)
    evaluation = read_json(workdir / workdirs.EVALUATION) if state == "done" else None
    entry = (evaluation or {}).get("frechet_distance")
    note = {"failed": status.get("error", ""), "running": _last_line(workdir / OUTPUT)}
    return Row(
        name=name,
        state=state,
        step=last.get("step", 0),
        num_steps=num_steps,
        loss=float(last["loss"]) if "loss" in last else None,
        distance=entry.get("value") if isinstance(entry, dict) else None,
        seconds=seconds,
        note=note.get(state, ""),
    )


def _last_line(path: Path) -> str:
    """The last line of a text file that is not empty; "" if there is none."""
    lines = [line.strip() for line in _tail(path).decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _last_record(path: Path) -> dict[str, Any]:
    """The last complete record of a metrics file."""
    for line in reversed(_tail(path).splitlines()):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        return record if isinstance(record, dict) else {}
    return {}


def _tail(path: Path) -> bytes:
    """The end of a file, which may be long; nothing if it can't be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - _TAIL_BYTES, 0))
            return file.read()
    except OSError:
        return b""
