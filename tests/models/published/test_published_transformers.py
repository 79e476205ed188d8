"""Diffusion transformers in the authors' layouts, against outputs of their code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models.ddt.published import FAMILY as DDT
from diffjax.models.dit.stages import stack_blocks
from diffjax.models.families import networks_of
from diffjax.models.jit.published import FAMILY as JIT
from diffjax.models.lightningdit.published import FAMILY as LIGHTNING
from diffjax.models.uvit.published import FAMILY as UVIT
from diffjax.training.flops import matrix_flops
from tests.references import dit, transformers

FAMILIES = {"LightningDiT": LIGHTNING, "JiT": JIT, "DDT": DDT, "UViT": UVIT}
OPTIONS = {
    "LightningDiT": {"qk_norm": True},
    "JiT": transformers.IN_CONTEXT,
    "DDT": {"encoder_depth": transformers.ENCODER_DEPTH},
    "UViT": {},
}
OTHER = pytest.mark.thorough(tenth=False)
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


def test_outputs_of_jit_are_those_of_the_authors_code():
    """It has most of the options of the others, whose test, with gradients, is the next one."""
    denoiser, given = network_of("JiT"), (transformers.NOISE_LABELS, dit.LABELS)
    params = JIT.to_ours(state_of("JiT"), denoiser, "theirs")
    assert networks_of(state_of("JiT")) == ["JiT"]
    out = jax.jit(denoiser.network.apply)({"params": params}, transformers.images("JiT"), *given)
    assert error(out, stored("JiT")["out"]) < 1e-5


# DDT's images are no squares.
@OTHER
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_authors_code(name):
    assert networks_of(state_of(name)) == [name]
    out, gradients, gradient = evaluated(name)
    assert error(out, stored(name)["out"]) < 1e-5
    assert error(out, stored(name)["out_in_training"]) < 1e-5
    assert error(gradient, stored(name)["gradient"]) < 1e-5
    assert error(transformers.projections(gradients), stored(name)["projections"]) < 1e-5


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAMILIES)
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


# Numbers of parameters in the authors' code, of the data sets that they trained on.
UVITS = {
    "U-ViT-S/2": ((32, 32, 3), 0, True, 44_255_328),
    "U-ViT-S/4": ((64, 64, 3), 0, True, 44_292_228),
    "U-ViT-S-deep/2": ((32, 32, 3), 0, True, 57_908_320),
    "U-ViT-M/4": ((64, 64, 3), 1000, False, 130_940_292),
    "U-ViT-L/4": ((64, 64, 3), 1000, False, 286_827_652),
    "U-ViT-L/2": ((32, 32, 4), 1000, True, 286_763_172),
    "U-ViT-H/2": ((32, 32, 4), 1000, True, 500_832_016),
    "U-ViT-H/4": ((64, 64, 4), 1000, True, 500_942_656),
}


def count(family, denoiser):
    return sum(leaf.size for leaf in jax.tree.leaves(family.shapes(denoiser)))


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("size", UVITS)
def test_uvits_of_the_authors_data_sets_have_as_many_parameters(size):
    image_shape, num_classes, null_row, number = UVITS[size]
    settings = UVIT.sizes[size].settings
    denoiser = UVIT.network(image_shape, num_classes, null_row=null_row, scan=True, **settings)
    assert count(UVIT, denoiser) == number


# Millions of parameters: Yao et al. 2025, table 5; Li & He 2025, tables 7 and 8; Wang et al. 2025,
# the authors' page; Bao et al. 2022, table 1, where S/2 is of CIFAR-10 and here has 1,001 classes.
PAPERS = {
    ("LightningDiT", "LightningDiT-XL/1"): 675,
    ("DDT", "DDT-XL/2"): 675,
    ("JiT", "JiT-B/16"): 131, ("JiT", "JiT-L/16"): 459, ("JiT", "JiT-H/16"): 953,
    ("JiT", "JiT-G/16"): 2007, ("JiT", "JiT-B/32"): 133, ("JiT", "JiT-L/32"): 462,
    ("JiT", "JiT-H/32"): 956,
    ("UViT", "U-ViT-M/4"): 131, ("UViT", "U-ViT-L/2"): 287, ("UViT", "U-ViT-H/2"): 501,
}  # fmt: skip


def test_sizes_have_the_papers_numbers_of_parameters():
    for (family, size), millions in PAPERS.items():
        assert round(FAMILIES[family].sizes[size].num_parameters / 1e6) == millions, size


# Billions of multiply-adds of an evaluation: Li & He 2025, tables 7 and 8 (LightningDiT's too).
GIGA = {
    ("JiT", "JiT-B/16"): 25, ("JiT", "JiT-L/16"): 88, ("JiT", "JiT-H/16"): 182,
    ("JiT", "JiT-B/32"): 26, ("LightningDiT", "LightningDiT-XL/1"): 119,
}  # fmt: skip


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize(("name", "size"), GIGA)
def test_an_evaluation_costs_what_the_papers_say(name, size):
    family = FAMILIES[name]
    denoiser = family.network(**family.sizes[size].settings, scan=True)

    def evaluate(params, *inputs):
        return denoiser.network.apply({"params": params}, *inputs)

    flops = matrix_flops(evaluate, family.shapes(denoiser), *denoiser.inputs)
    assert round(flops / 2e9) == GIGA[name, size]
