"""Codecs on arrays: what they compute, in batches and in tiles."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from diffjax import choices, config_files
from diffjax.codecs import Codec, Identity, ScaledLatents, SpaceToDepth, Tiled, Unstated, base
from diffjax.errors import UserError
from diffjax.spec import build
from diffjax.training.sharding import local_rows

RANDOM = np.random.default_rng(0)


@dataclass(frozen=True)
class Smooth(Codec):
    """Means over 3x3 elements, with twice as many pixels; zeros beyond the edges."""

    name = "smooth"
    sha256 = base.sha256_of("smooth")

    @property
    def params(self) -> Any:
        return np.full((3, 3, 1, 1), 1 / 9, np.float32)

    def latent_shape(self, image_shape):
        return image_shape[0] // 2, image_shape[1] // 2, image_shape[2]

    def image_shape(self, latent_shape):
        return latent_shape[0] * 2, latent_shape[1] * 2, latent_shape[2]

    def encode(self, params, images):
        return self._means(params, images[:, ::2, ::2])

    def decode(self, params, latents):
        return jnp.repeat(jnp.repeat(self._means(params, latents), 2, axis=1), 2, axis=2)

    def _means(self, params, x):
        return jax.lax.conv_general_dilated(
            x, params, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_a_latent_of_space_to_depth_is_a_square_of_pixels(block):
    images = normal(2, 6, 12, 3)
    codec = SpaceToDepth(block)
    latents = codec.encoder()(images)
    assert latents.shape == (2, *codec.latent_shape((6, 12, 3)))
    for i, j in ((0, 0), (6 // block - 1, 1)):
        square = images[1, i * block : (i + 1) * block, j * block : (j + 1) * block]
        np.testing.assert_array_equal(latents[1, i, j], square.ravel())
    np.testing.assert_array_equal(codec.decoder()(latents), images)
    assert codec.image_shape(codec.latent_shape((6, 12, 3))) == (6, 12, 3)


def test_shapes_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="does not divide images of 9x8"):
        SpaceToDepth(2).latent_shape((9, 8, 1))
    with pytest.raises(UserError, match=r"\[4, 4, 3\] has 3"):
        SpaceToDepth(2).image_shape((4, 4, 3))
    with pytest.raises(UserError, match=r"arrays \[N, H, W, C\], not \[8, 8, 1\]"):
        SpaceToDepth(2).encoder()(np.zeros((8, 8, 1)))
    with pytest.raises(UserError, match="overlap=8 must be less than tile=8"):
        Tiled(SpaceToDepth(2), tile=8, overlap=8)


@pytest.mark.parametrize("codec", [Identity(), Unstated()])
def test_the_codec_of_images_hands_on_the_very_array(codec):
    images = normal(2, 4, 4, 3)
    assert codec.decoder(local_rows())(images) is images
    assert codec.encoder()(images) is images


@pytest.mark.parametrize("size", [(12, 12), (13, 9), (7, 30), (5, 6)])
def test_tiles_of_more_overlap_than_a_result_depends_on_are_the_whole(size):
    """Each element depends on its neighbours, one away: a quarter of the overlap of 4."""
    latents = normal(2, *size, 1)
    whole = Smooth().decoder()(latents)
    padded = np.pad(latents[..., 0], [(0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    means = windows.mean(axis=(3, 4))
    np.testing.assert_allclose(whole[..., 0], means.repeat(2, axis=1).repeat(2, axis=2), atol=1e-6)
    tiled = Tiled(Smooth(), tile=6, overlap=4)
    np.testing.assert_allclose(tiled.decoder()(latents), whole, atol=1e-6)
    images = normal(2, 2 * size[0], 2 * size[1], 1)
    np.testing.assert_allclose(tiled.encoder()(images), Smooth().encoder()(images), atol=1e-6)


def test_tiles_of_less_overlap_differ_at_the_cuts_alone():
    latents = np.ones((1, 24, 6, 1), np.float32)
    made = Tiled(Smooth(), tile=12, overlap=0).decoder()(latents)[0, :, 4, 0]
    expected = np.ones(24)
    expected[[0, 11, 12, 23]] = 2 / 3  # beyond an edge or a cut there are zeros
    np.testing.assert_allclose(made, expected.repeat(2), atol=1e-6)


def test_overlapping_tiles_are_blended_linearly():
    """A codec that returns where an element lies in its tile: weights are seen in the mean."""

    @dataclass(frozen=True)
    class Place(Smooth):
        def image_shape(self, latent_shape):
            return latent_shape

        def decode(self, params, latents):
            return jnp.ones_like(latents) * jnp.arange(latents.shape[1])[None, :, None, None]

    made = Tiled(Place(), tile=8, overlap=4).decoder()(normal(1, 12, 3, 1))[0, :, 0, 0]
    # Rows 4 to 7 are rows 4 to 7 of the first tile and 0 to 3 of the second.
    share = np.array([1.0, 0.75, 0.25, 0.0])
    blended = share * np.arange(4, 8) + (1 - share) * np.arange(4)
    np.testing.assert_allclose(made, [0, 1, 2, 3, *blended, 4, 5, 6, 7], atol=1e-6)


@pytest.mark.parametrize("spread", [False, True])
def test_batches_are_as_small_as_memory_asks_and_change_nothing(spread, monkeypatch):
    monkeypatch.setattr(base, "_PIXELS_AT_ONCE", 3 * 16 * 16)
    seen = []

    @dataclass(frozen=True)
    class Counting(Smooth):
        spread: bool = False

        def decode(self, params, latents):
            seen.append(len(latents))
            return super().decode(params, latents)

    latents = normal(11, 8, 8, 1)
    place = local_rows() if spread else None
    made = Counting(spread).decoder(place)(latents)
    assert seen == [8 if spread else 3]  # traced once, and rounded up to the devices
    monkeypatch.undo()
    np.testing.assert_allclose(made, Smooth().decoder()(latents), atol=1e-6)
    assert Smooth().decoder()(latents[:0]).shape == (0, 16, 16, 1)


def test_a_codec_is_exported_for_a_batch_of_any_size():
    (b,) = export.symbolic_shape("b")
    codec = Tiled(Smooth(), tile=3, overlap=1)
    like = jax.ShapeDtypeStruct((b, 4, 5, 1), np.float32)
    exported = export.export(jax.jit(lambda x: codec.decode(jnp.asarray(codec.params), x)))(like)
    latents = normal(3, 4, 5, 1)
    np.testing.assert_allclose(exported.call(latents), codec.decoder()(latents), atol=1e-6)


def test_scaled_latents_decode_to_the_same_images():
    images = normal(2, 4, 4, 1)
    scaled = ScaledLatents(SpaceToDepth(2), 0.25)
    latents = scaled.encoder()(images)
    np.testing.assert_array_equal(latents, SpaceToDepth(2).encoder()(images) / 4)
    np.testing.assert_array_equal(scaled.decoder()(latents), images)
    assert scaled.facts == SpaceToDepth(2).facts


OF_A_FOLDER = "autoencoder", "embeddings"
"""Their shapes and hashes are those of a folder: test_autoencoders.py, test_embeddings.py."""


@pytest.mark.parametrize("name", [name for name in choices.CODECS if name not in OF_A_FOLDER])
def test_shapes_of_latents_and_of_images_belong_together(name):
    codec = build(choices.CODECS[name], Codec)
    images = (256, 256, 3) if name == "rae" else (32, 64, 3)
    shape = codec.latent_shape(images)
    assert codec.image_shape(shape) == images
    rows, columns = base.scale_of(codec, shape)
    assert (rows * shape[0], columns * shape[1]) == images[:2]
    assert len(codec.sha256) == 64


def test_an_axis_of_a_config_of_latents_names_its_codec():
    config = config_files.load("configs/imagenet256.py:model=DiT-S/8,codec=taef2")
    assert config.data.codec == choices.CODECS["taef2"]
    assert config.data.scale == 1  # not the 0.18215 of this config's latents without a codec
    assert config.name.endswith("-taef2")
    with pytest.raises(UserError, match="codec=taef2: the data of digits are no latents"):
        config_files.load("configs/digits.py:codec=taef2")
    with pytest.raises(UserError, match="no codec is called 'taef3'"):
        config_files.load("configs/imagenet256.py:codec=taef3")


def test_what_defines_a_codec_is_in_its_hash():
    assert SpaceToDepth(2).sha256 != SpaceToDepth(4).sha256
    assert Tiled(SpaceToDepth(2)).sha256 == SpaceToDepth(2).sha256  # which decode the same latents
    assert Tiled(SpaceToDepth(2)).name != SpaceToDepth(2).name
