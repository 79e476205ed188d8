"""How fast a config trains and samples, against the matrix products of the same machine."""

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

from diffjax.errors import UserError
from diffjax.loop.loop import compile_train_step, train_flops
from diffjax.runs.labels import balanced_labels
from diffjax.runs.model import Model, Request
from diffjax.runs.setup import Setup, countable, set_up
from diffjax.training.flops import flops_if_countable
from diffjax.training.sharding import AXES, batch_sharding, check_batch, make_mesh, replicated
from diffjax.training.state import TrainState

_PEAK_SECONDS = 0.2
_PEAK_SIZES = (512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Program:
    """Something to measure, compiled and warm.

    Attributes:
        name: what it does.
        run: does it with `repeats` batches, to the end.
        repeats: batches a run.
        batch_size: images a batch.
        flops: matrix FLOPs a batch; None where they can't be counted.
        compile_seconds: tracing and compiling.
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
    """One row of the table; seconds a batch and the peak beside them have one number a round."""

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


def measure(
    name: str, setup: Setup, *, steps: int, num_samples: int, rounds: int
) -> list[Measured]:
    """Times training and sampling in turn with the matrix product that they are compared to."""
    config = setup.config
    state = setup.init(jax.random.key(config.seed))
    # Copied, because training donates its state.
    params = jax.tree.map(jnp.copy, state.weights(config.weights))
    programs = [training(setup, state, steps), sampling(setup, params, num_samples)]
    host_bytes, device_bytes = peak_memory(setup.mesh)  # Before the product adds its own.
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
            share_of_peak=share(program.flops, times, reference),
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
    """Training on some devices; seconds a batch have one number a round."""

    config: str
    num_devices: int
    batch_size: int
    batch_seconds: tuple[float, ...]


def set_up_on(
    config: ConfigDict, image_shape: tuple[int, int, int], num_classes: int, num_devices: int
) -> Setup:
    """A run on the first `num_devices` devices, laid out as the config's mesh says.

    Raises:
        UserError: there are fewer, or the mesh or the batch does not fit them.
    """
    if num_devices > len(jax.devices()):
        raise UserError(f"there are {len(jax.devices())} devices, not {num_devices}")
    mesh = make_mesh(**config.mesh, devices=jax.devices()[:num_devices])
    check_batch(config.batch_size, mesh)
    return set_up(config, image_shape, num_classes, mesh)


def measure_scaled(name: str, setup: Setup, *, steps: int, rounds: int) -> Scaled:
    """Times training on the devices of a run."""
    program = training(setup, setup.init(jax.random.key(setup.config.seed)), steps)
    seconds = tuple(timed(program.run) / steps for _ in range(rounds))
    return Scaled(name, setup.mesh.size, setup.config.batch_size, seconds)


def training(setup: Setup, state: TrainState, steps: int) -> Program:
    """`steps` training steps on one batch of noise, by the training loop's own program."""
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


def sampling(setup: Setup, params: Any, num_samples: int) -> Program:
    """One batch of samples by the config's own recipe, as one compiled scan."""
    wired, model = setup.wired, Model(setup.programs, params)
    recipe = wired.recipe
    labels = balanced_labels(num_samples, wired.num_classes)
    images = np.zeros((num_samples, *wired.image_shape), np.float32)
    request = Request(labels, source=images if wired.objective.starts_at_source else None)

    def run() -> np.ndarray:
        return model.sample(recipe, request, batch_size=num_samples)

    with compiling() as seconds:
        run()
    x = np.zeros((num_samples, *wired.input_shape), np.float32)
    apply = countable(setup).wired.apply
    flops = flops_if_countable(apply, params, x, np.zeros(num_samples, np.float32), labels)
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
    """A batch with the shapes of the data."""
    config, wired = setup.config, setup.wired
    rng = np.random.default_rng(0)
    batch = {
        name: rng.uniform(-1, 1, rows.shape).astype(rows.dtype)
        for name, rows in wired.batch_shapes(config.batch_size).items()
    }
    batch["label"] = balanced_labels(config.batch_size, wired.num_classes)
    return jax.device_put(batch, batch_sharding(setup.mesh))


def matrix_peak(mesh: Mesh, dtype: str) -> Callable[[], float]:
    """A function that measures the FLOP/s of matrix products on all devices of a mesh.

    Every device multiplies square matrices, of the size that is fastest here.
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
    """A function that multiplies `[n, n]` on every device so many times, and returns FLOP/s."""
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
    """Seconds of all tracing, lowering and compiling inside, as JAX itself reports them."""
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
    """Seconds that a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def rate(flops: float | None, seconds: Sequence[float]) -> float | None:
    """GFLOP/s of the median run."""
    return None if flops is None else flops / statistics.median(seconds) / 1e9


def share(flops: float | None, seconds: Sequence[float], peaks: Sequence[float]) -> float | None:
    """The median over the rounds of what was reached by what the machine reached beside it.

    Example:
        >>> share(100.0, [1.0, 2.0, 1.0], [200.0, 100.0, 400.0])
        0.5
    """
    if flops is None:
        return None
    return statistics.median(flops / s / p for s, p in zip(seconds, peaks, strict=True))


def peak_memory(mesh: Mesh) -> tuple[int, int | None]:
    """The most bytes that this process and one of its devices ever held; None if unknown."""
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host = kibibytes * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes.
    return host, (mesh.devices.flat[0].memory_stats() or {}).get("peak_bytes_in_use")
