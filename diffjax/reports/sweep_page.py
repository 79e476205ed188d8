"""Writes the page that compares runs: verdict, plots, tables, and commands to reproduce it.

It depends only on the runs' files and is self-contained; equal files make equal pages.
"""

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from diffjax.comparison.results import CONFIG, SweepFiles, read_sweep
from diffjax.comparison.side_by_side import metric_table
from diffjax.comparison.summary import family, numbers
from diffjax.errors import UserError
from diffjax.evaluation.tables import METRICS, is_number, number, three_digits
from diffjax.host.files import write_whole
from diffjax.reports import sweep_figures
from diffjax.reports.run_page import embedded_image
from diffjax.reports.sweep_text import as_csv, as_markdown, common_recipe, recipes_sentence

HTML, MARKDOWN, CSV, JSON = "report.html", "report.md", "report.csv", "report.json"
_PLOTLY = "plotly/plotly-basic.min.js"


def write_sweep_report(workdirs: Iterable[str | Path], out: str | Path | None = None) -> Path:
    """Writes `report.html`, `report.md`, `report.csv` and `report.json` about several runs.

    For missing files, the report shows the command that makes them.

    Args:
        workdirs: a sweep's folder, a folder of runs, or several runs' folders.
        out: folder of the report; by default the given folder, if it is only one.

    Returns:
        The path of the page.

    Raises:
        UserError: there are no runs, `out` is a run's own folder, or the files can't be written.
    """
    files = read_sweep(workdirs)
    first, *others = files.given
    if out is None and others:
        raise UserError("--out is missing: it is the folder of the report on several runs")
    folder = first if out is None else Path(out)
    if (folder / CONFIG).exists():
        raise UserError(
            f"{folder} is a run and has its own report: set another folder with --out=DIR"
        )
    content = numbers(files)
    commands = _commands(files, out)
    written = {
        JSON: json.dumps(content, indent=1, allow_nan=False) + "\n",
        CSV: as_csv(files),
        MARKDOWN: as_markdown(content, commands),
        HTML: _page(files, content, commands),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in written.items():
            write_whole(folder / name, text)
    except OSError as error:
        raise UserError(f"can't write the report into {folder}: {error.strerror}") from error
    return folder / HTML


def _page(files: SweepFiles, content: Mapping[str, Any], commands: Mapping[str, Any]) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "measure": three_digits, "amount": _amount}
    arms, rows = files.arms, content["quality"]
    families = list(dict.fromkeys(family(row) for row in rows))
    figures = _figures(content, arms, families)
    scripts = [_resource(_PLOTLY), _resource("templates/sweep_page.js")]
    return environment.from_string(_resource("templates/sweep_page.html.jinja")).render(
        content,
        arm_styles=[(arm, *sweep_figures.style(index)) for index, arm in enumerate(arms)],
        families=_named(families),
        hidden=sweep_figures.hidden_families(rows, families),
        figures=figures,
        number_lines=metric_table(content["numbers"], arms),
        answer=answer(content["verdict_rows"]),
        whiskers=_whiskers(content["verdict_rows"]),
        drawn_by=recipes_sentence(content["own_recipes"]),
        recipes=common_recipe(row["recipe"] for row in content["verdict_rows"]),
        metrics=[name for name in METRICS if any(name in row for row in rows)],
        metric_labels={name: metric.label for name, metric in METRICS.items()},
        missing=_missing(content, arms),
        samples=_samples(files),
        commands=commands,
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
    )


def _resource(name: str) -> str:
    return resources.files("diffjax.reports").joinpath(name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """The content security policy: a browser may only load and run what is in the page."""
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
        for script in scripts
    ]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _figures(
    content: Mapping[str, Any], arms: Sequence[str], families: Sequence[tuple[Any, ...]]
) -> dict[str, sweep_figures.Figure]:
    probes = content["probes"]
    figures = sweep_figures.quality_figures(content["quality"], arms, families)
    others = {
        **{key: sweep_figures.cost_figure(content["cost"], arms, key) for key in _COSTS},
        "weights": sweep_figures.weights(probes, arms),
        **sweep_figures.losses(probes, arms),
        "noise": sweep_figures.noise(probes, arms),
    }
    return figures | {name: figure for name, figure in others.items() if figure}


_COSTS = ("train_flops", "train_seconds")


def answer(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: which arm leads, whether that is decided, and the verdicts on the others.

    Example:
        >>> answer([
        ...     {"arm": "a", "mean": 0.5, "low": 0.4, "high": 0.6, "verdict": "leads"},
        ...     {"arm": "b", "mean": 0.9, "low": 0.8, "high": 1.0, "verdict": "worse"},
        ... ])
        'a leads at a Fréchet distance of 0.500 (0.400 to 0.600); 1 of 1 other arm is worse.'
        >>> answer([
        ...     {"arm": "a", "mean": 0.5, "low": 0.0, "high": 1.6, "verdict": "lowest mean"},
        ...     {"arm": "b", "mean": 0.9, "low": 0.0, "high": 2.1, "verdict": "inconclusive"},
        ... ])
        'Nothing is decided: a has the lowest Fréchet distance, 0.500 (0.00 to 1.60); 1 is \
inconclusive with these seeds.'
    """
    known = [row for row in rows if row["mean"] is not None]
    if not known:
        return "No run has a Fréchet distance to compare yet."
    unfit = ("incomplete", "not evaluated", "no value")
    incomplete = [row for row in rows if row["verdict"].startswith(unfit)]
    best = ("leads", "lowest mean")
    first = min(
        known, key=lambda r: (not r["verdict"].startswith(best), r in incomplete, r["mean"])
    )
    others = len(rows) - 1
    plural = "arm" if others == 1 else "arms"
    if not others:
        return f"{first['arm']}: Fréchet distance {_amount(first)}, nothing to compare it with."
    if first in incomplete:
        return f"No arm is complete, so there is no verdict on the {len(rows)} arms."
    lowest = f"{first['arm']} has the lowest Fréchet distance, {_amount(first)}"
    if first["verdict"].startswith("chosen adaptively"):
        return f"{lowest}, of {len(rows)} trials of an adaptive search: no verdict."
    if not first["verdict"].startswith(best):
        return f"{lowest}; there are too few seeds for a verdict on the {others} other {plural}."
    counts = Counter(row["verdict"].partition(";")[0].partition(":")[0] for row in rows)
    parts = []
    if worse := counts["worse"]:
        parts.append(f"{worse} of {others} other {plural} {'is' if worse == 1 else 'are'} worse")
    if inconclusive := counts["inconclusive"]:
        verb = "is" if inconclusive == 1 else "are"
        parts.append(f"{inconclusive} {verb} inconclusive with these seeds")
    if incomplete:
        parts.append(f"{len(incomplete)} incomplete and not compared")
    if apart := counts["no two seeds in common"]:
        parts.append(f"{apart} without a verdict, because they share too few seeds with it")
    text = f"Nothing is decided: {lowest}"
    if first["verdict"] == "leads":
        text = f"{first['arm']} leads at a Fréchet distance of {_amount(first)}"
    return f"{text}; {', '.join(parts)}."


def _amount(one: Mapping[str, Any] | None, metric: str = "frechet_distance") -> str:
    """Formats a mean with its interval, if there is one."""
    write = METRICS[metric].write
    if one is None or one.get("mean") is None:
        return "–"
    if one.get("low") is None:
        return write(one["mean"])
    return f"{write(one['mean'])} ({write(one['low'])} to {write(one['high'])})"


def _whiskers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float] | None]:
    """Positions of each arm's interval on an axis from the lowest to the highest mean, in %."""
    means = [row["mean"] for row in rows if row["mean"] is not None]
    if not means:
        return [None for _ in rows]
    room = max(max(means) - min(means), 1e-3 * abs(max(means)), 1e-12)
    low = min(means) - 0.35 * room

    def place(value: float | None, default: float) -> float:
        share = (default if value is None else value) - low
        return round(min(max(100 * share / (1.7 * room), 0.0), 100.0), 2)

    return [
        None
        if row["mean"] is None
        else {key: place(row[key], row["mean"]) for key in ("low", "mean", "high")}
        for row in rows
    ]


def _named(families: Sequence[tuple[Any, ...]]) -> list[str]:
    """Names families of recipes by the settings in which they differ."""
    varying = [len({one[i] for one in families}) > 1 for i in range(4)]
    names = []
    for solver, grid, scale, weights in families:
        parts = [str(solver), str(grid)]
        parts += [f"guidance {scale:g}"] if varying[2] and is_number(scale) else []
        parts += [str(weights)] if varying[3] else []
        names.append(", ".join(parts))
    return names


def _missing(content: Mapping[str, Any], arms: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """For each section of `probes.json`, the arms without it and the reasons."""
    return {
        name: [
            (arm, reason)
            for arm in arms
            if (reason := content["probes"][arm][name].get("left_out", ""))
        ]
        for name in ("loss_by_log_snr", "effective_weight", "gradient_noise")
    }


def _samples(files: SweepFiles) -> dict[str, Any]:
    """The last picture of one run of each arm, all with the same seed if possible."""
    found = {arm: [run for run in files.of(arm) if run.grid] for arm in files.arms}
    seeds = Counter(run.seed for runs in found.values() for run in runs)
    if not seeds:
        return {"images": [], "seeds": []}
    most = max(seeds.values())
    common = min((seed for seed, count in seeds.items() if count == most), key=str)
    images = []
    for arm, runs in found.items():
        run = next((run for run in runs if run.seed == common), runs[0] if runs else None)
        if run is not None and run.grid is not None:
            step = int(run.grid.stem.removeprefix("step_"))
            images.append(
                {"arm": arm, "seed": run.seed, "step": step, "image": embedded_image(run.grid)}
            )
    return {"images": images, "seeds": sorted({str(one["seed"]) for one in images})}


def _commands(files: SweepFiles, out: str | Path | None) -> dict[str, Any]:
    """The commands that make what the page shows."""
    given = ",".join(path.as_posix() for path in files.given)
    report = f"python -m experiments.report --workdir={shlex.quote(given)}"
    if out is not None:
        report += f" --out={shlex.quote(Path(out).as_posix())}"
    runs = []
    for run in files.runs:
        command = run.run.get("command")
        text = shlex.join(map(str, command)) if isinstance(command, list) else command
        runs.append((run.name, str(text or "")))
    folders = {run.name: shlex.quote(run.folder.as_posix()) for run in files.runs}
    first = next((run.name for run in files.runs if not run.probes), files.runs[0].name)
    unevaluated = next((run.name for run in files.runs if not run.evaluation), files.runs[0].name)
    return {
        "sweep": str(files.sweep.get("command") or ""),
        "report": report,
        "runs": runs,
        "probe": f"python -m experiments.probe --workdir={folders[first]}",
        "evaluate": f"python -m experiments.evaluate --workdir={folders[unevaluated]}",
    }
