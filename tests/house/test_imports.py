"""Which way imports may point ([tool.importlinter] in pyproject.toml), and what they drag in."""

import ast
import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter import configuration
from importlinter.application.use_cases import lint_imports

ROOT = Path(__file__).parents[2]


def test_imports_keep_the_contracts():
    configuration.configure()  # not by its command, which would switch off all logging
    with contextlib.redirect_stdout(io.StringIO()) as said:
        kept = lint_imports(str(ROOT / "pyproject.toml"), cache_dir=None)
    assert kept, said.getvalue()


def test_no_prints_flags_or_environment_in_the_library():
    """Also if ruff does not see it: `print` as an argument, the environment by another way."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "diffjax").rglob("*.py"))
        if path != ROOT / "diffjax/sweeps/engines.py"  # what it starts inherits the environment
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Name) and node.id in ("print", "FLAGS"))
        or (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
    ]
    assert found == []


# Each is imported after those above it.
ABSENT = {
    "diffjax": {"flax", "grain", "matplotlib", "ml_collections", "optax", "orbax", "sklearn"},
    "diffjax.process": {"absl", "flax", "ml_collections", "optax"},
    "diffjax.sampling": {"absl", "flax", "ml_collections", "optax"},
    "diffjax.models": {"grain", "matplotlib", "ml_collections", "optax", "sklearn"},
    "diffjax.loop.loop": {"matplotlib"},
}
IMPORTS = """
import importlib, sys, jax
before = set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(*{module.split(".")[0] for module in set(sys.modules) - before})
"""


@pytest.mark.process
def test_what_an_import_does_not_drag_in():
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS, *ABSENT],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = result.stdout.splitlines()
    for name, line in zip(ABSENT, lines, strict=True):
        assert "diffjax" in line.split()
        assert not set(line.split()) & (ABSENT[name] | {"tensorflow", "torch"}), name
