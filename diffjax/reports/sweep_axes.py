"""Axes of the interactive plots of a comparison, as data for plotly.js."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

INK = "#1f2430"

Figure = dict[str, Any]


def layout(x: str, y: str, values: Iterable[Mapping[str, Any]]) -> Figure:
    """Builds the layout of a plot; its y axis covers all means and intervals.

    The y axis is logarithmic if all means are positive. Intervals that extend more than a factor of
    3 beyond all means are cut off.

    Args:
        x: title of the x axis.
        y: title of the y axis.
        values: means with the ends of their intervals, `mean, low, high`.
    """
    values = [one for one in values if one["mean"] is not None]
    means = [one["mean"] for one in values]
    y_axis = axis(y)
    if means and min(means) > 0:
        least = min((one["low"] for one in values if one["low"] is not None), default=min(means))
        most = max((one["high"] for one in values if one["high"] is not None), default=max(means))
        low = max(min(means) / 3, min(least, min(means)))
        high = min(3 * max(means), max(most, max(means)))
        y_axis |= {"type": "log", "range": log_range(low / 1.08, high * 1.08)}
        # With less than a decade, powers of ten are too few ticks.
        y_axis |= {"dtick": "D1" if high / low < 6 else "D2"} if high / low < 40 else {"dtick": 1}
        if high / low < 1e4:
            y_axis["exponentformat"] = "none"
    return {
        "xaxis": axis(x),
        "yaxis": y_axis,
        "showlegend": False,
        "hovermode": "closest",
        "height": 360,
        "margin": {"l": 60, "r": 12, "t": 30, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 12, "color": INK},
    }


def axis(title: str) -> Figure:
    """Builds an axis with a title."""
    return {
        "title": {"text": title, "standoff": 12},
        "automargin": True,
        "zeroline": False,
        "exponentformat": "power",
        "minorloglabels": "complete",
    }


def log_range(low: float, high: float) -> list[float]:
    """The range of a logarithmic axis in plotly's format, log10 of its ends.

    Example:
        >>> log_range(1.0, 100.0)
        [0.0, 2.0]
    """
    return [math.log10(low), math.log10(high)]


def log_ticks(values: Sequence[float]) -> Figure:
    """Builds a logarithmic axis with ticks at ascending values; ticks too close are left out."""
    ticks = list(values[:1])
    for value in values[1:]:
        if value / ticks[-1] >= 1.3:  # labels of closer ticks would overlap
            ticks.append(value)
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
