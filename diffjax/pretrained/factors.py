"""Changes of low rank in another layout: their two factors, number by number.

A published tensor has the entries of our kernels in another order, `T(W)`. Where its rows are
outputs and its columns inputs of a kernel, the factors of a change of the kernel have to be
reordered alone: no product is computed, and no number is rounded. Where several arrays become one,
their factors are side by side, and blockwise:

    [D1; D2] = [B1 0; 0 B2] [A1; A2]
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
        shapes: the shapes of the kernels, `[*window, in, out]`.
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
    found: list[Factors | None] = []
    for tensor in _places(transform, shapes):
        downs, ups = [], []
        for block in _blocks(tensor, shapes):
            if pair := factors[block.kernel]:
                a, b = pair[0].reshape(-1, len(pair[1])), pair[1]
                downs.append(np.zeros((len(b), block.columns.size), a.dtype))
                ups.append(np.zeros((block.rows.size, len(b)), b.dtype))
                downs[-1][:, block.columns] = a[block.inputs].T
                ups[-1][block.rows] = b[:, block.outputs].T
        if not downs:
            found.append(None)
            continue
        down, up = np.concatenate(downs, 0), np.concatenate(ups, 1)
        window = tensor.shape[1:]
        found.append((down.reshape(-1, *window), up.reshape(*up.shape, *(1 for _ in window[1:]))))
    return found


def to_ours(
    transform: Transform, shapes: Shapes, factors: Sequence[Factors | None]
) -> list[Factors | None]:
    """A and B of kernels, of the factors of the published tensors that become them.

    Args:
        transform: between published tensors and kernels.
        shapes: the shapes of the kernels, `[*window, in, out]`.
        factors: down and up of each tensor; None for one without a change.

    Raises:
        ValueError: the change of a kernel has no such factors; or tensors that are one kernel here
            have unlike ones.
    """
    sides: list[list[Factors]] = [[] for _ in shapes]
    known: dict[tuple, Factors | None] = {}
    for tensor, pair in zip(_places(transform, shapes), factors, strict=True):
        for block in _blocks(tensor, shapes):
            place = block.kernel, block.inputs.tobytes(), block.outputs.tobytes()
            if place in known:
                if not _same(known[place], pair):
                    raise ValueError("differ, and here one layer replaces all of them")
                continue
            known[place] = pair
            if pair is not None:
                down, up = (x.reshape(len(x), -1) for x in pair)
                *window, outputs = shapes[block.kernel]
                a = np.zeros((math.prod(window), len(down)), down.dtype)
                b = np.zeros((len(down), outputs), up.dtype)
                a[block.inputs] = down[:, block.columns].T
                b[:, block.outputs] = up[block.rows].T
                sides[block.kernel].append((a.reshape(*window, -1), b))
    return [
        (np.concatenate([a for a, _ in pairs], -1), np.concatenate([b for _, b in pairs], 0))
        if pairs
        else None
        for pairs in sides
    ]


def _same(one: Factors | None, other: Factors | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


class _Block(NamedTuple):
    """The part of a published matrix that is a part of one kernel.

    Attributes:
        kernel: which kernel.
        rows: the rows of the matrix, `[out]` booleans.
        columns: the columns of the matrix, `[in · window]` booleans.
        outputs: the outputs of the kernel, one for each of these rows.
        inputs: the inputs of the kernel, with its window, one for each of these columns.
    """

    kernel: int
    rows: np.ndarray
    columns: np.ndarray
    outputs: np.ndarray
    inputs: np.ndarray


def _places(transform: Transform, shapes: Shapes) -> tuple[np.ndarray, ...]:
    """Published tensors whose entries are the numbers of those of the kernels, all in a row."""
    starts = _starts(shapes)
    return transform.to_theirs(
        tuple(
            np.arange(start, start + math.prod(shape)).reshape(shape)
            for start, shape in zip(starts, shapes, strict=False)
        )
    )


def _starts(shapes: Shapes) -> np.ndarray:
    return np.cumsum([0, *map(math.prod, shapes)])


def _blocks(tensor: np.ndarray, shapes: Shapes) -> Iterator[_Block]:
    """The parts of a tensor of `_places`.

    Raises:
        ValueError: rows and columns of one are not outputs and inputs of a kernel.
    """
    places, starts = tensor.reshape(len(tensor), -1), _starts(shapes)
    kernel = np.searchsorted(starts, places, side="right") - 1
    for i in np.unique(kernel):
        here = kernel == i
        rows, columns = here.any(1), here.any(0)
        block = np.ix_(rows, columns)
        inputs, outputs = np.divmod(places[block] - starts[i], shapes[i][-1])
        by_row, by_column = outputs[:, 0], inputs[0]
        apart = (outputs == by_row[:, None]).all() and (inputs == by_column).all()
        if not apart or not here[block].all():
            raise ValueError("mixes inputs and outputs of a layer")
        yield _Block(int(i), rows, columns, by_row, by_column)
