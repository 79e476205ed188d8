"""The interactive plots of a comparison, as data for plotly.js.

Each figure is `{"data": traces, "layout": …}`. A trace's `meta` has the indices of its `arm` and of
its `family` of recipes, by which the page's legend hides it. Colours are those of `plots.py`; the
page has light and dark versions of them.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffjax.comparison.summary import family
from diffjax.evaluation.tables import (
    HIGHER_IS_BETTER,
    METRICS,
    Metric,
    duration,
    is_number,
    three_digits,
)
from diffjax.reports.sweep_axes import Figure as Figure
from diffjax.reports.sweep_axes import axis, layout, log_range, log_ticks

COLORS = ("#2f6fde", "#d9622b", "#1c9463", "#a44fc4", "#b8860b", "#cf3f6f")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
DASHES = ("solid", "dot", "dash", "dashdot", "longdash", "longdashdot")
SPACES = {"noise": "noise", "clean": "clean data", "v": "v"}
_MOST_LINES = 24

_Line = tuple[Sequence[float], Sequence[Mapping[str, Any]]]


def style(arm: int) -> tuple[int, int]:
    """Indices of an arm's colour and symbol; the first 36 arms have different pairs."""
    return arm % len(COLORS), (arm + arm // len(COLORS)) % len(SYMBOLS)


def quality_figures(
    rows: Sequence[Mapping[str, Any]], arms: Sequence[str], families: Sequence[tuple[Any, ...]]
) -> dict[str, Figure]:
    """Figures of each metric against NFE, with a line for each arm and family of recipes.

    Args:
        rows: rows of `diffjax.comparison.summary.quality`.
        arms: in the order of their colours.
        families: in the order of their dashes.

    Returns:
        By the metric's name; metrics that no row has are left out.
    """
    figures = {}
    for name, metric in METRICS.items():
        known = [row for row in rows if name in row and is_number(row["nfe"])]
        if not known:
            continue
        traces = []
        for index, arm in enumerate(arms):
            for number, kind in enumerate(families):
                line = [row for row in known if row["arm"] == arm and family(row) == kind]
                if line:
                    trace = _line(index, [row["nfe"] for row in line], [row[name] for row in line])
                    trace["line"]["dash"] = DASHES[number % len(DASHES)]
                    trace["meta"]["family"] = number
                    trace["customdata"] = [_of_row(row[name], row, metric) for row in line]
                    traces.append(trace)
        frame = layout("network evaluations per sample", metric.label, [row[name] for row in known])
        frame["xaxis"] |= log_ticks(sorted({row["nfe"] for row in known}))
        if metric.is_share:
            frame["yaxis"] = {**axis(metric.label), "tickformat": ".1%"}
        frame["meta"] = {"front": "higher" if name in HIGHER_IS_BETTER else "lower"}
        figures[name] = {"data": traces, "layout": frame}
    return figures


def hidden_families(
    rows: Sequence[Mapping[str, Any]], families: Sequence[tuple[Any, ...]]
) -> list[int]:
    """Families that are hidden at first: with many lines, only one family is shown.

    That is the family that most arms have; ties go to the lowest distance.
    """
    lines = {(row["arm"], family(row)) for row in rows}
    if len(lines) <= _MOST_LINES or len(families) < 2:
        return []

    def standing(one: tuple[Any, ...]) -> tuple[int, float]:
        means = [
            row["frechet_distance"]["mean"]
            for row in rows
            if family(row) == one and "frechet_distance" in row
        ]
        return -sum(kind == one for _, kind in lines), min(means, default=math.inf)

    kept = min(families, key=standing)
    return [index for index, one in enumerate(families) if one != kept]


def cost_figure(rows: Sequence[Mapping[str, Any]], arms: Sequence[str], key: str) -> Figure | None:
    """Figure of the Fréchet distance of each run's own recipe against its training cost.

    Args:
        rows: rows of `diffjax.comparison.summary.cost`.
        arms: in the order of their colours.
        key: `train_flops` or `train_seconds`.
    """
    metric = "frechet_distance"
    known = [row for row in rows if is_number(row[key]) and is_number(row[metric])]
    traces = []
    for index, arm in enumerate(arms):
        own = [row for row in known if row["arm"] == arm]
        if not own:
            continue
        color, symbol = style(index)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [row[key] for row in own],
                "y": [row[metric] for row in own],
                "customdata": [
                    f"<b>{html.escape(str(row['run']))}</b><br>{_amount(row[key], key)}<br>"
                    f"Fréchet distance {three_digits(row[metric])}"
                    for row in own
                ],
                "hovertemplate": "%{customdata}<extra></extra>",
                "marker": {"color": COLORS[color], "symbol": SYMBOLS[symbol], "size": 9},
                "meta": {"arm": index},
            }
        )
    if not traces:
        return None
    names = {"train_flops": "training FLOPs (matrix products)", "train_seconds": "training time, s"}
    values = [{"mean": row[metric], "low": None, "high": None} for row in known]
    frame = layout(names[key], METRICS[metric].label, values)
    frame["xaxis"]["type"] = "log"
    costs = [row[key] for row in known]
    if max(costs) / min(costs) < 20:  # there a log axis would hardly have a tick
        frame["xaxis"] |= {"type": "linear", "rangemode": "tozero"}
    return {"data": traces, "layout": frame}


def losses(probes: Mapping[str, Mapping[str, Any]], arms: Sequence[str]) -> dict[str, Figure]:
    """Figures of the loss by log-SNR in each space, and relative to the lowest of all arms."""
    found = {
        arm: probes[arm]["loss_by_log_snr"]
        for arm in arms
        if "left_out" not in probes[arm]["loss_by_log_snr"]
    }
    lines = {
        space: {
            arm: _by_bin(one["log_snr_edges"], one["spaces"][space])
            for arm, one in found.items()
            if space in one["spaces"]
        }
        for space in SPACES
    }
    shown = {"loss_relative": (_relative(lines["noise"]), "error, relative to the least")} | {
        f"loss_{space}": (lines[space], f"squared error of {label}")
        for space, label in SPACES.items()
    }
    return {name: _losses(one, arms, label) for name, (one, label) in shown.items() if one}


def _losses(lines: Mapping[str, _Line], arms: Sequence[str], label: str) -> Figure:
    """Figure of binned values with a line for each arm that has them."""
    traces = [
        _by_log_snr(arms, arm, *line, lambda one: f"{label} {_written(one)}", marker_size=5)
        for arm, line in lines.items()
    ]
    every = [one for _, bins in lines.values() for one in bins]
    return {"data": traces, "layout": layout(_LOG_SNR, label, every)}


def weights(probes: Mapping[str, Mapping[str, Any]], arms: Sequence[str]) -> Figure | None:
    """Figure of the effective weight of each arm's objective."""
    traces, every = [], []
    for arm in arms:
        curve = probes[arm]["effective_weight"]
        if "left_out" in curve:
            continue
        known = [{"mean": weight, "low": None, "high": None} for weight in curve["weight"]]
        every += known
        traces.append(
            _by_log_snr(
                arms,
                arm,
                curve["log_snr"],
                known,
                lambda one: f"weight {three_digits(one['mean'])}",
                mode="lines",
            )
        )
    if not traces:
        return None
    frame = layout(_LOG_SNR, "effective weight", every)
    # The range of the losses next to it; outside, some weights rise or fall without limit.
    inside = [
        weight
        for trace in traces
        for level, weight in zip(trace["x"], trace["y"], strict=True)
        if abs(level) <= 10 and weight > 0
    ]
    if inside:
        frame["yaxis"]["range"] = log_range(1e-5 * max(inside), 2.0 * max(inside))
        frame["xaxis"]["range"] = [-10.5, 10.5]
    return {"data": traces, "layout": frame}


def noise(probes: Mapping[str, Mapping[str, Any]], arms: Sequence[str]) -> Figure | None:
    """Figure of the gradient noise scale by log-SNR of each arm."""
    traces, every = [], []
    for arm in arms:
        found = probes[arm]["gradient_noise"]
        if "left_out" in found:
            continue
        bins = [
            (level, {"mean": one["scale"], "low": one["low"], "high": one["high"]})
            for level, one in zip(*_by_bin(found["log_snr_edges"], found["bins"]), strict=True)
            if one["scale"] is not None
        ]
        if not bins:
            continue
        levels, known = zip(*bins, strict=True)
        every += known
        traces.append(
            _by_log_snr(arms, arm, levels, known, lambda one: f"{_written(one)} examples")
        )
    if not traces:
        return None
    frame = layout(_LOG_SNR, "gradient noise scale, examples", every)
    return {"data": traces, "layout": frame}


def _by_log_snr(
    arms: Sequence[str],
    arm: str,
    levels: Sequence[float],
    values: Sequence[Mapping[str, Any]],
    say: Callable[[Mapping[str, Any]], str],
    **dress: Any,
) -> Figure:
    """An arm's trace over log-SNR, with the text of its tooltip."""
    trace = _line(arms.index(arm), levels, values, **dress)
    trace["customdata"] = [
        f"<b>{html.escape(arm)}</b><br>log-SNR {level:g}<br>{say(one)}"
        for level, one in zip(levels, values, strict=True)
    ]
    return trace


_LOG_SNR = "log-SNR: noisy to clean"


def _line(
    index: int,
    x: Sequence[float],
    values: Sequence[Mapping[str, Any]],
    mode: str = "lines+markers",
    marker_size: int = 7,
) -> Figure:
    """A trace in the style of an arm, with error bars where intervals are known."""
    color, symbol = style(index)
    trace: Figure = {
        "type": "scatter",
        "mode": mode,
        "x": list(x),
        "y": [one["mean"] for one in values],
        "hovertemplate": "%{customdata}<extra></extra>",
        "line": {"color": COLORS[color], "width": 1.8},
        "marker": {"color": COLORS[color], "symbol": SYMBOLS[symbol], "size": marker_size},
        "meta": {"arm": index},
    }
    if any(one["low"] is not None or one["high"] is not None for one in values):
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [_upwards(one) for one in values],
            "arrayminus": [_downwards(one) for one in values],
            "thickness": 1,
            "width": 3,
            "color": COLORS[color],
        }
    return trace


def _upwards(one: Mapping[str, Any]) -> float:
    """The length of an error bar; a bar without an end extends beyond the plot."""
    high = 1e3 * abs(one["mean"]) if one["high"] is None else one["high"]
    return max(high - one["mean"], 0.0)


def _downwards(one: Mapping[str, Any]) -> float:
    if one["low"] is None:
        return 0.0
    length = max(one["mean"] - one["low"], 0.0)
    # A bar that ends at or below 0 has no end on a logarithmic axis.
    return min(length, 0.999 * one["mean"]) if one["mean"] > 0 else length


def _by_bin(edges: Sequence[float], bins: Sequence[Any]) -> tuple[list[float], list[Any]]:
    """The midpoints of the bins that have a value, and the values."""
    known = [
        (0.5 * (low + high), one)
        for low, high, one in zip(edges[:-1], edges[1:], bins, strict=True)
        if one is not None
    ]
    return [level for level, _ in known], [one for _, one in known]


def _relative(lines: Mapping[str, tuple[list[float], list[Any]]]) -> dict[str, Any]:
    """Each error divided by the lowest of all arms at the same log-SNR."""
    least: dict[float, float] = {}
    for levels, bins in lines.values():
        for level, one in zip(levels, bins, strict=True):
            least[level] = min(least.get(level, one["mean"]), one["mean"])
    return {
        arm: (
            levels,
            [
                {
                    key: None if one[key] is None else one[key] / least[level]
                    for key in ("mean", "low", "high")
                }
                for level, one in zip(levels, bins, strict=True)
            ],
        )
        for arm, (levels, bins) in lines.items()
    }


def _of_row(one: Mapping[str, Any], row: Mapping[str, Any], metric: Metric) -> str:
    write = metric.write
    text = write(one["mean"])
    if one["low"] is not None:
        text += f" ({write(one['low'])} to {write(one['high'])}, {len(one['values'])} seeds)"
    recipe = f"{row['solver']}, {row['grid']}, {row['num_steps']} steps"
    if is_number(row["guidance_scale"]):
        recipe += f", guidance {row['guidance_scale']:g}"
    return (
        f"<b>{html.escape(str(row['arm']))}</b><br>{html.escape(recipe)}<br>"
        f"NFE {row['nfe']:g}<br>{metric.label} {text}"
    )


def _written(one: Mapping[str, Any]) -> str:
    text = three_digits(one["mean"])
    if one["low"] is None and one["high"] is None:
        return text
    low, high = (three_digits(one[key]) if one[key] is not None else "∞" for key in ("low", "high"))
    return f"{text} ({low} to {high})"


def _amount(value: float, key: str) -> str:
    return duration(value) if key == "train_seconds" else f"{value:.3g} FLOPs"
