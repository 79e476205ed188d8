"""The encoder and the decoder of latent diffusion: residual blocks, and attention in the middle."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffjax.models.layers.common import Dense, SelfAttention, compute_type
from diffjax.models.unet import GroupNorm
from diffjax.shapes import Array, Images, Keys, Latents, OneKey

_EPSILON = 1e-6
_LOG_VARIANCES = -30.0, 20.0
_BOTH = ((1, 1), (1, 1))
_END = ((0, 1), (0, 1))
_STATISTICS_EPSILON = 1e-4


class Posterior(NamedTuple):
    """The distribution of the latents of images: independent normal distributions.

        q(z | x) = N(mean, exp(log_variance))

    Attributes:
        mean: `[B, h, w, c]`.
        log_variance: `[B, h, w, c]`, within [-30, 20].
    """

    mean: Latents
    log_variance: Latents

    def sample(self, key: OneKey) -> Latents:
        """One sample of each latent, `mean + exp(log_variance / 2)·eps`.

        Example:
            >>> posterior = Posterior(jnp.ones((1, 2, 2, 4)), jnp.full((1, 2, 2, 4), -30.0))
            >>> bool(jnp.allclose(posterior.sample(jax.random.key(0)), 1.0, atol=1e-5))
            True
        """
        eps = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(self.log_variance / 2) * eps

    def samples(self, keys: Keys) -> Latents:
        """One sample of each latent, by a key of its own, whatever else is in the batch."""
        shape, dtype = self.mean.shape[1:], self.mean.dtype
        eps = jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)
        return self.mean + jnp.exp(self.log_variance / 2) * eps

    def scaled(self, scale: Array, shift: Array) -> "Posterior":
        """The distribution of `scale · (z − shift)`; both are broadcast to the mean."""
        more = 2 * jnp.log(jnp.abs(scale))
        return Posterior(scale * (self.mean - shift), self.log_variance + more)


def _conv(x: Array, features: int, dtype: jnp.dtype, name: str) -> Array:
    return nn.Conv(features, (3, 3), padding=_BOTH, dtype=dtype, name=name)(x)


def _norm(x: Array, num_groups: int, dtype: jnp.dtype, name: str) -> Array:
    # Published decoders have activations whose mean is large beside their deviations.
    return GroupNorm(num_groups, dtype, _EPSILON, two_pass=True, name=name)(x)


class SpatialNorm(nn.Module):
    """A group norm whose scale and shift are affine maps of a latent at each position.

        scale(z)·norm(x) + shift(z),    z repeated to the size of x

    References:
        Zheng et al., "MoVQ", 2022, arXiv:2209.09002
    """

    num_groups: int
    dtype: str

    @nn.compact
    def __call__(self, x: Images, z: Latents) -> Images:
        dtype = compute_type(self.dtype)
        for axis in (1, 2):
            z = jnp.repeat(z, x.shape[axis] // z.shape[axis], axis)
        scale, shift = (Dense(x.shape[-1], dtype=dtype, name=n)(z) for n in ("scale", "shift"))
        return scale * _norm(x, self.num_groups, dtype, "norm") + shift


def _norm_by(z: Latents | None, x: Array, num_groups: int, dtype: str, name: str) -> Array:
    """A group norm, or where there is a latent one whose scale depends on it."""
    if z is None:
        return _norm(x, num_groups, compute_type(dtype), name)
    return SpatialNorm(num_groups, dtype, name=name)(x, z)


class ResidualBlock(nn.Module):
    """`skip(x) + conv₂(SiLU(norm₂(conv₁(SiLU(norm₁(x))))))`, where `skip` changes the channels."""

    features: int
    num_groups: int
    dtype: str

    @nn.compact
    def __call__(
        self, x: Images, z: Latents | None = None
    ) -> Float[Array, " batch height width {self.features}"]:
        dtype = compute_type(self.dtype)
        h = x
        for n in (1, 2):
            h = nn.silu(_norm_by(z, h, self.num_groups, self.dtype, f"norm_{n}"))
            h = _conv(h, self.features, dtype, f"conv_{n}")
        if x.shape[-1] != self.features:
            x = Dense(self.features, dtype=dtype, name="skip")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention of all positions of a map with one head, and a skip."""

    num_groups: int
    dtype: str
    attention: str

    @nn.compact
    def __call__(self, x: Images, z: Latents | None = None) -> Images:
        batch, height, width, channels = x.shape
        h = _norm_by(z, x, self.num_groups, self.dtype, "norm")
        h = h.reshape(batch, height * width, channels)
        h = SelfAttention(1, self.attention, self.dtype, name="attention")(h)
        return x + h.reshape(x.shape)


class _Coder(nn.Module):
    """What the encoder and the decoder share; the attributes are those of `AutoencoderKL`."""

    channels: tuple[int, ...]
    num_res_blocks: int
    out_channels: int
    num_groups: int
    dtype: str
    attention: str
    attention_levels: tuple[int, ...] = ()

    def conv(self, x: Array, features: int, name: str) -> Array:
        return _conv(x, features, compute_type(self.dtype), name)

    def block(self, x: Array, level: int, name: str, z: Latents | None = None) -> Array:
        how = self.num_groups, self.dtype
        x = ResidualBlock(self.channels[level], *how, name=name)(x, z)
        if level not in self.attention_levels:
            return x
        return AttentionBlock(*how, self.attention, name=f"{name}_attention")(x, z)

    def middle(self, x: Array, z: Latents | None = None) -> Array:
        x = self.block(x, -1, "middle_0", z)
        how = self.num_groups, self.dtype, self.attention
        x = AttentionBlock(*how, name="middle_attention")(x, z)
        return self.block(x, -1, "middle_1", z)

    def final(self, x: Array, z: Latents | None = None) -> Array:
        x = nn.silu(_norm_by(z, x, self.num_groups, self.dtype, "final_norm"))
        return self.conv(x, self.out_channels, "final_conv").astype(jnp.float32)


class Encoder(_Coder):
    """`[B, H, W, C]` -> `[B, H/s, W/s, out_channels]`, where `s` is 2 to the levels less 1."""

    @nn.compact
    def __call__(self, x: Images) -> Latents:
        x = self.conv(x, self.channels[0], "conv_in")
        for level, features in enumerate(self.channels):
            for i in range(self.num_res_blocks):
                x = self.block(x, level, f"down_{level}_{i}")
            if level < len(self.channels) - 1:
                # The published ones pad below and on the right alone.
                x = nn.Conv(
                    features,
                    (3, 3),
                    2,
                    _END,
                    dtype=compute_type(self.dtype),
                    name=f"down_{level}_resample",
                )(x)
        return self.final(self.middle(x))


class Decoder(_Coder):
    """`[B, h, w, c]` -> `[B, s·h, s·w, out_channels]`; levels have `num_res_blocks + 1` blocks.

    With a second latent all norms depend on it (`SpatialNorm`).
    """

    @nn.compact
    def __call__(self, x: Latents, z: Latents | None = None) -> Images:
        x = self.middle(self.conv(x, self.channels[-1], "conv_in"), z)
        for level in reversed(range(len(self.channels))):
            for i in range(self.num_res_blocks + 1):
                x = self.block(x, level, f"up_{level}_{i}", z)
            if level > 0:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = self.conv(x, self.channels[level], f"up_{level}_resample")
        return self.final(x, z)


class AutoencoderKL(nn.Module):
    """The autoencoder of latent diffusion, and of Stable Diffusion and FLUX with it.

        q(z | x) = encode(x)        [B, H, W, C] in [-1, 1] -> Posterior of [B, H/s, W/s, c]
        x = decode(z)               [B, h, w, c] -> [B, s·h, s·w, C]

    Level i has `channels[i]` channels on maps of 1 / 2^i of the image's sides, so
    `s = 2^(levels − 1)`. The name is that of its loss: the KL divergence of the posterior from
    N(0, 1), by a small weight. Latents are neither shifted nor scaled here;
    `diffjax.codecs.autoencoder_kl` does that.

    A call with images returns `decode` of the mean of their posterior. The methods are evaluated by
    `network.apply(variables, images, method="encode")`.

    Attributes:
        latent_channels: the number of channels of a latent: 4 (Stable Diffusion 1, 2, XL), 16
            (Stable Diffusion 3, FLUX.1), 32 (FLUX.2).
        quant_convs: whether an affine map of the channels follows the encoder, and one precedes the
            decoder; from the vector-quantised autoencoder that this one came from.
        channels: the number of channels of each level.
        num_res_blocks: the number of residual blocks of each level of the encoder.
        num_groups: the number of groups of each group norm; divides all channels.
        image_channels: the number of channels of images.
        dtype: the compute type, `"float32"` or `"bfloat16"`; parameters and outputs are float32.
        attention: `"auto"` or a name in `diffjax.models.layers.attention.IMPLEMENTATIONS`;
            "chunked" for large images.
        attention_levels: levels with attention after each residual block, besides that in the
            middle; none in the published ones for 8×8 pixels.

    Example:
        >>> net = AutoencoderKL(channels=(8, 16), num_res_blocks=1, num_groups=4)
        >>> images = jnp.zeros((1, 8, 12, 3))
        >>> out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), images)
        >>> posterior = jax.eval_shape(lambda x: net.apply(x, images, method="encode"), variables)
        >>> out.shape, posterior.mean.shape
        ((1, 8, 12, 3), (1, 4, 6, 4))

    References:
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022,
        arXiv:2112.10752
    """

    latent_channels: int = 4
    quant_convs: bool = True
    channels: tuple[int, ...] = (128, 256, 512, 512)
    num_res_blocks: int = 2
    num_groups: int = 32
    image_channels: int = 3
    dtype: str = "float32"
    attention: str = "auto"
    attention_levels: tuple[int, ...] = ()

    def setup(self) -> None:
        how = self.num_groups, self.dtype, self.attention, self.attention_levels
        levels, moments = (self.channels, self.num_res_blocks), 2 * self.latent_channels
        self.encoder = Encoder(*levels, moments, *how)
        self.decoder = Decoder(*levels, self.image_channels, *how)
        if self.quant_convs:
            self.quant_conv = Dense(moments)
            self.post_quant_conv = Dense(self.latent_channels)

    @property
    def scale(self) -> int:
        """How many pixels one element of a latent, as `pack` returns it, is high and wide."""
        return 2 ** (len(self.channels) - 1)

    @property
    def packed_channels(self) -> int:
        """The channels of a latent as `pack` returns it."""
        return self.latent_channels

    def encode(self, images: Images) -> Posterior:
        """The posterior of the latents of images."""
        moments = self.encoder(images)
        if self.quant_convs:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, *_LOG_VARIANCES))

    def decode(self, latents: Latents) -> Images:
        """The images of latents."""
        return self.decoder(self.post_quant_conv(latents) if self.quant_convs else latents)

    def pack(self, latents: Latents) -> Array:
        """Latents as generative models see them, before they are scaled: here as they are."""
        return latents

    def unpack(self, latents: Latents) -> Array:
        """The inverse of `pack`."""
        return latents

    def __call__(self, images: Images) -> Images:
        """The images that are decoded from the mean of the posterior."""
        return self.decode(self.unpack(self.pack(self.encode(images).mean)))


class AutoencoderKLFlux2(AutoencoderKL):
    """The autoencoder of FLUX.2: `AutoencoderKL` whose latents are packed and normalised.

    `pack` makes squares of elements one, and normalises their channels by stored statistics.

    Attributes:
        latent_channels: as in `AutoencoderKL`, before they are packed.
        patch_size: the side of the squares.

    Example:
        >>> net = AutoencoderKLFlux2()
        >>> net.scale, net.packed_channels
        (16, 128)

    References:
        github.com/black-forest-labs/flux2
    """

    latent_channels: int = 32
    patch_size: int = 2

    def setup(self) -> None:
        super().setup()
        self.statistics = PackedNorm(self.latent_channels, self.patch_size)

    @property
    def scale(self) -> int:
        return super().scale * self.patch_size

    @property
    def packed_channels(self) -> int:
        return self.latent_channels * self.patch_size**2

    def pack(self, latents: Latents) -> Array:
        return self.statistics.pack(latents)

    def unpack(self, latents: Latents) -> Array:
        return self.statistics.unpack(latents)


class PackedNorm(nn.Module):
    """Squares of elements as channels, normalised by stored statistics, and back.

        pack(z)_c = (z_c − mean_c) / √(variance_c + ε),    c = (channel, row, column in a square)

    They are the running statistics of a batch norm, which does not learn from then on.
    """

    channels: int
    patch_size: int

    def setup(self) -> None:
        size = (self.channels * self.patch_size**2,)
        self.mean = self.param("mean", nn.initializers.zeros, size)
        self.variance = self.param("variance", nn.initializers.ones, size)

    @property
    def deviation(self) -> Array:
        return jnp.sqrt(self.variance + _STATISTICS_EPSILON)[None, None, None]

    def pack(self, z: Latents) -> Array:
        """`[B, p·h, p·w, c]` -> `[B, h, w, c·p²]`."""
        batch, height, width, channels = z.shape
        p = self.patch_size
        z = z.reshape(batch, height // p, p, width // p, p, channels)
        z = z.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // p, width // p, -1)
        return (z - self.mean[None, None, None]) / self.deviation

    def unpack(self, y: Latents) -> Array:
        """The inverse of `pack`."""
        batch, height, width, _ = y.shape
        p = self.patch_size
        z = y * self.deviation + self.mean[None, None, None]
        z = z.reshape(batch, height, width, -1, p, p).transpose(0, 1, 4, 2, 5, 3)
        return z.reshape(batch, height * p, width * p, -1)
