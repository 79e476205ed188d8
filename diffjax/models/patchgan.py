"""PatchGAN: a discriminator of overlapping patches of an image (Isola et al. 2017)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers

from diffjax.errors import UserError
from diffjax.kinds import AtLeastOne
from diffjax.shapes import Array, Images

_EPSILON = 1e-5
_MOST_WIDER = 8
_SPREAD = initializers.normal(0.02)


class BatchNorm(nn.Module):
    """Batch norm by the statistics of the batch, as in training: `scale·(x − mean)/√(var + ε) + b`.

    Mean and variance are over the images and pixels of the whole batch, also where it lies on
    several devices. There are no running statistics: a discriminator is used in training alone.
    """

    @nn.compact
    def __call__(self, x: Images) -> Images:
        channels = x.shape[-1:]
        scale = self.param("scale", lambda key, shape: 1.0 + _SPREAD(key, shape), channels)
        bias = self.param("bias", initializers.zeros, channels)
        centred = x - jnp.mean(x, axis=(0, 1, 2), keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=(0, 1, 2), keepdims=True)
        unit = centred * jax.lax.rsqrt(variance + _EPSILON)
        return unit * scale[None, None, None] + bias[None, None, None]


class PatchGAN(nn.Module):
    """Logits of patches: high where a patch looks like one of a real image.

        [B, H, W, C] in [-1, 1] -> [B, h, w, 1]

    Convolutions of 4×4 pixels: one of stride 2, `num_layers − 1` of stride 2 and one of stride 1
    with batch norm, one to the logits. With three layers a logit sees 70×70 pixels.

    Attributes:
        width: channels of the first layer; each further layer has twice as many, at most eight
            times `width`.
        num_layers: layers of stride 2; 3 is usual. Small images take fewer.

    Example:
        >>> images = jnp.zeros((1, 32, 48, 3))
        >>> logits, _ = jax.eval_shape(PatchGAN(8).init_with_output, jax.random.key(0), images)
        >>> logits.shape
        (1, 2, 4, 1)

    References:
        Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017,
        arXiv:1611.07004
    """

    width: AtLeastOne[int] = 64
    num_layers: AtLeastOne[int] = 3

    def check(self, height: int, width: int) -> None:
        """Refuses images that are too small for its layers.

        Raises:
            UserError: no logit is left of them.

        Example:
            >>> PatchGAN(num_layers=2).check(12, 12)
        """
        least = 3 * 2**self.num_layers
        if min(height, width) < least:
            fitting = max((n for n in range(1, 8) if 3 * 2**n <= min(height, width)), default=0)
            hint = f"num_layers={fitting} would do" if fitting else "leave it out, by weight 0"
            raise UserError(
                f"a PatchGAN of num_layers={self.num_layers} needs images of {least}x{least} "
                f"pixels, not {height}x{width}: {hint}"
            )

    @nn.compact
    def __call__(self, x: Images) -> Array:
        x = nn.leaky_relu(self._conv(x, self.width, 2, "conv_0"), 0.2)
        for i in range(1, self.num_layers + 1):
            features = self.width * min(2**i, _MOST_WIDER)
            stride = 2 if i < self.num_layers else 1
            x = self._conv(x, features, stride, f"conv_{i}", bias=False)
            x = nn.leaky_relu(BatchNorm(name=f"norm_{i}")(x), 0.2)
        return self._conv(x, 1, 1, "logits")

    def _conv(self, x: Array, features: int, stride: int, name: str, bias: bool = True) -> Array:
        return nn.Conv(
            features,
            (4, 4),
            stride,
            ((1, 1), (1, 1)),
            use_bias=bias,
            kernel_init=_SPREAD,
            name=name,
        )(x)
