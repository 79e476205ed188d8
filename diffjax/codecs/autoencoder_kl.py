"""AutoencoderKL as a codec: the autoencoders of Stable Diffusion and FLUX."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from diffjax.codecs.base import Posterior
from diffjax.codecs.one_file import OneFile
from diffjax.codecs.scaled import row
from diffjax.models.autoencoder_kl.published import LAYOUTS
from diffjax.models.autoencoder_kl.sizes import SCALINGS
from diffjax.pretrained.family import Family
from diffjax.shapes import Images, Latents


@dataclass(frozen=True)
class AutoencoderKL(OneFile):
    """The autoencoder of latent diffusion; a latent is the scaled mean of its posterior.

        encode(x) = scale·(E[z | x] − shift)        decode(y) = clip(D(y / scale + shift), −1, 1)

    Each element stands for 8×8 pixels. Scale and shift are the published ones of the size
    (`diffjax.models.autoencoder_kl.sizes.SCALINGS`), so latents have a standard deviation of about
    1 (`edm2`: 0.5) and need no further scale. Published models are trained on samples of the
    posterior (`posterior`), whose standard deviation is small beside that of the means.

    Latents of `flux2` are means without a posterior; 2×2 elements are packed to one of 128 channels
    and 16×16 pixels, and normalised by the statistics in the file.

    Group norms and the attention in the middle see the whole image, so tiles (`Tiled`) change it.

    Args:
        path: path or URL of a file of weights, of torch or safetensors, in the layout of diffusers,
            of LDM or of the authors of FLUX.2; a file of a whole model has them too.
        size: `sd-vae` (Stable Diffusion 1 and 2, DiT, SiT), `edm2` (its statistics of each channel,
            with the file sd-vae-ft-mse), `sdxl`, `sd3`, `flux` or `flux2`.
        file_sha256: hex digest of the file.

    Example:
        >>> codec = AutoencoderKL("vae.safetensors", "sd3")
        >>> codec.latent_shape((128, 64, 3)), codec.image_shape((16, 8, 16))
        ((16, 8, 16), (128, 64, 3))
        >>> AutoencoderKL("ae.safetensors", "flux2").latent_shape((128, 64, 3))
        (8, 4, 128)

    References:
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022,
        arXiv:2112.10752; Karras et al. 2024, arXiv:2312.02696, for `edm2`
    """

    kind: ClassVar[str] = "autoencoder_kl"
    layouts: ClassVar[Mapping[str, Family]] = LAYOUTS
    size: str = "sd-vae"

    @property
    def stochastic(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._network.patch_size == 1

    def encode(self, params: Any, images: Images) -> Latents:
        return self._apply(params, self.posterior(params, images).mean, "pack")

    def posterior(self, params: Any, images: Images) -> Posterior:
        """The distribution of latents before they are packed."""
        posterior: Posterior = self._apply(params, images, "encode")
        return posterior.scaled(*map(row, SCALINGS[self.size]))

    def decode(self, params: Any, latents: Latents) -> Images:
        scale, shift = map(row, SCALINGS[self.size])
        z = self._apply(params, latents, "unpack") / scale + shift
        return jnp.clip(self._apply(params, z, "decode"), -1, 1)
