"""Where activations live on a mesh, said by networks, which know its axes by name alone.

The mesh is the one in whose context a network is called (`jax.set_mesh`, or
`jax.sharding.use_abstract_mesh` where something is being traced already). Where there is none,
nothing here does anything.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import PartitionSpec

BATCH = ("data", "fsdp")
"""The axes that split the rows of a batch."""

Axes = str | tuple[str, ...] | None
"""What splits one dimension: an axis, several (the first one outermost), or nothing."""


def axis_size(axis: str) -> int:
    """Parts into which an axis of the mesh splits; 1 where there is no mesh, or no such axis.

    Example:
        >>> axis_size("tensor")
        1
    """
    return _sizes().get(axis, 1)


def one_device() -> bool:
    """Whether there is no mesh, or one of a single device.

    Example:
        >>> one_device()
        True
    """
    return math.prod(_sizes().values()) == 1


def constrain(x: jax.Array, *axes: Axes) -> jax.Array:
    """The same array, laid out over the mesh as said, one entry a dimension.

    What the mesh lacks, or what does not divide its dimension, is left out.

    Args:
        x: any array.
        *axes: of its dimensions.

    Example:
        >>> import jax.numpy as jnp
        >>> constrain(jnp.ones((2, 3)), ("data", "fsdp"), None).shape
        (2, 3)
    """
    if one_device():
        return x
    return jax.lax.with_sharding_constraint(x, fit(axes, x.shape, _sizes()))


def of_whole_groups(layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`layer(x)` of one vector an image, whose vectors are moved in place of the layer's weights.

    Each device multiplies its part of the weights by the vectors of all images of its `fsdp` group;
    what is moved are vectors, forward and backward. Where a group has more images than the vectors
    are long, the weights are smaller, and the compiler gathers those as ever.

    Args:
        layer: a product with weights that `fsdp` splits.
        x: vectors `[B, D]`.

    Example:
        >>> import jax.numpy as jnp
        >>> of_whole_groups(lambda x: x @ jnp.ones((3, 2)), jnp.ones((4, 3))).shape
        (4, 2)
    """
    images, width = x.shape
    # Asked in this order, because an exported program does not know how many images there are.
    if axis_size("fsdp") == 1 or images // axis_size("data") >= width:
        return layer(x)
    whole = constrain(layer(constrain(x, "data", "fsdp")), "data", None)
    return constrain(whole, BATCH, None)


def fit(axes: Sequence[Axes], shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """Those axes that a mesh has, on dimensions that they divide.

    Of all ways to put them there, the one with the most parts; of these, one that leaves most axes
    where they were named. An axis that does not divide its dimension may go to another one that is
    named, the last that it divides, but not to that of a batch.

    Args:
        axes: one entry a dimension.
        shape: of the array.
        sizes: of the mesh's axes, by name.

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
        """Axes by dimension, those at home before others."""
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
