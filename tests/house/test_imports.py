"""The rooms of the library and which way imports may point, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "diffjax").rglob("*.py"))

# A file may import rooms of a lower number and its own. A new room needs a row here.
LEVELS = {
    "compiling": 0,
    "errors": 0,
    "files": 0,
    "kinds": 0,
    "settings": 1,
    "spec": 1,
    "sweeps": 1,
    "process": 2,
    "models": 2,
    "objectives": 3,
    "sampling": 3,
    "choices": 4,
    "chosen": 5,
    "data": 4,
    "wiring": 6,
    "evaluation": 7,
    "training": 8,
    "planning": 9,
    "experiment": 9,
    "__init__": 10,
}
# Whole libraries that a room does without.
FORBIDDEN = {
    "process": {"flax", "ml_collections"},
    "sampling": {"flax", "ml_collections"},
    "models": {"ml_collections"},
}
FORBIDDEN_ANYWHERE = {"absl", "configs", "experiments", "tensorflow", "tests", "torch"}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "diffjax").with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports anywhere, `from a import b` as `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_reader_of_imports_sees_them(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("import x.y\ndef f():\n    from a.b import c as d\n")
    assert imported(file) == {"x.y", "a.b.c"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    room = room_of(path)
    names = imported(path)
    libraries = {name.split(".")[0] for name in names}
    assert not libraries & (FORBIDDEN_ANYWHERE | FORBIDDEN.get(room, set()))
    rooms = {name.split(".")[1] for name in names if name.startswith("diffjax.")} - {room}
    assert not {other for other in rooms if LEVELS[other] >= LEVELS[room]}
    if room == "models":
        assert rooms <= {"errors", "kinds"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_prints_flags_or_environment_in_the_library(path):
    found = [
        f"{path.name}:{node.lineno}"
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Name) and node.id in ("print", "FLAGS"))
        or (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
    ]
    assert not found


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("diffjax", {"flax", "grain", "matplotlib", "ml_collections", "optax", "orbax", "sklearn"}),
        ("diffjax.process, diffjax.sampling", {"absl", "flax", "ml_collections", "optax"}),
        ("diffjax.models", {"grain", "matplotlib", "ml_collections", "optax", "sklearn"}),
        ("diffjax.training.loop", {"matplotlib"}),
    ],
)
def test_what_an_import_does_not_drag_in(modules, absent):
    code = f"import sys; import jax; before = set(sys.modules); import {modules}; "
    code += "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "diffjax" in result.stdout
    assert not set(result.stdout.split()) & (absent | {"tensorflow", "torch"})
