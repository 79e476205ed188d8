"""Metrics on their way from the devices to the writers, without holding up a step."""

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax import Array

from diffjax.errors import UserError
from diffjax.training.logging import Writer
from diffjax.training.step import LOG_SNR_EDGES


class NonFiniteLoss(UserError):
    """The loss stopped being a number."""


class MetricsWindow:
    """Averages the metrics of the steps between two log lines.

    A closed window is read from the devices only when the next one closes. By then its steps are
    done, so reading does not wait, and no more than two windows of steps are ever queued.

    Args:
        writer: where the averages go.
        batch_size: images a step.
        step: the step before the first one.
        checkpoint_steps: says which checkpoints there are, for the message of a failure.
    """

    def __init__(
        self,
        writer: Writer,
        batch_size: int,
        step: int,
        checkpoint_steps: Callable[[], list[int]],
    ):
        self._writer = writer
        self._batch_size = batch_size
        self._step = step
        self._checkpoint_steps = checkpoint_steps
        self._open: list[Mapping[str, Array]] = []
        self._closed: list[Mapping[str, Array]] = []
        self._images_per_second = 0.0
        self.restart_clock()

    def add(self, metrics: Mapping[str, Array]) -> None:
        """Takes one step's metrics, still on the devices."""
        self._open.append(metrics)
        self._steps_since_clock += 1

    def close(self) -> None:
        """Ends the open window and writes the one before it."""
        self._write_closed()
        self._closed, self._open = self._open, []

    def flush(self) -> None:
        """Writes everything so far; this waits for the devices.

        Raises:
            NonFiniteLoss: a loss was not finite.
        """
        self.close()
        self._write_closed()

    def restart_clock(self) -> None:
        """Leaves the time since the last line out of the throughput (sampling, saving)."""
        self._clock = time.perf_counter()
        self._steps_since_clock = 0

    def _write_closed(self) -> None:
        if not self._closed:
            return
        window = [
            {name: np.asarray(value, np.float64) for name, value in metrics.items()}
            for metrics in jax.device_get(self._closed)
        ]
        self._closed = []
        for i, metrics in enumerate(window, start=1):
            self._check(self._step + i, metrics)
        self._measure_throughput()
        self._step += len(window)
        rate = {"images_per_second": self._images_per_second}
        self._writer.write(self._step, summarise(window) | rate)

    def _measure_throughput(self) -> None:
        """Steps begun since the last measurement: the devices lag behind by a constant."""
        if self._steps_since_clock:
            seconds = max(time.perf_counter() - self._clock, 1e-9)
            self._images_per_second = self._steps_since_clock * self._batch_size / seconds
            self.restart_clock()

    def _check(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
            return
        self._writer.write(step, summarise([metrics]))
        bad = [bin_name(int(i)) for i in np.flatnonzero(~np.isfinite(metrics["bin_loss"]))]
        what = "loss" if bad else "gradient"
        where = f" at log-SNR {', '.join(bad)}" if bad else ""
        saved = max(self._checkpoint_steps(), default=None)
        kept = f"the last good checkpoint is step {saved}" if saved is not None else "nothing saved"
        raise NonFiniteLoss(
            f"the {what} is not finite in step {step}{where}; {kept}. "
            "Lower --config.optimizer.learning_rate or clip_norm, in another --workdir"
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
    """The metrics of some steps as flat numbers: means, and the loss by log-SNR bin.

    A bin that no example fell into is absent.
    """
    scalars = {
        name: float(np.mean([metrics[name] for metrics in window]))
        for name in ("loss", "grad_norm", "learning_rate")
    }
    sums = np.sum([metrics["bin_loss"] for metrics in window], axis=0)
    counts = np.sum([metrics["bin_count"] for metrics in window], axis=0)
    for edge, total, count in zip(("-inf", *LOG_SNR_EDGES), sums, counts, strict=True):
        if count:
            name = edge if isinstance(edge, str) else f"{edge:g}"
            scalars[f"loss_by_log_snr/{name}"] = float(total / count)
    return scalars
