"""Writes a plan as one self-contained HTML page."""

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from diffjax.errors import UserError
from diffjax.performance.planning.search import Row
from diffjax.performance.planning.tables import (
    derived,
    memory_rows,
    time_rows,
    wire_rows,
    work_rows,
)
from diffjax.performance.planning.topologies import GIB, topology_called
from diffjax.reports.plan_figure import WIDTH, bars, drawing


def write_page(
    path: str | Path, name: str, rows: Sequence[Row], best: Row | None, command: str
) -> None:
    """Writes plans as one HTML page: memory, work, traffic and the lower bound on the time.

    Args:
        path: the path of the HTML file.
        name: the name of the config, for the title.
        rows: every plan as (label, config, needs).
        best: the plan shown in full; None shows the last row.
        command: the command that makes the page again.

    Raises:
        UserError: the file can't be written.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("diffjax.performance.planning").joinpath("page.html.jinja")
    template = environment.from_string(source.read_text(encoding="utf-8"))
    label, config, needs = best or rows[-1]
    about = derived(config, needs)
    content = {
        "name": name,
        "label": label,
        "needs": needs,
        "about": about,
        "memory": memory_rows(needs, about),
        "work": work_rows(needs, about),
        "wire": wire_rows(needs),
        "times": time_rows(about),
        "bars": Markup(bars([(label, needs.memory, needs.fits) for label, _, needs in rows],
                            about["usable_bytes"] / GIB)),
        "scaling": Markup(scaling(rows)),
        "command": command,
        "chip": topology_called(needs.topology).chip,
    }  # fmt: skip
    try:
        Path(path).write_text(template.render(content), encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error


def scaling(rows: Sequence[Row]) -> str:
    """SVG figure of memory and FLOPs per chip against the number of chips, both axes logarithmic.

    Returns "" if fewer than two numbers of chips fit.
    """
    fitting = [needs for _, _, needs in rows if needs.fits]
    numbered = [(topology_called(needs.topology).num_chips, needs) for needs in fitting]
    points = sorted(numbered, key=lambda point: point[0])
    chips = [number for number, _ in points]
    if len(set(chips)) < 2:
        return ""
    curves = {
        "state GiB": [needs.state_bytes / GIB for _, needs in points],
        "peak GiB": [needs.peak_bytes / GIB for _, needs in points],
        "matrix TFLOP": [needs.flops / 1e12 for _, needs in points],
    }
    values = [value for curve in curves.values() for value in curve if value > 0]
    x_of = _log_scale(min(chips), max(chips), 60, WIDTH - 170)
    y_of = _log_scale(min(values), max(values), 300, 30)
    parts = []
    for number, (name, curve) in enumerate(curves.items(), start=1):
        dots = [(x_of(chip), y_of(value)) for chip, value in zip(chips, curve, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        x, y = dots[-1]
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="var(--series-{number})" '
            'stroke-width="2"/>'
            f'<text x="{x + 8:.1f}" y="{y + 4:.1f}">{name} {curve[-1]:.3g}</text>'
        )
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="var(--series-{number})">'
            f"<title>{value:.3g}</title></circle>"
            for (x, y), value in zip(dots, curve, strict=True)
        ]
        parts += [
            f'<text x="{x:.1f}" y="{y - 9:.1f}" text-anchor="middle">{value:.3g}</text>'
            for (x, y), value in zip(dots[:-1], curve, strict=False)
        ]
    # The line 1/N from the first point of the FLOPs is the ideal slope.
    start = curves["matrix TFLOP"][0] * chips[0]
    ends = " ".join(f"{x_of(chip):.1f},{y_of(start / chip):.1f}" for chip in (chips[0], chips[-1]))
    parts.append(f'<polyline points="{ends}" class="limit" fill="none"/>')
    for n in sorted(set(chips)):
        parts.append(f'<text x="{x_of(n):.1f}" y="325" text-anchor="middle">{n}</text>')
    parts.append('<text x="300" y="345" text-anchor="middle">chips (dashed: 1/N)</text>')
    return drawing(355, parts)


def _log_scale(low: float, high: float, start: float, end: float) -> Any:
    span = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * math.log(value / low) / span
