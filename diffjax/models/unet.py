"""The U-Net: residual blocks, attention on small maps or to tokens, skip connections.

Published networks are settings of it: ADM (`models/adm`), DDPM (`models/ddpm`), DDPM++ and NCSN++
(`models/edm`), Stable Diffusion (`models/stable_diffusion`), Kandinsky 2 (`models/kandinsky`).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Float

from diffjax.conditions import TokenStates
from diffjax.errors import UserError, nearest
from diffjax.kinds import Decay, NotNegative, Positive
from diffjax.models.layers.common import (
    COSINES_FIRST,
    HIDDEN,
    Conditioning,
    Dense,
    Fourier,
    SelfAttention,
    Sinusoids,
    compute_type,
)
from diffjax.models.layers.context import AttentionWithTokens, Parts, beside, parts_of
from diffjax.models.layers.placement import BATCH, constrain
from diffjax.models.layers.remat import rematerialised
from diffjax.models.layers.resampling import BOX, check_filter, doubled, halved
from diffjax.models.layers.transformer_block import TransformerBlock
from diffjax.shapes import Array, Images, NoiseLabels

# Not split by rows: XLA's convolutions of maps that are split by rows and by channels at once
# returned wrong numbers (jax 0.10.2, eight CPU devices, tensor=2 and sequence=2).
MAPS = (BATCH, None, None, None)
"""The sharding of maps `[B, H, W, C]` between blocks; `sequence` splits attention's tokens only."""

_uniform = initializers.variance_scaling(1.0, "fan_avg", "uniform")
_SINES_FIRST = Sinusoids(endpoint=True, sine_first=True)


def num_groups(channels: int) -> int:
    """The number of groups of a group norm: the largest, up to 32, with 4 or more channels each.

    A group of one channel would be normalised over the pixels alone, which removes any constant
    that is added to a channel, such as the conditioning.

    Example:
        >>> num_groups(128), num_groups(64), num_groups(48)
        (32, 16, 12)
    """
    return max(n for n in range(1, 33) if channels % n == 0 and (n == 1 or channels >= 4 * n))


def multipliers_of(channels: int, widths: Iterable[int]) -> tuple[float, ...]:
    """`channel_multipliers` of a U-Net: the channels of its levels divided by `channels`.

    They are integers where `channels` divides them, as in the published settings.

    Example:
        >>> multipliers_of(64, [32, 64, 128])
        (0.5, 1, 2)
    """
    return tuple(w / channels if w % channels else w // channels for w in widths)


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


@dataclass(frozen=True)
class Embedding:
    """How noise labels, classes and labels of augmentation become one vector.

    Attributes:
        frequencies: the embedding of the noise label, `Sinusoids` or `Fourier`.
        width: that of the frequencies, in units of the network's `channels`; 2 in NCSN++.
        null_row: whether the null label is learned, as a row of the table of labels. Without one it
            adds nothing, as in EDM.
        early_labels: whether labels are added to the frequencies (DDPM++) or to the vector (ADM).
        augment_dim: the number of labels of augmentation; 0 is without. EDM has 9 for small images.
        added_width: the width of the embedding of each number of the condition; with it, the pooled
            vector of its tokens and all embedded numbers are added to the vector, through two dense
            layers. 256 in SDXL; 0 is without.
        guidance_width: the width of the embedding of a scale of guidance, which a dense layer adds
            to the frequencies. 256 in LCM; 0 is without.
        embedded_guidance: that scale; 8 in LCM. The network, which was distilled, returns in one
            evaluation what guidance of this scale returns in two.
    """

    frequencies: Sinusoids | Fourier = COSINES_FIRST
    width: Positive[int] = 1
    null_row: bool = True
    early_labels: bool = False
    augment_dim: NotNegative[int] = 0
    added_width: NotNegative[int] = 0
    guidance_width: NotNegative[int] = 0
    embedded_guidance: float = 8.0


WITHOUT_NULL_ROW = Embedding(null_row=False)
"""The null label adds nothing, as in ADM, EDM and Stable Diffusion's upscalers."""


@dataclass(frozen=True)
class Resampling:
    """How maps are halved and doubled between levels.

    Attributes:
        taps: the filter in residual blocks (`residual_resampling`): `(1, 1)` is the mean of two by
            two pixels, `(1, 3, 3, 1)` that of NCSN++.
        projected: whether the skip around such a block has a dense layer even if it keeps the
            number of channels, as in DDPM++.
        padded_before: whether convolutions that halve see one more pixel on each side, and not
            on the lower and right side alone, as in DDPM.
    """

    taps: tuple[Positive[float], ...] = BOX
    projected: bool = False
    padded_before: bool = True


@dataclass(frozen=True)
class Transformers:
    """Which maps are followed by transformers that attend to the condition's tokens.

    Attributes:
        levels: the number of transformer blocks after each residual block of a level, 0 for none;
            (1, 1, 1, 0) in Stable Diffusion, (0, 2, 10) in SDXL.
        middle: that between the two residual blocks of the middle; 1, and 10 in SDXL.
    """

    levels: tuple[NotNegative[int], ...]
    middle: Positive[int] = 1


def _conv(
    features: int,
    dtype: jnp.dtype,
    name: str,
    stride: int = 1,
    zero: bool = False,
    padding: Any = 1,
) -> nn.Conv:
    init = initializers.zeros if zero else _uniform
    return nn.Conv(
        features, (3, 3), stride, padding=padding, dtype=dtype, kernel_init=init, name=name
    )


def _same(x: jax.Array) -> jax.Array:
    return x


class ResidualBlock(nn.Module):
    """A residual block: two convolutions with the conditioning between them, and a skip.

        h = conv₁(r(SiLU(norm₁(x))))                           r = resample
        h = norm₂(h)·(1 + s) + b        (s, b) = W SiLU(c)        with scale_shift
        h = norm₂(h + b)                     b = W SiLU(c)        without
        x ← (skip(r(x)) + conv₂(dropout(SiLU(h))))·skip_scale

    The second convolution is initially 0. Call with `x [B,H,W,C]` and conditioning `[B, D]`;
    returns `[B,H',W',features]`, where `H', W'` is the size after `resample`.
    """

    features: int
    scale_shift: bool
    dropout: float
    dtype: str
    resample: Callable[[jax.Array], jax.Array] = _same
    project: bool = False
    epsilon: float = 1e-5
    skip_scale: float = 1.0
    num_groups: int = 0

    @nn.compact
    def __call__(
        self, x: Images, c: Float[Array, " batch width_of_c"], train: bool
    ) -> Float[Array, " batch new_height new_width {self.features}"]:
        dtype = compute_type(self.dtype)
        h = self.resample(nn.silu(self._norm(x, "norm_1")))
        h = _conv(self.features, dtype, "conv_1")(h)
        x = self.resample(x)
        modulation = nn.Dense(
            (1 + self.scale_shift) * self.features,
            dtype=dtype,
            kernel_init=_uniform,
            name="modulation",
        )(nn.silu(c))[:, None, None]
        if self.scale_shift:
            scale, shift = jnp.split(modulation, 2, axis=-1)
            h = self._norm(h, "norm_2") * (1 + scale) + shift
        else:
            h = self._norm(h + modulation, "norm_2")
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = _conv(self.features, dtype, "conv_2", zero=True)(h)
        if self.project or x.shape[-1] != self.features:
            x = Dense(self.features, dtype=dtype, kernel_init=_uniform, name="skip")(x)
        return constrain((x + h) * self.skip_scale, *MAPS)

    def _norm(self, x: jax.Array, name: str) -> jax.Array:
        groups = self.num_groups or num_groups(x.shape[-1])
        return GroupNorm(groups, compute_type(self.dtype), self.epsilon, name=name)(x)


class AttentionBlock(nn.Module):
    """Self-attention over pixels `[B,H,W,C]` with a skip; its output is initially zero.

        x ← (x + attention(norm(x)))·skip_scale

    There are `num_heads` heads, or, if that is 0, as many as have `head_channels` channels each.
    Called with the condition's tokens, it attends to them too (`AttentionWithTokens`).
    """

    head_channels: int
    dtype: str
    attention: str
    num_heads: int = 0
    qkv_order: str = "parts"
    epsilon: float = 1e-5
    skip_scale: float = 1.0
    num_groups: int = 0

    @nn.compact
    def __call__(self, x: Images, context: TokenStates | None = None) -> Images:
        channels = x.shape[-1]
        heads = _num_heads(x, self.num_heads, self.head_channels)
        dtype = compute_type(self.dtype)
        groups = self.num_groups or num_groups(channels)
        norm = GroupNorm(groups, dtype, self.epsilon, name="norm")
        kind: Any = SelfAttention if context is None else AttentionWithTokens
        look = kind(
            heads,
            self.attention,
            self.dtype,
            kernel_init=_uniform,
            out_init=initializers.zeros,
            qkv_order=self.qkv_order,
            name="attention",
        )
        tokens = () if context is None else (context,)
        h = look(norm(x).reshape(x.shape[0], -1, channels), *tokens)
        return constrain((x + h.reshape(x.shape)) * self.skip_scale, *MAPS)


def _num_heads(x: jax.Array, num_heads: int, head_channels: int) -> int:
    """The number of heads on a map: as given, or as many as have `head_channels` channels each."""
    channels = x.shape[-1]
    parts, what = (num_heads, "num_heads") if num_heads else (head_channels, "head_channels")
    if parts < 1 or channels % parts:
        raise UserError(
            f"U-Net: {what}={parts} does not divide the {channels} "
            f"channels of the {x.shape[1]}x{x.shape[2]} map"
        )
    return num_heads or channels // head_channels


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a map `[B,H,W,C]` and the condition's tokens.

        x ← x + out(block_n(… block_0(in(norm(x)), tokens) …, tokens))

    `in` and `out` are dense layers of each pixel; the norm is a group norm with an epsilon of 1e-6.
    The output layer is initially 0. Rombach et al. 2022 (arXiv:2112.10752).
    """

    depth: int
    head_channels: int
    dtype: str
    attention: str
    num_heads: int = 0
    num_groups: int = 0

    @nn.compact
    def __call__(self, x: Images, context: TokenStates) -> Images:
        channels, dtype = x.shape[-1], compute_type(self.dtype)
        heads = _num_heads(x, self.num_heads, self.head_channels)
        groups = self.num_groups or num_groups(channels)
        h = GroupNorm(groups, dtype, 1e-6, name="norm")(x).reshape(x.shape[0], -1, channels)
        h = Dense(channels, dtype=dtype, kernel_init=_uniform, name="in")(h)
        for i in range(self.depth):
            h = TransformerBlock(heads, self.dtype, self.attention, name=f"block_{i}")(h, context)
        h = Dense(channels, dtype=dtype, kernel_init=initializers.zeros, name="out")(h)
        return constrain(x + h.reshape(x.shape), *MAPS)


_NO_PARTS = Parts()


class UNet(nn.Module):
    """The U-Net of ADM, DDPM, DDPM++, NCSN++ and Stable Diffusion, by settings.

    Level i has `channels · channel_multipliers[i]` channels on maps of 1 / 2^i of the image's
    sides. Each level has `num_res_blocks` residual blocks on the way down. On the way up it has one
    more, each with a skip connection. Between the two ways are two residual blocks around
    attention. The output is initially zero, so an untrained network returns exactly 0. The output
    of the middle is sown (`HIDDEN`).

    Call with `x [B,H,W,C]`, `noise_label [B]` (floats, of the order 0 … 1000; `[B, 2]` for two
    labels, see `Conditioning`), a condition: labels `[B] int32` (`num_classes` is the null label,
    which is also used for None), images `[B,H,W,C]` beside `x` in the channels, token states with
    `transformers`, numbers `[B, k]` with `embedding.added_width`, or a dict of these, and
    `train=True` with `rngs={"dropout": key}` if there is dropout; returns `[B,H,W,C]` float32.
    With `embedding.augment_dim = k`, numbers `[B, k]` say how images are augmented; without them
    images are as they were.

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
        attention: `"auto"` or a name in
            `diffjax.models.layers.attention.IMPLEMENTATIONS`.
        out_channels: the number of output channels; 0 means that of the input.
        remat: a name in `diffjax.models.layers.remat.REMAT`: which activations residual and
            attention blocks keep.
        first_multiplier: the factor of the first convolution; 0.5 in ADM at 512×512.
        num_heads: the number of attention heads on all maps; 0 means as many as `head_channels`
            divides. 1 in DDPM and DDPM++.
        qkv_order: the order of attention's columns, a name in
            `diffjax.models.layers.common.QKV_ORDERS`.
        sparse_attention: whether on the way up only the last block of a level is followed by
            attention, as in DDPM++.
        norm_epsilon: ε of all group norms; 1e-5 in ADM, 1e-6 in DDPM and DDPM++.
        skip_scale: the factor after each sum of a block; √½ in DDPM++, which keeps the variance.
        embedding: how noise label and class are embedded.
        resampling: how maps are halved and doubled.
        images_in: how the halved image is added to each level on the way down: `"none"`, `"skip"`
            (a dense layer of it), or `"residual"` (NCSN++: a convolution of the sum so far).
        images_out: whether the output is a sum over levels, each at its own size and doubled, as in
            StyleGAN2.
        transformers: where transformers attend to the condition's tokens, in the place of
            self-attention; None is without.
        num_groups: the number of groups of all group norms; 0 is that of `num_groups`.
        token_levels: the levels whose self-attention attends to the condition's tokens too, as in
            Kandinsky 2, in the place of `attention_resolutions`; that of the middle does with any.
            None is without.

    Raises:
        UserError: a map can't be halved as often as there are levels, the heads do not divide the
            channels, or a name is unknown.

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
        Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations",
        2021, arXiv:2011.13456
        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
        arXiv:2206.00364
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022,
        arXiv:2112.10752
    """

    num_classes: int
    channels: Positive[int] = 64
    channel_multipliers: tuple[Positive[float], ...] = (1, 2, 2)
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
    first_multiplier: Positive[float] = 1.0
    num_heads: NotNegative[int] = 0
    qkv_order: str = "parts"
    sparse_attention: bool = False
    norm_epsilon: Positive[float] = 1e-5
    skip_scale: Positive[float] = 1.0
    embedding: Embedding = Embedding()
    resampling: Resampling = Resampling()
    images_in: str = "none"
    images_out: bool = False
    transformers: Transformers | None = None
    num_groups: NotNegative[int] = 0
    token_levels: tuple[NotNegative[int], ...] | None = None

    @nn.compact
    def __call__(
        self,
        x: Images,
        noise_label: NoiseLabels,
        cond: Any = None,
        train: bool = False,
    ) -> Float[Array, " batch height width out"]:
        self._check(*x.shape[1:3])
        how = self.embedding
        parts = parts_of(cond, takes_numbers=how.added_width > 0 or how.augment_dim > 0)
        self._check_parts(parts)
        c, context = self._conditioning(noise_label, parts), self._tokens(parts)
        h, skips = self._down(beside(x, parts.images), c, train, context)
        h = self._middle(h, c, train, context)
        self.sow(*HIDDEN, h)
        out_channels = self.out_channels or x.shape[-1]
        return self._up(h, skips, c, train, out_channels, context).astype(jnp.float32)

    def _conditioning(
        self,
        noise_label: jax.Array,
        parts: Parts = _NO_PARTS,
    ) -> jax.Array:
        how = self.embedding
        augment_labels = parts.numbers if how.augment_dim else None
        if how.guidance_width:
            # Added to the frequencies without a bias, as labels of augmentation are.
            scale = jnp.full(noise_label.shape[0], 1000.0 * (how.embedded_guidance - 1.0))
            augment_labels = _SINES_FIRST(self, scale, how.guidance_width)
        vector = Conditioning(
            self.num_classes,
            4 * self.channels,
            num_frequencies=how.width * self.channels,
            frequencies=how.frequencies,
            null_row=how.null_row,
            early_labels=how.early_labels,
            augment_dim=how.augment_dim or how.guidance_width,
            dtype=self.dtype,
            kernel_init=_uniform,
            # As large as the embedded time, as in ADM; smaller embeddings are learned late.
            label_init=initializers.normal(1.0),
            name="conditioning",
        )(noise_label, parts.labels, augment_labels).vector
        return vector + self._added(parts) if how.added_width else vector

    def _tokens(self, parts: Parts) -> TokenStates | None:
        """The tokens that attention sees."""
        return parts.tokens

    def _added(self, parts: Parts) -> jax.Array:
        """What the pooled vector and the numbers add to the conditioning vector."""
        how, dtype = self.embedding, compute_type(self.dtype)
        assert parts.tokens is not None
        assert parts.numbers is not None
        flat = parts.numbers.reshape(-1)
        waves = how.frequencies(self, flat, how.added_width, "_added")
        of_numbers = waves.reshape(parts.numbers.shape[0], -1)
        h = jnp.concatenate([parts.tokens.pooled, of_numbers], axis=-1)
        for name in ("added_hidden", "added_out"):
            h = nn.silu(h) if name == "added_out" else h
            h = nn.Dense(4 * self.channels, dtype=dtype, kernel_init=_uniform, name=name)(h)
        return h

    def _down(
        self, x: jax.Array, c: jax.Array, train: bool, context: TokenStates | None = None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The map after the way down, and all maps for the way up."""
        dtype, image = compute_type(self.dtype), x
        h = _conv(int(self.first_multiplier * self.channels), dtype, "conv_in")(x)
        skips = [h]
        for level in range(self._last + 1):
            for i in range(self.num_res_blocks):
                h = self._residual(h, c, train, level, f"down_{level}_{i}")
                h = self._attention_of(level, h, f"down_{level}_{i}", context)
                skips.append(h)
            if level < self._last:
                h = self._halve(h, c, train, level)
                h, image = _IMAGES_IN[self.images_in](self, h, image, f"image_{level + 1}")
                skips.append(h)
        return h, skips

    def _middle(
        self, h: jax.Array, c: jax.Array, train: bool, context: TokenStates | None = None
    ) -> jax.Array:
        h = self._residual(h, c, train, self._last, "middle_0")
        if self.transformers is None:
            h = self._attend(h, "middle_attention", self._shown(context))
        else:
            h = self._transform(h, self.transformers.middle, "middle_transformer", context)
        return self._residual(h, c, train, self._last, "middle_1")

    def _up(
        self,
        h: jax.Array,
        skips: list[jax.Array],
        c: jax.Array,
        train: bool,
        out_channels: int,
        context: TokenStates | None = None,
    ) -> jax.Array:
        out = None
        for level in reversed(range(self._last + 1)):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = self._residual(h, c, train, level, f"up_{level}_{i}")
                if not self.sparse_attention or i == self.num_res_blocks:
                    h = self._attention_of(level, h, f"up_{level}_{i}", context)
            if level == 0 or self.images_out:
                names = ("final_norm", "final_conv") if level == 0 else (
                    f"out_{level}_norm", f"out_{level}_conv"
                )  # fmt: skip
                image = self._image(h, out_channels, *names)
                out = image if out is None else image + doubled(out, self.resampling.taps)
            if level > 0:
                h = self._double(h, c, train, level)
        assert out is not None
        return out

    def _image(self, h: jax.Array, channels: int, norm: str, conv: str) -> jax.Array:
        return _conv(channels, compute_type(self.dtype), conv, zero=True)(self._normed(h, norm))

    def _normed(self, h: jax.Array, name: str) -> jax.Array:
        groups = self.num_groups or num_groups(h.shape[-1])
        dtype = compute_type(self.dtype)
        return nn.silu(GroupNorm(groups, dtype, self.norm_epsilon, name=name)(h))

    def _residual(
        self,
        h: jax.Array,
        c: jax.Array,
        train: bool,
        level: int,
        name: str,
        resample: Callable[[jax.Array], jax.Array] = _same,
    ) -> jax.Array:
        block = rematerialised(ResidualBlock, self.remat, static_argnums=(3,))
        return block(
            int(self.channel_multipliers[level] * self.channels),
            self.scale_shift,
            self.dropout,
            self.dtype,
            resample,
            self.resampling.projected and resample is not _same,
            self.norm_epsilon,
            self.skip_scale,
            self.num_groups,
            name=name,
        )(h, c, train)

    def _attention_of(
        self, level: int, h: jax.Array, name: str, context: TokenStates | None
    ) -> jax.Array:
        """The map after what follows a residual block of a level: attention or transformers."""
        if self.transformers is not None:
            depth = self.transformers.levels[level]
            return self._transform(h, depth, f"{name}_transformer", context) if depth else h
        if self.token_levels is None:
            attends = h.shape[1] in self.attention_resolutions
        else:
            attends = level in self.token_levels
        return self._attend(h, f"{name}_attention", self._shown(context)) if attends else h

    def _transform(
        self, h: jax.Array, depth: int, name: str, context: TokenStates | None
    ) -> jax.Array:
        return rematerialised(SpatialTransformer, self.remat)(
            depth,
            self.head_channels,
            self.dtype,
            self.attention,
            self.num_heads,
            self.num_groups,
            name=name,
        )(h, context)

    def _shown(self, context: TokenStates | None) -> TokenStates | None:
        """The tokens that self-attention sees."""
        return None if self.token_levels is None else context

    def _attend(self, h: jax.Array, name: str, context: TokenStates | None) -> jax.Array:
        return rematerialised(AttentionBlock, self.remat)(
            self.head_channels,
            self.dtype,
            self.attention,
            self.num_heads,
            self.qkv_order,
            self.norm_epsilon,
            self.skip_scale,
            self.num_groups,
            name=name,
        )(h, context)

    def _halve(self, h: jax.Array, c: jax.Array, train: bool, level: int) -> jax.Array:
        name = f"down_{level}_resample"
        if self.residual_resampling:
            by_filter = partial(halved, taps=self.resampling.taps)
            return self._residual(h, c, train, level, name, by_filter)
        padding = 1 if self.resampling.padded_before else ((0, 1), (0, 1))
        return _conv(h.shape[-1], compute_type(self.dtype), name, stride=2, padding=padding)(h)

    def _double(self, h: jax.Array, c: jax.Array, train: bool, level: int) -> jax.Array:
        name = f"up_{level}_resample"
        if self.residual_resampling:
            by_filter = partial(doubled, taps=self.resampling.taps)
            return self._residual(h, c, train, level, name, by_filter)
        return _conv(h.shape[-1], compute_type(self.dtype), name)(doubled(h))

    def _skip_in(self, h: jax.Array, image: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
        image = halved(image, self.resampling.taps)
        dtype = compute_type(self.dtype)
        dense = Dense(h.shape[-1], dtype=dtype, kernel_init=_uniform, name=name)
        return h + dense(image.astype(dtype)), image

    def _residual_in(
        self, h: jax.Array, image: jax.Array, name: str
    ) -> tuple[jax.Array, jax.Array]:
        taps, dtype = self.resampling.taps, compute_type(self.dtype)
        # The filter sees what the convolution returns beyond the border, not zeros.
        wide = _conv(h.shape[-1], dtype, name, padding=1 + (len(taps) - 1) // 2)(image)
        h = (h + halved(wide, taps, padded=False)) * math.sqrt(0.5)
        return h, h

    def _no_image_in(
        self, h: jax.Array, image: jax.Array, name: str
    ) -> tuple[jax.Array, jax.Array]:
        del name
        return h, image

    @property
    def shift_equivariant(self) -> bool:
        """Whether rolls of maps that wrap around commute with the network (`models.seamless`).

        Longer filters than the mean of two by two pixels are padded by zeros.
        """
        return tuple(self.resampling.taps) == BOX

    @property
    def _last(self) -> int:
        return len(self.channel_multipliers) - 1

    def _check_parts(self, parts: Parts) -> None:
        """Refuses a condition whose tokens or numbers have no place, or that lacks them."""
        attends = self.transformers is not None or self.token_levels is not None
        if parts.tokens is not None and not attends:
            raise UserError(
                "UNet attends to no tokens: take DiT for this condition, or set `transformers`"
            )
        if parts.tokens is None and attends:
            raise UserError("this U-Net attends to tokens, and its condition has none")
        if self.embedding.added_width and (parts.numbers is None or parts.tokens is None):
            raise UserError(
                "this U-Net embeds numbers and a pooled vector; its condition lacks them"
            )

    def _check(self, height: int, width: int) -> None:
        halvings = self._last
        if self.transformers is not None and len(self.transformers.levels) != halvings + 1:
            raise UserError(
                f"U-Net: transformers.levels={self.transformers.levels} needs a number for each of "
                f"the {halvings + 1} levels of channel_multipliers"
            )
        if self.images_in not in _IMAGES_IN:
            raise UserError(
                f"images_in: no way {self.images_in!r}; {nearest(self.images_in, _IMAGES_IN)}"
            )
        check_filter(self.resampling.taps)
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


_IMAGES_IN: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "none": UNet._no_image_in,
    "skip": UNet._skip_in,
    "residual": UNet._residual_in,
}
