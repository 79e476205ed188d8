"""The perceptual distance LPIPS: differences of the features of VGG16, weighted by channel.

richzhang/PerceptualSimilarity, `lpips/lpips.py`; VGG16 is that of torchvision
"""

from collections.abc import Iterator

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers
from jaxtyping import Float

from diffjax.kinds import AtLeastOne
from diffjax.shapes import Array, Images, PerSample

# Of RGB in [-1, 1]: the statistics of ImageNet that torchvision's networks are trained with.
_MEAN = np.array((-0.030, -0.088, -0.188), np.float32)
_STD = np.array((0.458, 0.448, 0.450), np.float32)
_EPSILON = 1e-10
STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""Of VGG16: how many times `width` the channels of a stage are, and its convolutions."""
SMALLEST_SIDE = 2 ** (len(STAGES) - 1)
"""Of images, in pixels: VGG16 halves the sides before each stage but the first."""


def in_colour(images: Images) -> Float[Array, " batch height width 3"]:
    """Images `[B, H, W, 3]` of colours; grey is three equal parts."""
    return images if images.shape[-1] == 3 else jnp.repeat(images[..., :1], 3, axis=-1)


class VGG16(nn.Module):
    """The convolutions of VGG16: the features after each of its five stages.

        [B, H, W, 3] -> [[B, H, W, width], [B, H/2, W/2, 2·width], …]

    Attributes:
        width: channels of the first stage; the published network has 64.

    References:
        Simonyan & Zisserman, "Very Deep Convolutional Networks", 2015, arXiv:1409.1556
    """

    width: AtLeastOne[int] = 64

    @nn.compact
    def __call__(self, x: Images) -> list[Array]:
        features = []
        for stage, (factor, count) in enumerate(STAGES):
            if stage:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for i in range(count):
                conv = nn.Conv(factor * self.width, (3, 3), padding=1, name=f"conv_{stage}_{i}")
                x = nn.relu(conv(x))
            features.append(x)
        return features


class LPIPS(nn.Module):
    """The perceptual distance of pairs of images, `[B, H, W, 3]` in [-1, 1] each -> `[B]`.

        d(x, y) = Σ_stages mean_pixels Σ_channels w·(u(x) − u(y))²,     u = features / |features|

    The sides of images must be at least 16 pixels, since VGG16 halves them four times.

    Attributes:
        width: the width of `VGG16`.

    Example:
        >>> import jax
        >>> network, x = LPIPS(width=2), jnp.ones((1, 16, 16, 3))
        >>> distance, variables = network.init_with_output(jax.random.key(0), x, x)
        >>> distance.tolist()
        [0.0]

    References:
        Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
        2018, arXiv:1801.03924
    """

    width: AtLeastOne[int] = 64

    @nn.compact
    def __call__(self, x: Images, y: Images) -> PerSample:
        both = (jnp.concatenate([x, y]) - _MEAN[None, None, None]) / _STD[None, None, None]
        distance = jnp.zeros(len(x))
        for stage, features in enumerate(VGG16(self.width, name="vgg")(both)):
            weights = self.param(f"weights_{stage}", initializers.uniform(), features.shape[-1:])
            one, other = jnp.split(_unit(features), 2)
            squares = jnp.square(one - other) * weights[None, None, None]
            distance += jnp.mean(jnp.sum(squares, axis=-1), axis=(1, 2))
        return distance


def _unit(features: Array) -> Array:
    """Features over their norm at each pixel; where all are 0, they stay 0 with gradient 0."""
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    # The root has no derivative at 0, and `where` alone would not keep its NaN out of a gradient.
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return features / (norm + _EPSILON)


def convolutions() -> Iterator[tuple[int, int, int]]:
    """The convolutions of VGG16: stage, number within it, place in torchvision's `features`.

    Example:
        >>> [place for _, _, place in convolutions()]
        [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    """
    place = 0
    for stage, (_, count) in enumerate(STAGES):
        for i in range(count):
            yield stage, i, place
            place += 2  # The convolution and its ReLU.
        place += 1  # Pooling.
