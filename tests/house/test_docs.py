"""The Python in the pages runs.

The ```python blocks of a page, in their order, are one module, as a reader would paste them; its
functions called `test_…` are run as well. Blocks that are not meant to run have another language.
"""

import ast
import importlib
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from tests.support.old_runs import OLD_RUN

ROOT = Path(__file__).parents[2]
PAGES = tuple(
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()
)
LONG = {"extending.md", "likelihood.md", "oracle.md", "training.md"}  # hundreds of small programs
OURS = ("configs", "diffjax", "experiments")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text):
    """The code of each block, and the number of lines above it."""
    return [(match[1], text.count("\n", 0, match.start(1))) for match in BLOCK.finditer(text)]


def cases():
    """One case a page with code; those that load a run take long, since one is trained for them."""
    for page in PAGES:
        found = blocks(page.read_text(encoding="utf-8"))
        trained = any("runs/digits" in code for code, _ in found)
        long = trained or page.name in LONG
        marks = [pytest.mark.thorough(tenth=False)] if long else []
        if found:
            yield pytest.param(page, found, trained, id=page.name, marks=marks)


@pytest.fixture(scope="module")
def folder_with_run(tmp_path_factory):
    """A folder with a trained `runs/digits` in it, as small as it can be."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(OLD_RUN, folder / "runs" / "digits")
    return folder


@pytest.mark.parametrize(("page", "found", "trained"), list(cases()))
def test_the_code_of_a_page_runs(page, found, trained, tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.getfixturevalue("folder_with_run") if trained else tmp_path)
    module = types.ModuleType("my_study")
    # Samples that a reader is assumed to have.
    vars(module).update(
        samples=np.random.default_rng(0).uniform(-1, 1, (20, 8, 8, 1)).astype(np.float32),
        labels=np.arange(20, dtype=np.int32) % 10,
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for code, lines_above in found:
        # Empty lines in front make a traceback name the line of the page.
        exec(compile("\n" * lines_above + code, str(page), "exec"), vars(module))
    for name, value in list(vars(module).items()):
        if name.startswith("test_"):
            value()


def names_that_are_missing(code):
    """What a block imports from this project and is not there."""
    missing = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ImportError:
                        missing.append(f"{node.module}.{alias.name}")
    return missing


def test_what_pages_import_is_there():
    """Of every page at once, also of those whose code takes long to run."""
    found = [code for page in PAGES for code, _ in blocks(page.read_text(encoding="utf-8"))]
    assert [name for code in found for name in names_that_are_missing(code)] == []
    assert names_that_are_missing("from diffjax.process import paths, nothing") == [
        "diffjax.process.nothing"
    ]


def test_blocks_are_found_with_their_place():
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny = 2\nz = 3\n```\n"
    assert blocks(text) == [("x = 1\n", 2), ("y = 2\nz = 3\n", 8)]


def test_links_between_pages_lead_somewhere():
    lost = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert lost == []
