"""Changes of low rank in another layout: their two factors, number by number.

A published tensor has the entries of our kernels in another order, `T(W)`. Where its rows are
outputs and its columns inputs of a kernel, the factors of a change of the kernel have to be
reordered alone: no product is computed, and no number is rounded. Where several arrays become one,
their factors are side by side, and blockwise:

    [D1; D2] = [B1 0; 0 B2] [A1; A2]
"""

import math
from collections.abc import Sequence

import numpy as np

from diffjax.pretrained.transforms import Transform

Factors = tuple[np.ndarray, np.ndarray]
"""Of a kernel here, A `[*window, in, rank]` and B `[rank, out]`; of a published tensor, down
`[rank, in, *window]` and up `[out, rank, 1, …]`."""
Shapes = Sequence[Sequence[int]]


def to_theirs(
    transform: Transform, shapes: Shapes, factors: Sequence[Factors | None]
) -> list[Factors | None]:
    """Down and up of published tensors, of the factors of the kernels that they become.

    Args:
        transform: between published tensors and kernels.
        shapes: of the kernels, `[*window, in, out]`.
        factors: A and B of each kernel; None for one without a change.

    Returns:
        Down and up of each published tensor; None for a tensor without a change.

    Raises:
        ValueError: the change of a tensor has no such factors.

    Example:
        >>> from diffjax.pretrained.transforms import dense, merge
        >>> two = np.ones((4, 2)), np.arange(12.0).reshape(2, 6)
        >>> q, k, v = to_theirs(merge(3, dense), [(4, 6)], [two])
        >>> q[0].shape, v[1].tolist()
        ((2, 4), [[4.0, 10.0], [5.0, 11.0]])
    """
    sides = [None if x is None else (x[1].T, x[0].reshape(-1, len(x[1])).T) for x in factors]
    found: list[Factors | None] = []
    for tensor in transform.to_theirs(_places(shapes)):
        rows = tensor.reshape(len(tensor), -1)
        pair = _reordered(rows, shapes, [shape[-1] for shape in shapes], sides)
        if pair is not None:
            up, down = pair
            window = tensor.shape[1:]
            pair = down.reshape(-1, *window), up.reshape(*up.shape, *(1 for _ in window[1:]))
        found.append(pair)
    return found


def to_ours(
    transform: Transform, shapes: Shapes, factors: Sequence[Factors | None]
) -> list[Factors | None]:
    """A and B of kernels, of the factors of the published tensors that become them.

    Args:
        transform: between published tensors and kernels.
        shapes: of the tensors, `[out, in, *window]`.
        factors: down and up of each tensor; None for one without a change.

    Raises:
        ValueError: the change of a kernel has no such factors.
    """
    sides = [None if x is None else (_rows(x[0]).T, _rows(x[1]).T) for x in factors]
    found: list[Factors | None] = []
    for kernel in transform.to_ours(_places(shapes)):
        rows = kernel.reshape(-1, kernel.shape[-1])
        pair = _reordered(rows, shapes, [math.prod(shape[1:]) for shape in shapes], sides)
        if pair is not None:
            a, b = pair
            pair = a.reshape(*kernel.shape[:-1], -1), b
        found.append(pair)
    return found


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


def _places(shapes: Shapes) -> tuple[np.ndarray, ...]:
    """Arrays that have the number of each entry among all, in the order of these arrays."""
    starts = _starts(shapes)
    return tuple(
        np.arange(start, start + math.prod(shape)).reshape(shape)
        for start, shape in zip(starts, shapes, strict=False)
    )


def _starts(shapes: Shapes) -> np.ndarray:
    return np.cumsum([0, *map(math.prod, shapes)])


def _reordered(
    places: np.ndarray, shapes: Shapes, lengths: Sequence[int], sides: Sequence[Factors | None]
) -> Factors | None:
    """Left `[rows, rank]` and right `[rank, columns]` of a matrix with the entries of arrays.

    Args:
        places: the matrix `[rows, columns]`, of numbers of `_places`.
        shapes: of the arrays.
        lengths: of the part of each array that rows of the matrix go along.
        sides: left and right of each array in its own order.
    """
    starts = _starts(shapes)
    array = np.searchsorted(starts, places, side="right") - 1
    lefts, rights = [], []
    for i, pair in enumerate(sides):
        here = array == i
        if pair is None or not here.any():
            continue
        rows, columns = here.any(1), here.any(0)
        block = np.ix_(rows, columns)
        along, across = np.divmod(places[block] - starts[i], lengths[i])
        if not here[block].all() or (along != along[0]).any() or (across.T[0] != across.T).any():
            raise ValueError("mixes inputs and outputs of a layer")
        left, right = pair
        lefts.append(np.zeros((len(places), left.shape[1]), left.dtype))
        rights.append(np.zeros((right.shape[0], places.shape[1]), right.dtype))
        lefts[-1][rows] = left[across.T[0]]
        rights[-1][:, columns] = right[:, along[0]]
    return (np.concatenate(lefts, 1), np.concatenate(rights, 0)) if lefts else None
