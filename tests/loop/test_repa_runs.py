"""Runs with REPA: on eight devices, resumed, and begun from runs with and without a projector."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import diffjax
from diffjax.loop import loop
from diffjax.objectives.repa import PROJECTOR
from tests.objectives.test_repa import repa_config
from tests.support.tiny_run import (
    arrays_of,
    assert_same,
    loaded,
    on_one_device,
    without_pictures,
)

SIZES = {"model.dropout": 0.0, "num_steps": 4}
pytestmark = pytest.mark.thorough


def trained(folder: Path, arguments: str = "wrappers=repa", **changes: Any) -> Path:
    scale = changes.pop("scale", None)
    config = repa_config(arguments, **SIZES, **changes)
    if scale is not None:
        config.unlock()
        config.wrappers[0].scale = scale
        config.lock()
    loop.train(config, folder)
    return folder


def first_weights(folder: Path) -> Any:
    """The live weights that a run began with."""
    return diffjax.load(folder, step=0, allowed_packages=("diffjax", "tests")).weights("live")


def without_projector(params: Any) -> Any:
    return {name: leaves for name, leaves in params.items() if name != PROJECTOR}


@pytest.fixture
def quiet(monkeypatch):
    without_pictures(monkeypatch)


@pytest.fixture
def run(tmp_path, quiet) -> Path:
    """On all eight devices."""
    return trained(tmp_path / "run")


def test_eight_devices_train_as_one_does(run, tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    one = trained(tmp_path / "one")
    assert_same(arrays_of(run)["params"], arrays_of(one)["params"], rtol=2e-4, atol=2e-5)


def test_a_resumed_run_is_the_undisturbed_one(run, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "4")
    for name in ("evaluation.json", "report.html"):
        (again / name).unlink(missing_ok=True)
    trained(again)
    assert_same(arrays_of(run), arrays_of(again), rtol=0, atol=0)


def test_samples_do_without_the_projector(run):
    whole = loaded(run)
    params = whole.weights()
    x, t = np.ones((2, 8, 8, 1), np.float32), np.array([0.3, 0.7], np.float32)
    labels = np.array([1, 2], np.int32)
    found, bare = (
        whole.parts.wired.apply(each, x, t, labels) for each in (params, without_projector(params))
    )
    np.testing.assert_array_equal(found, bare)


def test_a_run_begins_from_one_with_a_projector_and_from_one_without(run, tmp_path):
    """What both have is taken; a projector that is missing is drawn, one that is left over left."""
    plain = trained(tmp_path / "plain", "", init_from=str(run))
    first = first_weights(plain)
    assert PROJECTOR not in first
    assert_same(first, without_projector(loaded(run).weights()), rtol=0, atol=0)
    begun = trained(tmp_path / "begun", init_from=str(plain))
    first = first_weights(begun)
    assert_same(without_projector(first), loaded(plain).weights(), rtol=0, atol=0)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(first[PROJECTOR]))
    further = trained(tmp_path / "further", init_from=str(run))
    first = first_weights(further)
    assert_same(first, loaded(run).weights(), rtol=0, atol=0)


def test_with_a_scale_of_0_the_network_trains_as_without(tmp_path, quiet, monkeypatch):
    on_one_device(monkeypatch)
    with_it = trained(tmp_path / "with", scale=0.0)
    without = trained(tmp_path / "without", "")
    found = without_projector(arrays_of(with_it)["params"])
    assert_same(found, arrays_of(without)["params"], rtol=1e-6, atol=1e-7)
