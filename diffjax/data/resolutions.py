"""Data sets of cascades: images at a fraction of their size, and images given their small ones."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffjax.conditions import Condition, LowResolution, Several
from diffjax.conditions.classes import Unconditional
from diffjax.data.sources import Batch, DataSet, Example, Source
from diffjax.errors import UserError
from diffjax.kinds import AtLeastOne, Positive
from diffjax.process.paths import Cosine, Path

_COSINE = Cosine()


@dataclass(frozen=True, eq=False, repr=False)
class SmallSource(Source):
    """The images of another source, each square of pixels replaced by one pixel, its mean.

    Args:
        images: the source, of uint8.
        factor: the side of a square; it divides the images' sides.
    """

    images: Source
    factor: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        example = self.images[index]
        return {**example, "image": self._small(example["image"][None])[0]}

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        batch = self.images.gather(rows)
        return {**batch, "image": self._small(batch["image"])}

    def fingerprint(self) -> str:
        """SHA-256 of the images' fingerprint and the factor."""
        stated = f"{self.images.fingerprint()} at 1/{self.factor}"
        return hashlib.sha256(stated.encode()).hexdigest()

    def _small(self, images: np.ndarray) -> np.ndarray:
        n, height, width, channels = images.shape
        f = self.factor
        squares = images.reshape(n, height // f, f, width // f, f, channels)
        return np.rint(squares.mean(axis=(2, 4))).astype(np.uint8)


def downscaled(dataset: DataSet, factor: AtLeastOne[int] = 2) -> DataSet:
    """A data set at a fraction of its size: what the base model of a cascade is trained on.

    Args:
        dataset: the images.
        factor: how many pixels become one, in each direction.

    Raises:
        UserError: the data are latents or pairs, or the factor does not divide their sides.

    Example:
        >>> from diffjax.data import digits
        >>> downscaled(digits()).image_shape
        (4, 4, 1)
    """
    height, width, channels = _checked(dataset, factor)
    return replace(
        dataset,
        name=f"{dataset.name} at 1/{factor}",
        train=SmallSource(dataset.train, factor),
        test=SmallSource(dataset.test, factor),
        image_shape=(height // factor, width // factor, channels),
        mixture=None,
    )


def upscaling(
    dataset: DataSet,
    factor: AtLeastOne[int] = 2,
    path: Path = _COSINE,
    most_level: Positive[float] = 0.5,
) -> DataSet:
    """A data set whose images have their small ones as a condition, beside that which they have.

    What a super-resolution model of a cascade is trained on (`LowResolution`). The parts of the
    condition are `label`, if there are classes, and `small`.

    Args:
        dataset: the images.
        factor: how many pixels of an image are one of the small image, in each direction.
        path: the path of the noise in small images.
        most_level: the largest level of noise in training, a time on the path; 0.3 to 1.

    Raises:
        UserError: as `downscaled`, or the path has no such time.

    Example:
        >>> from diffjax.data import digits
        >>> upscaling(digits()).condition.describe()
        'label: 10 classes, small: smaller images of 4×4×1'
    """
    height, width, channels = _checked(dataset, factor)
    if most_level > path.t_noise:
        raise UserError(f"most_level={most_level:g} is beyond t_noise={path.t_noise:g} of {path}")
    small = LowResolution(
        (height // factor, width // factor, channels),
        path=path,
        most_level=most_level,
        factor=factor,
    )
    own = dataset.condition
    parts: dict[str, Condition] = dict(own.parts) if isinstance(own, Several) else {"label": own}
    if "small" in parts:
        raise UserError(f"{dataset.name} has small images in its condition already")
    kept = (*own.kept, "small") if isinstance(own, Several) else ("small",)
    main = own.main if isinstance(own, Several) else ""
    parts = {name: part for name, part in parts.items() if not isinstance(part, Unconditional)}
    return replace(
        dataset,
        name=f"{dataset.name} from 1/{factor}",
        given=Several({**parts, "small": small}, kept=kept, main=main),
    )


def _checked(dataset: DataSet, factor: int) -> tuple[int, int, int]:
    """The shape of the images.

    Raises:
        UserError: as `downscaled`.
    """
    height, width, channels = dataset.image_shape
    if not dataset.codec.pixels:
        raise UserError(f"{dataset.name} are latents, and only pixels are made smaller here")
    if dataset.real is not None:
        raise UserError(f"{dataset.name} are pairs: make images of one kind smaller")
    if factor < 2 or height % factor or width % factor:
        raise UserError(f"factor={factor} does not divide images of {height}x{width} into smaller")
    return height, width, channels
