"""TAESD as a codec: small autoencoders whose latents are those of large published ones."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from diffjax.codecs.base import Codec, Shape, digest
from diffjax.errors import UserError, nearest
from diffjax.models.taesd.network import SCALE, Decoder, Encoder
from diffjax.models.taesd.published import TABLE, TAEF2_DECODER, TAEF2_ENCODER
from diffjax.models.taesd.sizes import SIZES
from diffjax.pretrained.downloads import read_weights
from diffjax.pretrained.torch_files import read_state_dict
from diffjax.shapes import Images, Latents


@dataclass(frozen=True)
class TAESD(Codec):
    """A tiny autoencoder, whose latents are close to those that it was distilled from.

    Each element stands for 8×8 pixels. By default it is TAEF2, of FLUX.2: 32 channels of a standard
    deviation of about 0.8, and 1.3 M parameters each way; a photograph of a flower comes back at
    32.5 dB of PSNR. Its coarsest blocks normalise over the whole image, so that tiles (`Tiled`)
    change it: by 26 dB with tiles of 32 elements, by 36 dB with 48 of 52×80.

    Args:
        path: the folder, or the start of a URL, of `SIZE_encoder.pth` and `SIZE_decoder.pth`
            (`diffjax.models.taesd.published.ADDRESS`).
        size: `taef2`, `taef1`, `taesd3`, `taesdxl` or `taesd`.
        encoder_sha256: hex digest of the encoder's file; change it for another size than `taef2`.
        decoder_sha256: of the decoder's file.

    Example:
        >>> TAESD("folder").latent_shape((128, 64, 3)), TAESD("folder").image_shape((16, 8, 32))
        ((16, 8, 32), (128, 64, 3))

    References:
        github.com/madebyollin/taesd, of the MIT licence.
    """

    path: str = ""
    size: str = "taef2"
    encoder_sha256: str = TAEF2_ENCODER
    decoder_sha256: str = TAEF2_DECODER

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UserError(f"there is no TAESD of size {self.size!r}; {nearest(self.size, SIZES)}")

    @property
    def name(self) -> str:
        return self.size

    @property
    def sha256(self) -> str:
        return digest(f"taesd {self.encoder_sha256.lower()} {self.decoder_sha256.lower()}")

    @cached_property
    def params(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        if not self.path:
            raise UserError(
                f"the codec {self.size} needs its weights: set path to the folder of "
                f"{self.size}_encoder.pth and {self.size}_decoder.pth"
            )
        encoder, decoder = (net(**SIZES[self.size]) for net in (Encoder, Decoder))
        image, latent = ((1, *shape) for shape in ((8, 8, 3), self.latent_shape((8, 8, 3))))
        return {
            "encoder": self._read("encoder", self.encoder_sha256, encoder, image),
            "decoder": self._read("decoder", self.decoder_sha256, decoder, latent),
        }

    def latent_shape(self, image_shape: Shape) -> Shape:
        height, width, channels = image_shape
        if height % SCALE or width % SCALE or channels != 3:
            raise UserError(
                f"{self.name} encodes images in colour whose sides are multiples of {SCALE}, not "
                f"{height}x{width} with {channels} channels"
            )
        return height // SCALE, width // SCALE, SIZES[self.size]["latent_channels"]

    def image_shape(self, latent_shape: Shape) -> Shape:
        height, width, channels = latent_shape
        if channels != SIZES[self.size]["latent_channels"]:
            wanted = SIZES[self.size]["latent_channels"]
            raise UserError(f"{self.name} has latents of {wanted} channels, not {channels}")
        return height * SCALE, width * SCALE, 3

    def encode(self, params: Any, images: Images) -> Latents:
        encoder: Any = Encoder(**SIZES[self.size])
        return encoder.apply({"params": params["encoder"]}, (images + 1) / 2)

    def decode(self, params: Any, latents: Latents) -> Images:
        decoder: Any = Decoder(**SIZES[self.size])
        images = decoder.apply({"params": params["decoder"]}, latents)
        return 2 * jnp.clip(images, 0, 1) - 1

    def _read(self, part: str, sha256: str, network: nn.Module, shape: tuple[int, ...]) -> Any:
        file = f"{self.path.rstrip('/')}/{self.size}_{part}.pth"
        state = read_state_dict(file, read_weights(file, sha256))
        like = jax.ShapeDtypeStruct(shape, jnp.float32)
        expected: Any = jax.eval_shape(network.init, jax.random.key(0), like)
        found = {}
        for ours, leaf in traverse_util.flatten_dict(expected["params"], sep="/").items():
            theirs, change = _published(ours)
            found[ours] = change(state.take(theirs)).astype(np.float32)
            if found[ours].shape != leaf.shape:
                raise UserError(f"{file} is of another network: {theirs} is {found[ours].shape}")
        state.check_empty()
        return traverse_util.unflatten_dict(found, sep="/")


def _published(ours: str) -> tuple[str, Any]:
    """The published name of a parameter, and what becomes of its array."""
    for theirs, pattern, change in TABLE:
        groups = re.sub(r"\{(\w)\}", r"(?P<\1>\\d+)", pattern)
        if found := re.fullmatch(groups, ours):
            return theirs.format(**found.groupdict()), change
    raise KeyError(ours)
