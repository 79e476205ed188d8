"""Pictures without edges: convolutions that wrap around, and rolled inputs of other networks."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.codecs import Codec
from diffjax.codecs.tiled import Tiled
from diffjax.evaluation.scores.seams import jump_at_edges
from diffjax.models.autoencoder_kl.network import AutoencoderKL
from diffjax.models.edm2.network import EDM2
from diffjax.models.layers.seamless import circular, seamless
from diffjax.models.unet import UNet

UNET = UNet(num_classes=0, channels=8, channel_multipliers=(1, 2), num_res_blocks=1,
            attention_resolutions=(), head_channels=8)  # fmt: skip


def drawn(shapes, scale=0.2):
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return tree.unflatten([scale * rng.normal(size=leaf.shape).astype("f") for leaf in leaves])


def rolled(x, rows, columns):
    return np.roll(x, (rows, columns), (1, 2))


def commutes(network, axes, moves):
    """The largest difference between the network of rolled inputs and its rolled output."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, 8, 12, 1)).astype("f")
    small = rng.normal(size=(4, 4, 6, 1)).astype("f")
    params = drawn(jax.eval_shape(network.init, jax.random.key(0), x, jnp.ones(4), small)["params"])

    @jax.jit
    def evaluated(x, small):
        with circular(axes):
            return network.apply({"params": params}, x, jnp.ones(4), small)

    y = evaluated(x, small)
    moved = [
        evaluated(rolled(x, *move), rolled(small, move[0] // 2, move[1] // 2)) for move in moves
    ]
    return [np.abs(z - rolled(y, *move)).max() for z, move in zip(moved, moves, strict=True)]


@pytest.mark.thorough
def test_a_circular_unet_commutes_with_rolls_and_leaves_no_edge():
    both, down = commutes(UNET, "both", [(2, 4), (4, 0)])
    assert max(both, down) < 1e-5


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize(
    "network",
    [
        UNET,
        UNET.clone(images_in="residual", residual_resampling=True),
        EDM2(num_classes=0, channels=8, channel_multipliers=(1, 2), num_res_blocks=1,
             head_channels=8),
    ],
    ids=["unet", "adm", "edm2"],
)  # fmt: skip
def test_one_direction_alone_wraps(network):
    assert network.shift_equivariant
    across, down = commutes(network, "x", [(0, 4), (2, 0)])
    assert across < 1e-5
    assert down > 0.01


def test_each_layer_sees_the_opposite_side():
    """As a convolution without padding of the map with its margin."""
    x = np.random.default_rng(0).normal(size=(2, 6, 8, 3)).astype("f")
    kinds = {
        (1, 1, 1): ((1, 1), (1, 1)),
        (2, 0, 1): ((0, 1), (0, 1)),  # of the autoencoder's encoder, and diffusers' U-Nets
        (2, 1, 1): ((1, 1), (1, 1)),
        (1, 2, 2): "SAME",  # of five pixels
    }
    size = {kind: 5 if padding == "SAME" else 3 for kind, padding in kinds.items()}
    layers = {
        kind: nn.Conv(2, (size[kind],) * 2, kind[0], padding=padding)
        for kind, padding in kinds.items()
    }
    params = {
        kind: drawn(jax.eval_shape(layer.init, jax.random.key(0), x)["params"])
        for kind, layer in layers.items()
    }

    @jax.jit
    def evaluated(x):
        with circular("both"):
            return [layer.apply({"params": params[kind]}, x) for kind, layer in layers.items()]

    for (step, before, after), found in zip(layers, evaluated(x), strict=True):
        kernel, bias = (params[(step, before, after)][name] for name in ("kernel", "bias"))
        margins = (before, after)
        wide = np.pad(x, ((0, 0), margins, margins, (0, 0)), mode="wrap")
        k = kernel.shape[0]
        windows = np.lib.stride_tricks.sliding_window_view(wide, (k, k), (1, 2))[:, ::step, ::step]
        np.testing.assert_allclose(
            found, np.einsum("bhwcij,ijcd->bhwd", windows, kernel) + bias, atol=1e-5
        )


def test_what_depends_on_positions_is_rolled_and_rolled_back():
    """Of a network that multiplies by a pattern nothing but the place of the pattern changes."""
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(1, 6, 8, 1)).astype("f")
    x, small = np.ones((3, 6, 8, 1), "f"), rng.normal(size=(3, 3, 4, 1)).astype("f")
    labels = np.array([0.3, 0.3, 0.7], "f")

    def apply(params, x, noise_label, cond):
        large = jnp.repeat(jnp.repeat(cond["small"], 2, 1), 2, 2)
        return jnp.concatenate([params * x, large], -1)

    evaluated = jax.jit(seamless(apply, "x", shift_equivariant=False))
    found = np.asarray(evaluated(pattern, x, labels, {"small": small}))
    places = []
    for image in found[..., :1]:
        same = [n for n in range(0, 8, 2) if np.allclose(np.roll(pattern[0], -n, 1), image)]
        places += same
    assert len(places) == 3  # each by whole pixels of the small image, to the side alone
    assert places[0] == places[1]  # of one label
    np.testing.assert_array_equal(found[..., 1:], small.repeat(2, 1).repeat(2, 2))
    many = np.linspace(0, 1, 64, dtype="f")
    plain = {"small": np.zeros((64, 3, 4, 1), "f")}
    moved = np.asarray(evaluated(pattern, np.ones((64, 6, 8, 1), "f"), many, plain))[..., 0]
    assert len({image.tobytes() for image in moved}) == 4


class Smoothing(Codec):
    """Latents that are decoded by one convolution; each element of the image sees its eight
    neighbours.
    """

    name, sha256 = "smoothing", ""
    layer: ClassVar[Any] = nn.Conv(1, (3, 3), use_bias=False)
    kernel: ClassVar[Any] = np.random.default_rng(2).normal(size=(3, 3, 1, 1)).astype("f")

    def latent_shape(self, image_shape):
        return image_shape

    def image_shape(self, latent_shape):
        return latent_shape

    def encode(self, params, images):
        return self.layer.apply({"params": {"kernel": self.kernel}}, images)

    def decode(self, params, latents):
        return self.encode(params, latents)


def test_tiles_of_a_seamless_picture_are_the_whole():
    x = np.random.default_rng(0).normal(size=(2, 10, 13, 1)).astype("f")
    wide = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
    windows = np.lib.stride_tricks.sliding_window_view(wide[..., 0], (3, 3), (1, 2))
    expected = np.einsum("bhwij,ij->bhw", windows, Smoothing.kernel[..., 0, 0])[..., None]
    tiled = Tiled(Smoothing(), tile=8, overlap=4).seamless("both")
    for codec in (Smoothing().seamless("both"), tiled):
        np.testing.assert_allclose(codec.decoder()(x), expected, atol=1e-5)
    np.testing.assert_allclose(tiled.encoder()(x), expected, atol=1e-5)
    assert np.abs(Smoothing().decoder()(x) - expected).max() > 0.1


@pytest.mark.thorough(tenth=False)
def test_the_jump_at_the_edges_is_as_inside_where_convolutions_wrap():
    """Smooth noise through random convolutions, with zeros or the opposite side around each map."""
    network = AutoencoderKL(channels=(4, 8), num_res_blocks=1, num_groups=2, image_channels=1)
    z = np.random.default_rng(0).normal(size=(64, 8, 8, 4)).astype("f")
    for axis in (1, 2) * 3:
        z = (z + np.roll(z, 1, axis)) / np.sqrt(2)
    images = jax.ShapeDtypeStruct((1, 16, 16, 1), jnp.float32)
    params = drawn(jax.eval_shape(network.init, jax.random.key(0), images)["params"])

    def decoded(z):
        return network.apply({"params": params}, z, method="decode")

    @jax.jit
    def each(z, moved):
        with circular("both"):
            wrapped = decoded(jnp.concatenate([z, moved]))
        return decoded(z), wrapped

    plain, both = map(np.asarray, each(z, rolled(z, 3, 2)))
    found, moved = np.split(both, 2)
    np.testing.assert_allclose(moved, rolled(found, 6, 4), atol=1e-4)
    # Where the edge lies inside; it is between two elements of the latent, as every second place.
    inside = jump_at_edges(moved)
    assert jump_at_edges(found) == pytest.approx(inside, rel=0.1)
    assert jump_at_edges(plain) > 1.2 * inside
