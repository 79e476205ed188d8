"""Toy data with a known distribution, to test methods and comparisons."""

from typing import Annotated

import jax.numpy as jnp
import numpy as np

from diffjax.data.sources import ArraySource, DataSet, Source
from diffjax.errors import UserError
from diffjax.kinds import NotNegative, Range
from diffjax.oracle.analytic import GaussianMixture

_CORNER, _DEVIATION = 0.3, 0.1
_CORNERS = _CORNER * (2.0 * np.indices((2, 2, 2)).reshape(3, -1).T - 1.0)


def colours(
    blur: Annotated[float, Range("[0, 0.25]")] = 0.0,
    along: Annotated[int, Range("[0, 1]")] = 0,
    num_images: Annotated[int, Range("[8, 10000000]")] = 8_192,
    seed: NotNegative[int] = 0,
) -> DataSet:
    """A data set of single pixels `[1, 1, 3]`: eight Gaussians around the corners of a cube.

        x = 0.3·c + 0.1·n_1 + blur·n_2·e_along,     c in {-1, 1}³ evenly, n_1 in R³, n_2 in R

    with standard normal n_1 and n_2, rounded to the 256 levels of an image. `blur` is added to the
    training images alone; samples are compared with images without it. So the Fréchet distance
    after perfect training is known (`colours_distance`). It is the same for `along` 0 and 1: the
    training images of the two are equal up to a swap of two channels, and the images that samples
    are compared with contain both orders. `mixture` is the distribution without the blur.

    Args:
        blur: the standard deviation of the added noise, at most 0.25, so that hardly any value is
            clipped.
        along: the channel with the added noise, 0 or 1.
        num_images: the number of training images; an eighth as many are for testing.
        seed: the seed of everything random.

    Raises:
        UserError: `along` is another channel, or `blur` is too large.

    Example:
        >>> data = colours(blur=0.2)
        >>> data.image_shape, len(data.train), data.num_classes
        ((1, 1, 3), 8192, 0)
    """
    if along not in (0, 1) or not 0.0 <= blur <= 0.25:
        raise UserError(f"colours(blur={blur}, along={along}): blur in [0, 0.25], along 0 or 1")
    rng = np.random.default_rng(seed)
    train, test, real = (_draw(n, rng) for n in (num_images, num_images // 8, num_images // 2))
    train[:, 0] += blur * rng.normal(size=num_images)
    order = [along, 1 - along, 2]
    both = np.concatenate([real, real[:, [1, 0, 2]]])
    return DataSet(
        "colours",
        _pixels(train[:, order]),
        _pixels(test),
        (1, 1, 3),
        0,
        (),
        real=_pixels(both),
        mixture=_mixture(),
    )


def colours_distance(blur: float) -> float:
    """The Fréchet distance between `colours(blur)` and `colours()`: `(√(v + blur²) - √v)²`.

    `v` is the variance of a channel.

    Example:
        >>> colours_distance(0.0), round(colours_distance(0.25), 4)
        (0.0, 0.0075)
    """
    variance = _CORNER**2 + _DEVIATION**2
    return float((np.sqrt(variance + blur**2) - np.sqrt(variance)) ** 2)


def _mixture() -> GaussianMixture:
    """The distribution of the colours without blur and before rounding."""
    k = len(_CORNERS)
    return GaussianMixture(
        jnp.full(k, 1.0 / k),
        jnp.asarray(_CORNERS.reshape(k, 1, 1, 3)),
        jnp.tile(_DEVIATION**2 * jnp.eye(3), (k, 1, 1)),
    )


def _draw(n: int, rng: np.random.Generator) -> np.ndarray:
    return _CORNERS[np.arange(n) % len(_CORNERS)] + _DEVIATION * rng.normal(size=(n, 3))


def _pixels(points: np.ndarray) -> Source:
    levels = np.clip(np.rint((points + 1.0) * 127.5), 0, 255).astype(np.uint8)
    return ArraySource(levels[:, None, None, :], np.zeros(len(levels), np.int32))
