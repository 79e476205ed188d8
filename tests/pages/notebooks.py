"""The notebooks of docs/notebooks, made of Python files with cells.

    python -m tests.pages.notebooks            # runs all, and writes each .ipynb with its outputs
    python -m tests.pages.notebooks --quick    # runs all with the settings of tests, writes none

`NAME.py` is the source: a cell begins with `# %%`, one of text with `# %% [markdown]`. All run in
one process and one folder, in the order of `NAMES`, so that a run which one of them trains is there
for the next. A line `num_steps = 400  # in tests: 20` has the second value with `--quick`, and the
networks of configs have one narrow block.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NAMES = (
    "first_model",
    "your_own_objective",
    "sampling_and_guidance",
    "comparing_two_objectives",
    "published_weights",
    "few_steps",
)
_CELL = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)
_QUICK = re.compile(r"= .*  # in tests: (.*)$", re.MULTILINE)


class Cell(NamedTuple):
    """A cell: text without its `# `, or code."""

    is_text: bool
    source: str


def cells_of(code: str) -> list[Cell]:
    """The cells of a file, in their order."""
    parts = _CELL.split(code)[1:]
    found = []
    for mark, body in zip(parts[::2], parts[1::2], strict=True):
        lines = body.strip("\n")
        if mark:
            lines = re.sub(r"^# ?", "", lines, flags=re.MULTILINE)
        found.append(Cell(bool(mark), lines))
    return found


def quick(code: str) -> str:
    """The same code with the settings of tests."""
    return _QUICK.sub(r"= \1", code)


def use_small_configs() -> None:
    """Configs have a network of one narrow block from now on, and evaluations of one row."""
    for name in ("colours", "digits", "digits_mean_flow"):
        module: Any = import_module(f"configs.{name}")
        module.get_config = partial(_small, module.get_config)


def _small(get_config: Callable[..., Any], *arguments: str) -> Any:
    config = get_config(*arguments)
    config.model.update(hidden_size=16, depth=1)
    config.evaluation.update(solvers=(), num_steps=())
    return config


def run(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Executes a cell of code; its outputs as a notebook stores them.

    These are what it prints, and the value of its last line as a picture or as text.
    """
    tree, shown = ast.parse(source), None
    if tree.body and isinstance(last := tree.body[-1], ast.Expr):
        tree.body.pop()
        shown = ast.Expression(last.value)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = eval(compile(shown, "cell", "eval"), names) if shown else None
    outputs = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": printed.getvalue()})
    if value is not None:
        outputs.append({"data": _data(value), "metadata": {}, "output_type": "display_data"})
    return outputs


def _data(value: Any) -> dict[str, str]:
    picture = io.BytesIO()
    if hasattr(value, "savefig"):  # a figure of matplotlib
        value.savefig(picture, format="png", dpi=80, bbox_inches="tight")
    elif hasattr(value, "_repr_png_"):  # a picture of Pillow
        value.save(picture, "PNG", optimize=True)
    else:
        return {"text/plain": repr(value)}
    return {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": "<picture>"}


def notebook(cells: list[Cell], outputs: list[list[dict[str, Any]]]) -> str:
    """A notebook in the format of Jupyter, 4.5."""
    content = []
    for number, (cell, out) in enumerate(zip(cells, outputs, strict=True)):
        kind: dict[str, Any] = {"cell_type": "markdown"}
        if not cell.is_text:
            kind = {"cell_type": "code", "execution_count": None, "outputs": out}
        source = cell.source.splitlines(keepends=True)
        content.append({**kind, "id": f"cell-{number}", "metadata": {}, "source": source})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {
        "cells": content,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def sources(path: Path) -> list[Cell]:
    """The cells of a notebook without their outputs."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [Cell(cell["cell_type"] == "markdown", "".join(cell["source"])) for cell in cells]


def main(argv: list[str]) -> None:
    """Runs the notebooks, and writes them unless `--quick`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--workdir", help="where runs are kept; by default they are not")
    parser.add_argument("names", nargs="*", default=NAMES)
    args = parser.parse_args(argv)
    sys.path.insert(0, os.getcwd())
    if args.quick:
        use_small_configs()
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(args.workdir or scratch):
        for name in args.names:
            start, code = time.process_time(), (FOLDER / f"{name}.py").read_text("utf-8")
            cells = cells_of(quick(code) if args.quick else code)
            names: dict[str, Any] = {"__name__": "__main__"}
            outputs = [[] if cell.is_text else run(cell.source, names) for cell in cells]
            if not args.quick:
                text = notebook(cells, outputs)
                (FOLDER / f"{name}.ipynb").write_text(text, "utf-8")
            print(f"{name}: {time.process_time() - start:.0f} processor seconds", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
