"""One program on a named mesh: what is split over which axis, as data.

Axes: `data` splits the batch, `fsdp` the batch and the parameters, `tensor` the parameters and the
activations that they make, `sequence` the tokens. Any of them may be 1.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffjax.errors import UserError, nearest
from diffjax.models.layers.common import is_stacked
from diffjax.models.layers.placement import Axes, fit

AXES = ("data", "fsdp", "tensor", "sequence")
Rule = tuple[str, tuple[Axes, ...]]

RULES: tuple[Rule, ...] = (
    # Column-parallel, then row-parallel: one reduction per attention and per MLP.
    (r"(qkv|up)/kernel$", ("fsdp", "tensor")),
    (r"(out|down)/kernel$", ("tensor", "fsdp")),
    (r"(kernel|embedding)$", ("fsdp", "tensor")),
    (r"(bias|scale)$", ("fsdp",)),
)
"""`(pattern, axes)`: the first pattern found in a parameter's path names the axes of its last
dimensions; what no rule matches is replicated. A first axis of stacked blocks is not one of them,
so that each block is gathered by itself. `config.sharding_rules` may have others."""

SPREAD: tuple[Rule, ...] = (
    (r"(qkv|up)/kernel$", ("fsdp", ("tensor", "data"))),
    (r"(out|down)/kernel$", (("tensor", "data"), "fsdp")),
    (r"(kernel|embedding)$", ("fsdp", ("tensor", "data"))),
    (r"(bias|scale)$", (("fsdp", "data"),)),
)
"""`RULES`, and the state over `data` as well, so that no device holds what another one has. It
costs a gather and a reduction a step of the part that a device has along `fsdp`."""

GROUP = 16
"""The most devices of `fsdp` where nothing else is set. XLA for TPUs gathers parts of whole
tiles of eight rows, and scatters their gradients, in a ring; others it adds up whole, at twice the
traffic; and the widths of networks are multiples of 8 x 16."""


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices (or the given ones).

    Where TPUs are on several slices, `data` is the one axis that goes across them, over the slow
    links; GPUs of one machine lie together, and any axis may go across machines.

    Args:
        data: groups of devices; -1 is what is left.
        fsdp: devices of a group; -1 is what is left, and where `data` is -1 as well, as much of it
            as divides one slice, up to `GROUP`.
        tensor: devices to an image's channels and heads; -1 is what is left.
        sequence: devices to an image's tokens; -1 is what is left.
        devices: all by default.

    Raises:
        UserError: the axes do not multiply to the number of devices, or `data` not to the slices.

    Example:
        >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
        {'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1}
    """
    devices = jax.devices() if devices is None else devices
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
    sizes = filled(sizes, len(devices), num_slices)
    grid = np.asarray(by_slice(devices, sizes["data"])).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def filled(sizes: Mapping[str, int], num_devices: int, num_slices: int = 1) -> dict[str, int]:
    """Sizes of a mesh's axes with numbers for -1, as `make_mesh` has them.

    Raises:
        UserError: they do not multiply to the number of devices, with sizes that would.

    Example:
        >>> filled({"data": -1, "fsdp": -1, "tensor": 2, "sequence": 1}, 64)
        {'data': 2, 'fsdp': 16, 'tensor': 2, 'sequence': 1}
        >>> filled({"data": 1, "fsdp": -1, "tensor": 1, "sequence": 1}, 64)
        {'data': 1, 'fsdp': 64, 'tensor': 1, 'sequence': 1}
    """
    found = dict(sizes)
    free = [axis for axis, size in sizes.items() if size == -1]
    taken = math.prod(size for size in sizes.values() if size != -1)
    fits = (
        all(size == -1 or size >= 1 for size in sizes.values())
        and num_devices % taken == 0
        and (free or taken == num_devices)
    )
    if not fits or (len(free) > 1 and free != ["data", "fsdp"]):
        raise UserError(_no_mesh(sizes, num_devices))
    left = num_devices // taken
    if len(free) == 2:
        within = left // num_slices if left % num_slices == 0 else left
        found["fsdp"] = max(n for n in range(1, min(GROUP, within) + 1) if within % n == 0)
        left //= found["fsdp"]
    return found | dict.fromkeys(free[:1], left)


def _no_mesh(sizes: Mapping[str, int], num_devices: int) -> str:
    """A line on sizes that do not multiply to the number of devices, with what would."""
    text = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    line = (
        f"a mesh of {text} does not fit {num_devices} device(s): the axes must multiply to "
        f"{num_devices}, and one of them may be -1, or data and fsdp"
    )
    for axis, size in sizes.items():
        others = math.prod(abs(other) for name, other in sizes.items() if name != axis)
        if size != -1 and size != 1 and others >= 1 and num_devices % others == 0:
            free = any(other == -1 for name, other in sizes.items() if name != axis)
            most = num_devices // others
            fitting = [n for n in range(1, most + 1) if most % n == 0] if free else [most]
            return f"{line}; {axis}={' or '.join(map(str, fitting))} would"
    return line


def by_slice(devices: Sequence[Any], data: int) -> list[Any]:
    """Devices with those of a slice together, each slice in its own order.

    JAX lists devices by process, and rows of a batch have to lie together in one, so nothing but
    whole slices is moved. On GPUs other axes than `data` may go across machines.

    Raises:
        UserError: the slices are unlike, or `data` can't go across them.
    """
    counts = Counter(getattr(device, "slice_index", 0) for device in devices)
    # Of GPUs a slice is a machine, and whatever is between machines carries other axes as well.
    any_axis = getattr(devices[0], "platform", "") == "gpu"
    if len(set(counts.values())) > 1 or (data % len(counts) and not any_axis):
        raise UserError(
            f"a mesh of data={data} does not fit {len(counts)} slices of "
            f"{', '.join(map(str, counts.values()))} devices: slices must be alike, and data a "
            f"multiple of {len(counts)}, because it is the axis that goes across them"
        )
    return sorted(devices, key=lambda device: getattr(device, "slice_index", 0))


def on_mesh(apply: Callable[..., Any], mesh: Mesh, rules: Sequence[Rule]) -> Callable[..., Any]:
    """A network that is traced in the context of a mesh, for `diffjax.models.layers.placement`.

    `inspect.unwrap` returns the network, for programs on another mesh.
    """
    if mesh.size == 1:
        return apply

    @functools.wraps(apply)
    def placed(params: Any, *args: Any, **how: Any) -> Any:
        params = as_used(params, mesh, rules)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return apply(params, *args, **how)

    return placed


def as_used(params: Any, mesh: Mesh, rules: Sequence[Rule]) -> Any:
    """Parameters as a network is given them: whole along axes that split the state alone.

    `data` in a rule splits the state further than the program: along it, parameters are gathered
    once a step, and gradients are reduced once. Along `fsdp` it is the program that gathers, each
    layer when it is needed.
    """
    # On such a mesh XLA (jaxlib 0.10) gave gradients of products with split parameters that were
    # wrong by up to a half; on those where one of the axes is 1 it did not
    # (tests/training/test_meshes.py).
    # Stacked blocks are gathered in their loop.
    broken = all(mesh.shape[axis] > 1 for axis in ("data", "fsdp", "tensor"))
    if mesh.shape["data"] == 1:
        return params

    def whole(path: tuple, leaf: Array, place: NamedSharding) -> Array:
        stacked = is_stacked(jax.tree_util.keystr(path, simple=True, separator="/"))
        gone = ("data", "fsdp") if broken and not stacked else ("data",)
        left = PartitionSpec(*(_without(axes, gone) for axes in place.spec))
        if left == place.spec:  # A constraint that adds nothing still fixes what XLA may choose.
            return leaf
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, left))

    return jax.tree_util.tree_map_with_path(whole, params, state_shardings(params, mesh, rules))


def _without(axes: Axes, gone: Sequence[str]) -> Axes:
    names = (axes,) if isinstance(axes, str) else axes or ()
    left = tuple(name for name in names if name not in gone)
    return left[0] if len(left) == 1 else left or None


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def local_rows(devices: Sequence[Any] | None = None) -> NamedSharding | None:
    """Rows of a batch over devices of this process, by default all; None where there is one."""
    devices = jax.local_devices() if devices is None else devices
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


def check_rules(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Rules as a config has them, which has lists where tuples were.

    Raises:
        UserError: a pattern is not a regular expression, or an axis is unknown.

    Example:
        >>> check_rules([["kernel$", ["fsdp", ["tensor", "sequence"]]]])
        (('kernel$', ('fsdp', ('tensor', 'sequence'))),)
    """
    found = []
    for pattern, axes in rules:
        entries = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in axes)
        for entry in entries:
            for axis in entry if isinstance(entry, tuple) else (entry,):
                if axis is not None and axis not in AXES:
                    raise UserError(
                        f"config.sharding_rules: no axis {axis!r} in the rule of {pattern!r}; "
                        f"{nearest(str(axis), AXES)}"
                    )
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"config.sharding_rules: {pattern!r} is no regular expression: {error}"
            ) from error
        found.append((pattern, entries))
    return tuple(found)


def placed_shapes(state: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """The shapes of a training state with the shardings of its arrays (`state_shardings`).

    Args:
        state: arrays or their shapes.
        mesh: the mesh.
        rules: as `RULES`.

    Returns:
        A tree like `state` of `jax.ShapeDtypeStruct`.
    """
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        state_shardings(state, mesh, rules),
    )


def state_shardings(state: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """Where each array of a training state lives, by its path.

    Optimizer moments and averages have their parameter's path within their own, so the same rules
    split them alike. An axis that does not divide its dimension goes to another one that the rule
    names, or is left out.

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
        axes = axes[-leaf.ndim :] if leaf.ndim else ()
        padded = (None,) * (leaf.ndim - len(axes)) + tuple(axes)
        return NamedSharding(mesh, fit(padded, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(place, state)
