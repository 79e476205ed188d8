"""The encoder and the decoder of MOVQ: those of latent diffusion, with norms by the latent."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.models.autoencoder_kl.network import Decoder, Encoder
from diffjax.models.layers.common import Dense
from diffjax.shapes import Images, Latents


class MOVQ(nn.Module):
    """The autoencoder of Kandinsky 2, whose decoder modulates each norm by the latent.

        z = encode(x)               [B, H, W, C] in [-1, 1] -> [B, H/s, W/s, c]
        x = decode(quantise(z))     [B, h, w, c] -> [B, s·h, s·w, C]

    It was trained with latents that are entries of a codebook; Kandinsky's models make latents that
    are not, and decode them as they are.

    A call with images returns the images of their quantised latents.

    Attributes:
        latent_channels: the number of channels of a latent.
        num_codes: entries of the codebook.
        channels: the number of channels of each level.
        num_res_blocks: the number of residual blocks of each level of the encoder.
        attention_levels: levels with attention after each residual block.
        num_groups: the number of groups of each group norm; divides all channels.
        image_channels: the number of channels of images.
        dtype: the compute type, `"float32"` or `"bfloat16"`; parameters and outputs are float32.
        attention: as in `AutoencoderKL`.

    Example:
        >>> net = MOVQ(channels=(8, 16), num_res_blocks=1, num_groups=4, attention_levels=(1,))
        >>> images = jnp.zeros((1, 8, 12, 3))
        >>> out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), images)
        >>> out.shape, variables["params"]["codebook"].shape
        ((1, 8, 12, 3), (16384, 4))

    References:
        Zheng et al., "MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation", 2022,
        arXiv:2209.09002
    """

    latent_channels: int = 4
    num_codes: int = 16_384
    channels: tuple[int, ...] = (128, 256, 256, 512)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (3,)
    num_groups: int = 32
    image_channels: int = 3
    dtype: str = "float32"
    attention: str = "auto"

    def setup(self) -> None:
        how = self.num_groups, self.dtype, self.attention, self.attention_levels
        levels = self.channels, self.num_res_blocks
        self.encoder = Encoder(*levels, self.latent_channels, *how)
        self.decoder = Decoder(*levels, self.image_channels, *how)
        self.quant_conv = Dense(self.latent_channels)
        self.post_quant_conv = Dense(self.latent_channels)
        size = (self.num_codes, self.latent_channels)
        self.codebook = self.param("codebook", nn.initializers.normal(1 / self.num_codes), size)

    @property
    def scale(self) -> int:
        """How many pixels one element of a latent is high and wide."""
        return 2 ** (len(self.channels) - 1)

    @property
    def packed_channels(self) -> int:
        """The channels of a latent."""
        return self.latent_channels

    def encode(self, images: Images) -> Latents:
        """The latents of images, before they are quantised."""
        return self.quant_conv(self.encoder(images))

    def quantise(self, latents: Latents) -> Latents:
        """The nearest entries of the codebook; the gradient is that of the identity."""
        products = jnp.einsum("bhwc,nc->bhwn", latents, self.codebook)
        squares = jnp.sum(jnp.square(self.codebook), axis=-1)
        nearest = self.codebook[jnp.argmin(squares[None, None, None] - 2 * products, axis=-1)]
        return latents + jax.lax.stop_gradient(nearest - latents)

    def decode(self, latents: Latents) -> Images:
        """The images of latents as they are."""
        return self.decoder(self.post_quant_conv(latents), latents)

    def __call__(self, images: Images) -> Images:
        """The images that are decoded from quantised latents."""
        return self.decode(self.quantise(self.encode(images)))
