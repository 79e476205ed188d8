"""The magnitude-preserving U-Net of EDM2: normalised weights, no norms of maps, no biases."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers
from jaxtyping import Bool, Float

from diffjax.errors import UserError
from diffjax.kinds import Decay, Limit, NotNegative, Positive, Probability
from diffjax.models.layers.common import HIDDEN, SelfAttention, compute_type
from diffjax.models.layers.context import beside, parts_of
from diffjax.models.layers.magnitude import (
    MPConv,
    MPDense,
    MPEmbedding,
    MPFourier,
    MPFunction,
    mp_concatenate,
    mp_silu,
    mp_sum,
    normalised,
)
from diffjax.models.layers.placement import BATCH, constrain
from diffjax.models.layers.remat import ATTENTION, rematerialised
from diffjax.models.layers.resampling import doubled, halved
from diffjax.models.unet import MAPS
from diffjax.shapes import Array, Images, Labels, NoiseLabels, Tokens


def _same(x: jax.Array) -> jax.Array:
    return x


class MPConditioning(nn.Module):
    """The conditioning vector of an example, of unit magnitude, from noise label and class.

        c = mp_silu(mp_sum(W₁ fourier(label_scale·noise_label), √classes·W₂ onehot(cond)))

    The null label, `num_classes` or None, has a term of zeros instead of the class's. A label
    outside of the table returns NaN. Several noise labels have weights of their own, and their
    terms are added and divided by the root of their number.

    Call with `noise_label [B]` or `[B, n]` and `cond [B] int32 | None`; returns `[B, features]`
    float32.
    """

    num_classes: int
    features: int
    num_frequencies: int
    label_scale: float
    balance: float

    @nn.compact
    def __call__(
        self, noise_label: NoiseLabels, cond: Labels | None
    ) -> Float[Array, " batch {self.features}"]:
        noise = self.label_scale * noise_label.reshape(noise_label.shape[0], -1)
        fourier, count = MPFourier(self.num_frequencies, name="fourier"), noise.shape[1]
        terms = [
            MPDense(self.features, name=f"noise_{i}" if i else "noise")(fourier(noise[:, i]))
            for i in range(count)
        ]
        c = sum(terms[1:], terms[0]) / math.sqrt(count)
        if self.num_classes:
            if cond is None:
                cond = jnp.full(noise.shape[0], self.num_classes, jnp.int32)
            embedded = MPEmbedding(self.num_classes, self.features, name="label")(cond)
            c = mp_sum(c, embedded, self.balance)
        return constrain(mp_silu(c), BATCH, None)


class MPAttention(SelfAttention):
    """Self-attention whose queries, keys and values are normalised for each token and head."""

    @nn.compact
    def __call__(self, x: Tokens, place: Bool[Array, " depth"] | None = None) -> Tokens:
        batch, length, width = x.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        q, k, v = (
            constrain(
                normalised(part.reshape(heads), (-1,)), BATCH, "sequence", "tensor", None
            )
            for part in jnp.split(MPDense(3 * width, name="qkv")(x), 3, axis=-1)
        )  # fmt: skip
        out = checkpoint_name(self.look(q, k, v, place), ATTENTION).reshape(batch, length, width)
        return MPDense(width, name="out")(out)


class MPBlock(nn.Module):
    """A block of EDM2: two convolutions with the conditioning between them, and attention.

        x ← r(x)                                        r = resample
        x ← normalised(skip(x))                         in the encoder
        h = conv₂(dropout(mp_silu(conv₁(mp_silu(x))·(1 + gain·W c))))
        x ← mp_sum(x, h, residual_balance)              with skip(x) in the decoder
        x ← mp_sum(x, attention(x), attention_balance)  with `num_heads` above 0
        x ← clip(x, −clip, clip)

    The gain is initially 0. Call with `x [B,H,W,C]` and conditioning `[B, D]`; returns
    `[B,H',W',features]`, where `H', W'` is the size after `resample`.
    """

    features: int
    decoder: bool
    num_heads: int
    dropout: float
    residual_balance: float
    attention_balance: float
    clip: float
    attention: str
    resample: Callable[[jax.Array], jax.Array] = _same

    @nn.compact
    def __call__(
        self, x: Images, c: Float[Array, " batch width_of_c"], train: bool
    ) -> Float[Array, " batch new_height new_width {self.features}"]:
        x = self.resample(x)

        def skip(x: jax.Array) -> jax.Array:
            return x if x.shape[-1] == self.features else MPDense(self.features, name="skip")(x)

        if not self.decoder:
            x = normalised(skip(x), (-1,))
        h = MPConv(self.features, name="conv_1")(mp_silu(x))
        gain = self.param("gain", initializers.zeros, ())
        scale = 1.0 + MPDense(self.features, name="modulation")(c, gain)
        h = mp_silu(h * scale[:, None, None].astype(h.dtype))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = MPConv(self.features, name="conv_2")(h)
        x = mp_sum(skip(x) if self.decoder else x, h, self.residual_balance)
        if self.num_heads:
            attend = MPAttention(self.num_heads, self.attention, name="attention")
            seen = attend(x.reshape(x.shape[0], -1, self.features)).reshape(x.shape)
            x = mp_sum(x, seen, self.attention_balance)
        return constrain(jnp.clip(x, -self.clip, self.clip), *MAPS)


class EDM2(nn.Module):
    """The U-Net of EDM2, whose activations and weights keep their magnitude in training.

    Level i has `channels · channel_multipliers[i]` channels on maps of 1 / 2^i of the image's
    sides. Each level has `num_res_blocks` blocks on the way down, and one more, each with a skip
    connection, on the way up; between the two ways are two blocks. There are no biases, norms or
    shifts: weights are normalised when they are used, sums and activations divided by what they
    would grow by (`diffjax.models.layers.magnitude`). The output is initially zero, by a gain of 0.
    The output of the middle is sown (`HIDDEN`).

    It is made for EDM's preconditioning (`objective=edm2`), and for the optimizer
    `normalised_adam`.

    Call with `x [B,H,W,C]`, of unit variance, `noise_label [B]` (floats, of the order 0 … 1000;
    `[B, 2]` for two labels), a condition: labels `[B] int32` (`num_classes` is the null label,
    which is also used for None), images `[B,H,W,C]` beside `x` in the channels, or a dict of both,
    and `train=True` with `rngs={"dropout": key}` if there is dropout; returns `[B,H,W,C]` float32.

    Attributes:
        num_classes: the number of classes; 0 is without labels.
        channels: the number of channels of the first level, and of Fourier features; 128 (XS) to
            448 (XXL).
        channel_multipliers: one factor per level.
        num_res_blocks: the number of blocks per level on the way down.
        attention_levels: the levels whose blocks have attention, 0 for that of the whole image; the
            first block of the middle always has it.
        head_channels: the number of channels of one attention head; divides those of the levels
            with attention.
        label_scale: the factor of noise labels before their Fourier features, whose inputs are of
            the order 1. By default 1/200: labels `log_snr` are 200·(log σ)/4, and the paper's input
            is (log σ)/4.
        label_balance: the share of the class in the conditioning vector, from 0 to 1.
        skip_balance: the share of skip connections on the way up, from 0 to 1.
        residual_balance: the share of a block's convolutions in its output, from 0 to 1.
        attention_balance: the share of its attention, from 0 to 1.
        clip: the largest activation after a block, by absolute value; `inf` clips nothing.
        dropout: the fraction of activations dropped in each block in training; 0 for XS and S, 0.1
            from M on.
        dtype: the compute type, `"float32"` or `"bfloat16"`; parameters and the conditioning are
            always float32.
        attention: `"auto"` or a name in `diffjax.models.layers.attention.IMPLEMENTATIONS`.
        out_channels: the number of output channels; 0 means that of the input.
        uncertainty_terms: the number of Fourier features of the uncertainty of the loss, whose
            parameters published files have beside the network's. They are used by the wrapper
            `uncertainty_fourier` alone, which has as many by default; 0 is without.
        remat: a name in `diffjax.models.layers.remat.REMAT`: which activations blocks keep.

    Raises:
        UserError: a map can't be halved as often as there are levels, `head_channels` does not
            divide the channels, or the condition has tokens.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = EDM2(num_classes=10, channels=32, channel_multipliers=(1, 2), head_channels=32)
        >>> x, t, label = jnp.ones((2, 8, 8, 1)), jnp.ones(2), jnp.array([3, 10])
        >>> out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t, label)
        >>> out.shape
        (2, 8, 8, 1)

    References:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024,
        arXiv:2312.02696, config G and figure 21
    """

    shift_equivariant: ClassVar[bool] = True

    num_classes: int
    channels: Positive[int] = 192
    channel_multipliers: tuple[Positive[int], ...] = (1, 2, 3, 4)
    num_res_blocks: Positive[int] = 3
    attention_levels: tuple[NotNegative[int], ...] = (2, 3)
    head_channels: Positive[int] = 64
    label_scale: Positive[float] = 0.005
    label_balance: Probability[float] = 0.5
    skip_balance: Probability[float] = 0.5
    residual_balance: Probability[float] = 0.3
    attention_balance: Probability[float] = 0.3
    clip: Limit[float] = 256.0
    dropout: Decay[float] = 0.0
    dtype: str = "float32"
    attention: str = "auto"
    out_channels: NotNegative[int] = 0
    uncertainty_terms: NotNegative[int] = 128
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
        labels, tokens, images, _ = parts_of(cond)
        if tokens is not None:
            raise UserError("EDM2 attends to no tokens: take DiT for this condition")
        widths = [factor * self.channels for factor in self.channel_multipliers]
        c = MPConditioning(
            self.num_classes,
            max(widths),
            widths[0],
            self.label_scale,
            self.label_balance,
            name="conditioning",
        )(noise_label, labels)
        block_of = rematerialised(MPBlock, self.remat, static_argnums=(3,))

        def block(
            h: jax.Array, features: int, name: str, attend: bool = False, resample=_same
        ) -> jax.Array:
            return block_of(
                features,
                not name.startswith("down"),
                self._num_heads(features) if attend else 0,
                self.dropout,
                self.residual_balance,
                self.attention_balance,
                self.clip,
                self.attention,
                resample,
                name=name,
            )(h, c, train)

        whole = beside(x, images).astype(dtype)
        h = jnp.concatenate([whole, jnp.ones_like(whole[..., :1])], axis=-1)
        h = MPConv(widths[0], name="conv_in")(h)
        skips = [h]
        for level, width in enumerate(widths):
            if level > 0:
                h = block(h, h.shape[-1], f"down_{level}_resample", resample=halved)
                skips.append(h)
            for i in range(self.num_res_blocks):
                h = block(h, width, f"down_{level}_{i}", level in self.attention_levels)
                skips.append(h)

        h = block(h, widths[-1], "middle_0", True)
        h = block(h, widths[-1], "middle_1")
        self.sow(*HIDDEN, h)

        for level, width in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                h = block(h, h.shape[-1], f"up_{level}_resample", resample=doubled)
            for i in range(self.num_res_blocks + 1):
                h = mp_concatenate(h, skips.pop(), self.skip_balance)
                h = block(h, width, f"up_{level}_{i}", level in self.attention_levels)

        if self.uncertainty_terms and self.is_initializing():
            # Evaluated by the objective, as the network's output does not depend on it.
            MPFunction(self.uncertainty_terms, name="uncertainty")(jnp.zeros(1))
        gain = self.param("final_gain", initializers.zeros, ())
        h = MPConv(self.out_channels or x.shape[-1], name="final_conv")(h, gain)
        return h.astype(jnp.float32)

    def _num_heads(self, features: int) -> int:
        if features % self.head_channels:
            raise UserError(
                f"EDM2: head_channels={self.head_channels} does not divide the {features} channels "
                "of a level with attention"
            )
        return features // self.head_channels

    def _check(self, height: int, width: int) -> None:
        halvings = len(self.channel_multipliers) - 1
        if halvings < 0:
            raise UserError("EDM2: channel_multipliers is empty; one factor per level is needed")
        if height % 2**halvings or width % 2**halvings:
            possible = max(n for n in range(halvings) if not (height % 2**n or width % 2**n))
            raise UserError(
                f"EDM2: {halvings + 1} levels halve an image of {height}x{width} {halvings} "
                f"times, which is not whole; at most {possible + 1} channel_multipliers fit"
            )
