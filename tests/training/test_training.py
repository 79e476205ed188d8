"""The loop, its state and its folder: what is promised of a run, seen on a tiny one."""

import errno
import json
import os
import shutil
import signal
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import diffjax
from diffjax import choices, lookup
from diffjax.conditions import of_classes
from diffjax.data import digits
from diffjax.errors import UserError
from diffjax.host import lock, processes
from diffjax.host.interrupts import Interrupted
from diffjax.host.processes import ProcessLost
from diffjax.host.watchdog import Watchdog
from diffjax.loop import loop
from diffjax.loop.pending_metrics import NonFiniteLoss
from diffjax.runs import checkpoints as checkpoints_module
from diffjax.runs import workdirs
from diffjax.runs.checkpoints import Checkpoints, digest
from diffjax.runs.samples.model import Model, Programs, Request
from diffjax.runs.setup import Setup, set_up
from diffjax.sampling import grids, solvers
from diffjax.spec import spec, to_json
from diffjax.training import sharding
from diffjax.training.averages import Averages, ema_name
from diffjax.training.nonfinite import NonFinite
from diffjax.wiring import wire
from experiments.train import headline
from tests.support.shared_parts import shared_parts
from tests.support.tiny_run import (
    COMMAND,
    arrays_of,
    assert_same,
    loaded,
    logged,
    on_one_device,
    tiny_config,
    trained_config,
    without_pictures,
)


@pytest.fixture(autouse=True)
def _shared_parts(monkeypatch):
    shared_parts(monkeypatch)


def test_a_run_leaves_what_is_promised(trained_run):
    names = {path.name for path in trained_run.iterdir()}
    assert names == {
        "config.json", "run.json", "metrics.jsonl", "evaluation.json", "report.html", "lock.json",
        "checkpoints", "samples", "tensorboard",
    }  # fmt: skip
    assert [record["step"] for record in logged(trained_run)] == [2, 4, 6]
    assert all(np.isfinite(record["loss"]) for record in logged(trained_run))
    config = json.loads((trained_run / "config.json").read_text())
    assert config["num_steps"] == 6
    assert config["optimizer"]["learning_rate"] == 1e-3
    result = json.loads((trained_run / "evaluation.json").read_text())
    assert 0.0 <= result["accuracy"] <= 1.0
    assert len(result["frechet_distance"]["provenance"]["extractor_sha256"]) == 64
    assert [row["nfe"] for row in result["by_nfe"]] == [4, 4]
    assert {row["solver"] for row in result["by_nfe"]} == {"ddim", "euler"}
    assert (trained_run / "samples" / "step_00000004.png").exists()
    run = json.loads((trained_run / "run.json").read_text())
    assert run["command"] == COMMAND
    assert run["train_seconds"] > 0


def test_a_finished_run_is_left_alone(copy_of_run, monkeypatch):
    monkeypatch.setattr(loop, "page", lambda workdir: workdir / "report.html")
    (copy_of_run / "evaluation.json").write_text((copy_of_run / "evaluation.json").read_text())
    before = {p: p.stat().st_mtime_ns for p in copy_of_run.rglob("*") if p.is_file()}
    loop.train(trained_config(), copy_of_run)
    changed = {
        p.name
        for p in copy_of_run.rglob("*")
        if p.is_file() and before.get(p) != p.stat().st_mtime_ns
    }
    assert changed <= {"report.html", "run.json", "lock.json"}


@pytest.mark.thorough(tenth=False)
def test_an_evaluation_of_an_earlier_step_is_made_anew(copy_of_run, monkeypatch):
    result = json.loads((copy_of_run / "evaluation.json").read_text())
    assert result["step"] == 6
    (copy_of_run / "evaluation.json").write_text(
        json.dumps({**result, "step": 4, "accuracy": -1.0})
    )
    monkeypatch.setattr(loop, "page", lambda workdir: workdir / "report.html")
    loop.train(trained_config(), copy_of_run)
    again = json.loads((copy_of_run / "evaluation.json").read_text())
    assert (again["step"], again["accuracy"]) == (6, result["accuracy"])


def test_a_folder_in_use_is_refused(copy_of_run):
    before = {p: p.stat().st_mtime_ns for p in copy_of_run.rglob("*")}
    with lock.locked(copy_of_run):
        with pytest.raises(UserError, match=f"is being trained by process {os.getpid()} on"):
            loop.train(trained_config(), copy_of_run)
        assert loaded(copy_of_run).step == 6  # reading goes on beside it
    after = {p: p.stat().st_mtime_ns for p in copy_of_run.rglob("*") if p.name != lock.LOCK}
    assert after == {p: time for p, time in before.items() if p.name != lock.LOCK}


def test_stopping_and_resuming_changes_nothing(trained_run, tmp_path, monkeypatch):
    """Ctrl-C after step 3, then the same command: bit for bit the undisturbed run."""
    original = loop.compile_train_step

    def interrupting(*parts):
        step = original(*parts)
        calls = []

        def stepped(*arguments):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return step(*arguments)

        return stepped

    monkeypatch.setattr(loop, "page", lambda workdir: workdir / "report.html")
    monkeypatch.setattr(loop, "evaluate_once", lambda *_: None)
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "compile_train_step", interrupting)
        with pytest.raises(Interrupted, match="stopped at step 3 of 6 and saved"):
            loop.train(trained_config(), tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    loop.train(trained_config(), tmp_path / "run")
    assert_same(arrays_of(tmp_path / "run"), arrays_of(trained_run), rtol=0, atol=0)
    assert logged(tmp_path / "run") == logged(trained_run)
    # What the evaluation draws and counts is compared in test_faults.py.
    there, here = (run / "samples/step_00000006.png" for run in (trained_run, tmp_path / "run"))
    assert there.read_bytes() == here.read_bytes()


def damage_truncated(folder: Path):
    for path in folder.rglob("d/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_emptied(folder: Path):
    shutil.rmtree(folder)
    folder.mkdir()


def damage_metadata(folder: Path):
    shutil.rmtree(folder / "meta")


def damage_what_is_beside(folder: Path):
    """One hexadecimal digit of the data's hash: not damaged data, but a damaged checkpoint."""
    path = folder / "meta" / "metadata"
    text = path.read_text()
    start = text.index('"data_sha256"') + 20
    path.write_text(text[:start] + ("0" if text[start] != "0" else "1") + text[start + 1 :])


DAMAGES = [damage_truncated, damage_emptied, damage_metadata, damage_what_is_beside]


@pytest.fixture(scope="module")
def setup(loaded_run):
    """What `trained_run` was trained by."""
    return Setup.of(loaded_run.parts)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(setup, copy_of_run, damage):
    damage(copy_of_run / "checkpoints" / "6")
    run = loaded(copy_of_run)  # reading changes nothing
    assert run.step == 4
    assert (copy_of_run / "checkpoints" / "6").exists()
    with closing(Checkpoints(copy_of_run / "checkpoints", keep=5)) as store:
        restored = store.restore(setup.abstract)
    assert restored is not None
    state, meta = restored
    assert (int(state.step), meta["step"]) == (4, 4)
    assert not (copy_of_run / "checkpoints" / "6").exists()
    assert (copy_of_run / "checkpoints_damaged" / "6").exists()


@pytest.mark.thorough
def test_a_run_with_a_damaged_checkpoint_ends_as_it_did(trained_run, copy_of_run, monkeypatch):
    without_pictures(monkeypatch)
    damage_truncated(copy_of_run / "checkpoints" / "6")
    loop.train(trained_config(), copy_of_run)
    assert (copy_of_run / "checkpoints_damaged" / "6").exists()
    assert_same(arrays_of(copy_of_run), arrays_of(trained_run), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
        (ValueError("INTERNAL: reading x: Stale file handle"), "Stale file handle"),
        (TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)), "Connection timed out"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files"),
        (MemoryError(), "out of memory"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "out of memory"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), None),
        (ValueError("torn"), None),
    ],
)
def test_what_hinders_reading_is_no_damage(copy_of_run, monkeypatch, trouble, said):
    """The newest checkpoint is left where it is; one on a broken sector is damaged."""
    as_it_is = ocp.CheckpointManager.restore

    def restore(self, step, **how):
        if step == 6:
            raise trouble
        return as_it_is(self, step, **how)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    if said is None:
        assert loaded(copy_of_run).step == 4
        return
    with pytest.raises(UserError, match=f"^checkpoint 6 can't be read now: {said}; nothing was"):
        loop.train(trained_config(), copy_of_run)
    assert (copy_of_run / "checkpoints" / "6").is_dir()
    assert not (copy_of_run / "checkpoints_damaged").exists()


def test_a_peer_that_is_lost_while_reading_is_no_damage(copy_of_run, monkeypatch):
    lost = jax.errors.JaxRuntimeError("Gloo AllGather failed: Connection closed by peer")

    def restore(self, step, **how):
        raise lost

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    monkeypatch.setattr(processes, "is_loss", lambda error: error is lost)
    with pytest.raises(ProcessLost) as told:
        loop.train(trained_config(), copy_of_run)
    assert told.value.status == 75
    assert not (copy_of_run / "checkpoints_damaged").exists()


def test_what_a_lost_peer_says_is_told_from_other_troubles(monkeypatch):
    lost = jax.errors.JaxRuntimeError("Gloo AllGather failed: Connection closed by peer")
    assert not processes.is_loss(lost), "there is no other one"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert processes.is_loss(lost)
    assert not processes.is_loss(ValueError(str(lost)))
    assert not processes.is_loss(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"))


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(copy_of_run):
    """As when the disk with them is not mounted: the metrics would be begun anew as well."""
    for path in (copy_of_run / "checkpoints").iterdir():
        shutil.rmtree(path)
    before = (copy_of_run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"checkpoints is empty, and .* has steps up to 6: bring"):
        loop.train(trained_config(), copy_of_run)
    assert (copy_of_run / "metrics.jsonl").read_bytes() == before


def test_damaged_checkpoints_behind_a_link_stay_on_their_file_system(setup, copy_of_run):
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as far:
        there = Path(far) / "of_this_run"
        shutil.move(copy_of_run / "checkpoints", there)
        (copy_of_run / "checkpoints").symlink_to(there)
        damage_truncated(there / "6")
        with closing(Checkpoints(copy_of_run / "checkpoints", keep=5)) as store:
            restored = store.restore(setup.abstract)
            assert restored is not None
            assert (there.parent / "of_this_run_damaged" / "6").is_dir()
            assert not (there / "6").exists()
            store.save(6, *restored)
        assert (there / "6").is_dir(), "made again"


def assert_finite(workdir: Path, step: int) -> None:
    arrays = arrays_of(workdir)
    assert int(arrays["step"]) == step
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays))


def test_what_was_trained_before_a_damaged_image_is_saved(trained_run, tmp_path, monkeypatch):
    as_it_is = loop.device_batches

    def damaged(*arguments):
        stream = as_it_is(*arguments)
        yield from (next(stream) for _ in range(3))
        raise UserError("image 7 is damaged")

    folder = tmp_path / "run"
    without_pictures(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "device_batches", damaged)
        with pytest.raises(UserError, match="image 7 is damaged"):
            loop.train(trained_config(), folder)
    assert (folder / "checkpoints" / "3").is_dir()
    assert_finite(folder, 3)  # From where on the run is the same: the test of stopping.
    assert logged(folder) == logged(trained_run)[:1]


def test_storage_that_hangs_is_noticed_as_well(copy_of_run, monkeypatch):
    """Before the first step and after the last one, when checkpoints are read and finished."""
    as_it_is, stacks, until = Checkpoints.wait, copy_of_run / "stacks.txt", time.monotonic() + 60

    def wait(self):
        while time.monotonic() < until and not (stacks.exists() and stacks.read_text()):
            time.sleep(0.02)
        as_it_is(self)

    without_pictures(monkeypatch)
    monkeypatch.setattr(Checkpoints, "wait", wait)
    loop.train(trained_config(), copy_of_run, watchdog=Watchdog(seconds=0.2, exits=False))
    assert "before the first checkpoint" in stacks.read_text()


def test_a_file_that_a_hand_was_in_is_one_line(copy_of_run):
    run = json.loads((copy_of_run / "run.json").read_text())
    (copy_of_run / "run.json").write_text(json.dumps({**run, "train_seconds": "x"}))
    workdirs.add_seconds(copy_of_run, train_seconds=1.0)
    assert json.loads((copy_of_run / "run.json").read_text())["train_seconds"] == 1.0
    (copy_of_run / "evaluation.json").write_text('{"step": 6}')
    with pytest.raises(UserError, match=r"evaluation.json is not a valid evaluation"):
        headline(copy_of_run)
    (copy_of_run / "run.json").unlink()
    (copy_of_run / "run.json").mkdir()
    with pytest.raises(UserError, match=r"run.json can't be read: Is a directory"):
        loaded(copy_of_run)


def test_data_may_lie_elsewhere_on_another_machine():
    saved = {"data": {"_target_": "t", "path": "/a", "size": 8}, "mesh": {"data": 2}}
    there = {**saved, "data": {**saved["data"], "path": "/b"}, "mesh": {"data": 1}}
    assert workdirs._without_place(saved) == workdirs._without_place(there)
    there["data"]["size"] = 9
    assert workdirs._without_place(saved) != workdirs._without_place(there)


def test_no_flipped_bit_goes_unnoticed(setup, trained_run, tmp_path):
    """Each flip is either harmless, bit for bit, or the checkpoint is passed over."""
    truth, noticed = arrays_of(trained_run), 0
    rng = np.random.default_rng(0)
    for trial in range(12):
        copy = shutil.copytree(trained_run / "checkpoints", tmp_path / str(trial))
        files = [p for p in (copy / "6" / "state").rglob("d/*") if p.is_file()]
        sizes = np.array([p.stat().st_size for p in files], float)
        file = files[rng.choice(len(files), p=sizes / sizes.sum())]
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(content)
        with closing(Checkpoints(copy, read_only=True)) as store:
            restored = store.restore(setup.abstract)
        assert restored is not None
        state, meta = restored
        if meta["step"] == 6:
            assert_same(jax.device_get(state._asdict()), truth, rtol=0, atol=0)
        else:
            assert meta["step"] == 4
            noticed += 1
    assert noticed > 0


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_config_is_mended_from_a_checkpoint(copy_of_run, damage, caplog):
    before = (copy_of_run / "config.json").read_text()
    damage_what_is_beside(copy_of_run / "checkpoints" / "6")  # It is not read.
    if damage == "cut":
        (copy_of_run / "config.json").write_text(before[:100])
    else:
        (copy_of_run / "config.json").unlink()
    (copy_of_run / "lock.json").unlink()
    with pytest.raises(UserError, match="another config"):
        workdirs.claim(copy_of_run, trained_config(seed=3))
    workdirs.claim(copy_of_run, trained_config())
    assert json.loads((copy_of_run / "config.json").read_text()) == json.loads(before)
    assert "mended from a checkpoint" in caplog.text
    assert (copy_of_run / "config.json.damaged").exists() == (damage == "cut")
    shutil.rmtree(copy_of_run / "checkpoints")
    (copy_of_run / "config.json").write_text(before[:100])
    with pytest.raises(UserError, match="not valid JSON"):
        workdirs.claim(copy_of_run, trained_config())


def test_changed_data_are_refused(setup, trained_run):
    """One pixel of one image."""
    data = digits()
    images = data.train.images.copy()  # type: ignore
    images[5, 3, 3, 0] ^= 1
    changed = replace(data, train=replace(data.train, images=images))  # type: ignore
    store = Checkpoints(trained_run / "checkpoints", read_only=True)
    state, start = loop.restore_or_init(setup, store, data)
    assert int(state.step) == start["step"] == 6
    with pytest.raises(UserError, match="training images of digits changed since this run began"):
        loop.restore_or_init(setup, store, changed)
    store.close()


def test_when_no_checkpoint_is_whole_it_says_so(copy_of_run):
    for folder in (copy_of_run / "checkpoints").iterdir():
        damage_emptied(folder)
    with pytest.raises(UserError, match="none of the checkpoints"):
        loaded(copy_of_run)


def test_the_digest_notices_any_bit_and_no_layout():
    x = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    mesh = sharding.make_mesh(fsdp=4, data=2)
    spread = jax.device_put(
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "data"))
    )
    assert digest({"x": spread}) == digest({"x": jnp.asarray(x)})
    for bit in (0, 12, 31):
        flipped = x.copy()
        flipped.view(np.uint32)[3, 5] ^= np.uint32(1 << bit)
        assert digest({"x": flipped}) != digest({"x": x})
    # An independent computation of the declared sum.
    bits, index = x.view(np.uint32).ravel().astype(object), np.arange(x.size, dtype=object)
    expected = int((bits * (2 * index + 1) * 2654435761).sum()) % 2**32
    assert digest({"x": x}) == {"x": expected}


@pytest.mark.thorough
def test_eight_devices_compute_what_one_does():
    """The same three steps: the same losses and parameters to float tolerance.

    Of a stack of blocks, whose parameters are split within one, and with dropout. Gradients of
    other networks on other meshes are in test_meshes.py.
    """
    blocks = {"model.patch_size": 2, "model.depth": 2, "model.scan": True, "model.remat": "dense"}
    config, data = tiny_config(**blocks), digits()

    def run(mesh):
        setup = set_up(config, data.image_shape, data.condition, mesh=mesh)
        train_state = setup.init(jax.random.key(0))
        key = jax.random.key(1)
        step = loop.compile_train_step(setup, key)
        stream = loop.device_batches(setup, data, 0)
        losses = []
        for _ in range(3):
            train_state, metrics = step(train_state, key, next(stream))
            losses.append(float(metrics["loss"]))
        return losses, jax.device_get(train_state.params)

    one_losses, one_params = run(sharding.make_mesh(devices=jax.devices()[:1]))
    losses, params = run(sharding.make_mesh(data=1, fsdp=2, tensor=2, sequence=2))
    np.testing.assert_allclose(losses, one_losses, rtol=2e-5)
    # Adam divides by the root of tiny squares, so rounding shows at the scale of its step.
    assert_same(params, one_params, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 8}, "mesh.tensor=8 does not divide the 2 heads; sizes that do: 1, 2"),
        ({"sequence": 8}, "mesh.sequence=8 does not divide the 4 tokens; sizes that do: 1, 2, 4"),
    ],
)
def test_a_mesh_that_does_not_divide_the_network_is_refused(axes, message):
    with pytest.raises(UserError, match=message):
        set_up(tiny_config(), (8, 8, 1), of_classes(10), mesh=sharding.make_mesh(**axes))


class OnSlice(NamedTuple):
    id: int
    slice_index: int


def test_data_goes_across_slices_and_all_else_stays_within_one():
    devices = [OnSlice(i, i % 2) for i in range(8)]
    ordered = sharding.by_slice(devices, data=4)
    # As JAX's own arrangement has them, which wants real devices to look at.
    assert [device.id for device in ordered] == [0, 2, 4, 6, 1, 3, 5, 7]
    with pytest.raises(UserError, match="data=1 does not fit 2 slices of 4, 4"):
        sharding.by_slice(devices, data=1)
    with pytest.raises(UserError, match="slices of 4, 3 devices: slices must be alike"):
        sharding.by_slice(devices[:7], data=2)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("kernel", ("fdsp",)),), "no axis 'fdsp' in the rule of 'kernel'; did you mean 'fsdp'"),
        ((("(kernel", ("fsdp",)),), "'\\(kernel' is no regular expression"),
    ],
)
def test_rules_that_are_none_are_refused(rules, message):
    with pytest.raises(UserError, match=message):
        sharding.check_rules(rules)


def test_a_config_has_its_own_rules():
    config = tiny_config(**{"model.scan": True, "model.depth": 2}).copy_and_resolve_references()
    with config.unlocked():
        config.sharding_rules = (("up/kernel$", (None, ("fsdp", "data"))),)
    config = ConfigDict(json.loads(to_json(config)))  # As a folder keeps it.
    mesh = sharding.make_mesh(data=2, fsdp=4)
    params = set_up(config, (8, 8, 1), of_classes(10), mesh=mesh).shardings.params
    assert params["blocks"]["mlp"]["up"]["kernel"].spec == P(None, None, ("fsdp", "data"))
    assert params["blocks"]["mlp"]["down"]["kernel"].is_fully_replicated


def test_every_part_of_the_state_is_split_alike_and_stacks_are_split_within_a_block():
    config = tiny_config(**{"model.scan": True, "model.depth": 4})
    abstract = set_up(
        config, (8, 8, 1), of_classes(10), mesh=sharding.make_mesh(data=1, fsdp=4, tensor=2)
    )
    abstract = abstract.abstract
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, abstract)
    assert specs.params["blocks"]["attention"]["qkv"]["kernel"] == P(None, "fsdp", "tensor")
    moments = specs.opt_state[1][0]
    for like in (*specs.ema.values(), moments.mu, moments.nu):
        assert like == specs.params
    whole = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    held = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(abstract.params)
    )
    assert held < 0.2 * whole  # 1/8, but for what is small and does not divide


def test_parameters_are_really_split():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    setup = set_up(trained_config(), (8, 8, 1), of_classes(10), mesh=mesh)
    train_state = setup.init(jax.random.key(0))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(train_state))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(train_state))
    assert held < 0.35 * whole  # what does not divide by 8 stays whole


def test_a_checkpoint_restores_onto_another_mesh(trained_run):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    setup = set_up(trained_config(), (8, 8, 1), of_classes(10), mesh=mesh)
    store = Checkpoints(trained_run / "checkpoints", read_only=True)
    restored = store.restore(setup.abstract)
    store.close()
    assert restored is not None
    train_state, meta = restored
    assert_same(jax.device_get(train_state._asdict()), arrays_of(trained_run), rtol=0, atol=0)
    assert not train_state.params["embed"]["embedding"].sharding.is_fully_replicated
    assert meta["config"]["num_steps"] == 6


def test_samples_do_not_depend_on_the_batch(loaded_run):
    run = loaded_run
    labels = np.arange(13) % 10
    images = run.sample(labels, seed=3)
    assert images.shape == (13, 8, 8, 1)
    np.testing.assert_allclose(run.sample(labels, seed=3, batch_size=8), images, atol=1e-5)
    np.testing.assert_allclose(run.sample(labels[:5], seed=3, batch_size=8), images[:5], atol=1e-5)
    part = run.model().sample(run.recipe, Request(labels, 3).only(np.arange(6, 11)), batch_size=8)
    np.testing.assert_allclose(part, images[6:11], atol=1e-5)
    assert np.abs(run.sample(labels, seed=4) - images).max() > 0.1


def test_steps_grids_seeds_and_scales_do_not_compile_again(loaded_run):
    run = loaded_run
    traced = []

    def apply(*inputs, **how):
        traced.append(1)
        return run.parts.wired.apply(*inputs, **how)

    wired = run.parts.wired._replace(apply=apply)
    model, first = Model(Programs(wired, run.parts.mesh), run.weights()), 0
    for recipe, seed in (
        (run.recipe, 0),
        (replace(run.recipe, num_steps=7), 1),
        (replace(run.recipe, num_steps=40, grid=grids.UniformLogSNR()), 0),
        (replace(run.recipe, guidance_scale=3.5), 0),
    ):
        model.sample(recipe, Request(np.arange(3), seed), batch_size=8)
        first = first or len(traced)
    assert len(traced) == first > 0
    images = model.sample(replace(run.recipe, solver=solvers.ddim()), Request(np.arange(3)))
    assert len(traced) > first
    assert np.isfinite(images).all()


def test_samples_that_are_not_finite_name_the_step(loaded_run):
    run = loaded_run
    broken = run.model().map(lambda x: x * jnp.nan)
    request = Request(np.arange(9))
    images = broken.sample(run.recipe, request.only(np.arange(3)))
    assert not np.isfinite(images).any()
    with pytest.raises(UserError, match="3 of 3 samples are not finite; number 0 from step 1 of"):
        list(broken.batches(run.recipe, request.only(np.arange(3))))
    images[0] = 0.0
    with pytest.raises(UserError, match="2 of 3 samples are not finite; number 6 from step 1 of"):
        broken.check_finite(images, run.recipe, request.only(np.arange(5, 8)))


def test_loading_names_what_is_missing(loaded_run, tmp_path):
    with pytest.raises(UserError, match=r"there is no run in .*: No such file or directory$"):
        diffjax.load(tmp_path / "nowhere")
    for name in ("digits", "flow"):
        (tmp_path / "sweep" / name).mkdir(parents=True)
        (tmp_path / "sweep" / name / "config.json").touch()
    with pytest.raises(UserError, match=r"no run in .*sweep: .*; known: digits, flow$"):
        diffjax.load(tmp_path / "sweep")
    with pytest.raises(UserError, match=r"no run in .*; did you mean 'digits'\?$"):
        diffjax.load(tmp_path / "sweep" / "digit")
    with pytest.raises(UserError, match=r"; known: digits, flow$"):
        diffjax.load(tmp_path / "sweep" / "mine")
    run = loaded_run
    with pytest.raises(UserError, match=r"no weights 'ema-0\.9999'; did you mean 'ema-0\.99'"):
        run.weights("ema-0.9999")


def test_another_config_does_not_get_the_folder(copy_of_run):
    before = (copy_of_run / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.001 there, 0.5 here"):
        loop.train(trained_config(**{"optimizer.learning_rate": 0.5}), copy_of_run)
    assert (copy_of_run / "config.json").read_bytes() == before


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write to"):
        loop.train(tiny_config(), tmp_path / "file" / "run")


# What is kept is finite: the next test, and steps left out and rolled back in tests/loop/.
@pytest.mark.thorough(tenth=False)
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    on_one_device(monkeypatch)
    wild = {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 1e30}
    config = tiny_config("model=tiny", **wild)
    with pytest.raises(NonFiniteLoss, match=r"not finite in step \d.*last good checkpoint is step"):
        loop.train(config, tmp_path / "run")
    kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert_finite(tmp_path / "run", kept[-1])


@pytest.mark.parametrize("rollbacks", [pytest.param(0, marks=pytest.mark.thorough), 1])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, rollbacks, monkeypatch):
    """A rate beyond float32: loss and gradient of the first step are finite, its weights not."""
    without_pictures(monkeypatch)
    on_one_device(monkeypatch)
    every = {"checkpoint_every_steps": 1, "checkpoints_to_keep": 1, "log_every_steps": 1}
    config = tiny_config("model=tiny", **every)
    config.unlock()
    config.optimizer.learning_rate = 1e39
    config.nonfinite = spec(NonFinite, rollbacks=rollbacks)
    with pytest.raises(NonFiniteLoss, match=r"^params/\S+ is not finite after step 1; .* step 0"):
        loop.train(config.lock(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0"]
    assert_finite(tmp_path / "run", 0)
    assert (tmp_path / "run" / "rollbacks.json").exists() == bool(rollbacks)


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ("path=linear,target=noise", {}, "target Noise can't be used on path Linear.*use --config"),
        ("", {"model.patch_size": 3}, "patch"),
        ("", {"model.num_heads": 3}, "heads"),
        ("", {"batch_size": 12}, "8 or 16 would"),
        ("", {"mesh.fsdp": 3}, "does not fit 8 device"),
        ("", {"condition_dropout": 0.0}, "guidance_scale=2 needs a null condition"),
        ("", {"weights": "ema-0.5"}, "are not kept by the run"),
        ("", {"log_every_steps": 0}, "log_every_steps=0 must be at least 1"),
        ("", {"evaluation.num_steps": (2, 0)}, r"num_steps\[1\]=0 must be at least 1"),
        ("", {"evaluation.num_samples": 2}, "at least 3"),
        ("", {"evaluation.solvers": ("hein",)}, "did you mean 'heun'"),
        ("", {"evaluation.extractor.name": "fashion_mnist"}, "28, 28, 1"),
    ],
)
def test_impossible_configs_are_refused_before_anything_is_written(
    tmp_path, arguments, changes, message
):
    with pytest.raises(UserError, match=message):
        loop.train(tiny_config(arguments, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("axis", [*choices.AXES, "wrappers"])
def test_every_choice_of_every_axis_wires(axis):
    """Each choice once, on the flow objective with a target that every path allows."""
    table = {**choices.AXES, "wrappers": choices.WRAPPERS}[axis]
    for name in table:
        network = "dit" if axis in ("loss", "wrappers") else "tiny"  # which needs more than a noise
        given = {"model": network, "path": "cosine", "target": "f", axis: name}
        if name == "mean_flow":  # a mean velocity, of which no other target is known
            given["target"] = "velocity"
        wired = wire(
            tiny_config(",".join(f"{k}={v}" for k, v in given.items())), (8, 8, 1), of_classes(10)
        )
        assert wired.num_params > 0


def test_averages_follow_their_recursion():
    decays, values = (0.5, 0.999), [3.0, -1.0, 2.0, 5.0]
    averages = Averages(decays)
    ema = averages.init({"w": jnp.array(1.0)})
    expected = dict.fromkeys(averages.names, 1.0)
    for step, value in enumerate(values):
        ema = averages.update(ema, {"w": jnp.array(value)}, jnp.array(step))
        for d in decays:
            kept = min(d, (1 + step) / (10 + step))
            name = ema_name(d)
            expected[name] = kept * expected[name] + (1 - kept) * value
    for name, value in expected.items():
        assert float(ema[name]["w"]) == pytest.approx(value, rel=1e-6)


def test_checkpoints_are_kept_by_policy(tmp_path):
    class Before(NamedTuple):
        x: Any

    class After(NamedTuple):
        x: Any
        memory: Any = ()

    store = Checkpoints(tmp_path / "c", keep=2, keep_every_steps=4)
    for step in range(0, 10, 2):
        store.save(step, Before(jnp.arange(3.0) + step), {})
    store.close()
    store = Checkpoints(tmp_path / "c", keep=2, keep_every_steps=4)
    assert store.steps() == [0, 4, 6, 8]
    abstract = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jnp.zeros(1).sharding)
    restored = store.restore(After(abstract))
    assert restored is not None, "a part that is empty must not keep old runs from being read"
    np.testing.assert_array_equal(restored[0].x, [8.0, 9.0, 10.0])
    assert restored[0].memory == ()
    store.close()


def test_first_line_of_an_error_is_one_line():
    assert "\n" not in checkpoints_module._first_line(ValueError("a\nb"))


def test_config_differences_are_named():
    assert workdirs.differing_keys({"a": 1}, {"a": 1}) == []
    assert workdirs.differing_keys({"a": 1}, {}) == ["a: 1 there, absent here"]


def test_a_run_from_before_an_argument_came_goes_on(tmp_path):
    config = tiny_config()
    workdirs.claim(tmp_path, config)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["mesh"]["sequence"], saved["model"]["scan"]
    del saved["sampling"]["guidance"], saved["sampling"]["against"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    workdirs.claim(tmp_path, config)
    config = tiny_config(**{"sampling.against": lookup.against_called("label:3")})
    with pytest.raises(UserError, match=r"sampling\.against.*NullCondition there"):
        workdirs.claim(tmp_path, config)
