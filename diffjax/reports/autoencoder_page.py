"""Writes the report of the training of an autoencoder as one self-contained HTML page."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, UndefinedError
from markupsafe import Markup

from diffjax.errors import UserError
from diffjax.evaluation.tables import duration, number
from diffjax.host.files import write_whole
from diffjax.host.run_files import read_json, read_metrics
from diffjax.reports import plots
from diffjax.reports.run_page import embedded_image


def write_autoencoder_page(workdir: str | Path) -> Path:
    """Writes `report.html` from the files of a run's folder.

    Args:
        workdir: with `config.json`, `run.json`, `metrics.jsonl`, `autoencoder.json`, and pictures
            `samples/step_*.png` of images beside their reconstructions.

    Returns:
        The path of the page.

    Raises:
        UserError: one of the files is missing or not what a run writes.
    """
    workdir = Path(workdir)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "duration": duration}
    source = resources.files("diffjax.reports").joinpath("templates/autoencoder_page.html.jinja")
    try:
        page = environment.from_string(source.read_text("utf-8")).render(_content(workdir))
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, UndefinedError) as error:
        raise UserError(
            f"a file in {workdir} is not what a run writes ({type(error).__name__}: {error}): "
            "train again with the same command, or restore it"
        ) from error
    path = workdir / "report.html"
    write_whole(path, page)
    return path


def _content(workdir: Path) -> dict[str, Any]:
    records = read_metrics(workdir / "metrics.jsonl")
    result = read_json(workdir / "autoencoder.json") or {}
    pictures = sorted((workdir / "samples").glob("step_*.png"))
    titles = {"psnr": "PSNR (dB)", "rate": "rate (bits per dimension)"}
    names = [name for name in plots.metric_names(records) if name.startswith("test/")]
    curves = {
        titles.get(name.removeprefix("test/"), name): Markup(plots.metric_curve(records, name))
        for name in names
    }
    return {
        "name": workdir.resolve().name,
        "result": result,
        "latents": _rows(result.get("latents") or {}),
        "loss_curve": Markup(plots.loss_curve(records)),
        "curves": curves,
        "picture": embedded_image(pictures[-1]) if pictures else None,
        "last": records[-1] if records else {},
        "config": read_json(workdir / "config.json") or {},
        "run": read_json(workdir / "run.json") or {},
    }


def _rows(latents: Mapping[str, Any]) -> dict[str, str]:
    """The statistics of latents in words."""
    return {
        name.replace("_", " "): ", ".join(f"{x:.4g}" for x in value)
        if isinstance(value, list)
        else f"{value:.4g}"
        for name, value in latents.items()
    }
