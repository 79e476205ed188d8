"""Training processes that are really killed, and checkpoints that are really broken.

Each trial disturbs a run in one way, then the same command goes on, and in the end everything
that the run leaves is bit for bit that of a run which nothing disturbed. A few trials are in every
run of all tests, of runs that neither draw nor evaluate (test_processes.py stops one that does);
`pytest -m faults tests/processes/test_faults.py --trials=200 -s` makes as many as are asked for, of
whole runs, and prints their table.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from diffjax import config_files
from diffjax.data import digits
from diffjax.host.run_files import read_json, read_metrics
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.setup import set_up
from diffjax.training.sharding import make_mesh
from tests.support.trainer import CONFIG, STEPS, Trainer, may_drop

pytestmark = pytest.mark.faults

# Measured at other steps than those that are saved, and stopped between both.
WITH_EVALUATOR = CONFIG.replace(
    "    return config",
    """    config.evaluators = {"validation": spec(Validation, every_steps=3, num_images=8)}
    config.best_by = "validation/loss"
    return config""",
).replace(
    "from diffjax import choices",
    "from diffjax import choices\nfrom diffjax.runs.measuring.evaluators import Validation",
)


class Truth(NamedTuple):
    """What a run that nothing disturbed left, and how long it took."""

    content: dict[str, Any]
    setup: Any
    seconds: float


@pytest.fixture(scope="module")
def trainer(request, tmp_path_factory):
    whole = request.config.getoption("--trials") > 1
    folder = tmp_path_factory.mktemp("outputs")
    return Trainer(folder, WITH_EVALUATOR, xla_flags="", pictures=whole)


@pytest.fixture(scope="module")
def truth(trainer, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    seconds = 0.0
    for _ in range(2):  # The second has its programs from the cache.
        shutil.rmtree(workdir, ignore_errors=True)
        began = time.monotonic()
        status, said = trainer.run(workdir)
        seconds = time.monotonic() - began
        assert status == 0, said
    config = config_files.load(str(trainer.config)).lock()
    data = digits()
    mesh = make_mesh(devices=jax.devices()[:1])
    setup = set_up(config, data.image_shape, data.condition, mesh=mesh)
    content = left_by(workdir, setup)
    assert content["best"]["step"] in (3, 6, STEPS)
    return Truth(content, setup, seconds)


@pytest.fixture(scope="module")
def tally():
    """Trials by kind; what happened in them, when they are over."""
    counts: dict[str, Counter] = {}
    yield counts
    counts["all"] = sum(counts.values(), Counter())
    columns = ("trials", "stops", "damaged", "set aside", "lost")
    lines = [f"| kind | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for kind, row in counts.items():
        row["lost"] = row["trials"] - row["whole"]
        skipped = f" ({row['skipped']} skipped)" if row["skipped"] else ""
        lines.append(f"| {kind}{skipped} | {' | '.join(str(row[name]) for name in columns)} |")
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


@pytest.fixture
def workdir(tmp_path):
    """A run's folder, which may become a file system of its own."""
    yield tmp_path / "run"
    if os.path.ismount(tmp_path / "run"):
        subprocess.run(["umount", "--lazy", str(tmp_path / "run")], check=True)


def left_by(workdir: Path, setup: Any) -> dict[str, Any]:
    """Everything that a finished run leaves, but for the clock's readings."""
    store = Checkpoints(workdir / "checkpoints", read_only=True)
    steps = store.steps()
    state, meta = store.read(STEPS, setup.abstract)
    store.close()
    arrays = jax.tree_util.tree_leaves_with_path(jax.device_get(state._asdict()))
    pictures = sorted((workdir / "samples").glob("*.png"))
    evaluation, page = workdir / "evaluation.json", workdir / "report.html"
    return {
        "steps": steps,
        "arrays": {jax.tree_util.keystr(path): (x.dtype, x.tobytes()) for path, x in arrays},
        "meta": meta,
        "metrics": [
            {name: value for name, value in record.items() if name != "images_per_second"}
            for record in read_metrics(workdir / "metrics.jsonl")
        ],
        "best": (read_json(workdir / "run.json") or {}).get("best"),
        "best steps": sorted(path.name for path in (workdir / "best").glob("[0-9]*")),
        "pictures": {path.name: path.read_bytes() for path in pictures},
        "evaluation": evaluation.exists() and without_seconds(json.loads(evaluation.read_text())),
        "page": page.exists(),
    }


def without_seconds(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: without_seconds(v) for k, v in tree.items() if "seconds" not in k}
    return [without_seconds(v) for v in tree] if isinstance(tree, list) else tree


# How a process ends. Each takes the generator, the folder and how long a whole run takes, and
# returns what is done to the process.


def kill(rng, workdir: Path, seconds: float):
    def disturb(pid: int) -> None:
        time.sleep(rng.uniform(0, seconds))
        send(pid, signal.SIGKILL)

    return disturb


def late(number: int):
    """Some time after some checkpoint is there: a run's first half is imports and compilation."""

    def ending(rng, workdir: Path, seconds: float):
        which, pause = rng.integers(STEPS // 2) * 2, rng.uniform(0, seconds / 8)

        def disturb(pid: int) -> None:
            until = time.monotonic() + 3 * seconds
            while time.monotonic() < until and alive(pid):
                if (workdir / "checkpoints" / str(which)).exists():
                    time.sleep(pause)
                    break
                time.sleep(0.01)
            send(pid, number)

        return disturb

    return ending


def kill_while_saving(rng, workdir: Path, seconds: float):
    """As soon as some step's checkpoint is begun, or a little later."""
    which, pause = rng.integers(0, STEPS // 2 + 1) * 2, rng.uniform(0, 0.05)

    def disturb(pid: int) -> None:
        until = time.monotonic() + 2 * seconds
        while time.monotonic() < until and alive(pid):
            if any((workdir / "checkpoints").glob(f"{which}*")):
                time.sleep(pause)
                break
            time.sleep(0.0005)
        send(pid, signal.SIGKILL)

    return disturb


def permission(rng, workdir: Path, seconds: float):
    """The folder of checkpoints can't be written any more, from some checkpoint on."""
    which = rng.integers(STEPS // 2) * 2

    def disturb(pid: int) -> None:
        until = time.monotonic() + 3 * seconds
        while time.monotonic() < until and alive(pid):
            if (workdir / "checkpoints" / str(which)).exists():
                (workdir / "checkpoints").chmod(0o500)
                return
            time.sleep(0.001)

    return disturb


def full_disk(rng, workdir: Path, seconds: float):
    """The folder is a file system of its own, with room for little, each time for more or less."""
    workdir.mkdir(exist_ok=True)
    # What holds more already does not shrink.
    mount(workdir, f"{rng.integers(50, 600)}k")
    return lambda pid: None


def mount(folder: Path, size: str) -> bool:
    """Gives a folder a file system of its own, or the one that it has another size."""
    how = "remount," if os.path.ismount(folder) else ""
    command = ["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def out_of_reach(ending: Any, folder: Path) -> str:
    """Why this machine can't end a process so; "" where it can."""
    if ending is permission and os.geteuid() == 0 and not may_drop():
        return "root writes anywhere"
    if ending is full_disk:
        folder.mkdir()
        if not mount(folder, "1m"):
            return "no file system of our own"
    return ""


def make_good(workdir: Path) -> None:
    """Room and permission again."""
    if (workdir / "checkpoints").exists():
        (workdir / "checkpoints").chmod(0o755)
    if os.path.ismount(workdir):
        assert mount(workdir, "1g")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# What happens to the folder of a checkpoint.


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def one_of(rng, folder: Path) -> Path:
    """A file that holds something: any of them, or one drawn by its size."""
    files = [path for path in files_of(folder) if path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files], float)
    return files[rng.choice(len(files), p=None if rng.random() < 0.5 else sizes / sizes.sum())]


def truncate(rng, folder: Path) -> None:
    file = one_of(rng, folder)
    os.truncate(file, int(rng.integers(file.stat().st_size)))


def flip(rng, folder: Path) -> None:
    file = one_of(rng, folder)
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)


def half_delete(rng, folder: Path) -> None:
    files = files_of(folder)
    for i in rng.choice(len(files), len(files) // 2, replace=False):
        files[i].unlink()


def empty_files(rng, folder: Path) -> None:
    for file in files_of(folder):
        file.write_bytes(b"")


def empty_folder(rng, folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


KINDS = {
    "SIGKILL while saving": (kill_while_saving, None),
    "one bit flipped": (late(signal.SIGKILL), flip),
    "SIGTERM": (late(signal.SIGTERM), None),
    "SIGKILL": (kill, None),
    "a file truncated": (late(signal.SIGKILL), truncate),
    "half the files deleted": (late(signal.SIGKILL), half_delete),
    "all files empty": (late(signal.SIGKILL), empty_files),
    "the folder empty": (late(signal.SIGKILL), empty_folder),
    "permission taken away": (permission, None),
    "the disk full": (full_disk, None),
    "SIGINT": (late(signal.SIGINT), None),
}
STATUSES = {
    "SIGTERM": (128 + signal.SIGTERM, -signal.SIGTERM),
    "SIGINT": (128 + signal.SIGINT,),
    "permission taken away": (2,),
    "the disk full": (2,),
}
ONE_LINE = (
    "error: (can't write to .*; choose .*"
    "|.* can't be written any more: .*, and run the same command.*)"
)
# A process that dies at the worst time, a file that rots, a folder that takes no more; what signals
# ask for, and damage of other kinds, are in test_processes.py and test_training.py.
SHORT = ("SIGKILL while saving", "one bit flipped", "permission taken away", "the disk full")


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        trials, kinds = metafunc.config.getoption("--trials"), list(KINDS)
        short = [kinds.index(kind) for kind in SHORT]
        metafunc.parametrize("seed", short if trials == 1 else range(trials))


def test_nothing_is_lost(seed, trainer, truth, tally, workdir):
    kind = list(KINDS)[seed % len(KINDS)]
    ending, damage = KINDS[kind]
    rng, row = np.random.default_rng(seed), tally.setdefault(kind, Counter())
    if why := out_of_reach(ending, workdir):
        row["skipped"] += 1
        pytest.skip(why)
    row["trials"] += 1
    for _ in range(int(rng.integers(1, 4)) if trainer.pictures else 1):
        status, said = trainer.run(workdir, ending(rng, workdir, truth.seconds))
        row["stops"] += status != 0
        assert status in (0, *STATUSES.get(kind, (-signal.SIGKILL,))), said
        if status == 2:
            assert re.fullmatch(ONE_LINE, said.rstrip().rpartition("\n")[2]), said
        # Before and after the run Python itself handles a Ctrl-C, and may print that.
        assert kind == "SIGINT" or "Traceback" not in said, said
        if damage is not None:
            row["damaged"] += hurt(rng, workdir / "checkpoints", damage)
    make_good(workdir)
    status, said = trainer.run(workdir)
    assert status == 0, said
    row["set aside"] += said.count("was moved to")
    found = left_by(workdir, truth.setup)
    for name, value in truth.content.items():
        if name != "steps":
            assert found[name] == value, name
    # No step that an undisturbed run saves is missing, unless it was damaged.
    aside = workdir / "checkpoints_damaged"
    gone = {int(path.name.split("-")[0]) for path in aside.iterdir()} if aside.exists() else set()
    assert set(truth.content["steps"]) <= set(found["steps"]) | gone
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    row["whole"] += 1


def hurt(rng, folder: Path, damage) -> int:
    """Damages some of the newest checkpoints but never all; how many."""
    if not folder.exists():
        return 0
    store = Checkpoints(folder, read_only=True)
    steps = store.steps()
    store.close()
    if len(steps) < 2:
        return 0
    chosen = steps[-int(rng.integers(1, len(steps))) :]
    for step in chosen:
        damage(rng, folder / str(step))
    return len(chosen)
