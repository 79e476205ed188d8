"""Gradient accumulation: the large batch, with the activations of a part of it."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import register_dataclass
from ml_collections import ConfigDict

from diffjax import choices
from diffjax.conditions import of_classes
from diffjax.data import digits
from diffjax.errors import UserError
from diffjax.loop import loop
from diffjax.loop.compiled_step import train_step_of
from diffjax.objectives.denoising import Denoising
from diffjax.optimizers.base import Optimizer
from diffjax.runs.setup import set_up
from diffjax.spec import spec
from diffjax.training import sharding
from diffjax.training.accumulation import check_parts, compares_outputs, loss_and_gradient
from diffjax.training.nonfinite import NonFinite
from diffjax.wiring import build_objective
from tests.support.tiny_network import Plain
from tests.support.tiny_run import assert_same, tiny_config

BATCH = 32


def gradient_descent(num_steps: int) -> Optimizer:
    """Parameters move by the gradient itself, so that a step shows it."""
    del num_steps
    return Optimizer(optax.sgd(1.0), optax.constant_schedule(1.0))


def config_of(arguments: str = "", parts: int | None = None, **changes: Any) -> ConfigDict:
    config = tiny_config(arguments).copy_and_resolve_references()
    config.unlock()
    config.batch_size, config.optimizer = BATCH, spec(gradient_descent)
    if "dropout" in config.model:
        config.model.dropout = 0.0
    if parts is not None:
        config.accumulation_steps = parts
    for name, value in changes.items():
        config[name] = value
    return config


def tiny(arguments: str = "", parts: int | None = None, **changes: Any) -> ConfigDict:
    return config_of(arguments, parts, **{"model": spec(Plain), **changes})


class Steps:
    """The compiled step of a config on one device, or on a mesh, and its first state."""

    def __init__(self, config: ConfigDict, mesh: Any = None):
        mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
        self.setup = set_up(config, digits().image_shape, digits().condition, mesh)
        self.state = self.setup.init(jax.random.key(0))
        step = jax.jit(train_step_of(self.setup), out_shardings=(self.setup.shardings, None))
        self.key = jax.random.key(1)
        self.compiled = step.lower(self.state, self.key, next(self.batches())).compile()

    def batches(self):
        return loop.device_batches(self.setup, digits(), 0)

    def two(self, image: Any = None) -> tuple:
        """The state and the metrics after two steps."""
        stream, state, seen = self.batches(), self.state, []
        for _ in range(2):
            batch = next(stream)
            if image is not None:
                batch = {**batch, "image": jax.device_put(image, batch["image"].sharding)}
            state, metrics = self.compiled(state, self.key, batch)
            seen.append(jax.device_get(metrics))
        return jax.device_get(state), seen


def two_steps(config: ConfigDict, mesh: Any = None) -> tuple:
    return Steps(config, mesh).two()


def assert_equal(one: tuple, other: tuple) -> None:
    assert_same(other[0], one[0], rtol=2e-4, atol=5e-6)
    assert_same(other[1], one[1], rtol=2e-4, atol=5e-6)


# Who draws for all of a batch, or remembers it; has steps instead of times, noise of a bridge,
# parameters of its own, other rows to compare with, or an output more.
MORE = [
    "coupling=ot",
    "objective=ddpm,uniforms=low_discrepancy",
    "loss=interpolant_brownian",
    "wrappers=adaptive+uncertainty",
    "wrappers=contrastive",
    "objective=iddpm",
]


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("arguments", MORE)
def test_parts_of_any_objective_add_up_to_the_batch(arguments):
    assert_equal(two_steps(tiny(arguments, 1)), two_steps(tiny(arguments, 4)))


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_each_part_is_every_so_manieth_row(parts):
    """By NumPy: losses, gradients and the order of what comes back, of a network of two outputs."""
    rng = np.random.default_rng(parts)
    x, goal = rng.normal(size=(2, 8, 2)).astype(np.float32)
    level, cond = rng.normal(size=8).astype(np.float32), np.arange(8, dtype=np.int32)
    params = {"w": np.float32(0.7), "b": np.array([0.2, -0.4], np.float32)}
    asked = []

    def apply(params, x, noise_label, cond, *, key=None, **how):
        assert key is None
        assert how == {"hidden": True}
        asked.append(len(x))
        scale = (noise_label + cond)[:, None]
        return params["w"] * x * scale + params["b"][None], (2.0 * x,)

    def losses_of(apply, params):
        said, (twice,) = apply(params, x, level, cond, hidden=True)
        losses = jnp.sum((said - goal) ** 2 + 0.0 * twice, axis=1)
        return losses, {"log_snr": level, "pairs": jnp.asarray(x), "said": said}

    network: Any = apply
    (loss, (losses, metrics)), gradient = jax.jit(
        lambda params: loss_and_gradient(losses_of, network, params, parts)
    )(params)
    said = params["w"] * x * (level + cond)[:, None] + params["b"]
    expected = ((said - goal) ** 2).sum(1)
    slope = 2 * (said - goal) / 8
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(
        gradient["w"], (slope * x * (level + cond)[:, None]).sum(), rtol=1e-4
    )
    np.testing.assert_allclose(gradient["b"], slope.sum(0), rtol=1e-4)
    np.testing.assert_array_equal(metrics["log_snr"], level)
    np.testing.assert_array_equal(metrics["pairs"], x)
    np.testing.assert_allclose(metrics["said"], said, rtol=1e-5)
    assert set(asked) == {8 // parts}


MESHES = {
    "one": None,
    "fsdp": {"data": 2, "fsdp": 4},
    "tensor": {"data": 4, "tensor": 2},
    "sequence": {"data": 4, "sequence": 2},
}
# What a mesh does to a step without parts is in test_training.py and test_meshes.py.


@pytest.fixture(scope="module")
def whole():
    """The two steps of a DiT on one device without parts."""
    return two_steps(config_of("model=dit"))


REMEMBERING = "uniforms=antithetic,wrappers=second_moment"
SKIPPING: dict[str, Any] = {"nonfinite": spec(NonFinite, skip_in_a_row=3)}


@pytest.fixture(scope="module")
def on_one():
    """`parts -> Steps` on one device, of a step that leaves bad gradients out."""
    return functools.cache(lambda parts: Steps(tiny(REMEMBERING, parts, **SKIPPING)))


def test_parts_add_up_to_the_batch(on_one):
    """The gradient, averages, memory, loss, its norm and the log-SNR bins of two steps."""
    assert_equal(on_one(1).two(), on_one(4).two())


def test_parts_on_eight_devices_add_up_to_the_batch(on_one):
    found = two_steps(tiny(REMEMBERING, 4, **SKIPPING), sharding.make_mesh(data=2, fsdp=4))
    assert_equal(on_one(1).two(), found)


@pytest.mark.thorough
@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_a_network_in_parts_on_one_and_eight_devices(whole, axes):
    found = two_steps(config_of("model=dit", parts=4), axes and sharding.make_mesh(**axes))
    for one, other in zip(whole[1], found[1], strict=True):
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=2e-5)
    assert_equal(whole, found)


def test_without_accumulation_the_program_is_what_it_was():
    """The same operations whether the setting is 1 or absent, as in older configs; no loop more."""

    def program(config: ConfigDict) -> str:
        setup = set_up(config, (8, 8, 1), of_classes(10))
        key = jax.eval_shape(lambda: jax.random.key(0))
        batch = setup.wired.batch_shapes(BATCH)
        return str(jax.make_jaxpr(train_step_of(setup))(setup.abstract, key, batch))

    absent, one, two = (program(tiny(parts=parts)) for parts in (None, 1, 2))
    assert absent == one
    assert two.count("scan[") == one.count("scan[") + 1


def test_only_a_part_of_the_activations_is_in_memory(on_one):
    one, other = (on_one(parts).compiled.memory_analysis().temp_size_in_bytes for parts in (1, 4))
    assert other < 0.5 * one


def test_a_bad_image_is_handled_as_in_the_whole_batch(on_one):
    """A step that is left out, whatever part the image is in, and the bin that it is blamed on."""
    image = np.zeros((BATCH, 8, 8, 1), np.float32)
    image[5] = np.nan
    one, other = (on_one(parts).two(image) for parts in (1, 4))
    assert one[0].skipped.tolist() == [2, 2]
    assert_equal(one, other)
    assert np.isnan(other[1][0]["bin_loss"]).sum() == 1


def test_each_part_has_dropout_of_its_own():
    x = jnp.zeros((4, 1, 1, 1))

    def apply(params, x, noise_label, cond, *, key):
        return params + jax.random.normal(key, x.shape)

    def losses_of(apply, params):
        said = apply(params, x, jnp.zeros(4), None, key=jax.random.key(0))
        return said.ravel(), {"log_snr": jnp.zeros(4)}

    network: Any = apply
    (_, (losses, _)), _ = loss_and_gradient(losses_of, network, jnp.zeros(()), 4)
    assert len(np.unique(losses)) == 4


@register_dataclass
@dataclass(frozen=True)
class Rolled(Denoising):
    """Somebody's objective that looks at the next example's output, without declaring it."""

    def loss(self, noised, output):
        return super().loss(noised, output) + jnp.mean(jnp.roll(output, 1, axis=0), (1, 2, 3)) ** 2


def objective_of(arguments: str, **changes: Any):
    return build_objective(tiny(arguments, **changes))


FOUND_OUT = ["wrappers=dispersive", "wrappers=contrastive", "coupling=ot"]
MORE_FOUND_OUT = [
    *(f"wrappers={name}" for name in choices.WRAPPERS if name != "learned_variance"),
    *(f"coupling={name}" for name in choices.COUPLINGS),
    "objective=iddpm",
    "loss=interpolant_brownian",
]


@pytest.mark.parametrize(
    "arguments",
    [
        *FOUND_OUT,
        *(
            pytest.param(more, marks=pytest.mark.thorough(tenth=False))
            for more in MORE_FOUND_OUT
            if more not in FOUND_OUT
        ),
    ],
)
def test_what_compares_outputs_is_found_out(arguments):
    assert compares_outputs(objective_of(arguments)) == ("dispersive" in arguments)


def test_what_compares_outputs_is_refused():
    plain: Any = objective_of("")
    rolled = Rolled(plain.path, plain.precond, plain.weight, plain.times)
    for objective, name in (
        (rolled, "Rolled"),
        (objective_of("wrappers=dispersive+uncertainty"), "Uncertainty"),
    ):
        check_parts(objective, 1, 32, 8)
        with pytest.raises(UserError, match=f"accumulation_steps=2: {name} compares"):
            check_parts(objective, 2, 32, 8)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (3, "batch_size=32 does not divide into accumulation_steps=3 .* = 8 device rows; 24 or 48"),
        (8, "accumulation_steps=8 equal parts over the mesh's .*; 64 would"),
        (0, "config.accumulation_steps=0 must be at least 1"),
    ],
)  # fmt: skip
def test_parts_that_are_none_are_said_in_one_line(parts, said):
    with pytest.raises(UserError, match=said):
        loop.prepared(tiny(parts=parts))
