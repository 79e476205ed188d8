"""Formats the benchmark's numbers as Markdown tables."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from diffjax.evaluation.tables import number, percent, table
from diffjax.evaluation.tables import three_digits as digits
from diffjax.performance.loop_time import LoopTime
from diffjax.performance.throughput import Measured, Scaled
from experiments.benchmark.against_torch import Pair
from experiments.benchmark.cases import Start


def spread(values: Sequence[float]) -> str:
    """Formats a median with its minimum and maximum.

    Example:
        >>> spread([1.0, 1.25, 3.0])
        '1.25 (1.00 … 3.00)'
    """
    return f"{digits(statistics.median(values))} ({digits(min(values))} … {digits(max(values))})"


def throughput_table(results: Sequence[Measured]) -> str:
    """A table of throughput with one row per program."""
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
    return table(headings, rows)


def against_table(pairs: Sequence[Pair], other: str) -> str:
    """A table of both libraries and their ratio, with one row per program."""
    rows = [
        [
            f"{pair.config}: {pair.program}",
            spread(pair.ours),
            spread(pair.theirs),
            spread(pair.ratios),
        ]
        for pair in pairs
    ]
    headings = ["program", "s a batch (min … max)", other, f"ours / {other}"]
    return table(headings, rows)


def loop_time_table(splits: Sequence[LoopTime]) -> str:
    """A table of the training loop and its parts, with one row per config."""
    headings = [
        "loop", "batch", "compute ms", "loop ms", "loop over compute", "host ms", "input batches/s",
        "input over compute",
    ]  # fmt: skip
    rows = [
        [
            split.config,
            number(split.batch_size),
            *(spread([1e3 * s for s in times]) for times in (split.compute, split.loop)),
            f"{100 * split.loop_overhead:+.1f} %",
            digits(1e3 * statistics.median(split.host)),
            digits(1 / statistics.median(split.input)),
            f"{digits(split.input_speed)} times",
        ]
        for split in splits
    ]
    return table(headings, rows)


def startup_tables(imports: Mapping[str, float], starts: Sequence[Start]) -> str:
    """Tables of import times, and of starts without, with an empty and with a filled cache."""
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
            table(["beyond jax's own import", "ms"], import_rows),
            table(
                ["launch to first step", "no cache s", "empty cache s", "filled cache s"],
                start_rows,
            ),
        ]
    )


def scaling_table(rows: Sequence[Scaled]) -> str:
    """A table of training the same batch on several numbers of devices."""
    first: dict[str, Scaled] = {}
    cells = []
    for row in rows:
        one = first.setdefault(row.config, row)
        speed_up = [a / b for a, b in zip(one.batch_seconds, row.batch_seconds, strict=True)]
        cells.append(
            [
                row.config,
                number(row.num_devices),
                spread(row.batch_seconds),
                digits(row.batch_size / statistics.median(row.batch_seconds)),
                f"{spread(speed_up)} times",
            ]
        )
    headings = ["training over devices", "devices", "s a batch (min … max)", "images/s", "as fast"]
    return table(headings, cells)


def headline(machine: Mapping[str, Any], results: Sequence[Measured]) -> str:
    """Describes the machine and its peak in lines of Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    peaks: dict[str, list[float]] = {}
    for row in results:
        peaks.setdefault(row.dtype, []).extend(row.peak_gflops_per_second)
    return "\n".join(
        [
            f"- {machine['machine']}; {results[0].device}; {machine['date']}, "
            f"load average {machine['load_average']} at the start",
            f"- {versions}, revision {machine['git_revision'][:9] or 'unknown'}",
            *(
                f"- peak of {kind} matrix products: {spread(p)} GFLOP/s"
                for kind, p in peaks.items()
            ),
        ]
    )
