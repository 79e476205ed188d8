"""Latents of another codec, brought to a standard deviation of about 1."""

from dataclasses import dataclass
from typing import Any

from diffjax.codecs.base import Around, Codec
from diffjax.kinds import Positive
from diffjax.shapes import Images, Latents


@dataclass(frozen=True)
class ScaledLatents(Around):
    """The latents of a codec times a factor: `encode(x) = scale · codec.encode(x)`.

    The images are those of the codec, so this has its name and hash.

    Args:
        codec: any codec.
        scale: the factor, such as 1 over the standard deviation of the codec's latents.

    Example:
        >>> import numpy as np
        >>> from diffjax.codecs import SpaceToDepth
        >>> ScaledLatents(SpaceToDepth(2), 0.5).encode((), np.ones((1, 2, 2, 1))).ravel().tolist()
        [0.5, 0.5, 0.5, 0.5]
    """

    codec: Codec
    scale: Positive[float] = 1.0

    @property
    def latents(self) -> str:
        return f"{self.scale:g} times {self.codec.latents}"

    def encode(self, params: Any, images: Images) -> Latents:
        return self.scale * self.codec.encode(params, images)

    def decode(self, params: Any, latents: Latents) -> Images:
        return self.codec.decode(params, latents / self.scale)
