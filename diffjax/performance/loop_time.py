"""Measures how the time of the training loop divides into input, compute and host."""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from diffjax.data import DataSet
from diffjax.host.prefetch import prefetched
from diffjax.loop.compiled_step import compile_train_step
from diffjax.loop.device_batches import device_batches
from diffjax.loop.recorder import Recorder
from diffjax.loop.training import Training
from diffjax.performance.throughput import noise_batch, timed
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.setup import set_up

_NEVER = 2**30
_HOST_STEPS = 200
# More batches than are prefetched, so that batches made before the clock started do not count.
_INPUT_WARM, _INPUT_BATCHES = 8, 40


@dataclass(frozen=True)
class LoopTime:
    """Seconds per step of the parts of a training loop, one number for each round.

    The parts are measured separately and in turn.

    Attributes:
        config: name of the config.
        batch_size: images per step.
        compute: the compiled step alone, on one batch that is already on the devices.
        loop: the training loop with its input and log lines, without checkpoints and samples.
        host: the loop around a step that does nothing, on a batch that is ready.
        input: making batches and copying them to the devices, without training.
    """

    config: str
    batch_size: int
    compute: tuple[float, ...]
    loop: tuple[float, ...]
    host: tuple[float, ...]
    input: tuple[float, ...]

    @property
    def loop_overhead(self) -> float:
        """Time of the loop / time of the steps alone in the same round, minus 1; the median."""
        pairs = zip(self.loop, self.compute, strict=True)
        return statistics.median(loop / compute for loop, compute in pairs) - 1.0

    @property
    def input_speed(self) -> float:
        """Number of batches made in the time of one step; the median over the rounds."""
        pairs = zip(self.compute, self.input, strict=True)
        return statistics.median(compute / made for compute, made in pairs)


def measure_loop_time(
    name: str, config: ConfigDict, dataset: DataSet, *, steps: int, rounds: int
) -> LoopTime:
    """Measures compute, loop, host and input of a config in turn.

    Args:
        name: the name of the config, for the result.
        config: a resolved config.
        dataset: its data set.
        steps: training steps in each measurement; about 20.
        rounds: number of rounds; about 7.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for key in ("num_steps", "sample_every_steps", "checkpoint_every_steps"):
            config[key] = _NEVER
    setup = set_up(config, dataset.image_shape, dataset.condition, codec=dataset.codec)
    key, batch = jax.random.key(config.seed), noise_batch(setup)
    train_step = compile_train_step(setup, key)
    state, metrics = train_step(setup.init(key), key, batch)
    made, done = device_batches(setup, dataset, 0), 0
    next(islice(made, _INPUT_WARM - 1, None))

    def compute() -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = train_step(state, key, batch)
        jax.block_until_ready(state)

    def take(train_step: Callable, stream: Any, number: int) -> None:
        nonlocal state, done
        for _ in range(number):  # as in `train_and_evaluate`
            done += 1
            state, metrics = train_step(state, key, next(stream))
            recorder.add(done, metrics)
            if recorder.due(done, stop=False):
                recorder.keep(done, state, stop=False)
        jax.block_until_ready(state)

    def instant(state: Any, *_: Any) -> Any:
        return state, metrics

    def batches_made() -> None:
        # Batches that were prefetched during other measurements do not count.
        next(islice(made, _INPUT_WARM - 1, None))
        seconds[3].append(timed(lambda: jax.block_until_ready(list(islice(made, _INPUT_BATCHES)))))

    seconds: list[list[float]] = [[], [], [], []]
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        checkpoints = Checkpoints(workdir / "checkpoints", 1, _NEVER)
        training = Training(setup, dataset, workdir, checkpoints)
        recorder = Recorder(training, {"step": 0}, bar=False)
        with prefetched(device_batches(setup, dataset, 0)) as stream:
            take(train_step, stream, steps)
            for _ in range(rounds):
                seconds[0].append(timed(compute))
                seconds[1].append(timed(lambda: take(train_step, stream, steps)))
                seconds[2].append(timed(lambda: take(instant, repeat(batch), _HOST_STEPS)))
                batches_made()
        recorder.close()
        checkpoints.close()
    counts = (steps, steps, _HOST_STEPS, _INPUT_BATCHES)
    each = (tuple(second / n for second in row) for row, n in zip(seconds, counts, strict=True))
    return LoopTime(name, config.batch_size, *each)
