"""Tensors of a file, which are read when they are used."""

import difflib
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffjax.errors import UserError

_MOST_RESIDENT_BYTES = 2**28


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its shape and type are known, its numbers are read by `np.asarray`.

    Attributes:
        shape: its shape in the file.
        dtype: its type in the file, a type of NumPy, or bfloat16.
        read: reads the numbers; each call reads them again.

    Example:
        >>> tensor = Tensor((2,), np.dtype(np.float32), lambda: np.ones(2, np.float32))
        >>> np.asarray(tensor)
        array([1., 1.], dtype=float32)
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)


class MappedFile:
    """Read-only arrays that are parts of a file: the system reads a page when it is used.

    The memory of pages is given back from time to time, so a file that is gone through array by
    array needs about 256 MB and the largest array, whatever its size; a page that is given back
    too early is read again.

    Args:
        path: the path of the file, which must not be changed as long as its arrays are in use.

    Raises:
        OSError: the file can't be opened.
        ValueError: it is empty.
    """

    def __init__(self, path: str):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._resident_bytes = 0

    def __len__(self) -> int:
        return len(self._map)

    def bytes(self, start: int, count: int) -> memoryview:
        """So many bytes from a place on; fewer where the file ends."""
        if self._resident_bytes > _MOST_RESIDENT_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._resident_bytes = 0
        self._resident_bytes += count
        return memoryview(self._map)[start : start + count]

    def array(self, start: int, dtype: Any, count: int) -> np.ndarray:
        """So many numbers of a type from a place on.

        Raises:
            ValueError: the file has fewer.
        """
        return np.frombuffer(self.bytes(start, count * np.dtype(dtype).itemsize), dtype, count)


def finite(name: str, tensor: Tensor | np.ndarray, source: str) -> Tensor:
    """A tensor that is compared with infinity when it is read for the first time.

    Args:
        name: the name of the tensor, for the error.
        tensor: the tensor of a file, or an array.
        source: name of the file, for the error.

    Returns:
        The tensor; reading it raises a `UserError` if it has a NaN or an infinity.

    Example:
        >>> np.asarray(finite("w", np.array([1.0, np.inf]), "w.pt"))
        Traceback (most recent call last):
        ...
        diffjax.errors.UserError: w.pt: w has 1 NaN or infinity among its 2 numbers;
        diffjax.pretrained.files.read_state_dict reads them as they are
    """
    seen = []

    def read() -> np.ndarray:
        array = np.asarray(tensor)
        if not seen and not _is_finite(array):
            raise UserError(
                f"{source}: {name} has {np.sum(~np.isfinite(array))} NaN or infinity among its "
                f"{array.size} numbers; diffjax.pretrained.files.read_state_dict reads them as "
                "they are"
            )
        seen.append(True)
        return array

    return Tensor(tuple(tensor.shape), np.dtype(tensor.dtype), read)


def _is_finite(array: np.ndarray) -> bool:
    """As `np.isfinite(array).all()`, which takes five times as long in half precision.

    As integers, positive floats are in order, and so are negative ones, after all of them.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    size = array.dtype.itemsize
    infinity = int(np.array(np.inf, array.dtype).view(f"u{size}"))
    largest = array.view(f"i{size}").max(initial=0), array.view(f"u{size}").max(initial=0)
    return largest[0] < infinity and largest[1] < infinity + 2 ** (8 * size - 1)


def first_bytes(path: Path, number: int) -> bytes:
    """The first bytes of a file of weights, or all that it has if they are fewer.

    Raises:
        UserError: it can't be read; a file of nearly its name is named.
    """
    try:
        if path.is_fifo() or path.is_char_device():  # A pipe would wait for its writer.
            raise OSError(0, "it is no file")
        with path.open("rb") as file:
            return file.read(number)
    except OSError as error:
        raise UserError(f"can't read weights from {path}: {error.strerror}{_near(path)}") from error


def _near(path: Path) -> str:
    """The file or folder of nearly the name of one that is not there."""
    if os.path.lexists(path) or not path.parent.is_dir():
        return ""
    names = [other.name for other in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f"; did you mean {str(path.with_name(close[0]))!r}?" if close else ""
