"""Writes a run's metrics, pictures, snapshots and checkpoints while it trains."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.data import DataSet
from diffjax.errors import UserError
from diffjax.host.interrupts import Interrupted, stop_at_once
from diffjax.host.processes import is_first
from diffjax.host.progress import progress, repeated
from diffjax.loop.callbacks import Callbacks
from diffjax.loop.logging import JSONLWriter, ProgressBar, TensorBoardWriter, Writer, join
from diffjax.loop.pending_metrics import MetricsWindow, NonFiniteLoss
from diffjax.loop.trackers.base import Onwards
from diffjax.loop.training import Training
from diffjax.reports.pictures import (
    captions,
    columns_by_class,
    most_classes,
    save_png,
)
from diffjax.runs import workdirs
from diffjax.runs.averages import Snapshot, snapshots_of
from diffjax.runs.checkpoints import Checkpoints, not_finite
from diffjax.runs.load import Run
from diffjax.runs.measuring.evaluated_samples import conditions_to_show
from diffjax.runs.parts import Parts
from diffjax.runs.samples.model import Request
from diffjax.training.averages import power_name
from diffjax.training.state import TrainState

_BEAT_SECONDS = 5.0


class Recorder:
    """Writes a run's metrics, pictures, snapshots and checkpoints while it trains.

    Args:
        training: the run.
        start: the meta of the checkpoint that it resumes from.
        bar: whether the terminal shows a progress bar.

    Attributes:
        writer: receives the metrics.
    """

    def __init__(self, training: Training, start: Mapping[str, Any], *, bar: bool = True):
        setup, dataset, workdir = training.setup, training.dataset, training.workdir
        self._config = config = setup.config
        self._checkpoints = checkpoints = training.checkpoints
        self._draw_grid = grid_drawer(setup.parts, dataset, workdir)
        self._workdir = workdir
        writers = open_writers(workdir, start["step"])
        shown = ProgressBar(config.num_steps, start["step"]) if bar and is_first() else None
        self._training, self._callbacks = training, Callbacks(training.callbacks)
        self._further = join([*writers, Onwards(training.trackers)])
        self.writer = join([self._further, *([shown] if shown else []), self._callbacks])
        skip_in_a_row = setup.nonfinite.skip_in_a_row
        # Lines of steps that will be repeated are dropped here, as in the metrics.
        kept = skip_in_a_row and is_first()
        left_out = [JSONLWriter(workdir / workdirs.SKIPPED, start["step"])] if kept else []
        self._left_out = join(left_out)
        self._snapshots = snapshots_of(workdir) if config.ema_lengths else None
        # The stream's position is a function of the step, so the step is all there is to keep.
        self._meta = {**training.meta}
        if start.get("schedule_start"):
            self._meta["schedule_start"] = start["schedule_start"]
        self._window = MetricsWindow(
            self.writer,
            config.batch_size,
            start["step"],
            checkpoints.steps,
            skip_in_a_row,
            self._left_out,
        )
        self._window.restore(start.get("unlogged", []))
        self._beats = ExitStack()
        if shown:
            beat = repeated(lambda: shown.beat(self._window.finished()), lambda: _BEAT_SECONDS)
            self._beats.enter_context(beat)

    def draw_beginning(self, state: TrainState) -> None:
        """Writes the picture of the first step if it is due and missing.

        It is due at step 0 if the run begins with trained weights. It may be missing at the step
        where a run was stopped while it drew the picture.
        """
        step = int(state.step)
        every = self._config.sample_every_steps
        wanted = self._config.init_from if step == 0 else self._every(every, step)
        if wanted and not picture_of(self._workdir, step).exists():
            self._draw(step, state)

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step, still on the devices.

        Raises:
            NonFiniteLoss: a loss of an earlier window was not finite; `keep` checks this window.
        """
        self._window.add(metrics)
        if self._every(self._config.log_every_steps, step):
            self._window.close()
            if self._callbacks:
                self._window.flush()

    def call_back(self, step: int, state: TrainState) -> None:
        """Calls the user's functions if a step has lines; if one fails, the state is saved before.

        Raises:
            NonFiniteLoss: as `save`.
        """
        if not self._callbacks.due(step):
            return
        stopped = (
            f"stopped in a callback of step {step} of {self._config.num_steps} and saved in "
            f"{self._workdir}; the same command goes on from there"
        )
        run = Run(self._training.setup.parts, state, self._workdir)
        try:
            with self.aside(state), stop_at_once(stopped), progress(f"callbacks of step {step}"):
                self._callbacks.call(step, run, self._further)
        except Exception as error:
            if not isinstance(error, NonFiniteLoss):
                self.save(state)
            raise

    def due(self, step: int, stop: bool) -> bool:
        """Whether `keep` has anything to do after this step."""
        config = self._config
        every = [config.sample_every_steps, config.checkpoint_every_steps]
        every += [config.snapshot_every_steps] if self._snapshots else []
        return stop or any(self._every(steps, step) for steps in every)

    def keep(self, step: int, state: TrainState, stop: bool) -> None:
        """Writes what is due after a step: the picture, the snapshot and the checkpoint."""
        if self._every(self._config.sample_every_steps, step):
            self._draw(step, state)
        if self._snapshots and self._every(self._config.snapshot_every_steps, step):
            self._save_snapshot(self._snapshots, state)
            self._window.restart_clock()
        if stop or self._every(self._config.checkpoint_every_steps, step):
            self.save(state)
            self._window.restart_clock()

    @contextmanager
    def aside(self, state: TrainState) -> Iterator[None]:
        """A context in which a finite state is measured; if training is stopped there, it is saved.

        Raises:
            NonFiniteLoss: as `save`.
        """
        self._check_finite(state)
        try:
            yield
        except Interrupted:
            self.save(state)
            raise
        finally:
            self._window.restart_clock()

    def save(self, state: TrainState) -> None:
        """Starts to save a state.

        Raises:
            NonFiniteLoss: a loss was not finite so far, or the state is not finite. An update can
                be infinite although loss and gradient are finite, and the next loss would show it
                only after the state was saved.
        """
        self._check_finite(state)
        meta = {**self._meta, "unlogged": self._window.unlogged()}
        with progress(f"saving the checkpoint of step {int(state.step)}"):
            self._checkpoints.save(int(state.step), state, meta)

    def close(self) -> None:
        """Closes the writers and waits for the snapshots."""
        self._beats.close()
        join([self.writer, self._left_out]).close()
        if self._snapshots:
            self._snapshots.close()

    def _draw(self, step: int, state: TrainState) -> None:
        """Writes the picture of a step."""
        stopped = (
            f"stopped while drawing at step {step} of {self._config.num_steps} and saved in "
            f"{self._workdir}; the same command goes on from there"
        )
        what = f"drawing the pictures of step {step}"
        with self.aside(state), stop_at_once(stopped), progress(what):
            self._draw_grid(state)
        for tracker in self._training.trackers:
            tracker.picture(step, picture_of(self._workdir, step))

    def _save_snapshot(self, snapshots: Checkpoints, state: TrainState) -> None:
        """Starts to store the averages from which others are reconstructed (`runs.averages`).

        A run that was killed repeats some steps; a snapshot that exists already stays.
        """
        self._check_finite(state)
        names = map(power_name, self._config.ema_lengths)
        averages = {name: state.ema[name] for name in names}
        snapshots.save(int(state.step), Snapshot(averages), {})

    def _check_finite(self, state: TrainState) -> None:
        self._window.flush()
        if bad := not_finite(state):
            step = int(state.step)
            if step == 0 and self._config.init_from:
                raise UserError(
                    f"config.init_from={self._config.init_from}: {bad[0]} is not finite: name "
                    "other weights, in another --workdir"
                )
            raise self._window.failure(f"{bad[0]} is not finite after step {step}", step)

    def _every(self, steps: int, step: int) -> bool:
        return step % steps == 0 or step == self._config.num_steps


def open_writers(workdir: Path, start_step: int) -> list[Writer]:
    """The files of metrics; only the first of several processes writes."""
    if not is_first():
        return []
    return [
        JSONLWriter(workdir / workdirs.METRICS, start_step),
        TensorBoardWriter(workdir / "tensorboard", start_step),
    ]


def picture_of(workdir: Path, step: int) -> Path:
    """The file of a step's picture."""
    return workdir / "samples" / f"step_{step:08d}.png"


def grid_drawer(parts: Parts, dataset: DataSet, workdir: Path) -> Callable[[TrainState], Any]:
    """A function that draws the run's picture: always the same noise and conditions.

    Text encoder and codec take memory only while it is drawn.

    Raises:
        UserError: the condition parses none of `config.sample_prompts`.
    """
    config, condition, prompts = parts.config, parts.wired.condition, parts.config.sample_prompts
    num_images, wanted = config.sample_images, len(prompts) or dataset.num_classes
    num_classes = min(wanted, most_classes(num_images))
    columns = columns_by_class(num_images, num_classes)
    num_images, texts = max(num_images // columns, 1) * columns, None
    if prompts:
        rows = np.arange(max(num_images, len(prompts))) % len(prompts)
        texts = [prompts[row] for row in rows]
        cond, source = condition.take(parsed_prompts(parts), rows), None
    else:
        cond, source = conditions_to_show(parts.wired, lambda: dataset, num_images, num_classes)
    request = Request(cond, config.seed, source)
    names = captions(condition.titles(request.condition) or texts, columns)
    beside = condition.pictures(request.condition)
    condition.release()
    run = Run(parts, parts.abstract, workdir)
    run.model().weaker(run.recipe)  # Reads, or refuses, another run of guidance before step 1.

    def draw_grid(state: TrainState) -> None:
        model = replace(run, arrays=state).model()
        images = model.sample(run.recipe, request, batch_size=len(request))
        if is_first():
            save_png(picture_of(workdir, int(state.step)), images, columns, names, beside)
        parts.codec.release()

    return draw_grid


def parsed_prompts(parts: Parts) -> Any:
    """The conditions of `config.sample_prompts`.

    Raises:
        UserError: they are no conditions of this run.
    """
    try:
        if parts.wired.objective.traits.starts_at_source:
            raise UserError("samples of this run start at test images: leave it empty")
        return parts.wired.condition.of(list(parts.config.sample_prompts))
    except UserError as error:
        raise UserError(f"config.sample_prompts: {error}") from error
