"""Data augmentation: random changes of training images.

An augmentation is any callable `(images, uniforms) -> images` on uint8 `[B,H,W,C]`. Row b of
`uniforms`, float64 `[B, UNIFORMS_PER_IMAGE]` in [0, 1), is all the randomness for image b. It is a
function of the seed and of the image's position in the training stream. So an augmentation is a
pure function, and the result depends neither on the number of processes nor on the rest of the
batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diffjax.errors import UserError
from diffjax.kinds import NotNegative, Probability

UNIFORMS_PER_IMAGE = 8

Augmentation = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Augment:
    """Random horizontal flips and random shifts.

    Args:
        flip_probability: the probability of a horizontal flip: 0, or 0.5 for photographs.
        max_shift_pixels: the horizontal and the vertical shift are each uniform on
            −max_shift_pixels … max_shift_pixels; pixels at the edge are repeated into the gap.

    Raises:
        UserError: a value out of range.

    Example:
        >>> image = np.arange(4, dtype=np.uint8).reshape(1, 1, 4, 1)
        >>> Augment(flip_probability=1.0)(image, np.zeros((1, UNIFORMS_PER_IMAGE))).ravel().tolist()
        [3, 2, 1, 0]
    """

    flip_probability: Probability[float] = 0.0
    max_shift_pixels: NotNegative[int] = 0

    def __post_init__(self) -> None:
        if not 0 <= self.flip_probability <= 1:
            raise UserError(f"flip_probability must be in [0, 1], not {self.flip_probability}")
        if self.max_shift_pixels < 0:
            raise UserError(f"max_shift_pixels can't be negative: {self.max_shift_pixels}")

    def __call__(self, images: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Returns augmented images, uint8 `[B,H,W,C]`; the arguments are not changed."""
        if self.flip_probability:
            flip = uniforms[:, 0] < self.flip_probability
            images = np.where(flip[:, None, None, None], images[:, :, ::-1], images)
        if self.max_shift_pixels:
            num_shifts = 2 * self.max_shift_pixels + 1
            shifts = (uniforms[:, 1:3] * num_shifts).astype(int) - self.max_shift_pixels
            images = _shift(images, down=shifts[:, 0], right=shifts[:, 1])
        return images


def _shift(images: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    num_images, height, width, _ = images.shape
    rows = np.clip(np.arange(height) - down[:, None], 0, height - 1)
    columns = np.clip(np.arange(width) - right[:, None], 0, width - 1)
    batch = np.arange(num_images)[:, None, None]
    return images[batch, rows[:, :, None], columns[:, None, :]]
