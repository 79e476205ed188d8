"""Changes of low rank in the layout of published tensors: their two factors, number by number.

A published tensor has the entries of our kernels in another order. Where its rows are outputs and
its columns inputs of a kernel, the factors of a change of the kernel, `A [..., in, rank]` and
`B [rank, out]`, have to be reordered alone: no product is computed, and no number is rounded.
A tensor of several kernels has the factors of all of them, side by side and blockwise:

    [D1; D2] = [B1 0; 0 B2] [A1; A2]
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffjax.pretrained.transforms import Transform

Factors = tuple[np.ndarray, np.ndarray]
"""Of a kernel: A `[*window, in, rank]` and B `[rank, out]`."""


def to_theirs(
    transform: Transform, shapes: Sequence[Sequence[int]], factors: Sequence[Factors | None]
) -> list[Factors | None]:
    """Down and up of published tensors, of the factors of the kernels that they become.

    Args:
        transform: between published tensors and kernels.
        shapes: of the kernels, `[*window, in, out]`.
        factors: of each kernel; None for one without a change.

    Returns:
        For each published tensor `[out, in, *window]` its down `[rank, in, *window]` and up
        `[out, rank, 1, …]`; None for a tensor without a change.

    Raises:
        ValueError: the change of a tensor has no such factors.

    Example:
        >>> from diffjax.pretrained.transforms import dense, merge
        >>> two = np.ones((4, 2)), np.arange(12.0).reshape(2, 6)
        >>> q, k, v = to_theirs(merge(3, dense), [(4, 6)], [two])
        >>> q[0].shape, v[1].tolist()
        ((2, 4), [[4.0, 10.0], [5.0, 11.0]])
    """
    starts = np.cumsum([0, *map(math.prod, shapes)])
    places = tuple(
        np.arange(start, start + math.prod(shape)).reshape(shape)
        for start, shape in zip(starts, shapes, strict=False)
    )
    return [
        _of_tensor(np.asarray(tensor), starts, shapes, factors)
        for tensor in transform.to_theirs(places)
    ]


def _of_tensor(
    tensor: np.ndarray,
    starts: np.ndarray,
    shapes: Sequence[Sequence[int]],
    factors: Sequence[Factors | None],
) -> Factors | None:
    """Of one tensor, whose entries are the places of numbers in all kernels in a row."""
    places = tensor.reshape(len(tensor), -1)
    kernel = np.searchsorted(starts, places, side="right") - 1
    downs, ups = [], []
    for i, pair in enumerate(factors):
        here = kernel == i
        if pair is None or not here.any():
            continue
        rows, columns = here.any(1), here.any(0)
        block = np.ix_(rows, columns)
        inputs, outputs = np.divmod(places[block] - starts[i], shapes[i][-1])
        if (
            not here[block].all()
            or np.any(inputs != inputs[0])
            or np.any(outputs.T[0] != outputs.T)
        ):
            raise ValueError("mixes inputs and outputs of a layer")
        a, b = pair[0].reshape(-1, pair[0].shape[-1]), pair[1]
        down, up = (_zeros(len(b), places.shape[1], a), _zeros(len(places), len(b), b))
        down[:, columns] = a[inputs[0]].T
        up[rows] = b[:, outputs.T[0]].T
        downs.append(down)
        ups.append(up)
    if not downs:
        return None
    down, up = np.concatenate(downs, 0), np.concatenate(ups, 1)
    window = (1,) * len(tensor.shape[2:])
    return down.reshape(-1, *tensor.shape[1:]), up.reshape(*up.shape, *window)


def _zeros(rows: int, columns: int, like: Any) -> np.ndarray:
    return np.zeros((rows, columns), like.dtype)
