"""Formats numbers, durations and tables, such as the table of quality by NFE."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

MISSING = "–"
# Names of metrics on pages, in the order of their table; other metrics follow with their own names.
LABELS = {
    "frechet_distance": "Fréchet distance",
    "frechet_distance_at_infinity": "Fréchet distance at infinity",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "inception_score": "Inception score",
    "cmmd": "CMMD",
    "accuracy": "accuracy",
    "clip_score": "CLIP score",
    "retrieval_accuracy": "retrieval accuracy",
    "closer_than_test": "closer than test images",
    "copied": "copied",
    "inauthentic": "inauthentic",
    "data_copying": "data copying",
    "sliced_wasserstein": "sliced Wasserstein distance",
    "mode_weights": "weight in wrong modes",
    "bits_per_dim": "bits per dimension",
}
# Metrics whose higher values are better; of the others, lower ones are.
HIGHER_IS_BETTER = frozenset(
    {
        "accuracy",
        "clip_score",
        "retrieval_accuracy",
        "precision",
        "recall",
        "density",
        "coverage",
        "inception_score",
    }
)
# Ranges of metrics; the others, such as unbiased estimates near 0, are unbounded.
RANGES = {
    "frechet_distance": (0.0, math.inf),
    "precision": (0.0, 1.0),
    "recall": (0.0, 1.0),
    "density": (0.0, math.inf),
    "coverage": (0.0, 1.0),
    "inception_score": (1.0, math.inf),
    "cmmd": (0.0, math.inf),
    "accuracy": (0.0, 1.0),
    "clip_score": (0.0, 100.0),
    "retrieval_accuracy": (0.0, 1.0),
    "closer_than_test": (0.0, 1.0),
    "copied": (0.0, 1.0),
    "inauthentic": (0.0, 1.0),
    "sliced_wasserstein": (0.0, math.inf),
    "mode_weights": (0.0, 1.0),
}


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a Markdown table with aligned columns; the first is left-aligned, the others right.

    Example:
        >>> print(table(["kind", "GiB"], [["code", "1.5"]]))
        | kind | GiB |
        |:-----|----:|
        | code | 1.5 |
    """
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        padded = [first.ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([line(headings), f"|{'|'.join(rule)}|", *map(line, rows)])


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """Formats a number with at least `digits` significant digits; other values as text.

    Example:
        >>> [number(x) for x in (1234567, 0.98765, 1234.5, 0.00001234, None, "heun")]
        ['1,234,567', '0.988', '1,234', '1.23e-05', '–', 'heun']
    """
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def percent(value: Any) -> str:
    """Formats a share of 1 in per cent, with one decimal.

    Example:
        >>> percent(0.9923), percent(None)
        ('99.2 %', '–')
    """
    return f"{100 * value:.1f} %" if is_number(value) else MISSING


def duration(seconds: Any) -> str:
    """Formats seconds in the two largest units of days, hours, minutes and seconds.

    Example:
        >>> [duration(s) for s in (7.26, 161, 7384, 200_000)]
        ['7.3 s', '2 min 41 s', '2 h 3 min', '2 d 7 h']
    """
    if not is_number(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def three_digits(value: Any) -> str:
    """Formats a measured number with three significant digits, including trailing zeros.

    Example:
        >>> [three_digits(x) for x in (1.3, 0.0041, 512.4, None)]
        ['1.30', '0.00410', '512', '–']
    """
    if not is_number(value) or abs(value) >= 100:
        return number(value)
    return f"{value:#.3g}"


class Metric(NamedTuple):
    """How pages show a metric of samples.

    Attributes:
        label: its name on axes and columns.
        write: formats a value.
        is_share: whether it is a share of 1, shown in per cent.
    """

    label: str
    write: Callable[[Any], str]
    is_share: bool = False


class Column(NamedTuple):
    """A column of the quality table.

    Attributes:
        key: key of its value in a row.
        heading: heading of the column.
        write: formats a value.
        shown: whether the column is shown, given the set of its values.
    """

    key: str
    heading: str
    write: Callable[[Any], str] = number
    shown: Callable[[set[Any]], bool] = lambda values: values != {None}


METRICS = {
    "frechet_distance": Metric("Fréchet distance", three_digits),
    "kernel_distance": Metric("kernel distance", three_digits),
    "accuracy": Metric("accuracy", percent, is_share=True),
    "clip_score": Metric("CLIP score", three_digits),
    "retrieval_accuracy": Metric("retrieval accuracy", percent, is_share=True),
}
COLUMNS = (
    Column("solver", "solver"),
    Column("grid", "grid"),
    Column("num_steps", "steps"),
    Column("nfe", "NFE"),
    Column("guidance_scale", "guidance"),
    Column("weights", "weights", shown=lambda values: len(values) > 1),
    Column("seed", "seed", shown=lambda values: len(values) > 1),
    *(
        Column(name, METRICS[name].label, METRICS[name].write)
        for name in (
            "accuracy",
            "clip_score",
            "retrieval_accuracy",
            "frechet_distance",
            "kernel_distance",
        )
    ),
    Column("seconds", "seconds", three_digits),
)


def sorted_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sorts rows of quality by NFE by solver, grid, guidance scale and NFE."""

    def order(row: Mapping[str, Any]) -> tuple[str, str, float, float]:
        scale, nfe = row.get("guidance_scale"), row.get("nfe")
        return (
            str(row.get("solver")),
            str(row.get("grid")),
            float(scale) if is_number(scale) else math.inf,  # pyright: ignore[reportArgumentType]
            float(nfe) if is_number(nfe) else math.inf,  # pyright: ignore[reportArgumentType]
        )

    return sorted(rows, key=order)


def quality_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Column], list[list[str]]]:
    """The columns that are shown, and their formatted cells in the order of `sorted_rows`."""
    columns = [c for c in COLUMNS if c.shown({row.get(c.key) for row in rows})]
    cells = [[c.write(row.get(c.key)) for c in columns] for row in sorted_rows(rows)]
    return columns, cells


def quality_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats quality by NFE as a plain-text table, sorted by NFE within each solver.

    Args:
        rows: the `by_nfe` of an evaluation. Columns without values are left out, and those of
            weights and seed if all rows have the same value.

    Example:
        >>> print(quality_table([
        ...     {"solver": "heun", "num_steps": 18, "nfe": 70, "frechet_distance": 1.34},
        ...     {"solver": "heun", "num_steps": 5, "nfe": 18, "frechet_distance": None},
        ... ]))
        solver  steps  NFE  Fréchet distance
        heun        5   18                 –
        heun       18   70              1.34
    """
    columns, cells = quality_cells(rows)
    lines = [[column.heading for column in columns], *cells]
    left = [column.heading in ("solver", "grid") for column in columns]
    return _aligned(lines, left)


def metrics_table(evaluation: Mapping[str, Any]) -> str:
    """Formats all metrics of an evaluation that have a value, each with its floor, as plain text.

    Example:
        >>> print(metrics_table({"accuracy": 0.5, "recall": {"value": 0.25, "floor": None}}))
        metric    value  floor
        recall    0.250      –
        accuracy  0.500      –
    """
    found = {
        name: entry if isinstance(entry, Mapping) else {"value": entry}
        for name in LABELS
        if (entry := evaluation.get(name)) is not None
    }
    rows = [("metric", "value", "floor")]
    rows += [
        (label(name), three_digits(each.get("value")), three_digits(each.get("floor")))
        for name, each in found.items()
    ]
    return _aligned(rows, [True, False, False])


def _aligned(lines: Sequence[Sequence[str]], left: Sequence[bool]) -> str:
    """Lines of cells as plain text; the columns of `left` are left-aligned, the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(line, widths, left, strict=True)
        )
        for line in lines
    )


def label(name: str) -> str:
    """The name of a metric on pages.

    Example:
        >>> label("frechet_distance (inception:spatial)")
        'Fréchet distance (inception:spatial)'
    """
    kind, bracket, rest = name.partition(" (")
    return f"{LABELS.get(kind, kind.replace('_', ' '))}{bracket}{rest}"


def range_of(name: str) -> tuple[float, float]:
    """The smallest and the largest possible value of a metric, with any extractor.

    Example:
        >>> range_of("recall (inception:pool)"), range_of("kernel_distance")
        ((0.0, 1.0), (-inf, inf))
    """
    return RANGES.get(name.partition(" (")[0], (-math.inf, math.inf))
