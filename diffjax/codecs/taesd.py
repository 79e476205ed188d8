"""TAESD as a codec: small autoencoders whose latents are those of large published ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import jax.numpy as jnp

from diffjax.codecs.base import Codec, Shape, sha256_of
from diffjax.codecs.one_file import OneFile
from diffjax.errors import UserError
from diffjax.models.taesd.network import SCALE
from diffjax.models.taesd.published import DECODER, DIFFUSERS, ENCODER
from diffjax.pretrained.downloads import find_weights
from diffjax.pretrained.family import Family
from diffjax.shapes import Array, Images, Latents


@dataclass(frozen=True)
class TAESD(Codec):
    """A tiny autoencoder, whose latents are close to those that it was distilled from.

    Each element encodes 8×8 pixels. By default it is TAEF2, of FLUX.2: 32 channels of a standard
    deviation of about 0.8, and 1.3 M parameters each way. Its coarsest blocks normalise over the
    whole image. They are evaluated on the whole also where the others are evaluated in tiles
    (`Tiled`), so that tiles of 24 elements that share 16 are the whole within a level of 8 bits.

    Args:
        path: the folder, or the start of a URL, of `SIZE_encoder.pth` and `SIZE_decoder.pth`
            (`diffjax.models.taesd.sizes.ADDRESS`).
        size: `taef2`, `taef1`, `taesd3`, `taesdxl` or `taesd`.
        encoder_sha256: hex digest of the encoder's file; change it for another size than `taef2`.
        decoder_sha256: hex digest of the decoder's file.

    Example:
        >>> TAESD("folder").latent_shape((128, 64, 3)), TAESD("folder").image_shape((16, 8, 32))
        ((16, 8, 32), (128, 64, 3))

    References:
        github.com/madebyollin/taesd, of the MIT licence.
    """

    path: str = ""
    size: str = "taef2"
    encoder_sha256: str = ENCODER.sizes["taef2"].sha256
    decoder_sha256: str = DECODER.sizes["taef2"].sha256

    def __post_init__(self) -> None:
        ENCODER.size(self.size)  # Refuses unknown ones.

    @property
    def name(self) -> str:
        return self.size

    @property
    def sha256(self) -> str:
        return sha256_of(f"taesd {self.encoder_sha256.lower()} {self.decoder_sha256.lower()}")

    @cached_property
    def params(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        if not self.path:
            raise UserError(
                f"the codec {self.size} needs its weights: set path to the folder of "
                f"{self.size}_encoder.pth and {self.size}_decoder.pth"
            )
        return {
            "encoder": self._read("encoder", ENCODER, self.encoder_sha256),
            "decoder": self._read("decoder", DECODER, self.decoder_sha256),
        }

    def latent_shape(self, image_shape: Shape) -> Shape:
        height, width, channels = image_shape
        if height % SCALE or width % SCALE or channels != 3:
            raise UserError(
                f"{self.name} encodes images in colour whose sides are multiples of {SCALE}, not "
                f"{height}x{width} with {channels} channels"
            )
        return height // SCALE, width // SCALE, DECODER.size(self.size).latent_channels

    def image_shape(self, latent_shape: Shape) -> Shape:
        height, width, channels = latent_shape
        wanted = DECODER.size(self.size).latent_channels
        if channels != wanted:
            raise UserError(f"{self.name} has latents of {wanted} channels, not {channels}")
        return height * SCALE, width * SCALE, 3

    def encode(self, params: Any, images: Images) -> Latents:
        return self.encode_whole(params, self.encode_local(params, images))

    def decode(self, params: Any, latents: Latents) -> Images:
        return self.decode_local(params, self.decode_whole(params, latents))

    def encode_local(self, params: Any, images: Images) -> Array:
        encoder = ENCODER.size(self.size)
        return encoder.apply({"params": params["encoder"]}, (images + 1) / 2, "local")

    def encode_whole(self, params: Any, x: Array) -> Latents:
        return ENCODER.size(self.size).apply({"params": params["encoder"]}, x, "coarse")

    def decode_whole(self, params: Any, latents: Latents) -> Array:
        return DECODER.size(self.size).apply({"params": params["decoder"]}, latents, "coarse")

    def decode_local(self, params: Any, x: Array) -> Images:
        images = DECODER.size(self.size).apply({"params": params["decoder"]}, x, "local")
        return 2 * jnp.clip(images, 0, 1) - 1

    def _read(self, part: str, family: Family, sha256: str) -> Any:
        file = find_weights(f"{self.path.rstrip('/')}/{self.size}_{part}.pth", sha256)
        return family.read(file, family.size(self.size))[1]


@dataclass(frozen=True)
class AutoencoderTiny(OneFile):
    """TAESD in the file of diffusers, without the one of FLUX.2, which diffusers does not have.

    Args:
        path: path or URL of the file.
        size: `taesd`, `taesdxl`, `taesd3` or `taef1`.
        file_sha256: hex digest of the file.

    Example:
        >>> AutoencoderTiny("taesd.safetensors").latent_shape((128, 64, 3))
        (16, 8, 4)
    """

    kind: ClassVar[str] = "autoencoder_tiny"
    layouts: ClassVar[Mapping[str, Family]] = {"encoder.layers.0.weight": DIFFUSERS}
    size: str = "taesd"

    def encode(self, params: Any, images: Images) -> Latents:
        return self._apply(params, (images + 1) / 2, "encode")

    def decode(self, params: Any, latents: Latents) -> Images:
        return 2 * jnp.clip(self._apply(params, latents, "decode"), 0, 1) - 1
