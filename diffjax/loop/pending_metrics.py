"""Metrics on their way from the devices to the writers, without holding up a step."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffjax.errors import UserError
from diffjax.host.interrupts import is_ready, wait_for
from diffjax.loop.logging import Writer, join
from diffjax.training.step import LOG_SNR_EDGES

_LOG = logging.getLogger("diffjax")
_FEWEST_AHEAD, _SECONDS_AHEAD = 8, 2.0
_NO_MEANS = ("bin_loss", "bin_count", "worst_interval", "skipped", "skipped_in_a_row")


class NonFiniteLoss(UserError):
    """The loss or the gradient is infinite or NaN.

    Args:
        message: the whole message, for the user.
        cause: its first part: what is not finite, and at which log-SNR.
        step: the step at which it happened.
    """

    def __init__(self, message: str, cause: str = "", step: int = 0):
        super().__init__(message)
        self.cause = cause
        self.step = step


class MetricsWindow:
    """Averages the metrics of the steps between two log lines.

    A closed window is read from the devices only when the next one closes. By then its steps are
    done, so reading does not wait. At most eight steps are queued, or those of two seconds: a run
    that is stopped has to finish them.

    Args:
        writer: receives the averages.
        batch_size: images per step.
        step: the step before the first one.
        checkpoint_steps: returns the steps that have a checkpoint, for the message of a failure.
        skip_in_a_row: how many steps in a row may be left out because they are not finite.
        left_out: receives the metrics of each step that was left out.
    """

    def __init__(
        self,
        writer: Writer,
        batch_size: int,
        step: int,
        checkpoint_steps: Callable[[], list[int]],
        skip_in_a_row: int = 0,
        left_out: Writer | None = None,
    ):
        self._writer = writer
        self._left_out = left_out or join([])
        self._batch_size = batch_size
        self._step = step
        self._checkpoint_steps = checkpoint_steps
        self._skip_in_a_row = skip_in_a_row
        self._open: Sequence[Mapping[str, Any]] = []
        self._closed: Sequence[Mapping[str, Any]] = []
        self._checked_until = step
        self._images_per_second = 0.0
        self.restart_clock()

    def restore(self, unlogged: Sequence[Mapping[str, Any]]) -> None:
        """Restores what `unlogged` returned, before the first step."""
        self._open = [{name: np.asarray(v) for name, v in metrics.items()} for metrics in unlogged]
        self._step -= len(self._open)

    def unlogged(self) -> list[dict[str, Any]]:
        """The metrics of the open window as plain numbers, to be saved with a checkpoint.

        So a log line is the same if the run stops between its steps. Call `flush` first.
        """
        return [{name: np.asarray(v).tolist() for name, v in m.items()} for m in self._open]

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Takes one step's metrics, still on the devices."""
        self._open = [*self._open, metrics]
        seconds = self._images_per_second / self._batch_size * _SECONDS_AHEAD
        waiting = [*self._closed, *self._open][: -max(_FEWEST_AHEAD, int(seconds))]
        wait_for(waiting[-1:])

    def finished(self) -> int:
        """The last step that the devices have finished; this does not wait."""
        closed, opened = self._closed, self._open
        done = [is_ready(next(iter(each.values()))) for each in (*closed, *opened)]
        return self._step + (done.index(False) if False in done else len(done))

    def close(self) -> None:
        """Ends the open window and writes the one before it."""
        self._write_closed()
        self._closed, self._open = self._open, []

    def flush(self) -> None:
        """Writes the closed window and looks at the open one; this waits for the devices.

        Raises:
            NonFiniteLoss: a loss was not finite.
        """
        self._write_closed()
        self._open = self._checked(self._open)

    def restart_clock(self) -> None:
        """Leaves the time since the last line out of the throughput (sampling, saving)."""
        self._clock = time.perf_counter(), self.finished()

    def failure(self, cause: str, step: int, row: str = "") -> NonFiniteLoss:
        """The error of a run that can't go on after this step."""
        saved = max(self._checkpoint_steps(), default=None)
        kept = f"the last good checkpoint is step {saved}" if saved is not None else "nothing saved"
        return NonFiniteLoss(
            f"{cause}{row}; {kept}. "
            "Lower --config.optimizer.learning_rate or clip_norm, in another --workdir",
            cause,
            step,
        )

    def _write_closed(self) -> None:
        if not self._closed:
            return
        window, self._closed = self._checked(self._closed), []
        self._step += len(window)
        self._measure_throughput()
        rate = {"images_per_second": self._images_per_second}
        self._writer.write(self._step, summarise(window) | rate)

    def _checked(self, window: Sequence[Mapping[str, Any]]) -> list[dict[str, np.ndarray]]:
        """The metrics of the steps after `self._step`, read from the devices."""
        read = [
            {name: np.asarray(value, np.float64) for name, value in metrics.items()}
            for metrics in jax.device_get(wait_for(list(window)))
        ]
        for step, metrics in enumerate(read, start=self._step + 1):
            if step > self._checked_until:
                self._check(step, metrics)
                self._checked_until = step
        return read

    def _measure_throughput(self) -> None:
        """Steps that the devices have finished since the last measurement."""
        (began, first), last = self._clock, self.finished()
        if last > first:
            seconds = max(time.perf_counter() - began, 1e-9)
            self._images_per_second = (last - first) * self._batch_size / seconds
            self.restart_clock()

    def _check(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        in_a_row = int(metrics.get("skipped_in_a_row", 0))
        if in_a_row == 0 and np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
            return
        cause = f"loss or gradient are not finite in step {step}"
        if "bin_loss" in metrics:
            cause = _not_finite(metrics["bin_loss"], metrics["bin_count"], step)
        if "worst_interval" in metrics:
            t, t_to = metrics["worst_interval"]
            cause = f"{cause}, between t = {t:.3g} and {t_to:.3g}"
        if 0 < in_a_row <= self._skip_in_a_row:
            total = int(metrics["skipped"])
            self._left_out.write(step, summarise([metrics]))
            _LOG.warning("%s: left out, %d in a row, %d in all", cause, in_a_row, total)
            return
        self._writer.write(step, summarise([metrics]))
        raise self.failure(cause, step, f", {in_a_row} steps in a row" if in_a_row else "")


def _not_finite(losses: np.ndarray, counts: np.ndarray, step: int) -> str:
    """What is not finite in a step, and in which bins; a gradient has none of its own."""
    bad = [bin_name(int(i)) for i in np.flatnonzero(~np.isfinite(losses))]
    if bad:
        return f"the loss is not finite in step {step} at log-SNR {', '.join(bad)}"
    means = np.where(counts > 0, losses / np.maximum(counts, 1), -np.inf)
    return (
        f"the gradient is not finite in step {step}, whose loss is largest at log-SNR "
        f"{bin_name(int(np.argmax(means)))}"
    )


def bin_name(index: int) -> str:
    """A log-SNR bin as an interval.

    Example:
        >>> bin_name(0), bin_name(1)
        ('[-inf, -8)', '[-8, -6)')
    """
    edges = ["-inf", *(f"{edge:g}" for edge in LOG_SNR_EDGES), "inf"]
    return f"[{edges[index]}, {edges[index + 1]})"


def summarise(window: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """The metrics of some steps as flat numbers: means, and the loss by log-SNR bin if it is there.

    Steps that were left out are left out here too, unless all of them were. A bin that no example
    fell into is absent.
    """
    skipped = window[-1].get("skipped")
    window = [metrics for metrics in window if not metrics.get("skipped_in_a_row")] or window
    scalars = {
        name: float(np.mean([metrics[name] for metrics in window]))
        for name in window[0]
        if name not in _NO_MEANS
    }
    if "bin_loss" not in window[0]:
        return scalars
    sums = np.sum([metrics["bin_loss"] for metrics in window], axis=0)
    counts = np.sum([metrics["bin_count"] for metrics in window], axis=0)
    for edge, total, count in zip(("-inf", *LOG_SNR_EDGES), sums, counts, strict=True):
        if count:
            name = edge if isinstance(edge, str) else f"{edge:g}"
            scalars[f"loss_by_log_snr/{name}"] = float(total / count)
    if skipped is not None:
        scalars["skipped"] = float(skipped)  # in all, since the run began
    return scalars
