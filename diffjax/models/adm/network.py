"""ADM's networks: a setting of `UNet`, an upsampler, and the classifier that guides them."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Float

from diffjax.kinds import Positive
from diffjax.models.layers.attention import attention
from diffjax.models.layers.common import Dense, compute_type
from diffjax.models.unet import WITHOUT_NULL_ROW, Embedding, UNet
from diffjax.shapes import Array, Images, NoiseLabels


class ADM(UNet):
    """A `UNet` with ADM's settings: adaptive norms, residual resampling, heads of 64 channels.

    The published networks have no null label; here it adds nothing to the embedded noise label,
    unless `embedding.null_row` makes it a row of the table. They return twice the channels: the
    predicted noise, and the learned variance (`out_channels`).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = ADM(num_classes=10, channels=64, channel_multipliers=(1, 2), out_channels=6)
        >>> x, t, label = jnp.ones((2, 8, 8, 3)), jnp.ones(2), jnp.array([3, 9])
        >>> out, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), x, t, label)
        >>> out.shape
        (2, 8, 8, 6)

    References:
        Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, arXiv:2105.05233
    """

    channels: Positive[int] = 256
    channel_multipliers: tuple[Positive[float], ...] = (1, 1, 2, 2, 4, 4)
    attention_resolutions: tuple[Positive[int], ...] = (32, 16, 8)
    residual_resampling: bool = True
    qkv_order: str = "heads"
    embedding: Embedding = WITHOUT_NULL_ROW


class ADMUpsampler(ADM):
    """An `ADM` whose condition has a smaller image, enlarged and then beside `x` in the channels.

    As any network here enlarges it (`diffjax.models.layers.context.beside`); published weights are
    known as an upsampler's by this class.
    """


class ADMClassifier(ADM):
    """The classifier of noisy images: the way down and the middle of `ADM`, and attention pooling.

    Call with `x [B,H,W,C]` and `noise_label [B]`; returns logits `[B, out_channels]`. The pooling
    has a learned position for each pixel of the smallest map, so one network serves one size.
    """

    channels: Positive[int] = 128

    @nn.compact
    def __call__(
        self,
        x: Images,
        noise_label: NoiseLabels,
        cond: Any = None,
        train: bool = False,
    ) -> Float[Array, " batch {self.out_channels}"]:
        del cond
        self._check(*x.shape[1:3])
        c = self._conditioning(noise_label)
        h, _ = self._down(x, c, train)
        h = self._normed(self._middle(h, c, train), "final_norm")
        return AttentionPool(self.out_channels, self.head_channels, self.dtype, name="pool")(h)


class AttentionPool(nn.Module):
    """The output of attention for one more pixel, the mean of all: `[B, H, W, C] -> [B, features]`.

    As in CLIP, with learned positions.
    """

    features: int
    head_channels: int
    dtype: str

    @nn.compact
    def __call__(self, x: Images) -> Float[Array, " batch {self.features}"]:
        dtype = compute_type(self.dtype)
        batch, channels = x.shape[0], x.shape[-1]
        x = x.reshape(batch, -1, channels)
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)
        init = initializers.normal(channels**-0.5)
        positions = self.param("positions", init, (1, *x.shape[1:]), jnp.float32)
        qkv = Dense(3 * channels, dtype=dtype, name="qkv")(x + positions.astype(dtype))
        heads = (batch, x.shape[1], channels // self.head_channels, self.head_channels)
        q, k, v = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
        pooled = attention(q[:, :1], k, v).reshape(batch, channels)
        return nn.Dense(self.features, dtype=dtype, name="out")(pooled).astype(jnp.float32)
