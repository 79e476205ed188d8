"""The measurements of the benchmark, each in its own process."""

import multiprocessing
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import jax
from ml_collections import ConfigDict

from diffjax import config_files
from diffjax.conditions import Condition, of_classes
from diffjax.errors import UserError
from diffjax.loop.compiled_step import compile_train_step
from diffjax.performance.loop_time import LoopTime, measure_loop_time
from diffjax.performance.throughput import (
    Measured,
    Scaled,
    measure_scaled,
    measure_throughput,
    noise_batch,
    set_up_on_devices,
    timed,
)
from diffjax.runs.setup import set_up
from diffjax.spec import build
from experiments.flags import cli


@dataclass(frozen=True)
class Case:
    """One config of the benchmark; another process can rebuild it from this.

    Attributes:
        name: name of a file in `configs/`, with its choices after a colon.
        batch_size: images per training step; None keeps that of the config.
        data_path: folder of the images, for configs that read a folder.
        overrides: settings `config.NAME=VALUE`.
    """

    name: str
    batch_size: int | None = None
    data_path: str | None = None
    overrides: tuple[str, ...] = ()

    def config(self) -> ConfigDict:
        """Loads the config.

        Raises:
            UserError: there is no config with this name, or no such setting.
        """
        stem, colon, arguments = self.name.partition(":")
        config = config_files.load(f"configs/{stem}.py{colon}{arguments}")
        if self.batch_size is not None:
            config.batch_size = self.batch_size
        if self.data_path is not None and "path" in config.data:
            config.data.path = self.data_path
        pairs = (text.partition("=") for text in self.overrides)
        config_files.override(config, {name: value for name, _, value in pairs})
        return config

    def data(self, config: ConfigDict) -> tuple[tuple[int, int, int], Condition]:
        """Image shape and number of classes, from `config.expected` or else from the data."""
        if "expected" in config:
            height, width, channels = config.expected.image_shape
            return (height, width, channels), of_classes(config.expected.num_classes)
        dataset = build(config.data)
        return dataset.image_shape, dataset.condition


@dataclass(frozen=True)
class Start:
    """Seconds from launching Python to the end of the first training step."""

    config: str
    no_cache_seconds: float
    first_seconds: float
    second_seconds: float


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new interpreter, which shares no memory and no compiled programs.

    Raises:
        UserError: the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_begin) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UserError(
                "the measuring process was killed, probably out of memory: lower --batch_size"
            ) from None


def _begin() -> None:
    # Ctrl-C reaches all processes of the group; only the parent prints a message.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    cli.keep_freed_memory()


def measure_case(case: Case, sizes: dict[str, int]) -> list[Measured]:
    """Measures training and sampling."""
    jax.config.update("jax_enable_compilation_cache", False)
    config = case.config()
    return measure_throughput(case.name, set_up(config, *case.data(config)), **sizes)


def measure_loop(case: Case, sizes: dict[str, int]) -> LoopTime:
    """Measures the training loop and its parts on the config's real data."""
    jax.config.update("jax_enable_compilation_cache", False)
    config = case.config()
    return measure_loop_time(case.name, config, build(config.data), **sizes)


def measure_devices(case: Case, num_devices: int, sizes: dict[str, int]) -> Scaled:
    """Measures training on a number of devices; on a CPU they are fake and share its cores."""
    jax.config.update("jax_num_cpu_devices", num_devices)
    jax.config.update("jax_enable_compilation_cache", False)
    config = case.config()
    setup = set_up_on_devices(config, *case.data(config), num_devices)
    return measure_scaled(case.name, setup, **sizes)


def measure_start(case: Case) -> Start:
    """Measures the first training step without, with an empty and with a filled cache."""

    def seconds(cache: str | None) -> float:
        return timed(lambda: in_new_process(_first_step, case, cache))

    with tempfile.TemporaryDirectory() as cache:
        return Start(case.name, seconds(None), seconds(cache), seconds(cache))


def _first_step(case: Case, cache: str | None) -> None:
    jax.config.update("jax_enable_compilation_cache", cache is not None)
    if cache is not None:
        cli.keep_compiled_programs(cache)
    config = case.config()
    setup = set_up(config, *case.data(config))
    key = jax.random.key(config.seed)
    state = setup.init(key)
    jax.block_until_ready(compile_train_step(setup, key)(state, key, noise_batch(setup)))


def import_seconds(module: str) -> float:
    """Seconds that an import takes once jax is imported; the median of three processes."""
    code = (
        "import time, jax; began = time.perf_counter(); "
        f"import {module}; print(time.perf_counter() - began)"
    )
    command = [sys.executable, "-c", code]
    outputs = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)
    ]
    return statistics.median(map(float, outputs))
