"""Sharding of activations: networks constrain them to the axes of a mesh, by the axes' names.

The mesh is that of the context in which a network is evaluated (`jax.set_mesh`, or
`jax.sharding.use_abstract_mesh` during tracing). Without a mesh, nothing here has an effect.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import PartitionSpec

BATCH = ("data", "fsdp")
"""The mesh axes that split the examples of a batch."""

Axes = str | tuple[str, ...] | None
"""The mesh axes that split one dimension: one, several (the first one outermost), or none."""


def axis_size(axis: str) -> int:
    """The size of an axis of the mesh; 1 if there is no mesh, or no such axis.

    Example:
        >>> axis_size("tensor")
        1
    """
    return _sizes().get(axis, 1)


def one_device() -> bool:
    """Whether there is no mesh, or a mesh of one device.

    Example:
        >>> one_device()
        True
    """
    return math.prod(_sizes().values()) == 1


def constrain(x: jax.Array, *axes: Axes) -> jax.Array:
    """Constrains the sharding of an array over the mesh; its values do not change.

    Axes that the mesh lacks, or that do not divide their dimension, are left out.

    Args:
        x: any array.
        *axes: the mesh axes that split each dimension, one entry per dimension.

    Example:
        >>> import jax.numpy as jnp
        >>> constrain(jnp.ones((2, 3)), ("data", "fsdp"), None).shape
        (2, 3)
    """
    if one_device():
        return x
    return jax.lax.with_sharding_constraint(x, fit(axes, x.shape, _sizes()))


def of_whole_groups(layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Evaluates `layer(x)` for one vector per image, moving vectors between devices, not weights.

    Each device multiplies its part of the weights by the vectors of all images of its `fsdp` group,
    so vectors are communicated, forward and backward. If a group has more images than the vectors
    have numbers, the weights are the smaller array, and the compiler gathers them as usual.

    Args:
        layer: a product with weights that `fsdp` splits.
        x: vectors `[B, D]`.

    Example:
        >>> import jax.numpy as jnp
        >>> of_whole_groups(lambda x: x @ jnp.ones((3, 2)), jnp.ones((4, 3))).shape
        (4, 2)
    """
    images, width = x.shape
    # In this order, because the number of images is unknown in an exported program.
    if axis_size("fsdp") == 1 or images // axis_size("data") >= width:
        return layer(x)
    whole = constrain(layer(constrain(x, "data", "fsdp")), "data", None)
    return constrain(whole, BATCH, None)


def fit(axes: Sequence[Axes], shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """Fits mesh axes to the dimensions of an array, so that each axis divides its dimension.

    Among all assignments, the one with the most parts is chosen; among these, one that keeps most
    axes on their dimension. An axis that does not divide its dimension may move to another
    dimension with an entry, the last one that it divides, but not to that of the batch.

    Args:
        axes: the mesh axes that should split each dimension, one entry per dimension.
        shape: the shape of the array.
        sizes: the sizes of the mesh's axes, by name.

    Example:
        >>> tuple(fit(("fsdp", "tensor"), (6, 8), {"fsdp": 2, "tensor": 4}))
        ('fsdp', 'tensor')
        >>> tuple(fit(("fsdp", "tensor"), (6, 8), {"fsdp": 4, "tensor": 1}))
        (None, ('tensor', 'fsdp'))
        >>> tuple(fit(("fsdp", ("tensor", "data")), (7, 8), {"fsdp": 8, "tensor": 1, "data": 2}))
        (None, ('tensor', 'fsdp'))
        >>> tuple(fit((("data", "fsdp"), None), (6, 8), {"data": 2, "fsdp": 2}))
        ('data', None)
    """
    homes = [
        (name, at)
        for at, entry in enumerate(axes)
        for name in ((entry,) if isinstance(entry, str) else entry or ())
        if name in sizes
    ]
    takers = [at for at, entry in enumerate(axes) if entry is not None and entry != BATCH]
    ways = [[home, *(at for at in reversed(takers) if at != home), None] for _, home in homes]

    def placed(way: tuple[int | None, ...]) -> list[list[str]]:
        """The axes on each dimension; those that stayed on their own dimension come first."""
        taken: list[list[str]] = [[] for _ in shape]
        for away in (False, True):
            for (name, home), at in zip(homes, way, strict=True):
                if at is not None and (at != home) == away:
                    taken[at].append(name)
        return taken

    def parts(names: Sequence[str]) -> int:
        return math.prod(sizes[name] for name in names)

    def worth(way: tuple[int | None, ...]) -> tuple[int, int]:
        at_home = sum(at == home for (_, home), at in zip(homes, way, strict=True))
        return math.prod(map(parts, placed(way))), at_home

    fitting = [
        way
        for way in itertools.product(*ways)
        if all(size % parts(names) == 0 for size, names in zip(shape, placed(way), strict=True))
    ]
    taken = placed(max(fitting, key=worth))
    entries = [None if not t else t[0] if len(t) == 1 else tuple(t) for t in taken]
    return PartitionSpec(*entries)


def _sizes() -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else dict(mesh.shape)
