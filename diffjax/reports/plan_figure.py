"""Draws the memory of a chip by kind as SVG bars, from the numbers of a plan."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import escape

WIDTH, _BAR = 720, 26
_TOTAL = 110  # space after the longest bar: "21.72 too much"
_GIB = 2**30


def of_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a report's section on a plan: the memory figure and one line for each plan.

    Args:
        plan: the contents of a `plan.json`, which `experiments.plan --json` writes.

    Example:
        >>> memory, derived = {"parameters": 2**30}, {"usable_bytes": 2**34, "seconds": 0.1}
        >>> derived |= {"bound_by": "memory", "wire_over_minimum": None, "flops_over_model": 1.0}
        >>> one = {"label": "v5e:4x4", "topology": "v5e:4x4", "program": "training", "fits": True}
        >>> one |= {"memory": memory, "derived": derived, "compiled": True, "batch_size": 256}
        >>> of_plan({"plans": [one]})["lines"]
        ['v5e:4x4: training, batch 256, compiled; 1.00 of 16.00 GiB a chip, at least 100 ms, bound \
by memory']
    """
    plans = plan["plans"]
    rows = [(one["label"], one["memory"], one["fits"]) for one in plans]
    usable = [one["derived"]["usable_bytes"] / _GIB for one in plans]
    lines = []
    for one, gib in zip(plans, usable, strict=True):
        label = (
            one["label"]
            if one["label"] == one["topology"]
            else f"{one['topology']}, {one['label']}"
        )
        how = "compiled" if one["compiled"] else "by an analytic model"
        peak = sum(one["memory"].values()) / _GIB
        lines.append(
            f"{label}: {one['program']}, batch {one['batch_size']}, {how}; {peak:.2f} of {gib:.2f} "
            f"GiB a chip, at least {1e3 * one['derived']['seconds']:.3g} ms, bound by "
            f"{one['derived']['bound_by']}"
        )
    return {"figure": bars(rows, max(usable)), "lines": lines}


def bars(rows: Sequence[tuple[str, Mapping[str, int], bool]], has_gib: float) -> str:
    """One stacked bar of memory by kind for each plan, with a line at the usable memory.

    Args:
        rows: label, bytes by kind, and whether the plan fits.
        has_gib: usable memory of a chip, GiB.
    """
    # A plan that the compiler rejected has fewer kinds, in the order and colours of the others.
    fullest = sorted((memory for _, memory, _ in rows), key=len, reverse=True)
    kinds = list(dict.fromkeys(kind for memory in fullest for kind in memory))
    longest = max(max(sum(memory.values()) for _, memory, _ in rows) / _GIB, has_gib)
    left = min(250, 20 + 7 * max(len(label) for label, _, _ in rows))
    top = 40 + 18 * math.ceil(len(kinds) / 4)
    scale = (WIDTH - left - _TOTAL) / longest
    parts = [_legend(kinds)]
    for number, (label, memory, fits) in enumerate(rows):
        y, x = top + number * (_BAR + 10), float(left)
        parts.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{escape(label)}</text>')
        for kind, size in memory.items():
            width = max(size, 0) / _GIB * scale
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" '
                f'fill="var(--series-{kinds.index(kind) % 9 + 1})">'
                f"<title>{escape(kind)} {size / _GIB:.3f} GiB</title></rect>"
            )
            x += width
        total = f"{sum(memory.values()) / _GIB:.2f}" + ("" if fits else " too much")
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 17}">{total}</text>')
    height = top + len(rows) * (_BAR + 10) + 24
    x = left + has_gib * scale
    parts.append(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{height - 20}" class="limit"/>'
        f'<text x="{x:.1f}" y="{height - 6}" text-anchor="end">{has_gib:.2f} GiB usable</text>'
    )
    return drawing(height, parts)


def _legend(kinds: Sequence[str]) -> str:
    parts = []
    for number, kind in enumerate(kinds):
        x, y = 20 + number % 4 * 175, 16 + number // 4 * 18
        parts.append(
            f'<rect x="{x}" y="{y - 9}" width="11" height="11" '
            f'fill="var(--series-{number % 9 + 1})"/>'
            f'<text x="{x + 16}" y="{y}">{escape(kind)}</text>'
        )
    return "".join(parts)


def drawing(height: float, parts: Sequence[str]) -> str:
    """Wraps SVG elements in an SVG image of the common width."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'
