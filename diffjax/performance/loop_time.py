"""Where the time of the training loop goes: input, compute, host."""

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
from diffjax.loop.loop import compile_train_step, device_batches, take_steps
from diffjax.loop.recorder import Recorder
from diffjax.performance.throughput import noise_batch, timed
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.setup import set_up

_NEVER = 2**30
_HOST_STEPS = 200
# More than are kept ready, so that what was made before the clock started does not count.
_INPUT_WARM, _INPUT_BATCHES = 8, 40


@dataclass(frozen=True)
class Split:
    """Seconds a step, one number a round, each measured by itself and in turn.

    Attributes:
        config: which.
        batch_size: images a step.
        compute: the compiled step alone, on one batch that lies on the devices.
        loop: the training loop with its stream, log lines and all but checkpoints and pictures.
        host: the loop around a step that takes no time, on a batch that lies ready.
        input: batches made and put on the devices, with nothing else to do.
    """

    config: str
    batch_size: int
    compute: tuple[float, ...]
    loop: tuple[float, ...]
    host: tuple[float, ...]
    input: tuple[float, ...]

    @property
    def loop_overhead(self) -> float:
        """The loop's time over the bare steps' beside it, less 1; the median over the rounds."""
        pairs = zip(self.loop, self.compute, strict=True)
        return statistics.median(loop / compute for loop, compute in pairs) - 1.0

    @property
    def input_speed(self) -> float:
        """How many batches are made in the time of a step; the median over the rounds."""
        pairs = zip(self.compute, self.input, strict=True)
        return statistics.median(compute / made for compute, made in pairs)


def measure_split(
    name: str, config: ConfigDict, dataset: DataSet, *, steps: int, rounds: int
) -> Split:
    """Times the four in turn, `steps` steps of each a round."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for key in ("num_steps", "sample_every_steps", "checkpoint_every_steps"):
            config[key] = _NEVER
    setup = set_up(config, dataset.image_shape, dataset.num_classes)
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
        each = range(done + 1, done + number + 1)
        state, done = take_steps(train_step, state, each, stream, recorder, lambda _: key)
        jax.block_until_ready(state)

    def instant(state: Any, *_: Any) -> Any:
        return state, metrics

    def batches_made() -> None:
        # What was kept ready while something else was measured is none of this round's.
        next(islice(made, _INPUT_WARM - 1, None))
        seconds[3].append(timed(lambda: jax.block_until_ready(list(islice(made, _INPUT_BATCHES)))))

    seconds: list[list[float]] = [[], [], [], []]
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        checkpoints = Checkpoints(workdir / "checkpoints", 1, _NEVER)
        recorder = Recorder(setup, dataset, {"step": 0}, checkpoints, workdir, bar=False)
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
    return Split(name, config.batch_size, *each)
