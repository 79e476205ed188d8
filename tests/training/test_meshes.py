"""Gradients of networks that are not fresh, whose gates and outputs are not zero, on meshes."""

import functools
import itertools

import jax
import numpy as np
import optax
import pytest

from diffjax import config_files
from diffjax.conditions import of_classes
from diffjax.loop.compiled_step import train_step_of
from diffjax.runs.setup import set_up
from diffjax.training import sharding

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
DIT = {"depth": 1, "hidden_size": 32, "num_heads": 2}
UNET = {"channels": 16, "head_channels": 16, "num_res_blocks": 1}


def gradients(arguments, network, rules=None, **mesh):
    """Of one training step, by the parameters' paths: Adam's first moment, times a constant.

    On one device where there is no mesh.
    """
    config = config_files.load(f"configs/digits.py:{arguments}")
    if rules is not None:
        config.sharding_rules = rules
    config.batch_size, config.ema_decays, config.weights = 32, (), "live"
    config.model.update(network)
    config.mesh.update(mesh)
    one = None if mesh else sharding.make_mesh(devices=jax.devices()[:1])
    setup = set_up(config, (8, 8, 1), of_classes(10), one)
    rng = np.random.default_rng(2)

    state = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), setup.abstract
    )

    def normal(leaf):
        """None is zero."""
        values = 0.2 * rng.normal(size=leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    state = state._replace(params=jax.tree.map(normal, setup.abstract.params))
    image = rng.normal(size=(32, 8, 8, 1)).astype(np.float32)
    batch = {"image": image, "label": (np.arange(32) % 10).astype(np.int32)}
    batch = jax.device_put(batch, sharding.batch_sharding(setup.mesh))
    places = setup.shardings, sharding.replicated(setup.mesh)
    step = jax.jit(train_step_of(setup), out_shardings=places)
    new, _ = step(state, jax.random.key(1), batch)
    found = jax.tree_util.tree_leaves_with_path(optax.tree.get(new.opt_state, "mu"))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


OPTIONS = {
    "norm": "rms",
    "mlp": "swiglu",
    "qk_norm": True,
    "rotary": True,
    "num_registers": 4,
    "num_class_tokens": 4,
    "class_tokens_from": 1,
    "encoder_depth": 2,
    "bottleneck": 2,
}
SKIPS = {"conditioning": "tokens", "long_skips": True, "positions": "learned", "final_conv": True}
NETWORKS = {
    "dit": ("model=dit", DIT),
    "stacked": ("model=dit,objective=mean_flow", {**DIT, "depth": 2, "scan": True}),
    "unet": ("model=unet", UNET),
    "options": ("model=dit", {**DIT, **OPTIONS, "depth": 3, "scan": True}),
    "skips": ("model=dit", {**DIT, **SKIPS, "depth": 3, "scan": True}),
}
THREES = [dict.fromkeys(names, 2) for names in itertools.combinations(sharding.AXES, 3)]
# Two axes are within three; what is new is an axis of four.
FOURS = [{"fsdp": 2, "tensor": 4}, {"data": 2, "sequence": 4}]


@functools.cache
def expected(name):
    return gradients(*NETWORKS[name])


def assert_the_gradients_of(name, rules, mesh):
    arguments, network = NETWORKS[name]
    # Heads: what a mesh does not divide is refused for a DiT, and left whole in a U-Net.
    network = {**network, "num_heads": 4} if name != "unet" and mesh.get("tensor") == 4 else network
    found = gradients(arguments, network, rules, **{"data": 1, **mesh})
    right = expected(name) if network == NETWORKS[name][1] else gradients(arguments, network)
    for path, gradient in right.items():
        size = np.abs(gradient).max()
        np.testing.assert_allclose(found[path], gradient, rtol=0, atol=1e-4 * size, err_msg=path)


def called(mesh):
    return "-".join(f"{axis}{size}" for axis, size in mesh.items())


def test_no_axis_changes_the_gradient_of_a_network_that_is_not_fresh():
    """All of `data`, `fsdp` and `tensor` above 1 is where XLA by itself was wrong."""
    assert_the_gradients_of("dit", None, THREES[0])


# What is new in a stack is how its parameters are split (below), and in a U-Net that channels come
# in odd numbers; how axes meet each other is seen on a DiT.
CROSS = [("dit", mesh) for mesh in THREES[1:] + FOURS]
CROSS += [("unet", THREES[0])]
CROSS += [(name, mesh) for name in ("options", "skips") for mesh in THREES]
SPREAD = [("stacked", THREES[0]), ("unet", {"data": 2, "fsdp": 4})]


def names(cases):
    return [f"{name} {called(mesh)}" for name, mesh in cases]


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize(("name", "mesh"), CROSS, ids=names(CROSS))
def test_no_two_or_three_axes_change_a_gradient(name, mesh):
    assert_the_gradients_of(name, None, mesh)


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize(("name", "mesh"), SPREAD, ids=names(SPREAD))
def test_a_state_that_is_split_over_all_devices_changes_no_gradient(name, mesh):
    assert_the_gradients_of(name, sharding.SPREAD, mesh)
