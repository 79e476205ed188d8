"""Autoencoders of any size: as they are trained, in a folder, and as a codec.

A folder is one of diffusers: `config.json`, with the scale and the shift of the latents, and
`diffusion_pytorch_model.safetensors`. `experiments.train_autoencoder` writes it into its run, as
`RUN/vae`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from diffjax.codecs.autoencoder_kl import AutoencoderKL as PublishedKL
from diffjax.codecs.autoencoder_kl import autoencoder_at
from diffjax.codecs.base import Codec, Posterior, Shape, sha256_of
from diffjax.errors import UserError, nearest
from diffjax.host.files import place_of
from diffjax.host.run_files import read_json
from diffjax.models.autoencoder_kl.network import AutoencoderKL, AutoencoderKLFlux2
from diffjax.models.autoencoder_kl.published import FAMILY as AUTOENCODER_KL
from diffjax.models.autoencoder_kl.published import FLUX2
from diffjax.models.autoencoder_kl.sizes import SCALINGS
from diffjax.models.movq.network import MOVQ
from diffjax.models.movq.published import FAMILY as VQ_MODEL
from diffjax.models.taesd.network import SCALE, TAESD
from diffjax.models.taesd.published import DIFFUSERS as AUTOENCODER_TINY
from diffjax.pretrained.downloads import sha256_of_file
from diffjax.pretrained.family import Family
from diffjax.pretrained.folders import CONFIG, read_weights, write_folder
from diffjax.shapes import Images, Latents

FOLDER = "vae"
"""The folder of an autoencoder within a run that trained it, and within a pipeline."""
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SCALE, _SHIFT = "scaling_factor", "shift_factor"
_SIZES = ("channels", "num_res_blocks", "latent_channels", "image_channels")
"""Settings that differ between sizes of `AutoencoderKL`."""


@dataclass(frozen=True)
class Variational:
    """`AutoencoderKL`, whose encoder returns a distribution of latents for each image.

    Args:
        network: its sizes.
    """

    network: AutoencoderKL

    layout: ClassVar[Family] = AUTOENCODER_KL
    scaled: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True
    last_layer: ClassVar[tuple[str, ...]] = ("decoder", "final_conv", "kernel")

    @property
    def scale(self) -> int:
        return self.network.scale

    @property
    def image_channels(self) -> int:
        return self.network.image_channels

    @property
    def latent_channels(self) -> int:
        return self.network.latent_channels

    def check(self) -> None:
        """Refuses sizes that do not divide.

        Raises:
            UserError: the groups of the norms do not divide the channels of a level.
        """
        groups = self.network.num_groups
        if wrong := [n for n in self.network.channels if n % groups]:
            raise UserError(
                f"num_groups={groups} does not divide the {wrong[0]} channels of a level of the "
                "autoencoder: change --config.autoencoder.network.num_groups or .channels"
            )

    def encode(self, params: Any, images: Images) -> Posterior:
        """The distributions of the latents of images in [-1, 1]."""
        posterior: Any = self.network.apply({"params": params}, images, method="encode")
        return posterior

    def decode(self, params: Any, latents: Latents) -> Images:
        """The images of latents, nominally in [-1, 1]."""
        images: Any = self.network.apply({"params": params}, latents, method="decode")
        return images


@dataclass(frozen=True)
class Deterministic:
    """`TAESD`, whose encoder returns the latents of an image.

    Their posterior has a variance of 0 for all practical purposes: a log-variance of -30.

    Args:
        network: its sizes.
    """

    network: TAESD

    layout: ClassVar[Family] = AUTOENCODER_TINY
    scaled: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False
    last_layer: ClassVar[tuple[str, ...]] = ("decoder", "layer_19", "kernel")
    scale: ClassVar[int] = SCALE
    image_channels: ClassVar[int] = 3

    @property
    def latent_channels(self) -> int:
        return self.network.latent_channels

    def check(self) -> None:
        """Refuses a network that its layout has no place for.

        Raises:
            UserError: it normalises over all positions.
        """
        AUTOENCODER_TINY.config.entries(self.network)  # pyright: ignore[reportOptionalMemberAccess]

    def encode(self, params: Any, images: Images) -> Posterior:
        """The latents of images in [-1, 1], as distributions that are all but points."""
        mean: Any = self.network.apply({"params": params}, (images + 1) / 2, method="encode")
        return Posterior(mean, jnp.full_like(mean, -30.0))

    def decode(self, params: Any, latents: Latents) -> Images:
        """The images of latents, nominally in [-1, 1]."""
        images: Any = self.network.apply({"params": params}, latents, method="decode")
        return 2 * images - 1


@dataclass(frozen=True)
class Unquantised(Variational):
    """`MOVQ`, whose latents are taken as they are, neither quantised nor scaled.

    Its folders have the scale of another autoencoder, which Kandinsky's models do not use.

    Args:
        network: its sizes.
    """

    network: MOVQ  # pyright: ignore[reportIncompatibleVariableOverride] it has the same methods

    layout: ClassVar[Family] = VQ_MODEL
    scaled: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False

    def encode(self, params: Any, images: Images) -> Posterior:
        """The latents of images in [-1, 1], as distributions that are all but points."""
        mean: Any = self.network.apply({"params": params}, images, method="encode")
        return Posterior(mean, jnp.full_like(mean, -30.0))


@dataclass(frozen=True)
class Packed(Variational):
    """`AutoencoderKLFlux2`, whose latents are means that are packed and normalised.

    Their posterior has a variance of 0 for all practical purposes: a log-variance of -30.

    Args:
        network: its sizes.
    """

    network: AutoencoderKLFlux2

    layout: ClassVar[Family] = FLUX2
    stochastic: ClassVar[bool] = False

    @property
    def latent_channels(self) -> int:
        return self.network.packed_channels

    def encode(self, params: Any, images: Images) -> Posterior:
        """The packed means of the latents of images, as distributions that are all but points."""
        mean = super().encode(params, images).mean
        packed: Any = self.network.apply({"params": params}, mean, method="pack")
        return Posterior(packed, jnp.full_like(packed, -30.0))

    def decode(self, params: Any, latents: Latents) -> Images:
        """The images of packed latents, nominally in [-1, 1]."""
        z: Any = self.network.apply({"params": params}, latents, method="unpack")
        return super().decode(params, z)


Autoencoder = Variational | Deterministic | Unquantised | Packed
KINDS: Mapping[str, type[Autoencoder]] = {
    "AutoencoderKL": Variational,
    "AutoencoderTiny": Deterministic,
    "VQModel": Unquantised,
    "AutoencoderKLFlux2": Packed,
}
"""By the name of the class in diffusers."""


def latent_shape(autoencoder: Autoencoder, image_shape: Shape) -> Shape:
    """The shape of the latents of images.

    Raises:
        UserError: their sides do not divide, or they have other channels.

    Example:
        >>> latent_shape(Variational(AutoencoderKL()), (64, 48, 3))
        (8, 6, 4)
    """
    height, width, channels = image_shape
    scale, wanted = autoencoder.scale, autoencoder.image_channels
    if height % scale or width % scale or channels != wanted:
        raise UserError(
            f"this autoencoder takes images of {wanted} channel(s) whose sides are multiples of "
            f"{scale}, not {height}x{width} with {channels} channel(s)"
        )
    return height // scale, width // scale, autoencoder.latent_channels


def write_autoencoder(
    folder: Path, autoencoder: Autoencoder, params: Any, scale: float, shift: float
) -> None:
    """Writes an autoencoder as a folder of diffusers.

    Args:
        folder: is made if need be.
        autoencoder: its kind and network.
        params: nested dicts of arrays.
        scale: what diffusion models are trained on is `scale·(z − shift)`.
        shift: see `scale`.

    Raises:
        UserError: a file can't be written, or the layout has no place for the network.
    """
    layout, network = autoencoder.layout, autoencoder.network
    assert layout.config is not None
    entries = {**layout.config.entries(network), _SCALE: scale, _SHIFT: shift}
    write_folder(folder, layout.to_theirs(params, network), entries)


@dataclass(frozen=True)
class AutoencoderFolder(Codec):
    """An autoencoder of any size in a folder of diffusers, or in the run that trained it.

        encode(x) = scale·(E[z | x] − shift)        decode(y) = clip(D(y / scale + shift), −1, 1)

    Scale and shift are those of its `config.json`. Where the encoder returns no distribution, z is
    what it returns.

    Args:
        path: the path of the folder; of a run or a pipeline, whose folder `vae` is taken.
        sha256: hash of `config.json` and the weights; "" is that of the files as they are. Latents
            have it beside them, and a run that uses the codec in its config.

    Example:
        >>> AutoencoderFolder("runs/ae").name
        'autoencoder'
    """

    path: str = ""
    sha256: str = ""  # pyright: ignore[reportIncompatibleVariableOverride]
    name: ClassVar[str] = "autoencoder"

    def __post_init__(self) -> None:
        if self.path and not self.sha256 and (self._folder / CONFIG).is_file():
            object.__setattr__(self, "sha256", self._hash)

    @property
    def stochastic(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._autoencoder.stochastic

    @cached_property
    def params(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.sha256 and self._hash != self.sha256:
            raise UserError(
                f"{self._folder} has another autoencoder than this config was written for: its "
                f"hash is {self._hash[:12]}…, not {self.sha256[:12]}…"
            )
        return self._autoencoder.layout.read(self._folder, self._autoencoder.network)[1]

    def latent_shape(self, image_shape: Shape) -> Shape:
        return latent_shape(self._autoencoder, image_shape)

    def image_shape(self, latent_shape: Shape) -> Shape:
        height, width, channels = latent_shape
        autoencoder = self._autoencoder
        if channels != autoencoder.latent_channels:
            raise UserError(
                f"{self._folder} has latents of {autoencoder.latent_channels} channels, not "
                f"{channels}"
            )
        return height * autoencoder.scale, width * autoencoder.scale, autoencoder.image_channels

    def encode(self, params: Any, images: Images) -> Latents:
        return self.posterior(params, images).mean

    def posterior(self, params: Any, images: Images) -> Posterior:
        scale, shift = self._scaling
        return self._autoencoder.encode(params, images).scaled(scale, shift)

    def decode(self, params: Any, latents: Latents) -> Images:
        scale, shift = self._scaling
        return jnp.clip(self._autoencoder.decode(params, latents / scale + shift), -1, 1)

    @property
    def is_published(self) -> bool:
        """Whether it has a published size of `AutoencoderKL` and the scale of its latents.

        Raises:
            UserError: the folder has no autoencoder.
        """
        name = str(self._config.get("_class_name"))
        if KINDS.get(name) is not Variational:
            return KINDS.get(name) is not Deterministic  # That codec reads others, or refuses.
        ours, scaling = self._autoencoder.network, self._scaling
        sizes = [AUTOENCODER_KL.size(name) for name in AUTOENCODER_KL.sizes]
        return any(all(getattr(x, y) == getattr(ours, y) for y in _SIZES) for x in sizes) and any(
            scaling == tuple(map(jnp.float32, known))
            for known in SCALINGS.values()
            if np.isscalar(known.scale)
        )

    @cached_property
    def _folder(self) -> Path:
        place = place_of(self.path)
        return place / FOLDER if (place / FOLDER / CONFIG).is_file() else place

    @property
    def _hash(self) -> str:
        files = [self._folder / name for name in (CONFIG, _WEIGHTS)]
        try:
            return sha256_of(f"autoencoder {' '.join(map(sha256_of_file, files))}")
        except OSError as error:
            raise UserError(f"can't read {error.filename}: {error.strerror}") from error

    @cached_property
    def _config(self) -> Mapping[str, Any]:
        if not self.path:
            raise UserError(
                "the codec autoencoder needs the folder of an autoencoder: set path to a run of "
                "experiments.train_autoencoder, or to a folder of diffusers"
            )
        config = read_json(self._folder / CONFIG)
        if config is None:
            raise UserError(
                f"{self.path} has no autoencoder: neither {CONFIG} of diffusers nor a folder "
                f"{FOLDER}, which experiments.train_autoencoder writes at its end"
            )
        return config

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        name = str(self._config.get("_class_name"))
        if name not in KINDS:
            raise UserError(f"{self._folder} is no autoencoder here: {nearest(name, KINDS)}")
        layout = KINDS[name].layout
        state = read_weights(self._folder).state
        network = layout.network_of(state, str(self._folder), self._config)
        return KINDS[name](network)

    @property
    def _scaling(self) -> tuple[Any, Any]:
        entries = self._autoencoder.layout.config
        assert entries is not None
        if not self._autoencoder.scaled:
            return jnp.float32(1.0), jnp.float32(0.0)
        scale = self._config.get(_SCALE, entries.beside.get(_SCALE, 1.0))
        shift = self._config.get(_SHIFT, entries.beside.get(_SHIFT)) or 0.0
        try:
            return jnp.float32(scale), jnp.float32(shift)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self._folder / CONFIG} has no scale of latents: {error}") from error


def codec_at(path: str | Path, size: str = "sd-vae") -> PublishedKL | AutoencoderFolder:
    """The codec whose weights are at a path.

    Args:
        path: the path of a file of a published AutoencoderKL, or of a folder of diffusers, a
            pipeline, or a run that trained an autoencoder.
        size: the size of the network in a file, which doesn't show the scale of its latents; see
            `diffjax.codecs.autoencoder_kl.autoencoder_at`.

    Raises:
        UserError: there is no autoencoder, or it can't be read.
    """
    if Path(path).is_dir():
        folder = AutoencoderFolder(str(path))
        if not folder.is_published:
            return folder
    return autoencoder_at(path, size)
