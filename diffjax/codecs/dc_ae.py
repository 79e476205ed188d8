"""DC-AE as a codec: 32 to 128 pixels of an image to one element of a latent."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from diffjax.codecs.one_file import OneFile
from diffjax.models.dc_ae.published import LAYOUTS
from diffjax.models.dc_ae.sizes import SCALES
from diffjax.pretrained.family import Family
from diffjax.shapes import Images, Latents


@dataclass(frozen=True)
class DCAE(OneFile):
    """The deep compression autoencoder, on scaled latents.

        encode(x) = scale·E(x)        decode(y) = clip(D(y / scale), −1, 1)

    Each element stands for 32×32, 64×64 or 128×128 pixels, with 32, 128 or 512 channels. The scale
    is the published one of the size (`diffjax.models.dc_ae.sizes.SCALES`), so latents have a
    standard deviation of about 1.

    Attention sees the whole image, so tiles (`Tiled`) change it.

    Args:
        path: path or URL of a file of weights, of torch or safetensors, in the layout of diffusers.
        size: a key of `diffjax.models.dc_ae.sizes.SIZES`, such as `dc-ae-f64c128-in-1.0`.
        file_sha256: hex digest of the file.

    Example:
        >>> DCAE("dc-ae.safetensors").latent_shape((512, 256, 3))
        (16, 8, 32)
        >>> DCAE("dc-ae.safetensors", "dc-ae-f128c512-in-1.0").image_shape((4, 2, 512))
        (512, 256, 3)

    References:
        Chen et al., "Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models",
        2024, arXiv:2410.10733
    """

    kind: ClassVar[str] = "dc_ae"
    layouts: ClassVar[Mapping[str, Family]] = LAYOUTS
    size: str = "dc-ae-f32c32-in-1.0"

    @property
    def name(self) -> str:
        return self.size

    def encode(self, params: Any, images: Images) -> Latents:
        return SCALES[self.size] * self._apply(params, images, "encode")

    def decode(self, params: Any, latents: Latents) -> Images:
        return jnp.clip(self._apply(params, latents / SCALES[self.size], "decode"), -1, 1)
