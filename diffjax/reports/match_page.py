"""Writes how well pictures match their prompts as one self-contained HTML page."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from diffjax.host.files import write_whole
from diffjax.reports import plots
from diffjax.reports.run_page import embedded_image


def write_match_page(folder: str | Path, result: Mapping[str, Any]) -> Path:
    """Writes `match.html` beside the pictures `seen.png` and `held_out.png`.

    Args:
        folder: the folder of the pictures.
        result: what `experiments.match_prompts` measured: `rows`, one for each guidance scale and
            part of the prompts, with `guidance_scale`, `part` and `shares`; `real`, the shares of
            real pictures; and `how`, facts by name.

    Returns:
        The path of the page.
    """
    folder, rows = Path(folder), result["rows"]
    scales = sorted({row["guidance_scale"] for row in rows})
    lines = {
        f"{name}, {part}": [_share(rows, scale, part, name) for scale in scales]
        for part in dict.fromkeys(row["part"] for row in rows)
        for name in next(row for row in rows if row["part"] == part)["shares"]
    }
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("diffjax.reports").joinpath("templates/match_page.html.jinja")
    shown = ("samples", "nearest training picture", "real picture")
    page = environment.from_string(source.read_text("utf-8")).render(
        result=result,
        scales=scales,
        lines=lines,
        curve=Markup(plots.shares_by_guidance(scales, lines)),
        pictures={
            name: embedded_image(folder / f"{name.replace(' ', '_')}.png")
            for name in ("seen", "held out")
        },
        shown=shown,
    )
    path = folder / "match.html"
    write_whole(path, page)
    return path


def _share(rows: Any, scale: float, part: str, name: str) -> float:
    row = next(row for row in rows if (row["guidance_scale"], row["part"]) == (scale, part))
    return row["shares"][name]
