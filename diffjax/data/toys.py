"""Data whose distribution is known, to try methods and comparisons on."""

from typing import Annotated

import jax.numpy as jnp
import numpy as np

from diffjax.data.sources import ArraySource, DataSet, Source
from diffjax.errors import UserError
from diffjax.kinds import Interval, NotNegative
from diffjax.oracle.analytic import GaussianMixture

_CORNER, _DEVIATION = 0.3, 0.1
_CORNERS = _CORNER * (2.0 * np.indices((2, 2, 2)).reshape(3, -1).T - 1.0)


def colours(
    blur: Annotated[float, Interval("[0, 0.25]")] = 0.0,
    along: Annotated[int, Interval("[0, 1]")] = 0,
    num_images: Annotated[int, Interval("[8, 10000000]")] = 8_192,
    seed: NotNegative[int] = 0,
) -> DataSet:
    """Single pixels `[1, 1, 3]`: eight colours, each a Gaussian around a corner of a cube.

        x = 0.3·c + 0.1·n_1 + blur·n_2·e_along,     c in {-1, 1}³ evenly, n_1 in R³, n_2 in R

    rounded to the 256 levels of an image. `blur` spoils the training images alone: what samples
    are held against are unspoilt ones. So the Fréchet distance that perfect training ends in is
    known (`colours_distance`), and equal for `along` 0 and 1: the training images of one are those
    of the other with two channels swapped, and the images held against are the same with both
    orders. `mixture` is what the unspoilt ones are drawn from.

    Args:
        blur: standard deviation of what is added, up to 0.25 so that next to nothing is cut off.
        along: the channel that it is added to, 0 or 1.
        num_images: for training, from 8 to 10⁷; an eighth as many for testing.
        seed: of all that is drawn.

    Raises:
        UserError: another channel, or too much blur.

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
    """The Fréchet distance of `colours(blur)` from `colours()`: `(√(v + blur²) - √v)²`, `v` the
    variance of a channel.

    Example:
        >>> colours_distance(0.0), round(colours_distance(0.25), 4)
        (0.0, 0.0075)
    """
    variance = _CORNER**2 + _DEVIATION**2
    return float((np.sqrt(variance + blur**2) - np.sqrt(variance)) ** 2)


def _mixture() -> GaussianMixture:
    """The distribution of the unspoilt colours, but for their rounding."""
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
