"""Arrays of one shape as one array, which is copied when it is used, by several threads."""

import math
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_TILE = 128, 512
"""Rows and columns that fit in a core's cache, read and written."""


@dataclass(frozen=True)
class Stack:
    """Equal layers as one array, whose first axis is their number.

    It takes no memory: `stack[index]` and `np.asarray(stack)` copy the layers, in C order, from
    where they lie. Transposed matrices are copied tile by tile, several times as fast as by
    `np.stack`.

    Attributes:
        layer: the number of a layer -> its array; called again by each use.
        shape: `(layers, *shape of a layer)`.
        dtype: the type of the numbers, whatever type the layers have.

    Example:
        >>> stack = Stack(lambda i: np.full((2, 3), i), (4, 2, 3), np.dtype(np.float32))
        >>> stack[1:3, :, 0]
        array([[1., 1.],
               [2., 2.]], dtype=float32)
    """

    layer: Callable[[int], np.ndarray]
    shape: tuple[int, ...]
    dtype: np.dtype

    def astype(self, dtype: Any, copy: bool = False) -> "Stack":
        """The same numbers in another type, in which they are copied."""
        del copy
        return replace(self, dtype=np.dtype(dtype))

    def __getitem__(self, index: Any) -> np.ndarray:
        numbers, *within = index if isinstance(index, tuple) else (index,)
        layers = range(self.shape[0])[numbers]
        axes = np.broadcast_to(np.False_, self.shape[1:])[tuple(within)].shape
        out = _pages((len(layers), *axes), self.dtype)

        def fill(place: int) -> None:
            copy(self.layer(layers[place])[tuple(within)], out[place, ...])

        with ThreadPoolExecutor() as pool:
            list(pool.map(fill, range(len(layers))))  # raises what a layer raised
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.astype(dtype or self.dtype)[:]


def copy(array: np.ndarray, out: np.ndarray) -> None:
    """Copies an array to another one of the same shape, a transposed one tile by tile.

    Of a transposed matrix either reading or writing jumps. NumPy goes along whole rows, so
    that the cache has lost a line before its next number is used.
    """
    if array.ndim < 2 or array.strides[-1] <= array.itemsize:
        out[...] = array
        return
    rows, columns = _TILE
    for i in range(0, array.shape[-2], rows):
        for j in range(0, array.shape[-1], columns):
            tile = ..., slice(i, i + rows), slice(j, j + columns)
            out[tile] = array[tile]


def _pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of zeros in pages of its own, which JAX's CPU device takes over without a copy.

    NumPy would take huge pages. On a virtual machine, whose host keeps what is free, the first use
    of these took three times as long.
    """
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(1, count * dtype.itemsize), **_PRIVATE)
    return np.frombuffer(memory, dtype, count).reshape(shape)
