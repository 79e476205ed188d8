"""Puts parameters on devices one by one, as they are read."""

from typing import Any

import jax
import numpy as np
from flax import traverse_util

from diffjax.pretrained.stacks import Stack
from diffjax.pretrained.tables import Place


def placed_like(like: Any) -> Place:
    """Puts each parameter where that of the same path lies: its part on each device.

    Args:
        like: nested dicts of arrays or `jax.ShapeDtypeStruct` with shardings, which also have the
            types.

    Example:
        >>> place = placed_like({"fc": {"bias": jax.numpy.zeros(2)}})
        >>> place("fc/bias", np.ones(2))
        Array([1., 1.], dtype=float32)
    """
    leaves: Any = traverse_util.flatten_dict(like, sep="/")

    def place(path: str, array: np.ndarray | Stack) -> jax.Array:
        leaf = leaves[path]

        def part(index: Any) -> np.ndarray:
            if isinstance(array, Stack):
                return array.astype(leaf.dtype)[index]
            # Transposed arrays are copied to a device faster than NumPy copies them. Those that
            # need no change may become the memory of a device, and that may not be a file's.
            piece = array[index].astype(leaf.dtype, copy=False)
            return piece.copy() if piece.flags.c_contiguous and _is_view(piece) else piece

        placed = jax.make_array_from_callback(leaf.shape, leaf.sharding, part)
        # The file's pages and this array are not to be in memory longer than need be.
        return jax.block_until_ready(placed)

    return place


def _is_view(array: np.ndarray) -> bool:
    """Whether the memory of an array belongs to something else than arrays, such as a file."""
    owner: Any = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return not isinstance(owner, np.ndarray)
