"""RAE as a codec: tokens of DINOv2 as latents."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from diffjax.codecs.base import Shape
from diffjax.codecs.one_file import OneFile
from diffjax.errors import UserError
from diffjax.models.rae.published import LAYOUTS
from diffjax.pretrained.family import Family
from diffjax.shapes import Images, Latents


@dataclass(frozen=True)
class RAE(OneFile):
    """The representation autoencoder: normalised tokens of DINOv2, and a decoder that was trained.

    Images are of 256×256 pixels, and latents of 16×16 elements with 384, 768 or 1024 channels of a
    mean of about 0 and a standard deviation of about 1. Attention sees the whole image, and there
    are no tiles (`Tiled`).

    Args:
        path: path or URL of a file of weights, of torch or safetensors, in the layout of diffusers.
        size: a key of `diffjax.models.rae.sizes.SIZES`.
        file_sha256: hex digest of the file.

    Example:
        >>> RAE("rae.safetensors").latent_shape((256, 256, 3))
        (16, 16, 768)

    References:
        Zheng et al., "Diffusion Transformers with Representation Autoencoders", 2025,
        arXiv:2510.11690
    """

    kind: ClassVar[str] = "rae"
    layouts: ClassVar[Mapping[str, Family]] = LAYOUTS
    size: str = "RAE-dinov2-wReg-base-ViTXL-n08"

    @property
    def name(self) -> str:
        return self.size

    def latent_shape(self, image_shape: Shape) -> Shape:
        network, wanted = self._network, (*[self._network.image_side] * 2, 3)
        if tuple(image_shape) != wanted:
            raise UserError(f"{self.name} encodes images of {wanted} alone, not {image_shape}")
        return network.side, network.side, network.encoder_width

    def image_shape(self, latent_shape: Shape) -> Shape:
        network = self._network
        wanted = network.side, network.side, network.encoder_width
        if tuple(latent_shape) != wanted:
            raise UserError(f"{self.name} has latents of {wanted} alone, not {latent_shape}")
        return network.image_side, network.image_side, 3

    def encode(self, params: Any, images: Images) -> Latents:
        return self._apply(params, (images + 1) / 2, "encode")

    def decode(self, params: Any, latents: Latents) -> Images:
        return 2 * jnp.clip(self._apply(params, latents, "decode"), 0, 1) - 1
