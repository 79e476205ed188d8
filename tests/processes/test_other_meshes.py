"""A run that goes on with other devices, other meshes and other numbers of processes.

Each trial trains a step or two in one layout, is stopped by SIGTERM, and goes on in another,
without drawing or evaluating; in the end it is the run of one device to the tolerance of
another order of sums. One trial is in every run of all tests; more are made, and how far each ended
from the undisturbed run is printed, by
`pytest -m process tests/processes/test_other_meshes.py --trials=20 -s`.
"""

import re
import signal
import sys
import time
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import pytest

from diffjax import config_files
from diffjax.data import digits
from diffjax.runs.setup import set_up
from diffjax.training.sharding import make_mesh
from tests.processes.test_faults import alive, send
from tests.processes.test_processes import PAUSE, assert_same_run, state_of
from tests.support.trainer import CONFIG, STEPS, Trainer

# Blocks whose every weight can be split.
SPLITTABLE = CONFIG.replace(
    "    config.model = spec(Tiny)\n",
    "    from diffjax.models import DiT\n"
    "    config.model = spec(DiT, patch_size=4, hidden_size=32, depth=1, num_heads=2)\n",
)
LEGS = 2
# Of an array's largest entry, after eight steps of Adam, whose first ones divide by a root near 0.
# One trial ended at 7e-5.
DRIFT = 1e-3


class Layout(NamedTuple):
    """Processes, devices of each, and the axes of the mesh that are not 1."""

    processes: int
    devices: int
    mesh: dict[str, int]

    @property
    def flags(self) -> list[str]:
        return [f"--config.mesh.{axis}={size}" for axis, size in self.mesh.items()]

    def __str__(self) -> str:
        axes = " ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        return f"{self.processes}x{self.devices} {axes}".strip()


def stop_early(workdir, never: bool, pids: list[int]) -> None:
    """Sends SIGTERM to the last process at its first log line: it stops at the next step."""
    file = workdir / "metrics.jsonl"
    before = file.stat().st_size if file.exists() else 0
    until = time.monotonic() + 300
    while not never and time.monotonic() < until and alive(pids[-1]):
        if file.exists() and file.stat().st_size > before:
            send(pids[-1], signal.SIGTERM)
            return
        time.sleep(0.01)


LAYOUTS = (
    Layout(1, 1, {}),
    Layout(1, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
    Layout(2, 2, {"data": 1, "fsdp": 4}),
    Layout(4, 1, {"data": 2, "fsdp": 2}),
    Layout(1, 2, {"data": 1, "tensor": 2}),
    Layout(1, 8, {"data": 1, "fsdp": 8}),
    Layout(2, 1, {"data": 2}),
    Layout(2, 4, {"data": 1, "fsdp": 4, "tensor": 2}),
    Layout(1, 4, {"data": 2, "tensor": 2}),
    Layout(1, 8, {"data": 8}),
)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("outputs"), SPLITTABLE, pictures=False)


@pytest.fixture(scope="module")
def setup(trainer):
    config = config_files.load(str(trainer.config)).lock()
    data = digits()
    return set_up(config, data.image_shape, data.condition, make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def alone(trainer, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    status, said = trainer.run(workdir)
    assert status == 0, said
    return workdir


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--trials")))


@pytest.mark.process
def test_a_run_moves_from_layout_to_layout(seed, trainer, setup, alone, tmp_path):
    # Of the first trials each layout is a part, and then at random.
    order = np.random.default_rng(seed).permutation(len(LAYOUTS)) if seed else range(len(LAYOUTS))
    workdir, layouts = tmp_path / "run", [LAYOUTS[i] for i in order][1 : LEGS + 1]
    begun = []
    for leg, layout in enumerate(layouts, start=1):
        ended = trainer.together(
            layout.processes,
            [*trainer.arguments(workdir), *layout.flags],
            disturb=partial(stop_early, workdir, leg == LEGS),
            devices=layout.devices,
            pause=0 if leg == LEGS else PAUSE,
        )
        assert {status for status, _ in ended} == {0 if leg == LEGS else 143}, ended
        begun += map(int, re.findall(r"resuming at step (\d+) of", ended[0][1]))
    # Each leg but the first went on where another one had made at least a step.
    assert len(begun) == LEGS - 1
    assert sorted({0, *begun, STEPS}) == [0, *begun, STEPS]
    ours, theirs = (jax.tree.leaves(state_of(place, setup).params) for place in (workdir, alone))
    drift = max(
        np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True) if b.any()
    )
    names = ", ".join(map(str, layouts))
    sys.stdout.write(f"\n| {names} | {', '.join(map(str, begun))} | {drift:.1e} |")
    assert drift < DRIFT
    assert_same_run(workdir, alone, setup)
    assert max(int(step.name) for step in (workdir / "checkpoints").iterdir()) == STEPS
