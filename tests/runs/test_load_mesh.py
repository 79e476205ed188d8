"""A run is loaded onto whatever mesh there is, and samples as it does on one device."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import diffjax
from diffjax.conditions import of_classes
from diffjax.errors import UserError
from diffjax.runs.setup import set_up
from diffjax.training.sharding import make_mesh
from tests.support.tiny_run import leave, of_noise, tiny_config

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh") / "run"
    leave(of_noise(set_up(tiny_config(), (8, 8, 1), of_classes(10))), folder)
    return folder


@pytest.mark.thorough
def test_samples_do_not_hang_on_the_mesh(workdir):
    labels = np.arange(10)
    alone = diffjax.load(workdir, make_mesh(devices=jax.devices()[:1])).sample(labels, seed=3)
    assert alone.std() > 0.1
    np.testing.assert_allclose(diffjax.load(workdir).sample(labels, seed=3), alone, atol=2e-4)
    run = diffjax.load(workdir, make_mesh(data=1, fsdp=4, tensor=2))
    held = [x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(run.weights())]
    assert {1 / 4, 1 / 8} <= set(held), "some are split along one axis, some along both"
    np.testing.assert_allclose(run.sample(labels, seed=3), alone, atol=2e-4)


def test_a_mesh_with_other_axes_is_refused_in_one_line():
    with pytest.raises(UserError, match="has the axes data, fsdp, tensor, sequence, not rows"):
        diffjax.load("nowhere", Mesh(np.array(jax.devices()), ("rows",)))
