"""AutoencoderKL as a codec: the autoencoders of Stable Diffusion and FLUX."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp

from diffjax.codecs.base import Posterior
from diffjax.codecs.one_file import OneFile
from diffjax.codecs.scaled import row
from diffjax.errors import UserError
from diffjax.host.run_files import read_json
from diffjax.models.autoencoder_kl.published import LAYOUTS
from diffjax.models.autoencoder_kl.sizes import RESCALED, SCALINGS, Scaling
from diffjax.pretrained.downloads import sha256_of_file
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
        size: `sd-vae` (Stable Diffusion 1 and 2, DiT, SiT), `sdxl`, `sd3`, `flux`, `flux2`, or
            `edm2`: the weights of `sd-vae` with EDM2's scale of each channel, to a standard
            deviation of 0.5.
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
        return self.size != "flux2"

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


def autoencoder_at(path: str | Path, size: str = "sd-vae") -> AutoencoderKL:
    """The codec whose weights are at a path, with the hash that they have.

    Args:
        path: the path of a file of weights, or of a folder of diffusers, whose `config.json` has
            the scale of the latents; of a folder with a folder `vae`, of that.
        size: the size of the network in a file, which doesn't show the scale of its latents; of a
            folder, only if it has the weights of this size (`RESCALED`).

    Raises:
        UserError: there are no such files, they can't be read, or no size has such a scale.
    """
    place = Path(path)
    if place.is_dir():
        place = place / "vae" if (place / "vae").is_dir() else place
        found = _size_of(place)
        size = size if RESCALED.get(size) == found else found
        place = next((place / name for name in _FILES if (place / name).is_file()), place)
    try:
        codec = AutoencoderKL(str(place), size, sha256_of_file(place))
    except OSError as error:
        raise UserError(f"can't read an autoencoder from {place}: {error.strerror}") from error
    _ = codec.params  # Read, or refused.
    return codec


_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_SIZES_OF_CLASSES = {"AutoencoderKLFlux2": "flux2"}  # whose `config.json` has no scale
_SCALE_OF_OLD_FOLDERS = 0.18215  # which have none in `config.json`


def _size_of(folder: Path) -> str:
    """The size with the scale that the folder's `config.json` has."""
    config = read_json(folder / "config.json")
    if config is None:
        raise UserError(f"{folder} is no folder of an autoencoder: it has no config.json")
    if size := _SIZES_OF_CLASSES.get(config.get("_class_name", "")):
        return size
    scale = config.get("scaling_factor", _SCALE_OF_OLD_FOLDERS), config.get("shift_factor") or 0.0
    for size, scaling in SCALINGS.items():
        if scaling == scale:
            return size
    own = {size: scaling for size, scaling in SCALINGS.items() if size not in RESCALED}
    known = ", ".join(f"{size} {scaling.scale:g}" for size, scaling in own.items())
    raise UserError(f"{folder}: no autoencoder here has {Scaling(*scale)}; known: {known}")
