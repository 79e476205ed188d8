"""AutoencoderKL as a codec: the autoencoders of Stable Diffusion and FLUX.1."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp

from diffjax.codecs.base import Codec, Posterior, Shape, sha256_of
from diffjax.codecs.scaled import row
from diffjax.errors import UserError
from diffjax.host.run_files import read_json
from diffjax.models.autoencoder_kl import network
from diffjax.models.autoencoder_kl.published import FAMILY, read
from diffjax.models.autoencoder_kl.sizes import RESCALED, SCALINGS, Scaling
from diffjax.pretrained.downloads import find_weights, sha256_of_file
from diffjax.shapes import Images, Latents


@dataclass(frozen=True)
class AutoencoderKL(Codec):
    """The autoencoder of latent diffusion; a latent is the scaled mean of its posterior.

        encode(x) = scale·(E[z | x] − shift)        decode(y) = clip(D(y / scale + shift), −1, 1)

    Each element stands for 8×8 pixels. Scale and shift are the published ones of the size
    (`diffjax.models.autoencoder_kl.sizes.SCALINGS`), so latents have a standard deviation of about
    1 and need no further scale. Published models are trained on samples of the posterior
    (`Posterior.sample`), whose standard deviation is small beside that of the means.

    Group norms and the attention in the middle see the whole image, so tiles (`Tiled`) change it.

    Args:
        path: path or URL of a file of weights, of torch or safetensors, in the layout of diffusers
            or of LDM; a file of a whole model has them too.
        size: `sd-vae` (Stable Diffusion 1 and 2, DiT, SiT), `sdxl`, `sd3`, `flux`, or `edm2`: the
            weights of `sd-vae` with EDM2's scale of each channel, to a standard deviation of 0.5.
        file_sha256: hex digest of the file.

    Example:
        >>> codec = AutoencoderKL("vae.safetensors", "sd3")
        >>> codec.latent_shape((128, 64, 3)), codec.image_shape((16, 8, 16))
        ((16, 8, 16), (128, 64, 3))

    References:
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022,
        arXiv:2112.10752
    """

    stochastic: ClassVar[bool] = True
    path: str = ""
    size: str = "sd-vae"
    file_sha256: str = ""

    def __post_init__(self) -> None:
        FAMILY.size(self.size)  # Refuses unknown ones.

    @property
    def name(self) -> str:
        return f"autoencoder_kl:{self.size}"

    @property
    def sha256(self) -> str:
        return sha256_of(f"autoencoder_kl {self.size} {self.file_sha256.lower()}")

    @cached_property
    def params(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        if not (self.path and self.file_sha256):
            raise UserError(
                f"the codec {self.name} needs its weights: set path to their file and file_sha256 "
                "to its SHA-256"
            )
        return read(find_weights(self.path, self.file_sha256), self._network)[1]

    def latent_shape(self, image_shape: Shape) -> Shape:
        height, width, channels = image_shape
        scale, wanted = self._network.scale, self._network.image_channels
        if height % scale or width % scale or channels != wanted:
            raise UserError(
                f"{self.name} encodes images of {wanted} channels whose sides are multiples of "
                f"{scale}, not {height}x{width} with {channels} channels"
            )
        return height // scale, width // scale, self._network.latent_channels

    def image_shape(self, latent_shape: Shape) -> Shape:
        height, width, channels = latent_shape
        scale, wanted = self._network.scale, self._network.latent_channels
        if channels != wanted:
            raise UserError(f"{self.name} has latents of {wanted} channels, not {channels}")
        return height * scale, width * scale, self._network.image_channels

    def encode(self, params: Any, images: Images) -> Latents:
        return self.posterior(params, images).mean

    def posterior(self, params: Any, images: Images) -> Posterior:
        posterior: Any = self._network.apply({"params": params}, images, method="encode")
        return posterior.scaled(*map(row, SCALINGS[self.size]))

    def decode(self, params: Any, latents: Latents) -> Images:
        scale, shift = map(row, SCALINGS[self.size])
        z = latents / scale + shift
        images: Any = self._network.apply({"params": params}, z, method="decode")
        return jnp.clip(images, -1, 1)

    @property
    def _network(self) -> network.AutoencoderKL:
        return FAMILY.size(self.size)


def autoencoder_at(path: str | Path, size: str = "sd-vae") -> AutoencoderKL:
    """The codec whose weights are at a path, with the hash that they have.

    Args:
        path: of a file of weights, or of a folder of diffusers, whose `config.json` has the scale
            of the latents; of a folder with a folder `vae`, of that.
        size: of a file, which doesn't show the scale of its latents; of a folder, if it has the
            weights of this size (`RESCALED`).

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
_SCALE_OF_OLD_FOLDERS = 0.18215  # which have none in `config.json`


def _size_of(folder: Path) -> str:
    """The size with the scale that the folder's `config.json` has."""
    config = read_json(folder / "config.json")
    if config is None:
        raise UserError(f"{folder} is no folder of an autoencoder: it has no config.json")
    scale = config.get("scaling_factor", _SCALE_OF_OLD_FOLDERS), config.get("shift_factor") or 0.0
    for size, scaling in SCALINGS.items():
        if scaling == scale:
            return size
    own = {size: scaling for size, scaling in SCALINGS.items() if size not in RESCALED}
    known = ", ".join(f"{size} {scaling.scale:g}" for size, scaling in own.items())
    raise UserError(f"{folder}: no autoencoder here has {Scaling(*scale)}; known: {known}")
