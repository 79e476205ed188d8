"""The Inception network that defines FID, KID, sFID and the Inception score.

It is the network of the TensorFlow graph `inception-2015-12-05`, which differs from the published
Inception v3 (Szegedy et al. 2015, arXiv:1512.00567) in its pooling: averages exclude the padding,
and the last block uses a maximum. The network is only for inference.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

SIZE = 299
"""The side of its input images, in pixels."""
_BATCH_NORM_EPSILON = 1e-3
_SPATIAL_CHANNELS = 7


class Layers(NamedTuple):
    """Features of a batch of images at several layers.

    Attributes:
        pool: `[B, 2048]`, means of the last block over all positions, for FID and KID.
        spatial: `[B, 2023]`, seven channels of the last but one block with 17x17 positions
            (`Mixed_6d`), for sFID (Nash et al. 2021, arXiv:2103.03841) as computed since
            Dhariwal & Nichol 2021.
        middle: `[B, 768]`, means of the last block with 17x17 positions (`Mixed_6e`).
        logits: `[B, 1008]` without their bias, for the Inception score (Salimans et al. 2016,
            arXiv:1606.03498).
    """

    pool: jax.Array
    spatial: jax.Array
    middle: jax.Array
    logits: jax.Array


class InceptionV3(nn.Module):
    """The Inception network, with the statistics of batch normalisation as parameters."""

    @nn.compact
    def __call__(self, x: jax.Array) -> Layers:
        """Computes the features of images.

        Args:
            x: `[B, 299, 299, 3]` in [-1, 1].
        """
        x = _conv(x, "Conv2d_1a_3x3", 32, (3, 3), stride=2)
        x = _conv(x, "Conv2d_2a_3x3", 32, (3, 3), padding="VALID")
        x = _shrink(_conv(x, "Conv2d_2b_3x3", 64, (3, 3)))
        x = _conv(x, "Conv2d_3b_1x1", 80)
        x = _shrink(_conv(x, "Conv2d_4a_3x3", 192, (3, 3), padding="VALID"))
        x = InceptionA(32, name="Mixed_5b")(x)
        x = InceptionA(64, name="Mixed_5c")(x)
        x = InceptionA(64, name="Mixed_5d")(x)
        x = InceptionB(name="Mixed_6a")(x)
        x = InceptionC(128, name="Mixed_6b")(x)
        x = InceptionC(160, name="Mixed_6c")(x)
        x = InceptionC(160, name="Mixed_6d")(x)
        spatial = x[..., :_SPATIAL_CHANNELS].reshape(len(x), -1)
        x = InceptionC(192, name="Mixed_6e")(x)
        middle = x.mean((1, 2))
        x = InceptionD(name="Mixed_7a")(x)
        x = InceptionE(_average, name="Mixed_7b")(x)
        x = InceptionE(_maximum, name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        return Layers(pool, spatial, middle, nn.Dense(1008, use_bias=False, name="fc")(pool))


class InceptionA(nn.Module):
    """Inception block with branches 1x1, 5x5, twice 3x3, and a mean of `pool_features` channels."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _conv(x, "branch1x1", 64)
        five = _conv(x, "branch5x5_1", 48)
        five = _conv(five, "branch5x5_2", 64, (5, 5))
        double = _conv(x, "branch3x3dbl_1", 64)
        double = _conv(double, "branch3x3dbl_2", 96, (3, 3))
        double = _conv(double, "branch3x3dbl_3", 96, (3, 3))
        pool = _conv(_average(x), "branch_pool", self.pool_features)
        return jnp.concatenate([one, five, double, pool], -1)


class InceptionB(nn.Module):
    """Reduction block from 35x35 to 17x17 positions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _conv(x, "branch3x3", 384, (3, 3), stride=2)
        double = _conv(x, "branch3x3dbl_1", 64)
        double = _conv(double, "branch3x3dbl_2", 96, (3, 3))
        double = _conv(double, "branch3x3dbl_3", 96, (3, 3), stride=2)
        return jnp.concatenate([three, double, _shrink(x)], -1)


class InceptionC(nn.Module):
    """Inception block with branches of 1x7 and 7x1 convolutions, which have `width` channels."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _conv(x, "branch1x1", 192)
        seven = _conv(x, "branch7x7_1", self.width)
        seven = _conv(seven, "branch7x7_2", self.width, (1, 7))
        seven = _conv(seven, "branch7x7_3", 192, (7, 1))
        double = _conv(x, "branch7x7dbl_1", self.width)
        double = _conv(double, "branch7x7dbl_2", self.width, (7, 1))
        double = _conv(double, "branch7x7dbl_3", self.width, (1, 7))
        double = _conv(double, "branch7x7dbl_4", self.width, (7, 1))
        double = _conv(double, "branch7x7dbl_5", 192, (1, 7))
        pool = _conv(_average(x), "branch_pool", 192)
        return jnp.concatenate([one, seven, double, pool], -1)


class InceptionD(nn.Module):
    """Reduction block from 17x17 to 8x8 positions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _conv(x, "branch3x3_1", 192)
        three = _conv(three, "branch3x3_2", 320, (3, 3), stride=2)
        seven = _conv(x, "branch7x7x3_1", 192)
        seven = _conv(seven, "branch7x7x3_2", 192, (1, 7))
        seven = _conv(seven, "branch7x7x3_3", 192, (7, 1))
        seven = _conv(seven, "branch7x7x3_4", 192, (3, 3), stride=2)
        return jnp.concatenate([three, seven, _shrink(x)], -1)


class InceptionE(nn.Module):
    """Inception block with branches that split into 1x3 and 3x1; `pool` is a mean or a maximum."""

    pool: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _conv(x, "branch1x1", 320)
        three = _conv(x, "branch3x3_1", 384)
        wide, high = (
            _conv(three, "branch3x3_2a", 384, (1, 3)),
            _conv(three, "branch3x3_2b", 384, (3, 1)),
        )
        double = _conv(x, "branch3x3dbl_1", 448)
        double = _conv(double, "branch3x3dbl_2", 384, (3, 3))
        wide_2, high_2 = (
            _conv(double, "branch3x3dbl_3a", 384, (1, 3)),
            _conv(double, "branch3x3dbl_3b", 384, (3, 1)),
        )
        pool = _conv(self.pool(x), "branch_pool", 192)
        return jnp.concatenate([one, wide, high, wide_2, high_2, pool], -1)


class _Unit(nn.Module):
    features: int
    kernel: tuple[int, int]
    stride: int
    padding: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides = (self.stride, self.stride)
        conv = nn.Conv(
            self.features, self.kernel, strides, self.padding, use_bias=False, name="conv"
        )
        return nn.relu(_BatchNorm(name="norm")(conv(x)))


class _BatchNorm(nn.Module):
    """Batch normalisation with stored statistics: `γ (x - m) / √(v + ε) + β`, ε = 0.001."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        zeros, ones, shape = nn.initializers.zeros, nn.initializers.ones, x.shape[-1:]
        scale, variance = (self.param(name, ones, shape) for name in ("scale", "variance"))
        bias, mean = (self.param(name, zeros, shape) for name in ("bias", "mean"))
        factor = scale / jnp.sqrt(variance + _BATCH_NORM_EPSILON)
        return x * factor[None, None, None] + (bias - mean * factor)[None, None, None]


def _conv(
    x: jax.Array,
    name: str,
    features: int,
    kernel: tuple[int, int] = (1, 1),
    *,
    stride: int = 1,
    padding: str | None = None,
) -> jax.Array:
    """A convolution, batch normalisation and ReLU; by default it is padded if its stride is 1."""
    padding = padding or ("SAME" if stride == 1 else "VALID")
    return _Unit(features, kernel, stride, padding, name=name)(x)


def _average(x: jax.Array) -> jax.Array:
    """Means over 3x3 positions, without the padding."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _maximum(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def _shrink(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")
