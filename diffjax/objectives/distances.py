"""Distances of two batches of images, for losses that compare images and not predictions."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from diffjax.errors import UserError
from diffjax.kinds import NotNegative
from diffjax.models.lpips.network import LPIPS, SMALLEST_SIDE, in_colour
from diffjax.models.lpips.published import read
from diffjax.process.paths import Scalar
from diffjax.shapes import PerSample, Samples

Metric = Callable[[Samples, Samples], PerSample]
"""`(x[B, …], y[B, …]) -> distance[B]`."""

_read_once = functools.lru_cache(maxsize=2)(read)


@register_dataclass
@dataclass(frozen=True)
class MeanSquare:
    """The mean of the squares over the image."""

    def __call__(self, x: Samples, y: Samples) -> PerSample:
        return jnp.mean(jnp.square(x - y), axis=tuple(range(1, x.ndim)))


@register_dataclass
@dataclass(frozen=True)
class PseudoHuber:
    """The pseudo-Huber distance `√(‖x - y‖² + c²) - c` with `c = factor·√D`, D numbers an image.

    Far from 0 it grows as the norm alone, so that few pairs which differ much do not decide the
    step. Song & Dhariwal 2023 (arXiv:2310.14189), section 3.3.

    Attributes:
        factor: 0.00054 in the paper, c = 0.03 for CIFAR-10. With 0 it is the norm, as in ECT.
    """

    factor: NotNegative[Scalar] = 0.00054

    def __call__(self, x: Samples, y: Samples) -> PerSample:
        numbers = x[0].size
        # Under the root, so that the gradient at equal images is 0 and not 0/0.
        c = jnp.maximum(self.factor * jnp.sqrt(float(numbers)), 1e-6)
        squares = jnp.sum(jnp.square(x - y), axis=tuple(range(1, x.ndim)))
        return jnp.sqrt(squares + jnp.square(c)) - c


@register_dataclass
@dataclass(frozen=True)
class Perceptual:
    """LPIPS with VGG16 (`diffjax.models.lpips`), of images in [-1, 1], and the mean of the squares.

    Zhang et al. 2018 (arXiv:1801.03924). Images in grey are taken as colours of equal parts. The
    weights are constants of the compiled training step.

    Attributes:
        path: the path of a file with all weights of `lpips.LPIPS(net="vgg")`, or of torchvision's
            VGG16.
        heads: beside torchvision's VGG16, the file `lpips/weights/v0.1/vgg.pth`.
        side: the length of the sides to which images are enlarged, by linear interpolation; 0
            leaves them as they are, 224 is that of consistency models. VGG16 needs at least 16.
        square: the weight of the mean square; 0 leaves it out, 1 in one of InstaFlow's variants.

    Raises:
        UserError: there is no file, or it holds something else; or the images are too small.
    """

    path: str = field(default="", metadata={"static": True})
    heads: str = field(default="", metadata={"static": True})
    side: NotNegative[int] = field(default=0, metadata={"static": True})
    square: NotNegative[Scalar] = 0.0

    def __call__(self, x: Samples, y: Samples) -> PerSample:
        if not self.path:
            raise UserError(
                "the perceptual distance needs weights: set its path to torchvision's "
                "vgg16-397923af.pth, and heads to lpips/weights/v0.1/vgg.pth of the package lpips"
            )
        network, params = _read_once(self.path, self.heads)
        distance = self.between(network, params, x, y)
        return distance + self.square * MeanSquare()(x, y)

    def between(self, network: LPIPS, params: Any, x: Samples, y: Samples) -> PerSample:
        """LPIPS by this network, `[B]`."""
        sides = (self.side, self.side) if self.side else x.shape[1:3]
        if min(sides) < SMALLEST_SIDE:
            raise UserError(
                f"the perceptual distance needs images of {SMALLEST_SIDE}x{SMALLEST_SIDE} "
                f"pixels, not {sides[0]}x{sides[1]}: set its side, or take another distance"
            )

        def prepared(images: Any) -> Any:
            return jax.image.resize(in_colour(images), (len(images), *sides, 3), "linear")

        found: Any = network.apply({"params": params}, prepared(x), prepared(y))
        return found
