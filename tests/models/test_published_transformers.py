"""Diffusion transformers in the authors' layouts, against outputs of their code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models.ddt.published import FAMILY as DDT
from diffjax.models.dit.stages import stack_blocks
from diffjax.models.jit.published import FAMILY as JIT
from diffjax.models.lightningdit.published import FAMILY as LIGHTNING
from diffjax.models.uvit.published import FAMILY as UVIT
from tests.references import dit, transformers

FAMILIES = {"LightningDiT": LIGHTNING, "JiT": JIT, "DDT": DDT, "UViT": UVIT}
OPTIONS = {
    "LightningDiT": {"qk_norm": True},
    "JiT": transformers.IN_CONTEXT,
    "DDT": {"encoder_depth": transformers.ENCODER_DEPTH},
    "UViT": {},
}
PREFIXES = {"JiT": "net.", "DDT": "ema_denoiser."}


def network_of(name, **settings):
    return FAMILIES[name].network(
        (*transformers.SHAPES[name], transformers.CHANNELS),
        dit.NUM_CLASSES,
        **{**transformers.SETTINGS[name], **OPTIONS[name], **settings},
    )


def published(name, params, denoiser):
    """Tensors by the names of the authors' network alone."""
    state = FAMILIES[name].to_theirs(params, denoiser)
    return {key.removeprefix(PREFIXES.get(name, "")): array for key, array in state.items()}


@functools.cache
def stored(name):
    with np.load(transformers.FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


@functools.cache
def state_of(name):
    """The drawn tensors, and those that the authors' code computes."""
    denoiser, family = network_of(name), FAMILIES[name]
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape, "f"), family.shapes(denoiser))
    fixed = {key.removeprefix("fixed/"): x for key, x in stored(name).items() if "/" in key}
    shapes = {key: x.shape for key, x in published(name, nothing, denoiser).items()}
    state = dit.drawn({key: shape for key, shape in shapes.items() if key not in fixed}) | fixed
    return {PREFIXES.get(name, "") + key: array for key, array in state.items()}


@functools.cache
def evaluated(name, scan=False):
    """Output, and gradients by parameters in the authors' layout and by the input."""
    denoiser, family = network_of(name, scan=scan), FAMILIES[name]
    params = family.to_ours(state_of(name), denoiser, "theirs")

    @jax.jit
    def run(params, x, noise_labels, labels):
        def f(params, x):
            return denoiser.network.apply({"params": params}, x, noise_labels, labels, train=True)

        out, pull = jax.vjp(f, params, x)
        shape = tuple(np.transpose(out.shape)[[0, 3, 1, 2]])
        direction = transformers.directions("out", shape)[0]
        return out, *pull(jnp.asarray(direction.transpose(0, 2, 3, 1)))

    given = transformers.images(name), transformers.NOISE_LABELS, dit.LABELS
    out, gradients, gradient = jax.device_get(run(params, *given))
    fixed = {key.removeprefix("fixed/") for key in stored(name) if "/" in key}
    theirs = published(name, gradients, denoiser)
    return out, {key: x for key, x in theirs.items() if key not in fixed}, gradient


def error(found, expected):
    assert expected.std() > 0.1
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_authors_code(name):
    out, gradients, gradient = evaluated(name)
    assert error(out, stored(name)["out"]) < 1e-5
    assert error(out, stored(name)["out_in_training"]) < 1e-5
    assert error(gradient, stored(name)["gradient"]) < 1e-5
    assert error(transformers.projections(gradients), stored(name)["projections"]) < 1e-5


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.thorough) for n in FAMILIES])
def test_stacked_blocks_of_each_stage_are_read_and_the_same_function(name):
    out, gradients, gradient = evaluated(name, scan=True)
    assert error(out, stored(name)["out"]) < 1e-5
    assert error(gradient, stored(name)["gradient"]) < 1e-5
    assert error(transformers.projections(gradients), stored(name)["projections"]) < 1e-5
    denoiser, family = network_of(name), FAMILIES[name]
    params = family.to_ours(state_of(name), denoiser, "theirs")
    starts = [stage.start for stage in denoiser.network.stages[1:]]
    loop = network_of(name, scan=True)
    stacked = family.to_ours(state_of(name), loop, "theirs")
    jax.tree.map(np.testing.assert_array_equal, stack_blocks(params, *starts), stacked)


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_the_same_function(name):
    denoiser, family = network_of(name, dtype="bfloat16"), FAMILIES[name]
    params = family.to_ours(state_of(name), denoiser, "theirs")
    given = transformers.images(name), transformers.NOISE_LABELS, dit.LABELS
    out = jax.jit(denoiser.network.apply)({"params": params}, *map(jnp.asarray, given))
    assert error(out, stored(name)["out"]) < 2e-2
