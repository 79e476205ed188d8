"""The notebooks of docs/notebooks run, and are what their Python files say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages.notebooks import FOLDER, NAMES, Cell, cells_of, quick, sources
from tests.support.witnesses import CROSS

ROOT = Path(__file__).parents[2]
# One that trains, and those that need not. The rest train several runs or sample in many ways.
QUICK = ("first_model", "your_own_objective", "published_weights")
REST = tuple(name for name in NAMES if name not in QUICK)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_the_cells_of_its_file(name):
    written = cells_of((FOLDER / f"{name}.py").read_text("utf-8"))
    assert sources(FOLDER / f"{name}.ipynb") == written, "run python -m tests.pages.notebooks"


def test_every_notebook_is_there():
    assert sorted(NAMES) == sorted(file.stem for file in FOLDER.glob("*.ipynb"))
    assert sorted(NAMES) == sorted(file.stem for file in FOLDER.glob("*.py"))


def test_cells_are_found_and_settings_replaced():
    code = "# %% [markdown]\n# Hello\n#\n# you\n\n# %%\nnum_steps = 400  # in tests: 20\n"
    assert cells_of(quick(code)) == [Cell(True, "Hello\n\nyou"), Cell(False, "num_steps = 20")]


@pytest.mark.process
@pytest.mark.parametrize(
    "names", [pytest.param(QUICK, id="quick"), pytest.param(REST, id="rest", marks=CROSS)]
)
def test_they_run_with_the_settings_of_tests(names):
    """In one process, on one device, so that what several of them train or compile is made once."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.pages.notebooks", "--quick", *names]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [*names]
