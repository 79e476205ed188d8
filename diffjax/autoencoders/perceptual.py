"""The perceptual distance of the loss: LPIPS, whose weights are in files of the user's."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.kinds import NotNegative
from diffjax.models.lpips.network import LPIPS, SMALLEST_SIDE, in_colour
from diffjax.models.lpips.published import read
from diffjax.shapes import Images, PerSample


@dataclass(frozen=True)
class Perceptual:
    """LPIPS with VGG16, `diffjax.models.lpips`; off, and 0, without its weights.

    Images in grey are taken as colours of equal parts.

    Args:
        path: the path of a file with all weights of `lpips.LPIPS(net="vgg")`, or of torchvision's
            VGG16; "" leaves the distance out.
        heads: beside torchvision's VGG16, the file `lpips/weights/v0.1/vgg.pth` of the package
            `lpips`.
        weight: the weight of the distance relative to the mean error of a pixel; 1 in latent
            diffusion.

    Example:
        >>> x = jnp.zeros((2, 32, 32, 3))
        >>> Perceptual()((), x, x).tolist()
        [0.0, 0.0]
    """

    path: str = ""
    heads: str = ""
    weight: NotNegative[float] = 1.0

    @property
    def on(self) -> bool:
        """Whether the distance is part of the loss."""
        return bool(self.path) and self.weight > 0

    def check(self, height: int, width: int) -> None:
        """Reads the weights, and refuses images that are too small.

        Raises:
            UserError: a file is missing, damaged or of another network; or the images.
        """
        if self.heads and not self.path:
            raise UserError(
                "config.loss.perceptual.heads are the weights of channels alone: set path to "
                "torchvision's vgg16-397923af.pth as well"
            )
        if self.on and min(height, width) < SMALLEST_SIDE:
            raise UserError(
                f"the perceptual distance needs images of {SMALLEST_SIDE}x{SMALLEST_SIDE} "
                f"pixels, not {height}x{width}: leave config.loss.perceptual.path out"
            )
        _ = self.params

    @property
    def params(self) -> Any:
        """The weights, an argument of a call; nothing if it is off."""
        return self._read[1] if self.on else ()

    def __call__(self, params: Any, x: Images, y: Images) -> PerSample:
        """The distances of images, `[B]`."""
        if not self.on:
            return jnp.zeros(len(x))
        network, _ = self._read
        distance: Any = network.apply({"params": params}, in_colour(x), in_colour(y))
        return distance

    @cached_property
    def _read(self) -> tuple[LPIPS, Any]:
        return read(self.path, self.heads)


OFF = Perceptual()
"""Without weights: no part of the loss."""
