"""Images in further channels, alone and with labels, through both networks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffjax import choices
from diffjax.conditions import Classes, Images, MaskedImages, Numbers, Several, TokenStates
from diffjax.config_files import override
from diffjax.data import ArraySource, Augment, DataSet, GivenSource, batches, digits
from diffjax.errors import UserError
from diffjax.loop.compiled_step import train_step_of
from diffjax.models import DiT, UNet
from diffjax.models.layers.context import parts_of
from diffjax.runs.samples.model import Model, Request
from diffjax.runs.setup import set_up
from diffjax.training.sharding import make_mesh
from tests.support.tiny_run import tiny_config

BOTH = Several({"digit": Classes(10), "coarse": Images((8, 8, 1))})
DIT = DiT(num_classes=10, patch_size=4, hidden_size=16, depth=1, num_heads=2)
UNET = UNet(num_classes=10, channels=8, channel_multipliers=(1,), num_res_blocks=1,
            attention_resolutions=(), head_channels=8)  # fmt: skip


def halved(images):
    """Each square of four pixels by its mean, in the size of the image."""
    small = images.reshape(-1, 4, 2, 4, 2, 1).mean((2, 4))
    return small.repeat(2, axis=1).repeat(2, axis=2).astype(np.uint8)


def super_resolution() -> DataSet:
    data = digits()

    def source(plain: ArraySource) -> GivenSource:
        return GivenSource(plain, {"given_image": halved(plain.images)})

    return DataSet(
        "fine", source(data.train), source(data.test), data.image_shape, 10, data.label_names,
        given=BOTH,
    )  # fmt: skip


def random_params(network, cond):
    x = jnp.zeros((2, 8, 8, 1))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(2), cond)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return tree.unflatten([0.1 * rng.normal(size=leaf.shape).astype("f") for leaf in leaves])


@pytest.mark.parametrize(
    "network",
    [DIT, pytest.param(UNET, marks=pytest.mark.thorough(tenth=False))],
    ids=["dit", "unet"],
)
def test_a_network_sees_labels_and_the_image_beside_its_input(network):
    rng = np.random.default_rng(1)
    cond = {"digit": np.array([3, 4]), "coarse": rng.normal(size=(2, 8, 8, 1)).astype("f")}
    params = random_params(network, cond)
    x = rng.normal(size=(2, 8, 8, 1)).astype("f")
    apply = jax.jit(lambda cond: network.apply({"params": params}, x, jnp.ones(2), cond))
    plain = apply(cond)
    assert plain.shape == (2, 8, 8, 1)
    for changed in (
        {"digit": np.array([5, 4])},
        {"coarse": cond["coarse"] * [[[[2.0]]], [[[1.0]]]]},
    ):
        moved = np.abs(apply(cond | changed) - plain).max((1, 2, 3))
        assert moved[0] > 1e-4
        assert moved[1] < 1e-6


def test_batches_hold_both_parts_and_augmentation_moves_them_alike():
    data = super_resolution()
    shift = Augment(flip_probability=1.0)
    batch = next(batches(data.train, batch_size=4, seed=0, augment=shift))
    assert batch["given_image"].dtype == np.float32  # type: ignore[typeddict-item]
    fine = batch["image"].reshape(-1, 4, 2, 4, 2, 1).mean((2, 4))
    coarse = batch["given_image"][:, ::2, ::2]  # type: ignore[typeddict-item]
    np.testing.assert_allclose(coarse, fine, atol=2 / 127.5)


@pytest.mark.thorough
def test_training_and_guided_sampling_with_several_parts():
    data = super_resolution()
    config = tiny_config(batch_size=8)
    config.unlock().sampling.solver = choices.copy(choices.SOLVERS["euler"])
    setup = set_up(config, data.image_shape, data.condition, make_mesh(devices=jax.devices()[:1]))
    stream, used = batches(data.train, batch_size=8, seed=0), setup.wired.batch_shapes(8)
    assert set(used) == {"image", "label", "given_image"}
    batch = next(stream)
    state, metrics = jax.jit(train_step_of(setup))(
        setup.init(jax.random.key(0)), jax.random.key(1), {name: batch[name] for name in used}
    )
    assert np.isfinite(metrics["loss"])
    request = Request(BOTH.of_batch(batch))
    images = Model(setup.parts.programs, state.params).sample(setup.wired.recipe, request)
    assert images.shape == (8, 8, 8, 1)
    assert np.isfinite(images).all()


def test_guidance_needs_rates_that_drop_all_parts():
    data, rates = super_resolution(), {"digit": 0.1}
    config = tiny_config()
    override(config.unlock(), {"config.condition_dropout": str(rates)})
    with pytest.raises(
        UserError, match=r"condition_dropout=\{'digit': 0.1\}, which never drops all"
    ):
        set_up(config, data.image_shape, data.condition)
    kept = Several(BOTH.parts, kept=("coarse",))
    assert set_up(config, data.image_shape, kept).wired.condition_dropout == rates
    override(config, {"config.condition_dropout.digit": "0.2"})
    assert config.condition_dropout.digit == 0.2
    with pytest.raises(UserError, match="seed expects int"):
        override(config, {"config.seed": "{'a': 1}"})
    with pytest.raises(UserError, match="expects numbers by name, like"):
        override(config, {"config.optimizer.learning_rate": "{3}"})


def test_what_a_network_can_not_take_is_refused():
    tokens = TokenStates(jnp.zeros((2, 3, 4)), jnp.ones((2, 3), bool), jnp.zeros((2, 0)))
    x = jnp.zeros((2, 8, 8, 1))
    with pytest.raises(UserError, match="UNet attends to no tokens: take DiT"):
        jax.eval_shape(UNET.init, jax.random.key(0), x, jnp.zeros(2), tokens)
    with pytest.raises(UserError, match="5x4 pixels are to lie beside images of 8x8"):
        jax.eval_shape(DIT.init, jax.random.key(0), x, jnp.zeros(2), jnp.zeros((2, 5, 4, 1)))
    with pytest.raises(UserError, match="one part of labels"):
        parts_of({"one": jnp.array([1]), "other": jnp.array([2])})


@pytest.mark.thorough(tenth=False)
def test_stacked_blocks_attend_to_the_same_tokens():
    """With weights that are the same in each block, both layouts compute the same."""
    from diffjax.models.dit.stages import stack_blocks

    rng = np.random.default_rng(2)
    tokens = TokenStates(
        rng.normal(size=(2, 3, 4)).astype("f"), np.array([[1, 1, 0], [0, 0, 0]], bool),
        rng.normal(size=(2, 5)).astype("f"),
    )  # fmt: skip
    plain = DiT(num_classes=0, patch_size=4, hidden_size=16, depth=2, num_heads=2)
    params = random_params(plain, tokens)
    x = rng.normal(size=(2, 8, 8, 1)).astype("f")
    expected = jax.jit(plain.apply)({"params": params}, x, jnp.ones(2), tokens)
    stacked = plain.clone(scan=True)
    found = jax.jit(
        lambda params: stacked.apply({"params": stack_blocks(params)}, x, jnp.ones(2), tokens)
    )(params)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_mask_lies_beside_latents_as_networks_for_inpainting_have_it():
    """The first pixel of each square before them, or all of them, row by row, after them."""
    latents = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype("f")
    mask = np.arange(8 * 12, dtype="f").reshape(1, 8, 12, 1)
    one = MaskedImages((2, 3, 5)).joined(latents, mask)
    np.testing.assert_array_equal(one[..., 1:], latents)
    np.testing.assert_array_equal(one[1, ..., 0], [[0, 4, 8], [48, 52, 56]])
    packed = MaskedImages((2, 3, 20), packed=True).joined(latents, mask)
    np.testing.assert_array_equal(packed[..., :4], latents)
    rows = np.array([[48, 49, 50, 51], [60, 61, 62, 63], [72, 73, 74, 75], [84, 85, 86, 87]])
    np.testing.assert_array_equal(packed[0, 1, 0, 4:], rows.ravel())
    for kind, given, said in (
        (MaskedImages((2, 3, 6)), mask, "takes a mask and latents of (2, 3, 6)"),
        (MaskedImages((2, 3, 5)), mask[:, :7], "7x12 pixels does not divide into latents of 2x3"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            kind.joined(latents, given)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_with_transparent_parts_is_refused_and_an_opaque_one_is_not(channels, tmp_path):
    pixels = np.full((8, 8, 4), 255, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "opaque.png")
    kind = Images((8, 8, channels))
    np.testing.assert_array_equal(kind.parse([tmp_path / "opaque.png"]), 1.0)
    pixels[2, 3, 3] = 254
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    with pytest.raises(UserError, match=r"clear.png has transparent parts \(an alpha channel\)"):
        kind.parse([tmp_path / "clear.png"])


def test_numbers_may_be_others_in_what_guidance_leads_away_from():
    score = Numbers(("height", "score"), (64.0, 6.0), negative_values=(("score", 2.5),))
    kind = Several({"digit": Classes(10), "size": score}, kept=("size",))
    cond = {"digit": np.array([3, 4]), "size": np.float32([[8, 6], [9, 7]])}
    expected = [[8, 2.5], [9, 2.5]]
    np.testing.assert_array_equal(kind.nulled(cond)["size"], expected)
    negative = kind.replaced(cond, {"digit": np.array([1, 1])})
    np.testing.assert_array_equal(negative["size"], expected)
    np.testing.assert_array_equal(negative["digit"], 1)
