"""Images of which a part is to be made anew, as networks for inpainting see them."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffjax.conditions.images import Images
from diffjax.errors import UserError

NO_LATENT = (
    "the mask is so small that no latent pixel is made anew: each counts by the first pixel of its "
    "square"
)
"""What is wrong with a mask that `nearest` leaves empty."""


@dataclass(frozen=True)
class MaskedImages(Images):
    """A mask and the latents of the image without its part, concatenated with the network's input.

    The mask is 1 where the image is to be made anew. Its pixels there are 0, mid-grey, before they
    are encoded. Rombach et al. 2022 (arXiv:2112.10752), section 4.5.

    Attributes:
        packed: whether the mask comes after the latents and has all pixels of the square that a
            latent pixel stands for, row by row, as in Flux.1 Fill. Else it comes before them and
            has the first pixel of the square, as in Stable Diffusion.

    Example:
        >>> kind = MaskedImages((2, 3, 5))
        >>> mask = np.zeros((1, 16, 24, 1))
        >>> mask[:, 8:] = 1
        >>> kind.joined(np.full((1, 2, 3, 4), 0.5), mask)[0, :, 0, :2].tolist()
        [[0.0, 0.5], [1.0, 0.5]]
    """

    packed: bool = False

    masks_latents: ClassVar[bool] = False
    """Whether latents are those of the whole image, and are 0 where it is made anew."""

    def joined(self, latents: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The condition `[n, h, w, C]` of latents `[n, h, w, c]` and masks `[1 or n, H, W, 1]`.

        Raises:
            UserError: they have other shapes.
        """
        place = latents.shape[1:3]
        parts = (latents, squares(mask, place)) if self.packed else (nearest(mask, place), latents)
        return self._beside_each_other(*parts)

    def _beside_each_other(self, *parts: np.ndarray) -> np.ndarray:
        count = max(map(len, parts))
        parts = tuple(np.broadcast_to(x, (count, *x.shape[1:])) for x in parts)
        found = np.concatenate(parts, axis=-1).astype(np.float32)
        if found.shape[1:] != self.shape:
            raise UserError(
                f"this network takes a mask and latents of {self.shape} beside its input, and "
                f"these have {found.shape[1:]}"
            )
        return found


@dataclass(frozen=True)
class KeptLatents(MaskedImages):
    """The latents of the part of an image that is kept, and a mask that is 1 there.

    Latents are those of the whole image, and 0 where it is made anew, which reaches one latent
    pixel beyond the mask on each side. So Kandinsky 2's networks for inpainting see them.

    Example:
        >>> kind = KeptLatents((1, 4, 2))
        >>> mask = np.zeros((1, 8, 32, 1))
        >>> mask[:, :, 24:] = 1
        >>> kind.joined(np.full((1, 1, 4, 1), 0.5), mask)[0, 0].tolist()
        [[0.5, 1.0], [0.5, 1.0], [0.0, 0.0], [0.0, 0.0]]
    """

    masks_latents: ClassVar[bool] = True

    def joined(self, latents: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """As `MaskedImages.joined`."""
        anew = nearest(mask, latents.shape[1:3])
        height, width = anew.shape[1:3]
        wide = np.pad(anew, ((0, 0), (1, 1), (1, 1), (0, 0)))
        near = [wide[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        kept = 1.0 - np.max(near, axis=0)
        return self._beside_each_other(kept * latents, kept)


def nearest(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask `[n, H, W, 1]` in the size of latents `(h, w)`: the first pixel of each square.

    The one rule for masks of latents, for networks that see them and for solvers that keep the
    known part. Published networks for inpainting were trained with it. Without a codec latents are
    pixels, and the mask stays as it is.

    Example:
        >>> mask = np.zeros((1, 4, 4, 1))
        >>> mask[:, 1:] = 1
        >>> nearest(mask, (2, 2))[0, ..., 0].tolist()
        [[0.0, 0.0], [1.0, 1.0]]

    Raises:
        UserError: the sizes do not divide.
    """
    rows, columns = _sides(mask, shape)
    return mask[:, ::rows, ::columns]


def squares(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask `[n, H, W, 1]` as all pixels of each square, row by row, `[n, h, w, H·W/(h·w)]`.

    Raises:
        UserError: the sizes do not divide.
    """
    (rows, columns), (height, width) = _sides(mask, shape), shape
    cells = mask.reshape(len(mask), height, rows, width, columns)
    return cells.transpose(0, 1, 3, 2, 4).reshape(len(mask), height, width, rows * columns)


def _sides(mask: np.ndarray, shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the square of pixels that a latent pixel stands for."""
    height, width = mask.shape[1:3]
    if height % shape[0] or width % shape[1]:
        raise UserError(
            f"a mask of {height}x{width} pixels does not divide into latents of "
            f"{shape[0]}x{shape[1]}"
        )
    return height // shape[0], width // shape[1]
