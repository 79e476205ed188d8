"""How many small faults in the library the tests notice.

    pip install -e '.[test,mutation]'
    python -m tests.tools.mutants --count=150 --seed=0 --out=mutants.jsonl

Places in the mathematics are drawn by seed, one after another, and one operator, number or
condition is changed in each (the operators are cosmic-ray's). Each mutant is tried against the
default tests of its room, up to the first failure, and against all of them if it survives. What
survives is printed with its line. The same command goes on where it was stopped.
"""

# pyright: reportMissingImports=false

import argparse
import importlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]

# What is mutated, and the folder of its tests.
ROOMS = {
    "diffjax/process/*.py": "tests/process",
    "diffjax/objectives/*.py": "tests/objectives",
    "diffjax/objectives/*/*.py": "tests/objectives",
    "diffjax/sampling/*.py": "tests/sampling",
    "diffjax/likelihood/*.py": "tests/likelihood",
    "diffjax/oracle/*.py": "tests/oracle",
    "diffjax/training/step.py": "tests/training",
    "diffjax/training/accumulation.py": "tests/training",
    "diffjax/evaluation/scores/distances.py": "tests/evaluation",
    "diffjax/comparison/verdicts.py": "tests/comparison",
}
_SWAPS = {
    "BinaryOperator": ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "Mul_Add", "Add_Mul", "Pow_Mul"),
    "ComparisonOperator": (
        *("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Lt_Gt", "Gt_Lt", "LtE_GtE", "GtE_LtE"),
        *("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is"),
    ),
    "UnaryOperator": ("USub_UAdd",),
}
OPERATORS = [
    *(f"core/Replace{kind}_{swap}" for kind, swaps in _SWAPS.items() for swap in swaps),
    "core/AddNot",
    "core/ReplaceUnaryOperator_Delete_Not",
    "core/ReplaceTrueWithFalse",
    "core/ReplaceFalseWithTrue",
    "core/ReplaceAndWithOr",
    "core/ReplaceOrWithAnd",
    "core/NumberReplacer",
    "core/ZeroIterationForLoop",
    "core/ExceptionReplacer",
]
_SHARED = (
    *("flax.linen", "hypothesis", "jax.numpy", "matplotlib", "ml_collections", "optax"),
    *("orbax.checkpoint", "scipy.stats", "sklearn.datasets"),
)
_SECONDS = 900  # after which a mutant hangs, and is noticed


class Mutant(NamedTuple):
    """One change: the operator's occurrence in a file, and the line where it is."""

    file: str
    line: int
    operator: str
    occurrence: int


def mutants_of(file: str) -> dict[tuple[int, int], list[Mutant]]:
    """All mutants of a file, by the places that they change."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    text = (ROOT / file).read_text()
    tree, lines = get_ast(text), text.splitlines()
    found: dict[tuple[int, int], list[Mutant]] = {}
    for name in OPERATORS:
        operator, count = get_operator(name)(), 0
        for node in ast_nodes(tree):
            for start, _ in operator.mutation_positions(node):
                # Whether a dataclass is frozen is no mathematics.
                if lines[start[0] - 1].startswith("@dataclass("):
                    count += 1
                    continue
                found.setdefault(start, []).append(Mutant(file, start[0], name, count))
                count += 1
    return found


def draw(count: int, seed: int) -> list[Mutant]:
    """Mutants of places drawn without repetition, each place as likely as another."""
    files = sorted(str(f.relative_to(ROOT)) for glob in ROOMS for f in ROOT.glob(glob))
    places = [each for file in files for _, each in sorted(mutants_of(file).items())]
    generator = random.Random(seed)
    return [generator.choice(each) for each in generator.sample(places, count)]


def room_of(file: str) -> str:
    """The folder of the tests of a file."""
    return next(room for glob, room in ROOMS.items() if Path(file).match(glob))


def tests_of(file: str) -> list[str]:
    """The room's tests and the file's own examples, those first that bear its name."""
    stem, room = Path(file).stem, ROOT / room_of(file)
    words = {*stem.split("_"), stem.rstrip("s")}
    tests = sorted(room.rglob("test_*.py"), key=lambda t: not any(w in t.stem for w in words))
    return [file, *(str(test.relative_to(ROOT)) for test in tests)]


def mutated(mutant: Mutant) -> str:
    """The text of the file with the change."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    text = (ROOT / mutant.file).read_text()
    changed = mutate_code(text, get_operator(mutant.operator)(), mutant.occurrence)
    assert changed is not None
    assert changed != text
    return changed


def _run_tests(folder: Path, tests: list[str], markers: list[str], send: Any) -> None:
    """In a process of its own: pytest on a copy of the project, with its imports made already."""
    import pytest

    os.setsid()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    out = io.StringIO()
    quiet = ["-x", "-q", "--tb=line", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
    with redirect_stdout(out):
        status = pytest.main([*quiet, *markers, *tests])
    failed = re.findall(r"^(?:FAILED|ERROR) ([^\s]+)", out.getvalue(), flags=re.M)
    send.send((int(status), failed[:1] or out.getvalue()[-500:]))


def try_tests(folder: Path, tests: list[str], markers: list[str]) -> tuple[str, Any]:
    """`killed`, `survived` or `hangs`, and the test that noticed it."""
    receive, send = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_run_tests, args=(folder, tests, markers, send))
    child.start()
    send.close()
    try:
        if not receive.poll(_SECONDS):
            return "hangs", None
        status, failed = receive.recv()
        if status not in (0, 1):  # neither passed nor failed: nothing was tried
            raise SystemExit(f"pytest ended with status {status}: {failed}")
        return ("survived" if status == 0 else "killed"), failed
    except EOFError:
        return "killed", "the process ended"
    finally:
        subprocess.run(["pkill", "-9", "-s", str(child.pid)], check=False)
        child.join()


def try_mutant(folder: Path, mutant: Mutant) -> dict[str, Any]:
    """Against the default tests of its room, then against all."""
    start, changed = time.monotonic(), mutated(mutant)
    before = (ROOT / mutant.file).read_text().splitlines()
    lines = [b for a, b in zip(before, changed.splitlines(), strict=False) if a != b]
    (folder / mutant.file).write_text(changed)
    record = mutant._asdict() | {"was": before[mutant.line - 1].strip(), "is": lines[:1]}
    try:
        record["default"], record["by"] = try_tests(folder, tests_of(mutant.file), [])
        record["all"] = record["default"]
        if record["default"] == "survived":
            record["all"], record["by"] = try_tests(folder, tests_of(mutant.file), ["-m", ""])
    finally:
        shutil.copyfile(ROOT / mutant.file, folder / mutant.file)
    return record | {"seconds": round(time.monotonic() - start, 1)}


def _preload() -> None:
    """Imports that all tests share, before the processes part; JAX has started no device yet."""
    for name in _SHARED:
        importlib.import_module(name)


def _work(number: int, folder: Path, mutants: list[Mutant], out: Path) -> None:
    copy = folder / str(number)
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    _preload()
    for mutant in mutants:
        record = try_mutant(copy, mutant)
        with out.open("a") as file:
            file.write(json.dumps(record) + "\n")


def main() -> None:
    """Draws, tries and counts."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--count", type=int, default=150)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    flags.add_argument("--workers", type=int, default=2)
    given = flags.parse_args()
    out = given.out.resolve()
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {Mutant(*(record[field] for field in Mutant._fields)) for record in records}
    drawn = draw(given.count, given.seed)
    left = [mutant for mutant in drawn if mutant not in done]
    # As conftest.py would have them, without asking XLA each time.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"mutants-{os.getpid()}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
    workers = [
        multiprocessing.Process(target=_work, args=(i, folder, left[i :: given.workers], out))
        for i in range(given.workers)
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    for record in records:
        if record["default"] == "survived":
            print(f"{record['file']}:{record['line']} all: {record['all']}; {record['by']}")
            print(f"    was {record['was']}\n    is  {' '.join(record['is']).strip()}")
    caught, by_all = (
        sum(record[tests] != "survived" for record in records) for tests in ("default", "all")
    )
    print(f"{len(records)} mutants: default tests catch {caught}, all tests {by_all}")


if __name__ == "__main__":
    main()
