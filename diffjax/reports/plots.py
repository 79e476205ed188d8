"""Draws curves as SVG for self-contained pages.

The functions return the text of an `<svg>` element. Its colours are CSS variables with a
fallback (`var(--ink, #1f2430)`), so that a page can have light and dark colours; its size
follows the surrounding element.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)
from scipy.signal import savgol_filter

from diffjax.evaluation.tables import METRICS, label

LOG_SNR_PREFIX, EVAL_PREFIX = "loss_by_log_snr/", "eval/"

_INK, _FAINT = "#1f2430", "#8b93a1"
_SERIES = ("#2f6fde", "#d9622b", "#1c9463", "#a44fc4", "#b8860b", "#cf3f6f")
_MARKERS = "osD^vP"
_VARIABLES = {_INK: "--ink", _FAINT: "--faint"} | {
    color: f"--series-{index}" for index, color in enumerate(_SERIES, start=1)
}
_NOISY_TO_CLEAN = LinearSegmentedColormap.from_list(
    "noisy_to_clean", ["#2f62e0", "#a048d0", "#d9416e", "#de7b1f", "#8c981c", "#1f9a6a"]
)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "diffjax",
    "font.size": 9,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "grid.color": _FAINT,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}
_MAX_POINTS = 600
_MIN_SHARE_RANGE = 0.04


def loss_curve(records: Sequence[Mapping[str, Any]]) -> str:
    """Plots the loss against the training step on a logarithmic axis, raw and smoothed.

    Args:
        records: metrics with `step` and `loss`; other records are ignored. The first step with a
            loss that is not finite is marked.

    Returns:
        an `<svg>` element, or "" if there is no finite loss to draw.
    """
    steps, losses = _series(records, "loss")
    if not np.isfinite(losses).any():
        return ""

    def draw(axes: Axes) -> None:
        _raw_and_smooth(axes, steps, losses, _SERIES[0], "loss")
        broken = steps[~np.isfinite(losses)]
        if broken.size:
            axes.axvline(broken[0], color=_SERIES[1], linestyle=":", label="not finite")
            axes.legend()
        _dress(axes, "training step", "loss", log_y=bool((losses > 0).any()))

    return _svg("loss", draw)


def plot_loss_by_log_snr(records: Sequence[Mapping[str, Any]]) -> str:
    """Plots the smoothed loss against the training step, with one curve for each bin of log-SNR.

    Args:
        records: metrics with `step` and `loss_by_log_snr/<lo>`, where `<lo>` is the lower edge of
            a bin; its upper edge is the next bin's lower edge.

    Returns:
        an `<svg>` element, or "" if there is nothing to draw.
    """
    edges = log_snr_edges(records)
    curves = [_series(records, f"{LOG_SNR_PREFIX}{edge}") for edge in edges]
    if not any(np.isfinite(losses).any() for _, losses in curves):
        return ""

    def draw(axes: Axes) -> None:
        for index in reversed(range(len(edges))):
            steps, losses = curves[index]
            finite = np.isfinite(losses)
            color = to_hex(_NOISY_TO_CLEAN(index / max(len(edges) - 1, 1)))
            upper = edges[index + 1] if index + 1 < len(edges) else "∞"
            _line(
                axes,
                steps[finite],
                _smooth(losses[finite]),
                color=color,
                label=f"{edges[index]} … {upper}".replace("-inf", "−∞").replace("-", "−"),
            )
        axes.legend(title="log-SNR", loc="center left", bbox_to_anchor=(1.0, 0.5))
        _dress(axes, "training step", "loss", log_y=any((loss > 0).any() for _, loss in curves))

    return _svg("loss_by_log_snr", draw)


def metric_curve(records: Sequence[Mapping[str, Any]], name: str, best: int | None = None) -> str:
    """Plots a metric that evaluators measured against the training step.

    Args:
        records: metrics with `step` and `eval/NAME`; other records are ignored.
        name: the name of the metric, `EVALUATOR/METRIC`.
        best: the step of the best checkpoint, which is marked.

    Returns:
        an `<svg>` element, or "" if there is no finite value to draw.
    """
    steps, values = _series(records, f"{EVAL_PREFIX}{name}")
    finite = np.isfinite(values)
    if not finite.any():
        return ""
    steps, values = steps[finite], values[finite]

    def draw(axes: Axes) -> None:
        axes.plot(steps, values, color=_SERIES[0], marker="o", markersize=3)
        if best is not None and best in steps:
            value = values[list(steps).index(best)]
            axes.plot([best], [value], "o", color=_SERIES[1], label=f"best: step {best:,}")
            axes.legend()
        _dress(axes, "training step", metric_title(name), log_y=False)

    return _svg(f"eval-{name.replace('/', '-')}", draw)


def metric_title(name: str) -> str:
    """The title of an evaluator's metric.

    Example:
        >>> metric_title("samples/frechet_distance"), metric_title("validation/loss")
        ('Fréchet distance (samples)', 'loss (validation)')
    """
    evaluator, _, metric = name.partition("/")
    return f"{label(metric)} ({evaluator})"


def metric_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics of evaluators, `EVALUATOR/METRIC`, that occur in `records`, in their order."""
    keys = dict.fromkeys(key for record in records for key in record)
    return [key.removeprefix(EVAL_PREFIX) for key in keys if key.startswith(EVAL_PREFIX)]


def log_snr_edges(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lower edges of the log-SNR bins that occur in `records`, from noisy to clean."""
    keys = {key for record in records for key in record if key.startswith(LOG_SNR_PREFIX)}
    return sorted((key.removeprefix(LOG_SNR_PREFIX) for key in keys), key=float)


def quality_against_nfe(
    rows: Sequence[Mapping[str, Any]],
    floor: float | None = None,
    metric: str = "frechet_distance",
) -> str:
    """Plots a metric against network evaluations per sample, with one line per solver and grid.

    Args:
        rows: rows with `solver`, `nfe`, `guidance_scale` and `metric`; rows without a number for
            `metric` are ignored.
        floor: value of real test images, drawn as a dashed line; None draws none.
        metric: name of the metric in `rows`, one of `tables.METRICS`.

    Returns:
        an `<svg>` element, or "" if there is nothing to draw.
    """
    rows = [row for row in rows if _is_number(row.get(metric)) and _is_number(row.get("nfe"))]
    if not rows:
        return ""
    lines = _lines(rows)
    values = [row[metric] for row in rows] + ([] if floor is None else [floor])

    def draw(axes: Axes) -> None:
        for index, (name, points) in enumerate(lines.items()):
            points = sorted(points, key=lambda row: row["nfe"])
            axes.plot(
                [row["nfe"] for row in points],
                [row[metric] for row in points],
                color=_SERIES[index % len(_SERIES)],
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=4,
                label=name,
            )
        if floor is not None:
            axes.axhline(floor, color=_INK, linestyle="--", linewidth=1, label="floor: real data")
        axes.set_xscale("log")
        _integer_ticks(axes, sorted({row["nfe"] for row in rows}))
        _dress(
            axes,
            "network evaluations per sample",
            METRICS[metric].label,
            log_y=not METRICS[metric].is_share and min(values) > 0,
        )
        if METRICS[metric].is_share:
            _widen(axes, values)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1, symbol=" %"))
        axes.legend()

    return _svg(metric, draw)


def shares_by_guidance(scales: Sequence[float], shares: Mapping[str, Sequence[float]]) -> str:
    """Plots shares of samples against the guidance scale, with one line for each name.

    Args:
        scales: the guidance scales, in increasing order.
        shares: in [0, 1], one for each scale, by the name of the line.

    Returns:
        an `<svg>` element.
    """

    def draw(axes: Axes) -> None:
        for index, (name, values) in enumerate(shares.items()):
            color, marker = _SERIES[index % len(_SERIES)], _MARKERS[index % 6]
            axes.plot(scales, values, markersize=4, label=name, color=color, marker=marker)
        _dress(axes, "guidance scale", "right", log_y=False)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.legend()

    return _svg("guidance", draw)


def _svg(name: str, draw: Callable[[Axes], None]) -> str:
    with mpl.rc_context(_STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(4.9, 3.1), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable}, {color})")
    # Two plots on one page must not share an id.
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)


def _dress(axes: Axes, x_label: str, y_label: str, log_y: bool) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True)
    if log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high / low < 300:  # with a smaller range, powers of ten are too few ticks
            steps = (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
            axes.yaxis.set_major_locator(LogLocator(subs=steps))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _widen(axes: Axes, shares: list[float]) -> None:
    # Differences of less than a few per cent are noise and should not fill the axis.
    if max(shares) - min(shares) < _MIN_SHARE_RANGE:
        middle = (max(shares) + min(shares)) / 2
        top = min(middle + _MIN_SHARE_RANGE / 2, 1.002)
        axes.set_ylim(top - _MIN_SHARE_RANGE, top)


def _integer_ticks(axes: Axes, values: list[float]) -> None:
    # Labels of ticks closer than half an octave would overlap.
    ticks = values[:1]
    for value in values[1:]:
        if value / ticks[-1] >= 1.4:
            ticks.append(value)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Groups rows by their recipe without its steps; settings that all share are not named."""
    prefixes = {"grid": "", "guidance_scale": "guidance ", "weights": "", "seed": "seed "}
    varying = [key for key in prefixes if len({row.get(key) for row in rows}) > 1]
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts = [f"{prefixes[key]}{row.get(key)}" for key in varying]
        lines.setdefault(", ".join([str(row.get("solver")), *parts]), []).append(row)
    return lines


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps, float), np.asarray(values, float)


def _raw_and_smooth(
    axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str
) -> None:
    axes.plot(*_thin(steps, values), color=color, alpha=0.3, linewidth=0.8, label=label)
    finite = np.isfinite(values)
    _line(axes, steps[finite], _smooth(values[finite]), color=color, label="smoothed")


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
    # A line through one point is invisible.
    axes.plot(*_thin(steps, values), marker="o" if len(steps) == 1 else "", **style)


def _smooth(values: np.ndarray) -> np.ndarray:
    # Local linear fits over 1/25 of the run, so that the ends are not biased.
    half = len(values) // 50
    return np.asarray(savgol_filter(values, 2 * half + 1, polyorder=1)) if half else values


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(steps) <= _MAX_POINTS:
        return steps, values
    rows = np.linspace(0, len(steps) - 1, _MAX_POINTS).round().astype(int)
    return steps[rows], values[rows]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
