"""A source of images with further arrays, for conditions that are not class labels."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffjax.data.fingerprints import evenly
from diffjax.data.sources import Batch, Example, Source
from diffjax.errors import UserError


@dataclass(frozen=True, eq=False, repr=False)
class GivenSource(Source):
    """The images of a source, with one row of further arrays for each of them.

    The arrays have the names that the data set's condition looks for in a batch
    (`Condition.shapes`). Arrays `[N, H, W, C]` are images: augmentation changes them as it changes
    the source's own, and uint8 becomes [-1, 1]. Arrays of float16 become float32 in a batch.

    Args:
        images: the source of N images.
        arrays: by name, N rows each.
        captions: a text for each image; by default those of the source.

    Raises:
        UserError: an array has another number of rows.

    Example:
        >>> from diffjax.data import digits
        >>> train = digits().train
        >>> source = GivenSource(train, {"tokens_pooled": np.zeros((len(train), 4), np.float32)})
        >>> source.gather([0, 1, 2])["tokens_pooled"].shape
        (3, 4)
    """

    images: Source
    arrays: Mapping[str, np.ndarray]
    captions: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "captions", self.captions or self.images.captions)
        for name, rows in self.arrays.items():
            if len(rows) != len(self.images):
                raise UserError(f"{len(self.images)} images have {len(rows)} rows of {name}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return self.images[index]

    def gather(self, rows: Sequence[int] | np.ndarray) -> Batch:
        batch: Any = self.images.gather(rows)
        return batch | self._given(rows)

    def draw(self, rows: Sequence[int] | np.ndarray, uniforms: np.ndarray) -> Batch:
        batch: Any = self.images.draw(rows, uniforms)
        return batch | self._given(rows)

    def _given(self, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        found = {name: np.asarray(array[rows]) for name, array in self.arrays.items()}
        return {
            name: some.astype(np.float32) if some.dtype == np.float16 else some
            for name, some in found.items()
        }

    @property
    def pixels(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.images.pixels

    def fingerprint(self) -> str:
        """SHA-256 of the images' fingerprint and of the arrays.

        Of an array in a file (`numpy.memmap`) it is of 256 rows, evenly spaced.
        """
        digest = hashlib.sha256(self.images.fingerprint().encode())
        for name, array in sorted(self.arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            some = array[evenly(len(array))] if isinstance(array, np.memmap) else array
            digest.update(np.ascontiguousarray(some).data)
        return digest.hexdigest()
