"""Fingerprints of data that are too large to be hashed as a whole: hashes of samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.errors import UserError

_MOST = 256  # files or rows that are sampled
_PART_BYTES, _MOST_PARTS = 4096, 2 * _MOST  # of all files together


def evenly(count: int, most: int = _MOST) -> np.ndarray:
    """At most `most` evenly spaced numbers of 0 … count − 1, with the first and the last.

    Example:
        >>> evenly(101, most=3).tolist(), evenly(2).tolist(), evenly(0).tolist()
        ([0, 50, 100], [0, 1], [])
    """
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)


def hash_parts(digest: Any, files: Sequence[Path]) -> None:
    """Adds evenly spaced parts of files to a digest: parts of 4 kB, of 2 MB in total.

    For 256 files these are the first and the last 4 kB of each file, for one file 512 parts. A
    small file is read as a whole.

    Args:
        digest: a hash object of `hashlib`.
        files: at most 256 files (`evenly`).

    Raises:
        UserError: one of them can't be read.
    """
    for file in files:
        try:
            size = file.stat().st_size
            parts = min(_MOST_PARTS // len(files), -(-size // _PART_BYTES))
            with file.open("rb") as stream:
                for start in evenly(max(size - _PART_BYTES, 0) + 1, parts):
                    stream.seek(int(start))
                    digest.update(stream.read(_PART_BYTES))
        except OSError as error:
            raise UserError(f"can't read {file}: {error.strerror}") from None
