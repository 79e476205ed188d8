"""Measure training and sampling against this machine's own matrix-multiply peak.

  python -m experiments.benchmark
  python -m experiments.benchmark --configs=digits,fashion_mnist:model=unet --data_path=FOLDER
  python -m experiments.benchmark --startup --json=benchmark.json

A benchmark, not a test: compare only numbers of one run, on a machine that does nothing else.
docs/performance.md says what each number means.
"""

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

import diffjax
from diffjax.errors import UserError
from diffjax.evaluation.tables import measure as digits
from diffjax.evaluation.tables import number, percent
from diffjax.spec import build
from diffjax.training.loop import compile_train_step
from diffjax.training.setup import set_up
from diffjax.training.throughput import Measured, measure, noise_batch, timed
from diffjax.training.workdirs import git_revision
from experiments import cli, config_files

FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "configs", "digits,digits:model=unet", "files in configs/, with their choices after a colon",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer(
    "batch_size", None, "images a training step; each config's own by default", lower_bound=1,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "data_path", None, "folder of the images, for configs that read one", flag_values=FLAGS
)
flags.DEFINE_integer("steps", 8, "training steps a round", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("num_samples", 64, "samples a round", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 5, "medians are over these", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool(
    "startup", False, "also time imports, and starts with and without JAX's compilation cache",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("out", None, "write the tables here as well", flag_values=FLAGS)
flags.DEFINE_string("json", None, "write every number here", flag_values=FLAGS)

_VERSIONS = ("jax", "jaxlib", "flax", "numpy")
_IMPORTS = ("diffjax", "diffjax.training.loop")


@dataclass(frozen=True)
class Start:
    """Seconds from launching Python to the end of the first training step."""

    config: str
    no_cache_seconds: float
    first_seconds: float
    second_seconds: float


def split_configs(text: str) -> list[str]:
    """Names of configs; commas part these and their arguments alike.

    Example:
        >>> split_configs("digits,digits:objective=ddpm,model=unet,fashion_mnist")
        ['digits', 'digits:objective=ddpm,model=unet', 'fashion_mnist']
    """
    names: list[str] = []
    for part in text.split(","):
        if names and "=" in part.partition(":")[0]:
            names[-1] += f",{part}"
        else:
            names.append(part.strip())
    return names


def load_config(name: str, batch_size: int | None, data_path: str | None) -> ConfigDict:
    """A config by its name in `configs/`; what is None stays as it is there.

    Raises:
        UserError: there is none of that name.
    """
    stem, colon, arguments = name.partition(":")
    config = config_files.load(f"configs/{stem}.py{colon}{arguments}")
    if batch_size is not None:
        config.batch_size = batch_size
    if data_path is not None and "path" in config.data:
        config.data.path = data_path
    return config


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a fresh interpreter, so that memory and compilation are its own.

    Raises:
        UserError: the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_die_on_interrupt) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UserError(
                "the measuring process was killed, probably out of memory: lower --batch_size"
            ) from None


def _die_on_interrupt() -> None:
    """Ctrl-C reaches the whole group; only the parent has something to say about it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _measure_config(sizes: dict[str, int], name: str, *changes: Any) -> list[Measured]:
    jax.config.update("jax_enable_compilation_cache", False)
    config = load_config(name, *changes)
    dataset = build(config.data)
    return measure(name, config, dataset.image_shape, dataset.num_classes, **sizes)


def _first_step(cache: str | None, name: str, *changes: Any) -> None:
    jax.config.update("jax_enable_compilation_cache", cache is not None)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)  # As the executables do.
    config = load_config(name, *changes)
    dataset = build(config.data)
    setup = set_up(config, dataset.image_shape, dataset.num_classes)
    key = jax.random.key(config.seed)
    state = setup.init(key)
    jax.block_until_ready(compile_train_step(setup, key)(state, key, noise_batch(setup)))


def measure_start(name: str, *changes: Any) -> Start:
    """Times the first training step without, with an empty and with a filled cache."""

    def seconds(cache: str | None) -> float:
        return timed(lambda: in_new_process(_first_step, cache, name, *changes))

    with tempfile.TemporaryDirectory() as cache:
        return Start(name, seconds(None), seconds(cache), seconds(cache))


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


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, padded so that it reads well as it is; numbers to the right.

    Example:
        >>> print(markdown(["config", "seconds"], [["digits", "1.5"]]))
        | config | seconds |
        |:-------|--------:|
        | digits |     1.5 |
    """
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        ":" + "-" * (width + 1) if not i else "-" * (width + 1) + ":"
        for i, width in enumerate(widths)
    ]
    return "\n".join([line(headings), f"|{'|'.join(rule)}|", *map(line, rows)])


def spread(values: Sequence[float]) -> str:
    """The median, with the extremes that show how noisy it is.

    Example:
        >>> spread([1.0, 1.25, 3.0])
        '1.25 (1.00 … 3.00)'
    """
    return f"{digits(statistics.median(values))} ({digits(min(values))} … {digits(max(values))})"


def throughput_table(results: Sequence[Measured]) -> str:
    """One row a program."""
    headings = [
        "program", "parameters", "batch", "NFE", "s a batch (min … max)", "images/s", "GFLOP/s",
        "of peak", "compile s", "host MiB",
    ]  # fmt: skip
    rows = [
        [
            f"{row.config}: {row.program}",
            number(row.num_params),
            number(row.batch_size),
            number(row.nfe),
            spread(row.batch_seconds),
            digits(row.images_per_second),
            digits(row.gflops_per_second),
            percent(row.share_of_peak),
            digits(row.compile_seconds),
            number(row.peak_host_bytes // 2**20),
        ]
        for row in results
    ]
    if any(row.peak_device_bytes is not None for row in results):
        headings.append("device MiB")
        for cells, row in zip(rows, results, strict=True):
            held = row.peak_device_bytes
            cells.append(number(None if held is None else held // 2**20))
    return markdown(headings, rows)


def startup_tables(imports: Mapping[str, float], starts: Sequence[Start]) -> str:
    """Import times, and first against second starts."""
    import_rows = [[f"import {name}", digits(1e3 * seconds)] for name, seconds in imports.items()]
    start_rows = [
        [
            start.config,
            *map(digits, (start.no_cache_seconds, start.first_seconds, start.second_seconds)),
        ]
        for start in starts
    ]
    return "\n\n".join(
        [
            markdown(["beyond jax's own import", "ms"], import_rows),
            markdown(
                ["launch to first step", "no cache s", "empty cache s", "filled cache s"],
                start_rows,
            ),
        ]
    )


def describe_machine() -> dict[str, Any]:
    """What the numbers hang on, but for the device, which only the measuring process may touch."""
    processor, vector = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):  # Linux only.
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        fields = dict(re.findall(r"^(model name|flags)\s*: (.*)$", text, re.MULTILINE))
        processor = fields.get("model name", processor)
        vector = next((f" ({v})" for v in ("avx512f", "avx2") if v in fields.get("flags", "")), "")
    return {
        "machine": f"{os.cpu_count()} cores of {processor}{vector}, {platform.system()}",
        "load_average": round(os.getloadavg()[0], 1),
        "date": datetime.now().isoformat(" ", timespec="minutes"),
        "versions": {"diffjax": diffjax.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _VERSIONS},
        "git_revision": git_revision(Path(__file__).parent),
    }


def headline(machine: Mapping[str, Any], results: Sequence[Measured]) -> str:
    """The machine and its peak, in lines of Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    peaks = [peak for row in results for peak in row.peak_gflops_per_second]
    return "\n".join(
        [
            f"- {machine['machine']}; {results[0].device}; {machine['date']}, "
            f"load average {machine['load_average']} at the start",
            f"- {versions}, revision {machine['git_revision'][:9] or 'unknown'}",
            f"- peak of float32 matrix products: {spread(peaks)} GFLOP/s",
        ]
    )


def main(args: SimpleNamespace) -> None:
    """Measures one config after the other, prints the tables and saves them."""
    for path in (args.out, args.json):
        if path is not None and not Path(path).parent.is_dir():
            raise UserError(f"can't write {path}: there is no folder {Path(path).parent}")
    names = split_configs(args.configs)
    changes = args.batch_size, args.data_path
    for name in names:  # A mistake in the last one should not show after minutes.
        build(load_config(name, *changes).data)

    machine = describe_machine()
    sizes = {"steps": args.steps, "num_samples": args.num_samples, "rounds": args.rounds}
    results: list[Measured] = []
    for name in names:
        print(f"measuring {name}", file=sys.stderr)
        results += in_new_process(_measure_config, sizes, name, *changes)
    tables = [headline(machine, results), throughput_table(results)]
    numbers = machine | {"results": [asdict(row) for row in results]}
    if args.startup:
        print("measuring imports and starts", file=sys.stderr)
        imports = {module: import_seconds(module) for module in _IMPORTS}
        starts = [measure_start(name, *changes) for name in names]
        tables.append(startup_tables(imports, starts))
        numbers["startup"] = {"imports": imports, "starts": [asdict(start) for start in starts]}
    text = "\n\n".join(tables)
    print(text)
    for path, content in ((args.out, text), (args.json, json.dumps(numbers, indent=2))):
        if path is not None:
            save(path, content)


def save(path: str, text: str) -> None:
    """Writes a file.

    Raises:
        UserError: it can't be written.
    """
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error


USAGE = f"""{__doc__}
Configs: {", ".join(cli.config_names())}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))
