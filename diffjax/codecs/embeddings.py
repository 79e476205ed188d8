"""Embeddings of images, standardised by the statistics that a prior was trained with."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from diffjax.codecs.base import Codec, Shape, sha256_of
from diffjax.errors import UserError
from diffjax.pretrained.folders import read_weights
from diffjax.shapes import Images, Latents

_MEAN, _STD = "clip_mean", "clip_std"


@dataclass(frozen=True)
class Embeddings(Codec):
    """CLIP's embeddings as images of one pixel `[B, 1, 1, D]`, by the statistics of a prior.

        encode(e) = (e − mean)/std        decode(z) = z·std + mean

    Args:
        path: the path of a prior's folder or file, with the tensors `clip_mean` and `clip_std`.
        sha256: hash of both; "" is that of the file as it is.

    Example:
        >>> Embeddings().latent_shape((1, 1, 1280))
        (1, 1, 1280)

    References:
        Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents", 2022,
        arXiv:2204.06125
    """

    path: str = ""
    sha256: str = ""  # pyright: ignore[reportIncompatibleVariableOverride]
    name: ClassVar[str] = "embeddings"
    bounded: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.path and not self.sha256:
            mean, std = self._statistics
            object.__setattr__(self, "sha256", sha256_of(f"{mean.tobytes()}{std.tobytes()}"))

    @property
    def params(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._statistics

    def latent_shape(self, image_shape: Shape) -> Shape:
        if tuple(image_shape[:2]) != (1, 1):
            raise UserError(f"embeddings are images of one pixel, [1, 1, D], not {image_shape}")
        return image_shape

    def image_shape(self, latent_shape: Shape) -> Shape:
        return self.latent_shape(latent_shape)

    def encode(self, params: Any, images: Images) -> Latents:
        mean, std = params
        return (images - mean) / std

    def decode(self, params: Any, latents: Latents) -> Images:
        mean, std = params
        return latents * std + mean

    @cached_property
    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        if not self.path:
            raise UserError("the codec embeddings needs the folder of a prior: set path to it")
        state = read_weights(self.path).state
        if lacking := [name for name in (_MEAN, _STD) if name not in state]:
            raise UserError(f"{self.path} is no prior: it has no tensor {lacking[0]}")
        mean, std = (np.asarray(state[name], np.float32) for name in (_MEAN, _STD))
        return mean.reshape(1, 1, 1, -1), std.reshape(1, 1, 1, -1)
