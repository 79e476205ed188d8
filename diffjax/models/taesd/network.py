"""The encoder and the decoder of TAESD: convolutions of 64 channels, eight pixels to an element.

    github.com/madebyollin/taesd, `taesd.py`

Layers are numbered by their places in the published sequences, activations among them.
"""

from collections.abc import Iterable
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from diffjax.shapes import Array, Images, Latents

WIDTH, SCALE = 64, 8
_GROUPS, _CLAMP = 4, 3.0


def _conv(features: int, name: str, stride: int = 1, bias: bool = True) -> nn.Conv:
    # Strided ones are padded on both sides, unlike "SAME".
    padding = ((1, 1), (1, 1))
    return nn.Conv(features, (3, 3), stride, padding, use_bias=bias, name=name)


class ConvBlock(nn.Module):
    """A residual block, `relu(conv(x) + x)`, of three convolutions.

    With `pooled`, `x + pool(x)` takes the place of `x`, where `pool` normalises four groups of 256
    channels over all positions: each pixel then depends on the whole image.
    """

    pooled: bool = False

    @nn.compact
    def __call__(self, x: Images) -> Array:
        if self.pooled:
            h = nn.Conv(4 * WIDTH, (1, 1), use_bias=False, name="pool_in")(x)
            norm = nn.GroupNorm(_GROUPS, epsilon=1e-5, use_fast_variance=False, name="norm")
            x = x + nn.Conv(WIDTH, (1, 1), use_bias=False, name="pool_out")(nn.relu(norm(h)))
        h = nn.relu(_conv(WIDTH, "conv_0")(x))
        h = nn.relu(_conv(WIDTH, "conv_2")(h))
        return nn.relu(_conv(WIDTH, "conv_4")(h) + x)


class TAESDEncoder(nn.Module):
    """`[B, H, W, 3]` in [0, 1] -> `[B, H/8, W/8, latent_channels]`, of about [-3, 3].

    Attributes:
        latent_channels: 4, 16 or 32, as the autoencoder that it approximates.
        pooled: whether the blocks of the coarsest level normalise over all positions.
    """

    latent_channels: int = 4
    pooled: bool = False

    @nn.compact
    def __call__(self, x: Array, part: str = "all") -> Array:
        """The latents; or `part="local"` of the network, whose elements depend on their
        surroundings alone, or with its result `part="coarse"`, the rest, at a latent's resolution.
        """
        if part != "coarse":
            x = ConvBlock(name="layer_1")(_conv(WIDTH, "layer_0")(x))
            for place in (2, 6):
                x = _conv(WIDTH, f"layer_{place}", stride=2, bias=False)(x)
                x = _blocks(x, range(place + 1, place + 4))
            x = _conv(WIDTH, "layer_10", stride=2, bias=False)(x)
        if part != "local":
            x = _blocks(x, range(11, 14), self.pooled)
            x = _conv(self.latent_channels, "layer_14")(x)
        return x


class TAESDDecoder(nn.Module):
    """`[B, h, w, latent_channels]` -> `[B, 8h, 8w, 3]`, of about [0, 1]; as `TAESDEncoder`."""

    latent_channels: int = 4
    pooled: bool = False

    @nn.compact
    def __call__(self, x: Array, part: str = "all") -> Array:
        """The images; or `part="coarse"`, at a latent's resolution, or with its result
        `part="local"`, the rest, as of `TAESDEncoder`.
        """
        if part != "local":
            x = nn.relu(_conv(WIDTH, "layer_1")(_CLAMP * jnp.tanh(x / _CLAMP)))
            x = _blocks(x, range(3, 6), self.pooled)
        if part != "coarse":
            for place in (7, 12, 17):
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = _conv(WIDTH, f"layer_{place}", bias=False)(x)
                x = _blocks(x, range(place + 1, min(place + 4, 19)))
            x = _conv(3, "layer_19")(x)
        return x


class TAESD(nn.Module):
    """An encoder with its decoder; the attributes are those of `TAESDEncoder`.

    A call with images `[B, H, W, 3]` in [0, 1] decodes what it encodes. The methods are evaluated
    by `network.apply(variables, images, method="encode")`.
    """

    scale: ClassVar[int] = SCALE
    image_channels: ClassVar[int] = 3
    latent_channels: int = 4
    pooled: bool = False

    def setup(self) -> None:
        self.encoder = TAESDEncoder(self.latent_channels, self.pooled)
        self.decoder = TAESDDecoder(self.latent_channels, self.pooled)

    @property
    def packed_channels(self) -> int:
        """The channels of a latent."""
        return self.latent_channels

    def encode(self, x: Images) -> Latents:
        """The latents of images."""
        return self.encoder(x)

    def decode(self, x: Latents) -> Images:
        """The images of latents."""
        return self.decoder(x)

    def __call__(self, x: Images) -> Images:
        """The images that are decoded from the latents of images."""
        return self.decode(self.encode(x))


def _blocks(x: Array, places: Iterable[int], pooled: bool = False) -> Array:
    for place in places:
        x = ConvBlock(pooled, name=f"layer_{place}")(x)
    return x
