"""One program on a named mesh: what is split over which axis, as data.

Axes: `data` splits the batch, `fsdp` the batch and the parameters, `tensor` the parameters and the
activations that they make. Any of them may be 1.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffjax.errors import UserError

AXES = ("data", "fsdp", "tensor")
Rule = tuple[str, tuple[str | None, ...]]

RULES: tuple[Rule, ...] = (
    # Column-parallel, then row-parallel: one reduction per attention and per MLP.
    (r"(qkv|up)/kernel$", ("fsdp", "tensor")),
    (r"(out|down)/kernel$", ("tensor", "fsdp")),
    (r"(kernel|embedding)$", ("fsdp", "tensor")),
)
"""`(pattern, axes)`: the first pattern found in a parameter's path names the axes of its last
dimensions; what no rule matches is replicated."""


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices (or the given ones); one axis may be -1, "what is left".

    Raises:
        UserError: the axes do not multiply to the number of devices.

    Example:
        >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
        {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    text = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    taken = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or taken < 1 or len(devices) % taken or (not free and taken != len(devices)):
        raise UserError(
            f"a mesh of {text} does not fit {len(devices)} device(s): the axes must multiply to "
            f"{len(devices)}, and one of them may be -1"
        )
    for axis in free:
        sizes[axis] = len(devices) // taken
    grid = np.asarray(devices).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def local_rows() -> NamedSharding | None:
    """Rows of a batch over the devices of this process alone; None where there is one."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    return NamedSharding(Mesh(np.asarray(devices), ("rows",)), PartitionSpec("rows"))


def part_of_batch(place: NamedSharding, batch_size: int) -> tuple[int, int]:
    """Which of how many equal parts of a batch this process's devices hold.

    Processes that share rows, since `tensor` spans them, have the same part.

    Raises:
        UserError: its rows don't lie together.

    Example:
        >>> part_of_batch(batch_sharding(make_mesh()), 8 * jax.device_count())
        (0, 1)
    """
    parts: Any = place.addressable_devices_indices_map((batch_size,))
    held = [rows.indices(batch_size)[:2] for rows, *_ in parts.values()]
    first, last = min(start for start, _ in held), max(stop for _, stop in held)
    size = last - first
    if size != sum(stop - start for start, stop in set(held)) or first % size or batch_size % size:
        raise UserError(
            f"the mesh gives process {jax.process_index()} rows of a batch that don't lie "
            "together: choose config.mesh so that data x fsdp follows the processes"
        )
    return first // size, batch_size // size


def spread(tree: Any, place: NamedSharding) -> Any:
    """Arrays that every process has, laid out over the devices of all of them.

    Example:
        >>> spread(np.arange(2), replicated(make_mesh())).tolist()
        [0, 1]
    """
    if place.is_fully_addressable:
        return jax.device_put(tree, place)

    def one(x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                one(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, place, lambda part: host[part])

    return jax.tree.map(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Refuses a batch that the mesh can't split evenly.

    Raises:
        UserError: with the nearest sizes that fit.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % rows:
        lower, upper = batch_size // rows * rows, -(-batch_size // rows) * rows
        fitting = " or ".join(str(size) for size in sorted({lower, upper}) if size > 0) or rows
        raise UserError(
            f"batch_size={batch_size} does not divide over the mesh's data x fsdp = {rows} "
            f"device rows; {fitting} would"
        )


def state_shardings(state: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """Where each array of a training state lives, by its path.

    Optimizer moments and averages have their parameter's path within their own, so the same rules
    split them alike. An axis that does not divide a dimension is left out for that one.

    Args:
        state: arrays or their shapes.
        mesh: the mesh.
        rules: as `RULES`.

    Returns:
        A tree like `state` of `NamedSharding`.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next((axes for pattern, axes in rules if re.search(pattern, name)), ())
        return NamedSharding(mesh, _fit(axes, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, state)


def _fit(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Aligns axes with the last dimensions and keeps those that divide."""
    axes = axes[-len(shape) :] if shape else ()
    padded = (None,) * (len(shape) - len(axes)) + tuple(axes)
    return PartitionSpec(
        *(
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(padded, shape, strict=True)
        )
    )
