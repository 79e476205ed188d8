"""RAE: tokens of DINOv2 as latents, and a vision transformer that decodes them."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffjax.models.dinov2.network import GRID, PATCH, cubic_weights, dinov2
from diffjax.models.dit.patches import positions_2d, unpatchify
from diffjax.models.vit import Block, gelu
from diffjax.shapes import Array, Images, Latents, Tokens

NUM_REGISTERS = 4
MEAN, DEVIATION = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
"""Of the channels of ImageNet's images in [0, 1]."""
_HEAD_WIDTH, _BASE_SIDE, _EPSILON = 64, 16, 1e-12
_SMALLEST = 1e-5


class Decoder(nn.Module):
    """Tokens `[B, T, C]` in rows of a square -> `[B, T, 3·p²]`; the attributes are those of `RAE`.

    It is a vision transformer with a class token and fixed positions.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    patch_size: int

    @nn.compact
    def __call__(self, x: Tokens) -> Float[Array, " batch tokens pixels"]:
        batch, length, _ = x.shape
        side = round(length**0.5)
        x = nn.Dense(self.width, name="embed")(x)
        # Of any grid, as far apart as the ends of one of 16.
        places = positions_2d(side, side, self.width, spacing=_BASE_SIDE / side)
        first = self.param("class_token", nn.initializers.zeros, (self.width,))
        first = jnp.broadcast_to(first, (batch, 1, self.width))
        x = jnp.concatenate([first, x + jnp.asarray(places)[None]], 1)
        for i in range(self.depth):
            how = self.num_heads, _EPSILON, gelu
            x = Block(*how, mlp_width=self.mlp_width, name=f"block_{i}")(x)
        x = nn.LayerNorm(_EPSILON, use_fast_variance=False, name="norm")(x)
        return nn.Dense(3 * self.patch_size**2, name="final")(x[:, 1:])


class RAE(nn.Module):
    """The representation autoencoder: DINOv2 with registers, which stays as it is, and a decoder.

        z = encode(x)               [B, H, W, 3] in [0, 1] -> [B, n, n, c], c = encoder_width
        x = decode(z)               [B, n, n, c] -> [B, p·n, p·n, 3]

    with `n = encoder_side / 14` and `p = patch_size`. Images of other sides are resized to
    `encoder_side` by a bicubic filter: 256×256 pixels become 224×224, these 16×16 tokens, and these
    256×256 pixels again. Tokens are normalised, and then by stored statistics of each channel
    and place.

    A call with images decodes what it encodes. The methods are evaluated by
    `network.apply(variables, images, method="encode")`.

    Attributes:
        encoder_width: the width of a token of DINOv2, and the channels of a latent: 384 (S) to 1024
            (L).
        encoder_depth: the number of its blocks.
        width: the width of a token of the decoder.
        depth: the number of the decoder's blocks.
        num_heads: the number of the decoder's attention heads.
        mlp_width: the width between the layers of the decoder's MLPs.
        patch_size: the side of the pixels that a token is decoded to.
        encoder_side: the side of the images that DINOv2 sees, a multiple of 14.
        normalised: whether there are statistics of the latents.
        grid: the number of patches per side for which DINOv2 has positions.

    Example:
        >>> import jax
        >>> net = RAE(64, 1, 16, 1, 2, 32, encoder_side=56)
        >>> images = jnp.zeros((1, 64, 64, 3))
        >>> out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), images)
        >>> latents = jax.eval_shape(lambda x: net.apply(x, images, method="encode"), variables)
        >>> out.shape, latents.shape
        ((1, 64, 64, 3), (1, 4, 4, 64))

    References:
        Zheng et al., "Diffusion Transformers with Representation Autoencoders", 2025,
        arXiv:2510.11690
    """

    image_channels: ClassVar[int] = 3
    encoder_width: int = 768
    encoder_depth: int = 12
    width: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_width: int = 4096
    patch_size: int = 16
    encoder_side: int = 224
    normalised: bool = True
    grid: int = GRID

    def setup(self) -> None:
        self.encoder = dinov2(
            self.encoder_width,
            self.encoder_depth,
            self.encoder_width // _HEAD_WIDTH,
            NUM_REGISTERS,
            self.grid,
            affine_end=False,
        )
        self.decoder = Decoder(
            self.width, self.depth, self.num_heads, self.mlp_width, self.patch_size
        )
        if self.normalised:
            size = (self.side, self.side, self.encoder_width)
            self.latents_mean = self.param("latents_mean", nn.initializers.zeros, size)
            self.latents_deviation = self.param("latents_deviation", nn.initializers.ones, size)

    @property
    def side(self) -> int:
        """The number of tokens in a row."""
        return self.encoder_side // PATCH

    @property
    def image_side(self) -> int:
        """The side of decoded images."""
        return self.side * self.patch_size

    def encode(self, images: Images) -> Latents:
        """The latents of images."""
        x = self._resized(images)
        x = (x - MEAN[None, None, None]) / DEVIATION[None, None, None]
        tokens = self.encoder(x)[:, 1 + NUM_REGISTERS :]
        z = tokens.reshape(len(tokens), self.side, self.side, -1)
        if not self.normalised:
            return z
        return (z - self.latents_mean[None]) / (self.latents_deviation[None] + _SMALLEST)

    def decode(self, latents: Latents) -> Images:
        """The images of latents, not clipped."""
        z = latents
        if self.normalised:
            z = z * (self.latents_deviation[None] + _SMALLEST) + self.latents_mean[None]
        patches = self.decoder(z.reshape(len(z), -1, z.shape[-1]))
        x = unpatchify(patches, self.patch_size, self.image_side, self.image_side)
        return x * DEVIATION[None, None, None] + MEAN[None, None, None]

    def __call__(self, images: Images) -> Float[Array, " batch side side channels"]:
        """The images that are decoded from the latents of images."""
        return self.decode(self.encode(images))

    def _resized(self, images: Images) -> Array:
        size = self.encoder_side
        if images.shape[1:3] == (size, size):
            return images
        rows, columns = (
            jnp.asarray(cubic_weights(n, size, step=n / size), jnp.float32)
            for n in images.shape[1:3]
        )
        return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, images)
