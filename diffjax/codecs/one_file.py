"""A codec whose weights are one published file."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from diffjax.codecs.base import Codec, Shape, sha256_of
from diffjax.errors import UserError
from diffjax.models.autoencoder_kl.published import read
from diffjax.pretrained.downloads import find_weights
from diffjax.pretrained.family import Family


@dataclass(frozen=True)
class OneFile(Codec):
    """A codec of a published family, whose weights are one file in one of several layouts.

    A subclass has `encode` and `decode`. Its network has `scale` (how many pixels an element is
    high and wide), `packed_channels` (of latents) and `image_channels`.

    Attributes:
        kind: its name before the size's.
        layouts: the families of the layouts, by a tensor of each.
        path: path or URL of the file, of torch or safetensors; a file of a whole model has it too.
        size: a published size of the family.
        file_sha256: hex digest of the file.
    """

    kind: ClassVar[str]
    layouts: ClassVar[Mapping[str, Family]]
    path: str = ""
    size: str = ""
    file_sha256: str = ""

    def __post_init__(self) -> None:
        _ = self._network  # Refuses unknown sizes.

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.size}"

    @property
    def sha256(self) -> str:
        return sha256_of(f"{self.kind} {self.size} {self.file_sha256.lower()}")

    @cached_property
    def params(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        if not (self.path and self.file_sha256):
            raise UserError(
                f"the codec {self.name} needs its weights: set path to their file and file_sha256 "
                "to its SHA-256"
            )
        return read(find_weights(self.path, self.file_sha256), self._network, self.layouts)[1]

    def latent_shape(self, image_shape: Shape) -> Shape:
        height, width, channels = image_shape
        scale, wanted = self._network.scale, self._network.image_channels
        if height % scale or width % scale or channels != wanted:
            raise UserError(
                f"{self.name} encodes images of {wanted} channels whose sides are multiples of "
                f"{scale}, not {height}x{width} with {channels} channels"
            )
        return height // scale, width // scale, self._network.packed_channels

    def image_shape(self, latent_shape: Shape) -> Shape:
        height, width, channels = latent_shape
        scale, wanted = self._network.scale, self._network.packed_channels
        if channels != wanted:
            raise UserError(f"{self.name} has latents of {wanted} channels, not {channels}")
        return height * scale, width * scale, self._network.image_channels

    @property
    def _network(self) -> Any:
        families = [*self.layouts.values()]
        family = next((each for each in families if self.size in each.sizes), families[-1])
        return family.size(self.size)

    def _apply(self, params: Any, x: Any, method: str) -> Any:
        return self._network.apply({"params": params}, x, method=method)
