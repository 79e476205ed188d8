"""Latents of another codec, brought to a mean of about 0 and a standard deviation of about 1."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffjax.codecs.base import Around, Codec, Posterior
from diffjax.shapes import Images, Latents

PerChannel = float | tuple[float, ...]
"""One number, or one for each channel."""


@dataclass(frozen=True)
class ScaledLatents(Around):
    """The latents of a codec, shifted and scaled: `encode(x) = scale · (codec.encode(x) − shift)`.

    The images are those of the codec, so this has its name and hash.

    Args:
        codec: any codec.
        scale: the factor, such as 1 over the standard deviation of the codec's latents; one number,
            or one for each channel.
        shift: the mean that is subtracted before, likewise.

    Example:
        >>> from diffjax.codecs import SpaceToDepth
        >>> scaled = ScaledLatents(SpaceToDepth(2), 0.5, shift=(0.0, 1.0, 2.0, 3.0))
        >>> scaled.encode((), np.ones((1, 2, 2, 1), np.float32)).ravel().tolist()
        [0.5, 0.0, -0.5, -1.0]

    References:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024,
        arXiv:2312.02696, for statistics of each channel
    """

    codec: Codec
    scale: PerChannel = 1.0
    shift: PerChannel = 0.0

    @property
    def latents(self) -> str:
        text = f"{_text(self.scale)} times {self.codec.latents}"
        return f"{text} less {_text(self.shift)}" if self.shift else text

    def encode(self, params: Any, images: Images) -> Latents:
        return row(self.scale) * (self.codec.encode(params, images) - row(self.shift))

    def decode(self, params: Any, latents: Latents) -> Images:
        return self.codec.decode(params, latents / row(self.scale) + row(self.shift))

    def posterior(self, params: Any, images: Images) -> Posterior:
        return self.codec.posterior(params, images).scaled(row(self.scale), row(self.shift))


def row(numbers: PerChannel) -> Any:
    """Numbers of channels as `[1, 1, 1, c]`, for latents `[B, h, w, c]`.

    Example:
        >>> row((1.0, 2.0)).shape, row(1.0).shape
        ((1, 1, 1, 2), (1, 1, 1, 1))
    """
    return np.asarray(numbers, np.float32).reshape(1, 1, 1, -1)


def _text(numbers: PerChannel) -> str:
    return ", ".join(f"{x:g}" for x in np.ravel(numbers))
