"""Loading reads the weights that are wanted, and nothing else until somebody asks for it."""

import json
import logging
import shutil
from typing import Any

import jax
import numpy as np
import pytest

import diffjax
from diffjax.errors import UserError
from diffjax.runs.checkpoints import Checkpoints
from diffjax.training.sharding import make_mesh
from tests.support.old_runs import OLD_RUN


@pytest.fixture(scope="module")
def run(old_run):
    return old_run


@pytest.fixture(scope="module")
def with_another(tmp_path_factory, run):
    """A run whose second checkpoint, of step 3, has weights that are larger by one."""
    copy = shutil.copytree(OLD_RUN, tmp_path_factory.mktemp("two") / "run")
    state = run.state
    larger = jax.tree.map(
        lambda x: jax.device_put(np.asarray(x) + 1, x.sharding),
        {"step": state.step, "params": state.params, "ema": state.ema},
    )
    store = Checkpoints(copy / "checkpoints")
    store.save(3, state._replace(**larger), {})
    store.close()
    return copy


@pytest.fixture
def folder(with_another, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(with_another, tmp_path / "run")


def damage(folder, step, part):
    """As if one bit of an array had been flipped since it was saved: its digest is another one."""
    path = folder / "checkpoints" / str(step) / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["meta_sha256"]
    name = next(name for name in meta["digest"] if name.startswith(part))
    meta["digest"][name] ^= 1
    path.write_text(json.dumps(meta))


def test_the_arrays_in_memory_are_those_of_the_chosen_weights():
    """A state is four to five times as large: live, two averages, two moments of Adam."""
    before = {id(x) for x in jax.live_arrays()}
    run = diffjax.load(OLD_RUN)
    held = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
    assert held == 4 * run.parts.wired.num_params
    assert run.weights() is run.weights(), "read once"
    state = run.state
    assert sum(x.nbytes for x in jax.tree.leaves(state)) > 5 * held
    for one, other in zip(jax.tree.leaves(run.weights()), jax.tree.leaves(state.ema), strict=False):
        assert one.shape == other.shape


@pytest.mark.thorough(tenth=False)
def test_each_part_is_what_the_whole_state_has(run):
    """Each is read by itself; the whole is read at once."""
    parts = {"live": run.state.params, **run.state.ema}
    assert len(parts) == 3
    for name, whole in parts.items():
        jax.tree.map(np.testing.assert_array_equal, run.weights(name), whole)
    with pytest.raises(UserError, match=r"no weights 'ema-0\.9999'; did you mean 'ema-0\.99"):
        run.weights("ema-0.9999")


def test_other_weights_are_chosen_as_it_is_loaded():
    live = diffjax.load(OLD_RUN, weights="live")
    arrays: Any = live.arrays
    assert list(arrays.known) == ["live"] == [live.config.weights]
    assert live.weights() is live.weights("live")
    with pytest.raises(UserError, match=r"no weights 'ema-0\.9'; did you mean"):
        diffjax.load(OLD_RUN, weights="ema-0.9")


def test_what_is_read_is_verified(folder, run):
    assert diffjax.load(folder).step == 3
    damage(folder, 3, f"ema/{run.config.weights}/")
    older = diffjax.load(folder)  # passed over, without a change in the folder
    assert older.step == 2
    jax.tree.map(np.testing.assert_array_equal, older.weights(), run.weights())
    assert diffjax.load(folder, weights="live").step == 3


def test_damage_in_what_is_read_later_is_refused_then(folder):
    damage(folder, 3, "opt_state/")
    loaded = diffjax.load(folder)
    assert loaded.step == 3
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(loaded.weights("live")))
    with pytest.raises(UserError, match=r"checkpoint 3 is damaged: .*opt_state/.*; move .*/3 away"):
        _ = loaded.state
    shutil.rmtree(folder / "checkpoints" / "3")
    with pytest.raises(UserError, match=r"checkpoint 3 in .* was deleted: load the run again"):
        _ = loaded.state


def test_nothing_is_said_and_nothing_written(folder, caplog):
    """Not by Orbax either, which warns three times of its own option `read_only`."""
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    caplog.set_level(logging.WARNING)
    caplog.set_level(logging.WARNING, "absl")  # which the executables silence
    loaded = diffjax.load(folder)
    loaded.weights("live")
    _ = loaded.state
    assert [record.getMessage() for record in caplog.records] == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files


def test_a_run_that_guides_another_is_on_its_devices(with_another):
    mesh = make_mesh(devices=jax.devices()[:1])
    other, _ = diffjax.load(OLD_RUN, mesh).called(f"{with_another}:live")
    assert other.parts.mesh == mesh
