"""Squares of pixels as channels: a codec without weights and without loss."""

from dataclasses import dataclass
from typing import Any

from diffjax.codecs.base import Codec, Shape, sha256_of
from diffjax.errors import UserError
from diffjax.kinds import AtLeastOne
from diffjax.shapes import Images, Latents


@dataclass(frozen=True)
class SpaceToDepth(Codec):
    """Each square of `block × block` pixels becomes one position with `block²` times the channels.

        latents[i, j, (p, q, c)] = images[block·i + p, block·j + q, c]

    It is invertible and exact. Networks with convolutions become cheaper on it; for a DiT it is the
    same as larger patches.

    Args:
        block: the side of a square in pixels; 2 or 4 is typical.

    Example:
        >>> SpaceToDepth(2).latent_shape((32, 32, 3)), SpaceToDepth(2).image_shape((4, 4, 4))
        ((16, 16, 12), (8, 8, 1))

    References:
        Hoogeboom et al., "simple diffusion", 2023, arXiv:2301.11093, §3.3; Shi et al. 2016,
        arXiv:1609.05158
    """

    block: AtLeastOne[int] = 2

    @property
    def name(self) -> str:
        return f"space_to_depth:{self.block}"

    @property
    def sha256(self) -> str:
        return sha256_of(f"space_to_depth block={self.block}")

    def latent_shape(self, image_shape: Shape) -> Shape:
        height, width, channels = image_shape
        if height % self.block or width % self.block:
            raise UserError(f"{self.name} does not divide images of {height}x{width}")
        return height // self.block, width // self.block, channels * self.block**2

    def image_shape(self, latent_shape: Shape) -> Shape:
        height, width, channels = latent_shape
        if channels % self.block**2:
            raise UserError(
                f"{self.name} has latents of {self.block**2} channels for each of an image's, and "
                f"{list(latent_shape)} has {channels}"
            )
        return height * self.block, width * self.block, channels // self.block**2

    def encode(self, params: Any, images: Images) -> Latents:
        batch, rows, columns, colours = images.shape
        b, (height, width, channels) = self.block, self.latent_shape((rows, columns, colours))
        squares = images.reshape(batch, height, b, width, b, colours)
        return squares.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)

    def decode(self, params: Any, latents: Latents) -> Images:
        batch, height, width, channels = latents.shape
        b, shape = self.block, self.image_shape((height, width, channels))
        squares = latents.reshape(batch, height, width, b, b, shape[-1])
        return squares.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *shape)
