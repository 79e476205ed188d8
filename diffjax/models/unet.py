"""The U-Net of DDPM and ADM: residual blocks, attention on small maps, skip connections."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Float

from diffjax.errors import UserError
from diffjax.kinds import Decay, NotNegative, Positive
from diffjax.models.context import beside, parts_of
from diffjax.models.layers import HIDDEN, Conditioning, Dense, SelfAttention, compute_type
from diffjax.models.placement import BATCH, constrain
from diffjax.models.remat import rematerialised
from diffjax.shapes import Array, Images, NoiseLabels

SIZES: dict[str, dict] = {
    "DDPM-CIFAR10": {
        "channels": 128,
        "channel_multipliers": (1, 2, 2, 2),
        "num_res_blocks": 2,
        "attention_resolutions": (16,),
        "head_channels": 256,
        "scale_shift": False,
        "dropout": 0.1,
    },
    "ADM-64": {
        "channels": 192,
        "channel_multipliers": (1, 2, 3, 4),
        "num_res_blocks": 3,
        "attention_resolutions": (32, 16, 8),
        "head_channels": 64,
        "residual_resampling": True,
        "dropout": 0.1,
    },
}
"""Published sizes: `UNet(num_classes=0, **SIZES["DDPM-CIFAR10"])` is Ho et al. 2020 (35.7 M
parameters at 32x32x3), `UNet(num_classes=1000, **SIZES["ADM-64"])` Dhariwal & Nichol 2021 (296 M at
64x64x3)."""

# Not split by rows: XLA's convolutions of maps that are split by rows and by channels at once
# returned wrong numbers (jax 0.10.2, eight CPU devices, tensor=2 and sequence=2).
MAPS = (BATCH, None, None, None)
"""The sharding of maps `[B, H, W, C]` between blocks; `sequence` splits attention's tokens only."""

_uniform = initializers.variance_scaling(1.0, "fan_avg", "uniform")


def num_groups(channels: int) -> int:
    """The number of groups of a group norm: the largest, up to 32, with 4 or more channels each.

    A group of one channel would be normalised over the pixels alone, which removes any constant
    that is added to a channel, such as the conditioning.

    Example:
        >>> num_groups(128), num_groups(64), num_groups(48)
        (32, 16, 12)
    """
    return max(n for n in range(1, 33) if channels % n == 0 and (n == 1 or channels >= 4 * n))


class GroupNorm(nn.Module):
    """Group norm of maps `[B,H,W,C]`: `flax.linen.GroupNorm`, in a form that is fast on CPUs.

        (x − mean)·rsqrt(var + epsilon)·scale + bias

    Mean and variance are over the pixels and channels of a group. Here the pixels are summed first,
    and then the few channels of each group, which takes a fifth of the time (docs/performance.md).

    Attributes:
        num_groups: the number of groups; divides the channels.
        dtype: the type of the output.
        epsilon: keeps the factor finite; 1e-5, or 1e-6 in the autoencoders of latent diffusion.
        two_pass: whether the variance is the mean of `(x − mean)²`, which stays exact where the
            mean is much larger than the deviations. By default it is the mean of `x²`, less
            `mean²`, which needs one pass less.

    References:
        Wu & He, "Group Normalization", 2018, arXiv:1803.08494
    """

    num_groups: int
    dtype: jnp.dtype
    epsilon: float = 1e-5
    two_pass: bool = False

    @nn.compact
    def __call__(self, x: Images) -> Images:
        channels = x.shape[-1]
        scale = self.param("scale", initializers.ones, (channels,))
        bias = self.param("bias", initializers.zeros, (channels,))
        wide = x.astype(jnp.float32)
        size = channels // self.num_groups
        # A product spreads a group's mean over its channels. With indices, XLA:CPU would look up
        # the group for each channel of each pixel.
        member = jnp.arange(channels)[:, None] // size == jnp.arange(self.num_groups)[None]
        dot = partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)

        def mean(maps: jax.Array) -> jax.Array:
            of_groups = dot(jnp.mean(maps, axis=(1, 2)), member.astype(jnp.float32) / size)
            return dot(of_groups, member.T.astype(jnp.float32))

        center = mean(wide)
        if self.two_pass:
            variance = mean(jnp.square(wide - center[:, None, None]))
        else:
            variance = jnp.maximum(mean(jnp.square(wide)) - jnp.square(center), 0.0)
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale[None]
        normed = (wide - center[:, None, None]) * factor[:, None, None]
        return (normed + bias[None, None, None]).astype(self.dtype)


def _norm(x: jax.Array, dtype: jnp.dtype, name: str) -> jax.Array:
    return GroupNorm(num_groups(x.shape[-1]), dtype, name=name)(x)


def _conv(
    x: jax.Array, features: int, dtype: jnp.dtype, name: str, stride: int = 1, zero: bool = False
) -> jax.Array:
    init = initializers.zeros if zero else _uniform
    return nn.Conv(features, (3, 3), stride, padding=1, dtype=dtype, kernel_init=init, name=name)(x)


def _same(x: jax.Array) -> jax.Array:
    return x


def _halved(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (2, 2), (2, 2))


def _doubled(x: jax.Array) -> jax.Array:
    return x.repeat(2, axis=1).repeat(2, axis=2)


class ResidualBlock(nn.Module):
    """A residual block: two convolutions with the conditioning between them, and a skip.

        h = conv₁(r(SiLU(norm₁(x))))                           r = resample
        h = norm₂(h)·(1 + s) + b        (s, b) = W SiLU(c)        with scale_shift
        h = norm₂(h + b)                     b = W SiLU(c)        without
        x ← skip(r(x)) + conv₂(dropout(SiLU(h)))

    The second convolution is initially 0. Call with `x [B,H,W,C]` and conditioning `[B, D]`;
    returns `[B,H',W',features]`, where `H', W'` is the size after `resample`.
    """

    features: int
    scale_shift: bool
    dropout: float
    dtype: str
    resample: Callable[[jax.Array], jax.Array] = _same

    @nn.compact
    def __call__(
        self, x: Images, c: Float[Array, " batch width_of_c"], train: bool
    ) -> Float[Array, " batch new_height new_width {self.features}"]:
        dtype = compute_type(self.dtype)
        h = self.resample(nn.silu(_norm(x, dtype, "norm_1")))
        h = _conv(h, self.features, dtype, "conv_1")
        x = self.resample(x)
        modulation = nn.Dense(
            (1 + self.scale_shift) * self.features,
            dtype=dtype,
            kernel_init=_uniform,
            name="modulation",
        )(nn.silu(c))[:, None, None]
        if self.scale_shift:
            scale, shift = jnp.split(modulation, 2, axis=-1)
            h = _norm(h, dtype, "norm_2") * (1 + scale) + shift
        else:
            h = _norm(h + modulation, dtype, "norm_2")
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = _conv(h, self.features, dtype, "conv_2", zero=True)
        if x.shape[-1] != self.features:
            x = Dense(self.features, dtype=dtype, kernel_init=_uniform, name="skip")(x)
        return constrain(x + h, *MAPS)


class AttentionBlock(nn.Module):
    """Self-attention over pixels `[B,H,W,C]` with a skip; its output is initially zero."""

    head_channels: int
    dtype: str
    attention: str

    @nn.compact
    def __call__(self, x: Images) -> Images:
        channels = x.shape[-1]
        if self.head_channels < 1 or channels % self.head_channels:
            raise UserError(
                f"U-Net: head_channels={self.head_channels} does not divide the {channels} "
                f"channels of the {x.shape[1]}x{x.shape[2]} map"
            )
        h = _norm(x, compute_type(self.dtype), "norm").reshape(x.shape[0], -1, channels)
        h = SelfAttention(
            channels // self.head_channels,
            self.attention,
            self.dtype,
            kernel_init=_uniform,
            out_init=initializers.zeros,
            name="attention",
        )(h)
        return constrain(x + h.reshape(x.shape), *MAPS)


class UNet(nn.Module):
    """The U-Net of DDPM and ADM, conditioned on noise label and class.

    Level i has `channels · channel_multipliers[i]` channels on maps of 1 / 2^i of the image's
    sides. Each level has `num_res_blocks` residual blocks on the way down. On the way up it has one
    more, each with a skip connection. Between the two ways are two residual blocks around
    attention. The output is initially zero, so an untrained network returns exactly 0. The output
    of the middle is sown (`HIDDEN`).

    Call with `x [B,H,W,C]`, `noise_label [B]` (floats, of the order 0 … 1000; `[B, 2]` for two
    labels, see `Conditioning`), a condition: labels `[B] int32` (`num_classes` is the null label,
    which is also used for None), images `[B,H,W,C]` beside `x` in the channels, or a dict of both,
    and `train=True` with `rngs={"dropout": key}` if there is dropout; returns `[B,H,W,C]` float32.

    Attributes:
        num_classes: the number of classes; 0 is without labels.
        channels: the number of channels of the first level; 128 (DDPM) to 256.
        channel_multipliers: one factor per level.
        num_res_blocks: the number of residual blocks per level on the way down; typically 2 or 3.
        attention_resolutions: the heights in pixels of the maps whose blocks are followed by
            attention; typically 16 and below. Heights that do not occur are ignored, and the middle
            always has attention.
        head_channels: the number of channels of one attention head; divides those of the maps with
            attention. 64 in ADM.
        scale_shift: whether the conditioning scales and shifts (ADM) or only shifts (DDPM).
        residual_resampling: whether maps are halved and doubled inside a residual block (ADM) or by
            a convolution (DDPM).
        dropout: the fraction of activations dropped in each residual block in training; 0.1 in DDPM
            and in ADM at 64×64.
        dtype: the compute type, `"float32"` or `"bfloat16"`; parameters are always float32.
        attention: `"auto"` or a name in `diffjax.models.attention.IMPLEMENTATIONS`.
        out_channels: the number of output channels; 0 means that of the input.
        remat: a name in `diffjax.models.remat.REMAT`: which activations residual and attention
            blocks keep.

    Raises:
        UserError: a map can't be halved as often as there are levels, or `head_channels` does not
            divide the channels.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = UNet(num_classes=10, channels=32, channel_multipliers=(1, 2))
        >>> x, t, label = jnp.ones((2, 8, 8, 1)), jnp.ones(2), jnp.array([3, 10])
        >>> out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t, label)
        >>> out.shape
        (2, 8, 8, 1)

    References:
        Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv:2006.11239
        Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, arXiv:2105.05233
    """

    num_classes: int
    channels: Positive[int] = 64
    channel_multipliers: tuple[Positive[int], ...] = (1, 2, 2)
    num_res_blocks: Positive[int] = 2
    attention_resolutions: tuple[Positive[int], ...] = (16,)
    head_channels: Positive[int] = 64
    scale_shift: bool = True
    residual_resampling: bool = False
    dropout: Decay[float] = 0.0
    dtype: str = "float32"
    attention: str = "auto"
    out_channels: NotNegative[int] = 0
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        x: Images,
        noise_label: NoiseLabels,
        cond: Any = None,
        train: bool = False,
    ) -> Float[Array, " batch height width out"]:
        self._check(*x.shape[1:3])
        dtype = compute_type(self.dtype)
        labels, tokens, images = parts_of(cond)
        if tokens is not None:
            raise UserError("UNet attends to no tokens: take DiT for this condition")
        c = Conditioning(
            self.num_classes,
            4 * self.channels,
            num_frequencies=self.channels,
            dtype=self.dtype,
            kernel_init=_uniform,
            # As large as the embedded time, as in ADM; smaller embeddings are learned late.
            label_init=initializers.normal(1.0),
            name="conditioning",
        )(noise_label, labels).vector

        residual_block = rematerialised(ResidualBlock, self.remat, static_argnums=(3,))
        attention_block = rematerialised(AttentionBlock, self.remat)

        def residual(h: jax.Array, level: int, name: str, resample=_same) -> jax.Array:
            features = self.channel_multipliers[level] * self.channels
            return residual_block(
                features, self.scale_shift, self.dropout, self.dtype, resample, name=name
            )(h, c, train)

        def attend(h: jax.Array, name: str) -> jax.Array:
            return attention_block(self.head_channels, self.dtype, self.attention, name=name)(h)

        def block(h: jax.Array, level: int, name: str) -> jax.Array:
            h = residual(h, level, name)
            return attend(h, f"{name}_attention") if h.shape[1] in self.attention_resolutions else h

        def halve(h: jax.Array, level: int, name: str) -> jax.Array:
            if self.residual_resampling:
                return residual(h, level, name, _halved)
            return _conv(h, h.shape[-1], dtype, name, stride=2)

        def double(h: jax.Array, level: int, name: str) -> jax.Array:
            if self.residual_resampling:
                return residual(h, level, name, _doubled)
            return _conv(_doubled(h), h.shape[-1], dtype, name)

        last = len(self.channel_multipliers) - 1
        h = _conv(beside(x, images), self.channels, dtype, "conv_in")
        skips = [h]
        for level in range(last + 1):
            for i in range(self.num_res_blocks):
                h = block(h, level, f"down_{level}_{i}")
                skips.append(h)
            if level < last:
                h = halve(h, level, f"down_{level}_resample")
                skips.append(h)

        h = residual(h, last, "middle_0")
        h = attend(h, "middle_attention")
        h = residual(h, last, "middle_1")
        self.sow(*HIDDEN, h)

        for level in reversed(range(last + 1)):
            for i in range(self.num_res_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), level, f"up_{level}_{i}")
            if level > 0:
                h = double(h, level, f"up_{level}_resample")

        h = nn.silu(_norm(h, dtype, "final_norm"))
        return _conv(h, self.out_channels or x.shape[-1], dtype, "final_conv", zero=True).astype(
            jnp.float32
        )

    def _check(self, height: int, width: int) -> None:
        halvings = len(self.channel_multipliers) - 1
        if self.channels < 2 or self.channels % 2:
            raise UserError(f"U-Net: channels={self.channels} is not a positive even number")
        if halvings < 0:
            raise UserError("U-Net: channel_multipliers is empty; one factor per level is needed")
        if height % 2**halvings or width % 2**halvings:
            possible = max(n for n in range(halvings) if not (height % 2**n or width % 2**n))
            raise UserError(
                f"U-Net: {halvings + 1} levels halve an image of {height}x{width} {halvings} "
                f"times, which is not whole; at most {possible + 1} channel_multipliers fit"
            )
