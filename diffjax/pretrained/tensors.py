"""A tensor of a file, which is read when it is used."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


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
