"""Runs of several processes on the loopback, against the same run of one process.

One pair draws, evaluates and writes its page; the other runs train alone.
"""

import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from diffjax import config_files
from diffjax.data import digits
from diffjax.errors import UserError
from diffjax.host import processes
from diffjax.host.run_files import read_metrics
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.setup import set_up
from diffjax.training.sharding import batch_sharding, make_mesh, part_of_batch
from experiments.flags import shared
from tests.processes.test_faults import left_by
from tests.support.trainer import CONFIG, STEPS, Trainer
from tests.support.witnesses import witnesses

# Sums in another order: eight steps of Adam, whose first ones divide by a root near 0.
RTOL, ATOL = 2e-3, 2e-5
PAUSE = 0.5  # s; a signal at the second of eight steps comes before the last


MEASURED = CONFIG.replace(
    "    return config",
    """    config.evaluators = {"loss": spec(Validation, every_steps=3, num_images=9)}
    config.best_by = "loss/loss"
    config.evaluation.likelihood = ("vlb",)
    return config""",
).replace("\ndef", "\nfrom diffjax.runs.measuring.evaluators import Validation\n\ndef")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("outputs"), MEASURED)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Trainings that neither draw nor evaluate."""
    return Trainer(tmp_path_factory.mktemp("plain"), pictures=False)


@pytest.fixture(scope="module")
def alone_and_plain(plain, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone_and_plain") / "run"
    status, said = plain.run(workdir)
    assert status == 0, said
    return workdir


@pytest.fixture(scope="module")
def setup(trainer):
    config = config_files.load(str(trainer.config)).lock()
    data = digits()
    mesh = make_mesh(devices=jax.devices()[:1])
    return set_up(config, data.image_shape, data.condition, mesh=mesh)


@pytest.fixture(scope="module")
def alone(trainer, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    status, said = trainer.run(workdir)
    assert status == 0, said
    return workdir


def state_of(workdir: Path, setup, step: int = STEPS):
    store = Checkpoints(workdir / "checkpoints", read_only=True)
    state, _ = store.read(step, setup.abstract)
    store.close()
    return jax.device_get(state)


def assert_same_run(workdir: Path, other: Path, setup) -> None:
    """All arrays, all lines and the evaluation, to the tolerance of another order of sums."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=RTOL, atol=ATOL),
        state_of(workdir, setup),
        state_of(other, setup),
    )
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (workdir, other)]
    assert [record["step"] for record in lines[0]] == [record["step"] for record in lines[1]]
    for one, another in zip(*lines, strict=True):
        assert one.keys() == another.keys()
        for name in one.keys() - {"images_per_second"}:
            assert one[name] == pytest.approx(another[name], rel=1e-4), name
    assert {path.name for path in workdir.iterdir()} == {path.name for path in other.iterdir()}
    if (other / "evaluation.json").exists():
        found = [json.loads((at / "evaluation.json").read_text()) for at in (workdir, other)]
        assert found[0]["frechet_distance"]["value"] == pytest.approx(
            found[1]["frechet_distance"]["value"], rel=1e-3
        )


def when(there: Path, pids: list[int], number: int, which: int) -> None:
    """Sends a signal to one of some processes as soon as a file is there."""
    until = time.monotonic() + 120
    while time.monotonic() < until and not there.exists():
        time.sleep(0.005)
    os.kill(pids[which], number)


@pytest.mark.process
def test_two_processes_are_one_run_and_resume_on_one(plain, setup, alone_and_plain, tmp_path):
    """Ctrl-C to the first of two; one goes on; the end is that of a run of one process.

    SIGTERM to the last of several is in test_other_meshes.py.
    """
    workdir = tmp_path / "run"
    ended = plain.together(
        2,
        plain.arguments(workdir),
        disturb=lambda pids: when(workdir / "checkpoints" / "2", pids, signal.SIGINT, 0),
        pause=PAUSE,
    )
    assert [status for status, _ in ended] == [143, 143], ended
    stopped = {re.findall(r"stopped at step (\d+) of 8", said)[-1] for _, said in ended}
    assert len(stopped) == 1, "all stop at the same step"
    step = int(stopped.pop())
    assert (workdir / "checkpoints" / str(step)).is_dir()
    status, said = plain.run(workdir)
    assert status == 0, said
    assert f"resuming at step {step}" in said
    assert_same_run(workdir, alone_and_plain, setup)


@pytest.fixture(scope="module")
def pair(trainer, tmp_path_factory):
    """Two processes that nothing disturbs, with pictures, evaluation and page."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    ended = trainer.together(2, trainer.arguments(workdir))
    assert [status for status, _ in ended] == [0, 0], ended
    return workdir


@pytest.mark.process
def test_a_pair_evaluates_as_one_process_does(pair, alone, setup):
    """With an evaluator, the best checkpoint by it, and bits per dimension."""
    assert_same_run(pair, alone, setup)
    bits, best = (
        [json.loads((at / name).read_text())[key] for at in (pair, alone)]
        for name, key in (("likelihood.json", "vlb-none"), ("run.json", "best"))
    )
    assert bits[0]["bits_per_dim"] == pytest.approx(bits[1]["bits_per_dim"], rel=1e-3)
    assert best[0]["step"] == best[1]["step"]
    assert (pair / "best" / str(best[0]["step"])).is_dir()


def end_by_a_kill(trainer, workdir: Path, number: int, which: int) -> None:
    """Kills one of some processes: the others end soon, each with a reason."""
    began = 0.0

    def kill(pids: list[int]) -> None:
        nonlocal began
        when(workdir / "checkpoints" / "2", pids, signal.SIGKILL, which)
        began = time.monotonic()

    flags = [*trainer.arguments(workdir), "--heartbeat_timeout_seconds=10"]
    ended = trainer.together(number, flags, disturb=kill, pause=PAUSE)
    assert time.monotonic() - began < 60
    assert ended.pop(which)[0] == -signal.SIGKILL
    for status, said in ended:
        # A collective operation notices at once; at a barrier it takes a heartbeat, and JAX aborts.
        assert status in REASONS, said
        assert re.search(REASONS[status], said), said


REASONS = {
    75: r"error: process \d of \d lost another one \(",
    -signal.SIGABRT: "another task died|[Cc]oordination service|distributed service",
}


@pytest.mark.faults
@pytest.mark.thorough(tenth=False)
def test_the_first_of_a_pair_dies_and_the_same_commands_end_in_the_bits_of_one_left_alone(
    trainer, setup, pair, tmp_path
):
    """The first, which the others ask about each other."""
    workdir = tmp_path / "run"
    end_by_a_kill(trainer, workdir, 2, 0)
    ended = trainer.together(2, trainer.arguments(workdir))
    assert [status for status, _ in ended] == [0, 0], ended
    assert left_by(workdir, setup) == left_by(pair, setup)


@pytest.mark.faults
@pytest.mark.parametrize(("number", "which"), witnesses([(2, 0), (4, 2)], [(2, 0)]))
def test_one_of_several_dies_and_the_same_commands_go_on(
    number, which, plain, setup, alone_and_plain, tmp_path
):
    """The first of two, which the other asks about it, or the third of four."""
    workdir = tmp_path / "run"
    end_by_a_kill(plain, workdir, number, which)
    ended = plain.together(number, plain.arguments(workdir))
    assert [status for status, _ in ended] == [0] * number, ended
    assert_same_run(workdir, alone_and_plain, setup)
    assert not any("step 8/8" in said for _, said in ended[1:]), "the first alone tells"


@pytest.mark.process
def test_samples_of_two_processes_are_those_of_one(trainer, pair, tmp_path):
    pictures = [tmp_path / name / "grid.png" for name in ("two", "one")]
    arguments = [f"--workdir={pair}", "--num_samples=6", "--allowed_packages=tests"]
    out = [f"--out={path}" for path in pictures]
    ended = trainer.together(2, [*arguments, out[0]], program="sample")
    ended += trainer.start("sample", [[*arguments, out[1]]])
    assert [status for status, _ in ended] == [0, 0, 0], ended
    two, one = (np.load(path.with_suffix(".npz"))["images"] for path in pictures)
    np.testing.assert_allclose(two, one, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"coordinator": "host:1"}, "--num_processes and --process_index missing"),
        ({"num_processes": 2, "process_index": 0}, "--coordinator missing"),
        ({"coordinator": "host", "num_processes": 2, "process_index": 0}, "not of the form HOST:"),
        ({"coordinator": "h:0", "num_processes": 2, "process_index": 0}, "not of the form HOST:"),
        ({"coordinator": "h:1", "num_processes": 2, "process_index": 2}, "not one of 2 processes"),
        ({"coordinator": "h:1", "num_processes": 2, "process_index": -1}, "counted from 0"),
        ({"distributed": True, "num_processes": 2}, "finds the processes automatically"),
        ({"distributed": True}, "set --coordinator, --num_processes and --process_index"),
    ],
)
def test_flags_that_say_too_little_or_too_much(change, said, monkeypatch):
    """The last: nothing of a scheduler is around, which JAX finds out before it does anything."""

    def nothing_found(*args, **kwargs):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing_found)
    plain = dict.fromkeys(("coordinator", "num_processes", "process_index"), None)
    args = {**plain, "distributed": False, "heartbeat_timeout_seconds": 100, **change}
    with pytest.raises(UserError, match=said):
        shared.join_processes(SimpleNamespace(**args))


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}])
def test_one_process_has_the_whole_batch(axes):
    assert part_of_batch(batch_sharding(make_mesh(**{"data": -1, **axes})), 16) == (0, 1)


def test_what_the_first_refuses():
    def refuse():
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        processes.in_first(refuse)
    assert not processes.all_agree(False)
