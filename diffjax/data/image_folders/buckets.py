"""Buckets of aspect ratios: pictures keep their shape, and each batch is of pictures of one size.

Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", 2023,
arXiv:2307.01952, section 2.3
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffjax.data.sources import Batch, Bucket, Example, Source
from diffjax.errors import UserError

_MOST = 2.0
"""The largest ratio of a side to that of the square of the same area, as in SDXL."""


def bucket_sizes(image_size: int, step: int) -> list[tuple[int, int]]:
    """Heights and widths that are multiples of `step`, of at most `image_size²` pixels.

    For each side the largest other one, both from half to twice the side of the square.

    Raises:
        UserError: the step does not divide the side.

    Example:
        >>> bucket_sizes(512, 256)
        [(256, 768), (256, 1024), (512, 512), (768, 256), (1024, 256)]
    """
    if image_size % step:
        raise UserError(
            f"data.buckets={step} is the step of sizes of buckets and does not divide "
            f"data.image_size={image_size}"
        )
    least, most = image_size / _MOST, image_size * _MOST
    sides = range(step, int(most) + 1, step)
    pairs = [(side, image_size**2 // side // step * step) for side in sides if side >= least]
    pairs = [pair for pair in pairs if least <= pair[1] <= most]
    both = {*pairs, *((width, height) for height, width in pairs)}
    return sorted((int(height), int(width)) for height, width in both)


def bucket_of(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> int:
    """The number of the bucket of the nearest aspect ratio, by its logarithm.

    Example:
        >>> bucket_of((300, 900), [(512, 512), (256, 1024), (1024, 256)])
        1
    """
    height, width = (max(side, 1) for side in size)
    return int(np.argmin([abs(math.log(height * w / (width * h))) for h, w in sizes]))


@dataclass(frozen=True, eq=False, repr=False)
class BucketedSource(Source):
    """Sources of images of one shape each, one after the other; a batch is of one of them.

    Args:
        sources: not empty.
        image_shapes: the shapes of their images.
    """

    sources: tuple[Source, ...]
    image_shapes: tuple[tuple[int, int, int], ...]

    @property
    def pixels(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.sources[0].pixels

    @property
    def buckets(self) -> Sequence[Bucket]:  # pyright: ignore[reportIncompatibleVariableOverride]
        ends = np.cumsum([len(source) for source in self.sources]).tolist()
        rows = (range(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True))
        return [Bucket(*pair) for pair in zip(rows, self.image_shapes, strict=True)]

    @property
    def captions(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [text for source in self.sources for text in source.captions]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Example:
        which, rows = self._place([index])
        return self.sources[which][int(rows[0])]

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        which, own = self._place(rows)
        return self.sources[which].gather(own)

    def draw(self, rows: Sequence[int] | np.ndarray, uniforms: np.ndarray) -> Batch:
        which, own = self._place(rows)
        return self.sources[which].draw(own, uniforms)

    def fingerprint(self) -> str:
        """SHA-256 of the fingerprints of all."""
        facts = " ".join(source.fingerprint() for source in self.sources)
        return hashlib.sha256(facts.encode()).hexdigest()

    def _place(self, rows: Sequence[int] | np.ndarray) -> tuple[int, np.ndarray]:
        """The source of rows that are of one bucket, and their rows there."""
        ends = [bucket.rows.stop for bucket in self.buckets]
        which = set(np.searchsorted(ends, np.asarray(rows), side="right").tolist())
        if len(which) != 1:
            raise UserError("a batch is of images of one bucket, and these rows are of several")
        (number,) = which
        return number, np.asarray(rows) - self.buckets[number].rows.start
