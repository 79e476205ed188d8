"""Changes of layout between a published tensor and a parameter here, each with its inverse.

A `Transform` maps tuples of arrays to tuples of arrays, because several tensors may become one
parameter and the reverse. Their layout is PyTorch's: weights of dense layers are `[out, in]`, those
of convolutions `[out, in, height, width]`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffjax.pretrained.stacks import Stack

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Transform:
    """A change of layout that loses nothing.

    Attributes:
        to_ours: their tensors -> our parameters. It may raise `ValueError` with a reason, where
            tensors contradict each other.
        to_theirs: the inverse.
        reads: whether `to_ours` is called with the tensors of a file and reads them by itself,
            when their numbers are used.
    """

    to_ours: Callable[[Arrays], Arrays]
    to_theirs: Callable[[Arrays], Arrays]
    reads: bool = False


def each(
    to_ours: Callable[[np.ndarray], np.ndarray], to_theirs: Callable[[np.ndarray], np.ndarray]
) -> Transform:
    """Changes each array by itself."""
    return Transform(
        lambda arrays: tuple(to_ours(array) for array in arrays),
        lambda arrays: tuple(to_theirs(array) for array in arrays),
    )


keep = each(lambda array: array, lambda array: array)
"""The same array: biases, norms, embeddings."""

dense = each(lambda array: array.T, lambda array: array.T)
"""A dense layer's weights: `[out, in]` there, `[in, out]` here."""

conv = each(
    lambda array: array.transpose(*range(2, array.ndim), 1, 0),
    lambda array: array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2)),
)
"""A convolution's weights: `[out, in, *window]` there, `[*window, in, out]` here."""


def squeeze(*axes: int) -> Transform:
    """Removes axes of length 1 that only the published tensor has.

    Args:
        *axes: their numbers in the published tensor.

    Example:
        >>> squeeze(0).to_ours((np.zeros((1, 4, 8)),))[0].shape
        (4, 8)
    """
    return each(lambda array: np.squeeze(array, axes), lambda array: np.expand_dims(array, axes))


def reshape(ours: Sequence[int], theirs: Sequence[int]) -> Transform:
    """The same numbers in the same order, in another shape; one size of each may be -1.

    Example:
        >>> reshape(ours=(-1,), theirs=(-1, 2)).to_theirs((np.zeros(6),))[0].shape
        (3, 2)
    """
    return each(lambda array: array.reshape(ours), lambda array: array.reshape(theirs))


def merge(parts: int | Sequence[int], of: Transform = keep, axis: int = -1) -> Transform:
    """Joins several published tensors to one parameter, such as those of queries, keys and values.

    Args:
        parts: the number of equal parts, or the sizes of unequal ones.
        of: the change of each tensor before they are joined.
        axis: along which they are joined here; the last axis is that of a layer's outputs.

    Example:
        >>> merge(3, dense).to_ours((np.zeros((8, 4)),) * 3)[0].shape
        (4, 24)
    """
    return Transform(
        lambda arrays: (np.concatenate(of.to_ours(arrays), axis),),
        lambda arrays: of.to_theirs(_parts(arrays[0], parts, axis)),
    )


def split(parts: int | Sequence[int], of: Transform = keep, axis: int = -1) -> Transform:
    """Splits one published tensor into several parameters: the inverse of `merge`.

    Args:
        parts: the number of equal parts, or the sizes of unequal ones.
        of: the change of the whole tensor before it is split.
        axis: along which it is split here; the last axis is that of a layer's outputs.

    Example:
        >>> [part.shape for part in split((1, 3), dense).to_ours((np.zeros((4, 2)),))]
        [(2, 1), (2, 3)]
    """
    return Transform(
        lambda arrays: _parts(of.to_ours(arrays)[0], parts, axis),
        lambda arrays: of.to_theirs((np.concatenate(arrays, axis),)),
    )


def side_by_side(*transforms: Transform) -> Transform:
    """A transform for each of several arrays.

    Example:
        >>> one, two = side_by_side(dense, keep).to_ours((np.zeros((2, 3)), np.zeros((2, 3))))
        >>> one.shape, two.shape
        ((3, 2), (2, 3))
    """

    def changed(arrays: Arrays, direction: str) -> Arrays:
        pairs = zip(transforms, arrays, strict=True)
        return tuple(getattr(one, direction)((array,))[0] for one, array in pairs)

    return Transform(
        lambda arrays: changed(arrays, "to_ours"), lambda arrays: changed(arrays, "to_theirs")
    )


def stack(of: Transform = keep, per_block: int = 1) -> Transform:
    """Stacks the published tensors of all blocks to parameters with a first axis of blocks.

    Parameters are `Stack`s, so blocks are read when these are used.

    Args:
        of: the change of the tensors of one block.
        per_block: the number of published tensors of one block; they follow each other.

    Example:
        >>> stack(dense).to_ours((np.zeros((2, 3)),) * 5)[0].shape
        (5, 3, 2)
        >>> stack(merge(3, dense), 3).to_ours((np.zeros((2, 3)),) * 15)[0].shape
        (5, 3, 6)
    """

    def to_ours(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        def block(i: int) -> Arrays:
            of_block = tensors[i * per_block : (i + 1) * per_block]
            return of.to_ours(tuple(np.asarray(tensor) for tensor in of_block))

        depth = len(tensors) // per_block
        return tuple(
            Stack(lambda i, part=part: block(i)[part], (depth, *array.shape), array.dtype)
            for part, array in enumerate(block(0))
        )

    def to_theirs(arrays: Arrays) -> Arrays:
        return tuple(x for block in zip(*arrays, strict=True) for x in of.to_theirs(block))

    return Transform(to_ours, to_theirs, reads=True)


def reorder(order: Sequence[int] | np.ndarray, axis: int = -1) -> Transform:
    """Entries of one axis in another order, by their published numbers.

    Args:
        order: entry i here is entry `order[i]` there.
        axis: the axis; the last axis is that of a layer's outputs.

    Example:
        >>> reorder([2, 0, 1]).to_ours((np.arange(3),))[0]
        array([2, 0, 1])
    """
    back = np.argsort(order)

    def taken(array: np.ndarray, order: Sequence[int] | np.ndarray) -> np.ndarray:
        # One number that stands for a whole axis stays one: shapes are compared without memory.
        return np.take(array, order, axis) if array.strides[axis] else array

    return each(lambda array: taken(array, order), lambda array: taken(array, back))


def _halves_swapped(array: np.ndarray) -> np.ndarray:
    # One number that stands for a whole axis stays one: shapes are compared without memory.
    return np.roll(array, array.shape[-1] // 2, -1) if array.strides[-1] else array


swap_halves = each(_halves_swapped, _halves_swapped)
"""The second half of the last axis before the first: scale and shift, shift and scale."""


def permute(
    theirs: Sequence[int], order: Sequence[int], of: Transform = keep, axis: int = -1
) -> Transform:
    """Entries of one axis in another order: the axis is several axes in one, in another order here.

    Queries, keys and values of each of H heads, `[H, 3, C]` there and `[3, H, C]` here, are
    `permute((H, 3, -1), (1, 0, 2), dense)`.

    Args:
        theirs: sizes of the axes in one, in the published order; one of them may be -1.
        order: the published numbers of the axes, in the order here.
        of: a change of the tensor before.
        axis: the axis here; the last axis is that of a layer's outputs.

    Example:
        >>> permute((2, 3), (1, 0)).to_ours((np.arange(6),))[0]
        array([0, 3, 1, 4, 2, 5])
    """
    back = tuple(int(place) for place in np.argsort(order))

    def change(array: np.ndarray, sizes: Sequence[int], order: Sequence[int]) -> np.ndarray:
        last = np.moveaxis(array, axis, -1)
        parts = last.reshape(*last.shape[:-1], *sizes)
        before = range(last.ndim - 1)
        parts = parts.transpose(*before, *(last.ndim - 1 + place for place in order))
        return np.moveaxis(parts.reshape(last.shape), -1, axis)

    def to_theirs(array: np.ndarray) -> np.ndarray:
        return change(array, [theirs[place] for place in order], back)

    return then(of, each(lambda array: change(array, theirs, order), to_theirs))


def copies(count: int, of: Transform = keep) -> Transform:
    """`count` equal published tensors are one parameter; tensors that differ are refused.

    Example:
        >>> len(copies(3).to_theirs((np.zeros(2),)))
        3
    """

    def to_ours(arrays: Arrays) -> Arrays:
        if not all(_equal(array, arrays[0]) for array in arrays[1:]):
            raise ValueError("differ, and here one parameter replaces all of them")
        return of.to_ours(arrays[:1])

    return Transform(to_ours, lambda arrays: of.to_theirs(arrays) * count)


def constant(value: Callable[[], np.ndarray], tolerance: float = 1e-5) -> Transform:
    """A published tensor that the network computes, such as fixed position embeddings.

    Args:
        value: computes the tensor.
        tolerance: largest difference of a published number; of a half-precision file, which
            rounded it, the relative precision of its type besides.

    Example:
        >>> constant(lambda: np.arange(2)).to_theirs(())
        (array([0, 1]),)
    """

    def to_ours(arrays: Arrays) -> Arrays:
        kind = arrays[0].dtype
        rounded = float(jnp.finfo(kind).eps) if jnp.issubdtype(kind, jnp.floating) else 0.0
        if not np.allclose(arrays[0].astype(np.float64), value(), rounded, tolerance):
            raise ValueError("has other numbers than those which are computed here")
        return ()

    return Transform(to_ours, lambda _: (value(),))


def then(first: Transform, second: Transform) -> Transform:
    """Two transforms in a row: `first` from the published tensors, `second` to the parameters."""
    return Transform(
        lambda arrays: second.to_ours(first.to_ours(arrays)),
        lambda arrays: first.to_theirs(second.to_theirs(arrays)),
    )


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    # The first comparison is several times as fast, and suffices without NaN.
    return np.array_equal(one, other) or np.array_equal(one, other, equal_nan=True)


def _parts(array: np.ndarray, parts: int | Sequence[int], axis: int) -> Arrays:
    ends = parts if isinstance(parts, int) else np.cumsum(parts)[:-1]
    return tuple(np.split(array, ends, axis))
