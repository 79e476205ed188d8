"""Measures training and sampling throughput, compared with matrix products on the same machine."""

import contextlib
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from diffjax.conditions import Condition
from diffjax.errors import UserError
from diffjax.loop.compiled_step import compile_train_step, train_flops
from diffjax.runs.checks import check_config
from diffjax.runs.samples.model import Model, Request
from diffjax.runs.setup import Setup, countable, set_up
from diffjax.training.flops import flops_if_countable
from diffjax.training.sharding import AXES, batch_sharding, make_mesh, replicated
from diffjax.training.state import TrainState

_PEAK_SECONDS = 0.2
_PEAK_SIZES = (512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Program:
    """A compiled program to measure; it was run once before.

    Attributes:
        name: `training_program` or `sampling_program`.
        run: processes `repeats` batches and waits until they are done.
        repeats: batches per call of `run`.
        batch_size: images per batch.
        flops: matrix FLOPs per batch; None if they can't be counted.
        compile_seconds: seconds of tracing and compiling.
        nfe: network evaluations per sample; None for training.
    """

    name: str
    run: Callable[[], Any]
    repeats: int
    batch_size: int
    flops: float | None
    compile_seconds: float
    nfe: int | None


@dataclass(frozen=True)
class Measured:
    """Throughput of training or sampling with one config: one row of the benchmark's table.

    Attributes:
        config: name of the config.
        program: `training_program` or `sampling_program`.
        device: number, kind and platform of the devices.
        dtype: dtype in which the network computes.
        num_params: number of parameters.
        batch_size: images per batch.
        nfe: network evaluations per sample; None for training.
        images_per_second: from the median time of a batch.
        gflops_per_second: matrix GFLOP/s from the median time; None if FLOPs are unknown.
        share_of_peak: median over the rounds of FLOP/s divided by the peak of the same round.
        compile_seconds: seconds of tracing and compiling.
        peak_host_bytes: largest resident memory of the process.
        peak_device_bytes: largest memory of the first device; None if unknown.
        batch_seconds: seconds per batch, one number for each round.
        peak_gflops_per_second: GFLOP/s of a matrix product measured before and after each round.
    """

    config: str
    program: str
    device: str
    dtype: str
    num_params: int
    batch_size: int
    nfe: int | None
    images_per_second: float
    gflops_per_second: float | None
    share_of_peak: float | None
    compile_seconds: float
    peak_host_bytes: int
    peak_device_bytes: int | None
    batch_seconds: tuple[float, ...]
    peak_gflops_per_second: tuple[float, ...]


def measure_throughput(
    name: str, setup: Setup, *, steps: int, num_samples: int, rounds: int
) -> list[Measured]:
    """Measures training and sampling, in turn with the matrix product that they are compared with.

    Args:
        name: the name of the config, for the results.
        setup: the config, wired and placed.
        steps: training steps in each round; about 20.
        num_samples: images in the sampled batch.
        rounds: number of rounds; about 7.
    """
    config = setup.config
    state = setup.init(jax.random.key(config.seed))
    # Copied, because training donates its state.
    params = jax.tree.map(jnp.copy, state.weights(config.weights))
    programs = [training_program(setup, state, steps), sampling_program(setup, params, num_samples)]
    host_bytes, device_bytes = peak_memory(setup.mesh)  # Before the matrix products use memory.
    dtype = config.model.get("dtype", "float32")
    peak = matrix_peak(setup.mesh, dtype)

    seconds: list[list[float]] = [[] for _ in programs]
    peaks: list[list[float]] = [[] for _ in programs]
    before = peak()
    for _ in range(rounds):
        for i, program in enumerate(programs):
            seconds[i].append(timed(program.run) / program.repeats)
            after = peak()
            peaks[i].append((before + after) / 2)
            before = after

    device = setup.mesh.devices.flat[0]
    return [
        Measured(
            config=name,
            program=program.name,
            device=f"{setup.mesh.size} x {device.device_kind} ({device.platform})",
            dtype=dtype,
            num_params=setup.wired.num_params,
            batch_size=program.batch_size,
            nfe=program.nfe,
            images_per_second=program.batch_size / statistics.median(times),
            gflops_per_second=rate(program.flops, times),
            share_of_peak=share_of_peak(program.flops, times, reference),
            compile_seconds=program.compile_seconds,
            peak_host_bytes=host_bytes,
            peak_device_bytes=device_bytes,
            batch_seconds=tuple(times),
            peak_gflops_per_second=tuple(value / 1e9 for value in reference),
        )
        for program, times, reference in zip(programs, seconds, peaks, strict=True)
    ]


@dataclass(frozen=True)
class Scaled:
    """Training time on a number of devices.

    Attributes:
        config: name of the config.
        num_devices: devices used.
        batch_size: images per step, over all devices.
        batch_seconds: seconds per step, one number for each round.
    """

    config: str
    num_devices: int
    batch_size: int
    batch_seconds: tuple[float, ...]


def set_up_on_devices(
    config: ConfigDict, image_shape: tuple[int, int, int], condition: Condition, num_devices: int
) -> Setup:
    """A run on the first `num_devices` devices, laid out by the config's mesh.

    Raises:
        UserError: there are fewer devices, or the mesh or the batch does not fit them.
    """
    if num_devices > len(jax.devices()):
        raise UserError(f"there are {len(jax.devices())} devices, not {num_devices}")
    mesh = make_mesh(**config.mesh, devices=jax.devices()[:num_devices])
    check_config(config)
    return set_up(config, image_shape, condition, mesh)


def measure_scaled(name: str, setup: Setup, *, steps: int, rounds: int) -> Scaled:
    """Measures training on the devices of a set-up, for a table over numbers of devices.

    Args:
        name: the name of the config, for the table.
        setup: from `set_up_on_devices`.
        steps: training steps of a round.
        rounds: how often they are timed; the seconds of each are in the result.
    """
    program = training_program(setup, setup.init(jax.random.key(setup.config.seed)), steps)
    seconds = tuple(timed(program.run) / steps for _ in range(rounds))
    return Scaled(name, setup.mesh.size, setup.config.batch_size, seconds)


def training_program(setup: Setup, state: TrainState, steps: int) -> Program:
    """A program of training steps on one batch of noise, compiled and run once.

    Args:
        setup: the setup of the run; the step is that of the training loop.
        state: to begin with, which the first step donates.
        steps: in one call of the program.
    """
    config = setup.config
    key, batch = jax.random.key(config.seed), noise_batch(setup)
    with compiling() as seconds:
        compiled = compile_train_step(setup, key)

    def run() -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = compiled(state, key, batch)
        jax.block_until_ready(state)

    run()
    return Program(
        name="training",
        run=run,
        repeats=steps,
        batch_size=config.batch_size,
        flops=train_flops(setup),
        compile_seconds=sum(seconds),
        nfe=None,
    )


def sampling_program(setup: Setup, params: Any, num_samples: int) -> Program:
    """A program that samples one batch with the config's own recipe, compiled and run once.

    Args:
        setup: the setup of the run.
        params: the parameters of its network, on the devices.
        num_samples: the size of the batch.
    """
    wired, model = setup.wired, Model(setup.parts.programs, params)
    recipe = wired.recipe
    cond = _some_condition(wired.condition, num_samples)
    images = np.zeros((num_samples, *wired.image_shape), np.float32)
    request = Request(cond, source=images if wired.objective.traits.starts_at_source else None)

    def run() -> np.ndarray:
        return model.sample(recipe, request, batch_size=num_samples)

    with compiling() as seconds:
        run()
    x = np.zeros((num_samples, *wired.input_shape), np.float32)
    apply = countable(setup).wired.apply
    flops = flops_if_countable(apply, params, x, np.zeros(num_samples, np.float32), cond)
    return Program(
        name="sampling",
        run=run,
        repeats=1,
        batch_size=num_samples,
        flops=None if flops is None or recipe.nfe is None else recipe.nfe * flops,
        compile_seconds=sum(seconds),
        nfe=recipe.nfe,
    )


def noise_batch(setup: Setup) -> dict[str, jax.Array]:
    """A batch of uniform noise with the shapes and dtypes of the data, on the devices."""
    config, wired = setup.config, setup.wired
    rng = np.random.default_rng(0)
    batch = {
        name: rng.uniform(-1, 1, rows.shape).astype(rows.dtype)
        for name, rows in wired.batch_shapes(config.batch_size).items()
    }
    return jax.device_put(batch, batch_sharding(setup.mesh))


def _some_condition(condition: Condition, n: int) -> Any:
    listed = condition.in_turn(n)
    return condition.example(n) if listed is None else listed


def matrix_peak(mesh: Mesh, dtype: str) -> Callable[[], float]:
    """Returns a function that measures the FLOP/s of matrix products on all devices of a mesh.

    Every device multiplies square matrices of the size that is fastest on this machine.
    """
    candidates: list[tuple[float, int, Callable[[int], float]]] = []
    for n in _PEAK_SIZES:
        product, flops = product_of(n, mesh, dtype), mesh.size * 2 * n**3
        speed = max(product(1) for _ in range(3))
        candidates.append((speed, math.ceil(_PEAK_SECONDS * speed / flops), product))
        if flops / speed > _PEAK_SECONDS / 4:
            break
    _, times, fastest = max(candidates, key=lambda candidate: candidate[0])
    return lambda: fastest(times)


def product_of(n: int, mesh: Mesh, dtype: str) -> Callable[[int], float]:
    """Returns a function that multiplies `[n, n]` matrices on every device and returns FLOP/s.

    Its argument is the number of products.
    """
    rows = NamedSharding(mesh, PartitionSpec(AXES))
    square = np.random.default_rng(0).standard_normal((n, n), np.float32).astype(jnp.dtype(dtype))
    left = jax.device_put(np.tile(square, (mesh.size, 1)), rows)
    right = jax.device_put(square, replicated(mesh))
    multiply = jax.jit(lambda left, right: left @ right, out_shardings=rows)
    multiply(left, right).block_until_ready()

    def flops_per_second(times: int) -> float:
        def run() -> None:
            product = right
            for _ in range(times):
                product = multiply(left, right)
            product.block_until_ready()

        return times * mesh.size * 2 * n**3 / timed(run)

    return flops_per_second


@contextlib.contextmanager
def compiling() -> Iterator[list[float]]:
    """Collects the seconds of all tracing, lowering and compiling in a block, as JAX reports."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        del kwargs
        if event.startswith("/jax/core/compile/"):
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def timed(run: Callable[[], Any]) -> float:
    """Calls a function and returns the seconds that it takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def rate(flops: float | None, seconds: Sequence[float]) -> float | None:
    """GFLOP/s at the median time; None if the FLOPs are unknown."""
    return None if flops is None else flops / statistics.median(seconds) / 1e9


def share_of_peak(
    flops: float | None, seconds: Sequence[float], peaks: Sequence[float]
) -> float | None:
    """Median over the rounds of the achieved FLOP/s divided by the peak of the same round.

    Example:
        >>> share_of_peak(100.0, [1.0, 2.0, 1.0], [200.0, 100.0, 400.0])
        0.5
    """
    if flops is None:
        return None
    return statistics.median(flops / s / p for s, p in zip(seconds, peaks, strict=True))


def peak_memory(mesh: Mesh) -> tuple[int, int | None]:
    """Peak bytes of this process and of its first device; None for the latter if unknown."""
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host = kibibytes * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes.
    return host, (mesh.devices.flat[0].memory_stats() or {}).get("peak_bytes_in_use")
