"""Images that the network sees beside the noisy one, in further channels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from diffjax.conditions.base import Condition, Shapes
from diffjax.errors import UserError


@dataclass(frozen=True)
class Images(Condition):
    """Images `[n, H, W, C]` in [-1, 1], concatenated with the network's input in the channels.

    For super-resolution the coarse image in the fine one's size, for inpainting the image with its
    gaps. Height and width are those of the data. The null condition is an image of zeros. Saharia
    et al. 2021 (arXiv:2104.07636).

    Attributes:
        shape: `(H, W, C)`.
        name: the name of its array in a batch.

    Example:
        >>> Images((8, 8, 3)).null(2).shape
        (2, 8, 8, 3)
    """

    shape: tuple[int, int, int]
    name: str = "given_image"

    def shapes(self, n: Any) -> Shapes:
        return {self.name: jax.ShapeDtypeStruct((n, *self.shape), jnp.float32)}

    def of_batch(self, batch: Mapping[str, Any]) -> Array:
        return batch[self.name]

    def null(self, n: Any) -> Array:
        return self.example(n)

    def of(self, given: Any) -> Any:
        """As `Condition.of`; images of uint8, from 0 to 255, are also taken."""
        if getattr(given, "dtype", None) == np.uint8:
            given = np.asarray(given, np.float32) / 127.5 - 1.0
        return super().of(given)

    def parse(self, given: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Image files by their paths, in the size that is needed.

        Raises:
            UserError: the first that is no image, has another size, or has transparent parts.
        """
        height, width, channels = self.shape
        found = []
        for path in given:
            image = read_image(path, channels)
            if image.shape != self.shape:
                size = f"{image.shape[0]}x{image.shape[1]}"
                raise UserError(f"{path} has {size} pixels, and {height}x{width} are needed")
            found.append(image)
        return self.of(np.stack(found))

    def pictures(self, cond: Any) -> np.ndarray:
        return np.asarray(cond)

    def describe(self) -> str:
        return f"images of {'×'.join(map(str, self.shape))}"


def read_image(path: Any, channels: int) -> np.ndarray:
    """The image in a file, `[H, W, channels]` uint8.

    Raises:
        UserError: it is no image, or has transparent parts and the channels have no place for them.
    """
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise UserError(f"no file has images of {channels} channels: pass their arrays")
    try:
        with Image.open(path) as file:
            image = np.asarray(file.convert(modes[channels])).reshape(*file.size[::-1], -1)
            opaque = channels == 4 or not file.has_transparency_data or _is_opaque(file)
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path!r} is no image file that can be read: {error}") from error
    if not opaque:
        raise UserError(
            f"{path} has transparent parts (an alpha channel), and {channels} channels have no "
            "place for them: lay it over a colour first"
        )
    return image


def _is_opaque(file: Image.Image) -> bool:
    return file.convert("RGBA").getchannel("A").getextrema()[0] == 255
