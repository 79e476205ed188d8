"""MOVQ as a codec: the autoencoder of Kandinsky 2."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from diffjax.codecs.one_file import OneFile
from diffjax.models.movq.published import LAYOUTS
from diffjax.pretrained.family import Family
from diffjax.shapes import Images, Latents


@dataclass(frozen=True)
class MOVQ(OneFile):
    """The autoencoder of Kandinsky 2.1 and 2.2, on latents that are not quantised.

    Each element stands for 8×8 pixels; latents have 4 channels and are not scaled. All norms, and
    attention at the coarsest level, see the whole image, so tiles (`Tiled`) change it.

    Args:
        path: path or URL of a file of weights, of torch or safetensors, in the layout of diffusers
            or of the authors.
        size: `movq`.
        file_sha256: hex digest of the file.
        quantise: whether `decode` takes the nearest entries of the codebook first, as in the
            network's own training; Kandinsky's models do not.

    Example:
        >>> MOVQ("movq.safetensors").latent_shape((128, 64, 3))
        (16, 8, 4)

    References:
        Zheng et al., "MoVQ", 2022, arXiv:2209.09002; github.com/ai-forever/Kandinsky-2
    """

    kind: ClassVar[str] = "movq"
    layouts: ClassVar[Mapping[str, Family]] = LAYOUTS
    size: str = "movq"
    quantise: bool = False

    @property
    def name(self) -> str:
        return f"{self.size}, quantised" if self.quantise else self.size

    def encode(self, params: Any, images: Images) -> Latents:
        return self._apply(params, images, "encode")

    def decode(self, params: Any, latents: Latents) -> Images:
        if self.quantise:
            latents = self._apply(params, latents, "quantise")
        return jnp.clip(self._apply(params, latents, "decode"), -1, 1)
