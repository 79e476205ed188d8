"""Where the numbers of a training run go: a file of lines, TensorBoard, and the terminal.

A writer takes a step and a flat dictionary of numbers:

    {"loss": 0.31, "learning_rate": 1e-3, "images_per_second": 900.0, "loss_by_log_snr/-4": 0.2}

`loss_by_log_snr/<lo>` is the mean loss of the images whose log-SNR fell in the bin that begins at
`<lo>` (`-inf`, `-8`, `-6`, … ) and ends where the next one begins; an empty bin is absent. The
metrics of evaluators are lines of their own: `{"eval/samples/frechet_distance": 1.3}`.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, SupportsFloat, TextIO

from tqdm import tqdm

from diffjax.host.files import write_whole
from diffjax.host.run_files import read_metrics


@contextmanager
def _pytorch_unseen() -> Iterator[None]:
    """Lets imports pass PyTorch by, as if it were not installed, and leaves it importable.

    tensorboardX would load it for the sake of one type: seconds of every start.
    """
    modules: dict[str, Any] = sys.modules
    hidden = "torch" not in modules
    if hidden:
        modules["torch"] = None
    try:
        yield
    finally:
        if hidden:
            del modules["torch"]


with _pytorch_unseen():
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import (
        Event,  # pyright: ignore[reportAttributeAccessIssue]
        SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
    )
    from tensorboardX.summary import scalar

__all__ = ["JSONLWriter", "ProgressBar", "TensorBoardWriter", "Writer", "join", "read_metrics"]

_FLUSH_SECONDS = 120.0


class Writer(Protocol):
    """Something that takes the metrics of a step."""

    def write(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        """Takes the metrics of training step `step`; anything `float()` accepts is a number."""
        ...

    def close(self) -> None:
        """Writes everything that is pending; nothing may be written afterwards."""
        ...


class JSONLWriter:
    """Writes one JSON object a line: `step`, then `loss`, then the other metrics.

    Each line is on its way to the disk when `write` returns. Numbers that JSON can't write become
    the strings "nan", "inf" and "-inf", so that `float(value)` reads every value back.

    Opening a file that already exists keeps the lines up to `start_step` and drops, in one atomic
    replacement, those of later steps, which a resumed run is about to repeat.

    Args:
        path: the file; its folder is made if need be.
        start_step: the step that the run resumes from; 0 starts afresh.

    Raises:
        UserError: the file exists and a line other than the last isn't a record.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> writer = JSONLWriter(path)
        >>> writer.write(10, {"learning_rate": 0.5, "loss": float("nan")})
        >>> writer.close()
        >>> path.read_text().strip()
        '{"step": 10, "loss": "nan", "learning_rate": 0.5}'
    """

    def __init__(self, path: str | Path, start_step: int = 0):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_until(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        self._file.write(_line(step, scalars))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _keep_until(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    # The records are the first of the lines: only a torn last line has none.
    pairs = zip(content.splitlines(), read_metrics(path), strict=False)
    kept = b"".join(line + b"\n" for line, record in pairs if record["step"] <= last_step)
    if kept == content:
        return
    write_whole(path, kept)


def _line(step: int, scalars: Mapping[str, SupportsFloat]) -> str:
    numbers = {name: float(value) for name, value in scalars.items()}
    first = {"loss": numbers["loss"]} if "loss" in numbers else {}
    record = {name: _json_number(value) for name, value in (first | numbers).items()}
    return json.dumps({"step": int(step), **record}) + "\n"


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


class TensorBoardWriter:
    """Writes the same numbers as TensorBoard events, in float32 as TensorBoard keeps them.

    It writes by itself and not in a thread as `tensorboardX.SummaryWriter` does: one that dies on
    a full disk leaves a traceback, and holds up whoever writes the eleventh number after it.

    Args:
        folder: where the event files go; a resumed run adds one.
        start_step: the step that the run resumes from. TensorBoard then hides the events of later
            steps that older files in `folder` hold.
    """

    def __init__(self, folder: str | Path, start_step: int = 0):
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Event files are named by the second: the suffix keeps a quick restart from overwriting.
        self._events = EventsWriter(str(Path(folder) / "events"), f".from_{start_step}")
        self._flushed = -math.inf
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(
            Event(wall_time=time.time(), step=start_step + 1, session_log=start)
        )

    def write(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        for name, value in scalars.items():
            event = Event(wall_time=time.time(), step=int(step), summary=scalar(name, float(value)))
            self._events.write_event(event)
        # Which waits for the disk.
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()


class ProgressBar:
    """Shows how far a run is: a live bar on a terminal, else a plain line now and then.

    Nobody may be there to read it any more (a pipe or a terminal that was closed, a full disk
    behind `2>`): that ends no run.

    Args:
        total_steps: the step at which the run ends.
        start_step: the step that the run resumes from.
        stream: where to show it; standard error by default.
        interval_seconds: the least time between two plain lines; the last step always gets one.
        clock: a clock in seconds.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = stream or sys.stderr
        self._total_steps = total_steps
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._first: tuple[float, int] | None = None
        self._last_line = (clock(), start_step)
        self._shown = start_step
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            file=self._stream,
            disable=not self._stream.isatty(),
            dynamic_ncols=True,
            bar_format="step {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",
        )

    def write(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        self._see(self._clock(), step)
        with suppress(OSError):
            self._show(step, scalars)

    def _see(self, now: float, step: int) -> None:
        if self._first is None and step > self._shown:
            self._first = (now, step)

    def beat(self, step: int) -> None:
        """Shows that the run has come to a step that has no line; a quick run never needs it."""
        now = self._clock()
        self._see(now, step)
        with suppress(OSError):
            if step > self._shown and now - self._last_line[0] >= self._interval_seconds:
                self._show(step, {})

    def _show(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        self._shown = max(step, self._shown)
        if any(name.startswith("eval/") for name in scalars):
            text = f"step {step}/{self._total_steps}, {_headline(scalars)}"
            self._bar.write(text, file=self._stream)
            return
        now = self._clock()
        if not self._bar.disable:
            if scalars:
                self._bar.set_postfix_str(_headline(scalars), refresh=False)
            self._bar.update(step - self._bar.n)
            self._last_line = (now, step)
            return
        if step >= self._total_steps or now - self._last_line[0] >= self._interval_seconds:
            parts = [f"step {step}/{self._total_steps}", _headline(scalars), self._left(now, step)]
            self._stream.write(", ".join(part for part in parts if part) + "\n")
            self._stream.flush()
            self._last_line = (now, step)

    def _left(self, now: float, step: int) -> str:
        """The time that is left, by the steps after the first that was seen: it follows pauses.

        These are compilation, the first checkpoint and the first picture. Empty at that step.
        """
        start, start_step = self._first = self._first or (now, step)
        steps_left = self._total_steps - step
        if steps_left and step == start_step:
            return ""
        seconds_per_step = (now - start) / max(step - start_step, 1)
        return f"{tqdm.format_interval(round(steps_left * seconds_per_step))} left"

    def close(self) -> None:
        with suppress(OSError):
            self._bar.close()


def _headline(scalars: Mapping[str, SupportsFloat]) -> str:
    parts = []
    if "loss" in scalars:
        parts.append(f"loss {float(scalars['loss']):.4f}")
    if "images_per_second" in scalars:
        parts.append(f"{float(scalars['images_per_second']):,.0f} images/s")
    for name, value in scalars.items():
        if name.startswith("eval/"):
            parts.append(f"{name.removeprefix('eval/')} {float(value):.4g}")
    return ", ".join(parts)


def join(writers: Sequence[Writer]) -> Writer:
    """One writer that passes everything on to each of `writers`, in order.

    Closing it closes them all, the last first, even if one of them fails to.
    """
    return _Joined(tuple(writers))


class _Joined:
    def __init__(self, writers: tuple[Writer, ...]):
        self._writers = writers

    def write(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        for writer in self._writers:
            writer.write(step, scalars)

    def close(self) -> None:
        with ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)
