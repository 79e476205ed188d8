"""Writes a page on all objectives: effective weights, and legal combinations of their parts."""

import base64
import csv
import io
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from ml_collections import ConfigDict

from diffjax import choices, lookup
from diffjax.errors import UserError
from diffjax.host.files import write_whole
from diffjax.objectives.base import Objective
from diffjax.spec import build
from diffjax.studies import effective_weights
from diffjax.studies.legality import Legality, legality
from diffjax.wiring import build_objective

_SHOWN = ("path", "target", "weight", "times")
# How times are drawn and the network's inputs are scaled does not change the effective weight.
_IRRELEVANT = ("uniforms", "noise_label", "input_scale")


def write_objectives_page(folder: str | Path) -> Path:
    """Writes a page on all named choices: their effective weights and legal combinations.

    The folder gets `index.html`, which is self-contained, and its parts: `effective_weights.png`,
    `.csv` and `.md`, `legality.md` and `legality.csv`.

    Args:
        folder: the folder; it is created if it does not exist.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder can't be written to; this is checked first.
    """
    folder = Path(folder)
    page = folder / "index.html"
    _check_writable(folder)
    curves, without = {}, {}
    for name in choices.OBJECTIVES:
        try:
            curves[name] = effective_weights.weight_curve(named_objective(name))
        except NotImplementedError as reason:
            without[name] = str(reason)
    rows = effective_weights.effective_weights_table(
        curves, {name: _parts(name) for name in curves}
    )
    found = legality(
        *(
            {name: build(row) for name, row in table.items()}
            for table in (choices.PATHS, choices.TARGETS, choices.SOLVERS)
        )
    )
    png = effective_weights.plot_effective_weights(curves)
    content = {
        "picture": base64.b64encode(png).decode("ascii"),
        "headings": effective_weights.COLUMNS,
        "rows": rows,
        "without": without,
        **_matrix(found),
    }
    files = {
        "effective_weights.png": png,
        "effective_weights.csv": effective_weights.weights_csv(curves).encode(),
        "effective_weights.md": _markdown(effective_weights.COLUMNS, rows).encode(),
        "legality.md": _legality_markdown(found).encode(),
        "legality.csv": _legality_csv(found).encode(),
        page.name: _html(content).encode(),
    }
    for name, data in files.items():
        write_whole(folder / name, data)
    return page


def named_objective(name: str) -> Objective:
    """Builds an objective of `choices.OBJECTIVES` with its path, target and wrappers.

    Example:
        >>> type(named_objective("flow").path).__name__
        'Linear'
    """
    config = ConfigDict({"name": name})
    lookup.set_axes(config, f"objective={name}", {"none": ConfigDict()}, model="none")
    return build_objective(config)


def _parts(name: str) -> dict[str, str]:
    """The names of an objective's parts; `besides` lists other differences from the plain one."""
    parts = choices.OBJECTIVES[name]
    besides = ", ".join(
        f"{axis} {choice}"
        for axis, choice in parts.items()
        if axis not in _SHOWN + _IRRELEVANT and choice != choices.PLAIN[axis]
    )
    return {axis: parts[axis] for axis in _SHOWN} | {"besides": besides}


def _matrix(found: Legality) -> dict[str, Any]:
    """The legality matrix: a row per path, with the number of a reason for illegal pairs."""
    every = {**found.targets, **found.solvers}
    refused = [(path, other, reason) for (path, other), reason in every.items() if reason]
    numbers = {(path, other): i for i, (path, other, _) in enumerate(refused, start=1)}
    targets = list(dict.fromkeys(target for _, target in found.targets))
    solvers = list(dict.fromkeys(solver for _, solver in found.solvers))
    paths = list(dict.fromkeys(path for path, _ in found.targets))
    triples = found.triples()
    legal = {
        path: sum(1 for other, *_, reason in triples if other == path and not reason)
        for path in paths
    }
    return {
        "targets": targets,
        "solvers": solvers,
        "matrix": [
            (
                path,
                [numbers.get((path, target)) for target in targets],
                [numbers.get((path, solver)) for solver in solvers],
                legal[path],
            )
            for path in paths
        ],
        "reasons": refused,
        "num_triples": len(triples),
        "num_legal": sum(legal.values()),
    }


def _legality_markdown(found: Legality) -> str:
    content = _matrix(found)
    rows = [
        [path, *("yes" if n is None else f"no ({n})" for n in (*targets, *solvers)), str(legal)]
        for path, targets, solvers, legal in content["matrix"]
    ]
    headings = ["path", *content["targets"], *content["solvers"], "legal triples"]
    lines = [
        f"{content['num_legal']:,} of {content['num_triples']:,} triples of target, path and "
        "solver are legal: the target can be decoded on the path, and the solver can integrate "
        "it.\n",
        _markdown(headings, rows),
    ]
    lines += [
        f"{i}. {path} × {other}: {_markdown_cell(reason)}"
        for i, (path, other, reason) in enumerate(content["reasons"], start=1)
    ]
    return "\n".join(lines) + "\n"


def _legality_csv(found: Legality) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["path", "target", "solver", "legal", "reason"])
    for path, target, solver, reason in found.triples():
        writer.writerow([path, target, solver, "no" if reason else "yes", reason or ""])
    return out.getvalue()


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(headings), ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines) + "\n"


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _html(content: Mapping[str, Any]) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("diffjax.reports").joinpath("templates/objectives_page.html.jinja")
    return environment.from_string(source.read_text(encoding="utf-8")).render(content)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"can't write to {folder}: {error.strerror}; choose another folder"
        ) from error
