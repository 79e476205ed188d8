"""The encoder and the decoder of DC-AE: residual blocks, linear attention, shortcuts of pixels."""

from itertools import pairwise

import flax.linen as nn
import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.models.layers.common import Dense, compute_type
from diffjax.shapes import Array, Images, Latents

_EPSILON, _SMALLEST_SUM = 1e-5, 1e-15
_BOTH = ((1, 1), (1, 1))


def unshuffled(x: Images) -> Array:
    """Squares of 2×2 pixels as channels, `[B, 2h, 2w, c] -> [B, h, w, 4c]`.

    The order of the new channels is (channel, row, column), unlike that of `SpaceToDepth`.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // 2, width // 2, 4 * channels)


def shuffled(x: Images) -> Array:
    """The inverse of `unshuffled`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, channels // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, channels // 4)


def averaged(x: Images, channels: int) -> Array:
    """So many channels: each is the mean of neighbouring ones."""
    return x.reshape(*x.shape[:3], channels, -1).mean(-1)


def repeated(x: Images, channels: int) -> Array:
    """So many channels: each occurs several times in a row."""
    return jnp.repeat(x, channels // x.shape[-1], axis=-1)


def _conv(x: Array, features: int, dtype: jnp.dtype, name: str, *, bias: bool = True) -> Array:
    return nn.Conv(features, (3, 3), padding=_BOTH, use_bias=bias, dtype=dtype, name=name)(x)


class RMSNorm(nn.Module):
    """`scale·x / √(mean x² + ε) + bias` over the channels, with ε = 1e-5."""

    dtype: str

    @nn.compact
    def __call__(self, x: Images) -> Images:
        size, dtype = x.shape[-1:], compute_type(self.dtype)
        scale = self.param("scale", nn.initializers.ones, size)
        bias = self.param("bias", nn.initializers.zeros, size)
        x = x.astype(jnp.float32)
        x = x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + _EPSILON)
        return (scale[None, None, None] * x + bias[None, None, None]).astype(dtype)


class BatchNorm(nn.Module):
    """`scale·(x − mean) / √(variance + ε) + bias` by stored statistics, with ε = 1e-5.

    They are the running statistics of a batch norm, which does not learn from then on.
    """

    dtype: str

    @nn.compact
    def __call__(self, x: Images) -> Images:
        size, dtype = x.shape[-1:], compute_type(self.dtype)
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        mean, bias = (self.param(name, zeros, size) for name in ("mean", "bias"))
        variance, scale = (self.param(name, ones, size) for name in ("variance", "scale"))
        factor = scale / jnp.sqrt(variance + _EPSILON)
        x = x.astype(jnp.float32) - mean[None, None, None]
        return (x * factor[None, None, None] + bias[None, None, None]).astype(dtype)


class ResidualBlock(nn.Module):
    """`x + norm(conv₂(σ(conv₁(x))))`.

    σ is SiLU and the norm that of `RMSNorm`, or with `batch_norm` ReLU and that of `BatchNorm`.
    """

    dtype: str
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x: Images) -> Images:
        dtype, features = compute_type(self.dtype), x.shape[-1]
        h = _conv(x, features, dtype, "conv_1")
        h = nn.relu(h) if self.batch_norm else nn.silu(h)
        h = _conv(h, features, dtype, "conv_2", bias=False)
        return x + (BatchNorm if self.batch_norm else RMSNorm)(self.dtype, name="norm")(h)


class LinearAttention(nn.Module):
    """Attention of all positions whose cost is linear in their number, and a skip.

        out_i = Σ_j (q_i · k_j) v_j / Σ_j (q_i · k_j),    q, k ≥ 0 by ReLU
        x + norm(W out)

    For each kernel size there are as many heads again: queries, keys and values of their
    surroundings, by a convolution of each channel and a linear map within each head.
    """

    head_width: int
    kernel_sizes: tuple[int, ...]
    dtype: str

    @nn.compact
    def __call__(self, x: Images) -> Images:
        dtype, width = compute_type(self.dtype), self.head_width
        batch, height, columns, channels = x.shape
        groups = 3 * channels // width
        qkv = Dense(3 * channels, use_bias=False, dtype=dtype, name="qkv")(x)
        every = [qkv]
        for i, size in enumerate(self.kernel_sizes):
            local = nn.Conv(
                3 * channels,
                (size, size),
                padding=((size // 2, size // 2),) * 2,
                feature_group_count=3 * channels,
                use_bias=False,
                dtype=dtype,
                name=f"local_{i}",
            )(qkv)
            mixed = nn.Conv(
                3 * channels,
                (1, 1),
                feature_group_count=groups,
                use_bias=False,
                dtype=dtype,
                name=f"mixed_{i}",
            )
            every.append(mixed(local))
        # Published weights have the three of a head next to each other.
        heads = jnp.concatenate(every, -1).astype(jnp.float32)
        heads = heads.reshape(batch, height * columns, -1, 3, width)
        query, key, value = nn.relu(heads[..., 0, :]), nn.relu(heads[..., 1, :]), heads[..., 2, :]
        value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1)
        sums = jnp.einsum("bnhd,bnhe->bhde", key, value)
        out = jnp.einsum("bnhd,bhde->bnhe", query, sums)
        out = out[..., :-1] / (out[..., -1:] + _SMALLEST_SUM)
        out = out.reshape(batch, height, columns, -1).astype(dtype)
        out = Dense(channels, use_bias=False, dtype=dtype, name="out")(out)
        return x + RMSNorm(self.dtype, name="norm")(out)


class GatedConv(nn.Module):
    """`x + norm(W₂(a · SiLU(b)))` with `[a, b] = conv(SiLU(W₁ x))`, a convolution by channels."""

    dtype: str

    @nn.compact
    def __call__(self, x: Images) -> Images:
        dtype, channels = compute_type(self.dtype), x.shape[-1]
        inner = 8 * channels
        h = nn.silu(Dense(inner, dtype=dtype, name="up")(x))
        depthwise = nn.Conv(
            inner, (3, 3), padding=_BOTH, feature_group_count=inner, dtype=dtype, name="depthwise"
        )
        h, gate = jnp.split(depthwise(h), 2, axis=-1)
        h = Dense(channels, use_bias=False, dtype=dtype, name="down")(h * nn.silu(gate))
        return x + RMSNorm(self.dtype, name="norm")(h)


class Halved(nn.Module):
    """A map of half the size: a convolution, and with `shortcut` the means of squares of pixels."""

    features: int
    shuffle: bool
    dtype: str
    shortcut: bool = True

    @nn.compact
    def __call__(self, x: Images) -> Array:
        dtype = compute_type(self.dtype)
        if self.shuffle:
            h = unshuffled(_conv(x, self.features // 4, dtype, "conv"))
        else:
            h = nn.Conv(self.features, (3, 3), 2, _BOTH, dtype=dtype, name="conv")(x)
        return h + averaged(unshuffled(x), self.features) if self.shortcut else h


class Doubled(nn.Module):
    """A map of twice the size: a convolution, and with `shortcut` the channels as pixels."""

    features: int
    shuffle: bool
    dtype: str
    shortcut: bool = True

    @nn.compact
    def __call__(self, x: Images) -> Array:
        dtype = compute_type(self.dtype)
        if self.shuffle:
            h = shuffled(_conv(x, 4 * self.features, dtype, "conv"))
        else:
            h = _conv(x.repeat(2, axis=1).repeat(2, axis=2), self.features, dtype, "conv")
        return h + shuffled(repeated(x, 4 * self.features)) if self.shortcut else h


class _Coder(nn.Module):
    """What the encoder and the decoder share; the attributes are those of `DCAE`."""

    channels: tuple[int, ...]
    num_blocks: tuple[int, ...]
    attention_levels: tuple[int, ...]
    kernel_sizes: tuple[int, ...]
    head_width: int
    out_channels: int
    shuffle: bool
    dtype: str
    batch_norm: bool = False

    def blocks(self, x: Array, level: int, name: str) -> Array:
        for i in range(self.num_blocks[level]):
            if level not in self.attention_levels:
                block = ResidualBlock(self.dtype, self.batch_norm, name=f"{name}_{level}_{i}")
                x = block(x)
                continue
            how = self.head_width, self.kernel_sizes, self.dtype
            x = LinearAttention(*how, name=f"{name}_{level}_{i}_attention")(x)
            x = GatedConv(self.dtype, name=f"{name}_{level}_{i}_conv")(x)
        return x

    def conv(self, x: Array, features: int, name: str) -> Array:
        return _conv(x, features, compute_type(self.dtype), name)


class Encoder(_Coder):
    """`[B, H, W, C]` -> `[B, H/s, W/s, out_channels]`, where `s` is 2 to the levels less 1."""

    @nn.compact
    def __call__(self, x: Images) -> Latents:
        how = self.shuffle, self.dtype
        if self.num_blocks[0]:
            x = self.conv(x, self.channels[0], "conv_in")
        else:
            x = Halved(self.channels[1], *how, shortcut=False, name="conv_in")(x)
        last = len(self.channels) - 1
        for level in range(len(self.channels)):
            x = self.blocks(x, level, "down")
            if level < last and self.num_blocks[level]:
                x = Halved(self.channels[level + 1], *how, name=f"down_{level}_resample")(x)
        out = self.conv(x, self.out_channels, "final_conv") + averaged(x, self.out_channels)
        return out.astype(jnp.float32)


class Decoder(_Coder):
    """`[B, h, w, c]` -> `[B, s·h, s·w, out_channels]`, as of `Encoder`."""

    @nn.compact
    def __call__(self, x: Latents) -> Images:
        how = self.shuffle, self.dtype
        channels = self.channels[-1]
        x = self.conv(x, channels, "conv_in") + repeated(x, channels).astype(self.dtype)
        last = len(self.channels) - 1
        for level in reversed(range(len(self.channels))):
            if level < last and self.num_blocks[level]:
                x = Doubled(self.channels[level], *how, name=f"up_{level}_resample")(x)
            x = self.blocks(x, level, "up")
        x = nn.relu(RMSNorm(self.dtype, name="final_norm")(x))
        if self.num_blocks[0]:
            x = self.conv(x, self.out_channels, "final_conv")
        else:
            x = Doubled(self.out_channels, *how, shortcut=False, name="final_conv")(x)
        return x.astype(jnp.float32)


class DCAE(nn.Module):
    """The deep compression autoencoder: 32 to 128 pixels of an image to one element of a latent.

        z = encode(x)               [B, H, W, C] in [-1, 1] -> [B, H/s, W/s, c]
        x = decode(z)               [B, h, w, c] -> [B, s·h, s·w, C]

    Level i has `channels[i]` channels on maps of 1 / 2^i of the image's sides, so
    `s = 2^(levels − 1)`. Convolutions between levels learn the difference from a shortcut without
    parameters: means of pixels and channels on the way down, and their copies on the way up.

    A call with images decodes what it encodes. The methods are evaluated by
    `network.apply(variables, images, method="encode")`.

    Attributes:
        latent_channels: the number of channels of a latent: 32 (f32), 128 (f64), 512 (f128).
        channels: the number of channels of each level, multiples of `head_width` in those with
            attention; four times it is a multiple of the next one, and the last one a multiple of
            `latent_channels`. Nothing depends on that of a first level without blocks.
        encoder_blocks: the number of blocks of each level; a first level without blocks, 0, is
            skipped by a first convolution to the second one.
        decoder_blocks: likewise; 0 in the same levels.
        attention_levels: levels with blocks of attention and gated convolutions (EfficientViT); the
            other ones have residual blocks.
        kernel_sizes: the kernel sizes of the convolutions that make further heads of attention:
            none, or 5 (Sana).
        head_width: the width of an attention head.
        batch_norm: whether the decoder's residual blocks have batch norm and ReLU, in place of RMS
            norm and SiLU.
        shuffle: whether maps are halved and doubled by pixels that become channels and back, or by
            a convolution in steps of two and by repeated pixels (Sana).
        image_channels: the number of channels of images.
        dtype: the compute type, `"float32"` or `"bfloat16"`; parameters and outputs are float32.

    Raises:
        UserError: a level other than the first one has no blocks, or one without blocks has some in
            the other half; or channels do not divide each other.

    Example:
        >>> import jax
        >>> net = DCAE(8, (8, 16, 32), (0, 1, 1), (0, 1, 1), (2,), head_width=8)
        >>> images = jnp.zeros((1, 8, 12, 3))
        >>> out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), images)
        >>> latents = jax.eval_shape(lambda x: net.apply(x, images, method="encode"), variables)
        >>> out.shape, latents.shape
        ((1, 8, 12, 3), (1, 2, 3, 8))

    References:
        Chen et al., "Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models",
        2024, arXiv:2410.10733; Xie et al. 2024, arXiv:2410.10629, for Sana's
    """

    latent_channels: int = 32
    channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_blocks: tuple[int, ...] = (0, 4, 8, 2, 2, 2)
    decoder_blocks: tuple[int, ...] = (0, 5, 10, 2, 2, 2)
    attention_levels: tuple[int, ...] = (3, 4, 5)
    kernel_sizes: tuple[int, ...] = ()
    head_width: int = 32
    batch_norm: bool = True
    shuffle: bool = True
    image_channels: int = 3
    dtype: str = "float32"

    def setup(self) -> None:
        empty = [[not n for n in each] for each in (self.encoder_blocks, self.decoder_blocks)]
        if empty[0] != empty[1] or any(empty[0][1:]):
            raise UserError(
                "DCAE: only the first level may have no blocks, and then in both halves; not "
                f"encoder_blocks={self.encoder_blocks}, decoder_blocks={self.decoder_blocks}"
            )
        within = self.channels[empty[0][0] :]
        pairs = [*((4 * one, other) for one, other in pairwise(within))]
        if any(one % other for one, other in (*pairs, (within[-1], self.latent_channels))):
            raise UserError(
                "DCAE: four times the channels of a level are a multiple of the next ones, and the "
                f"last ones of latent_channels={self.latent_channels}; not channels={within}"
            )
        levels = self.attention_levels, self.kernel_sizes, self.head_width
        how = self.shuffle, self.dtype
        self.encoder = Encoder(
            self.channels, self.encoder_blocks, *levels, self.latent_channels, *how
        )
        self.decoder = Decoder(
            self.channels, self.decoder_blocks, *levels, self.image_channels, *how, self.batch_norm
        )

    @property
    def scale(self) -> int:
        """How many pixels one element of a latent is high and wide."""
        return 2 ** (len(self.channels) - 1)

    @property
    def packed_channels(self) -> int:
        """The channels of a latent."""
        return self.latent_channels

    def encode(self, images: Images) -> Latents:
        """The latents of images."""
        return self.encoder(images)

    def decode(self, latents: Latents) -> Images:
        """The images of latents."""
        return self.decoder(latents)

    def __call__(self, images: Images) -> Images:
        """The images that are decoded from the latents of images."""
        return self.decode(self.encode(images))
