"""Tables of foreign names: which published tensors are which parameters, in both directions.

    TABLE = (
        Row("blocks.{i}.attn.qkv.weight", "block_{i}/attention/qkv/kernel", dense),
        Row(("q.weight", "k.weight", "v.weight"), "qkv/kernel", merge(3, dense)),
    )

A name in braces is a number, one as `{block:s}` any text without "." and "/", and has the
same value on both sides. Rows are applied to the parameters that a network has: a row for registers
is not used for a network without them.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from diffjax.errors import UserError
from diffjax.pretrained.stacks import Stack
from diffjax.pretrained.tensors import finite
from diffjax.pretrained.transforms import Transform, dense, keep

_MOST_NAMED = 3


class Row(NamedTuple):
    """Published tensors that are parameters here.

    Attributes:
        theirs: name of the tensor, or the names of several.
        ours: path of the parameter, joined by "/", or the paths of several; `()` for a tensor that
            is no parameter here (`transforms.constant`).
        transform: the change of layout.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    transform: Transform = keep


Table = Sequence[Row]
Place = Callable[[str, np.ndarray | Stack], Any]


def in_memory(path: str, array: np.ndarray | Stack) -> np.ndarray:
    """The `Place` of parameters that stay arrays of NumPy."""
    del path
    return np.asarray(array)


def layer(theirs: str, ours: str, kernel: Transform = dense) -> tuple[Row, Row]:
    """The rows of a layer with a kernel and a bias.

    Example:
        >>> [row.ours for row in layer("fc", "mlp/up")]
        ['mlp/up/kernel', 'mlp/up/bias']
    """
    return Row(f"{theirs}.weight", f"{ours}/kernel", kernel), Row(f"{theirs}.bias", f"{ours}/bias")


def norm(theirs: str, ours: str) -> tuple[Row, Row]:
    """The rows of a norm with a scale and a bias."""
    return Row(f"{theirs}.weight", f"{ours}/scale"), Row(f"{theirs}.bias", f"{ours}/bias")


def within(rows: Iterable[Row], theirs: str, ours: str = "") -> tuple[Row, ...]:
    """The rows of a part of a network, from those with names within it.

    Example:
        >>> within(norm("norm1", "norm_1"), "blocks.0", "block_0")[0][:2]
        (('blocks.0.norm1.weight',), ('block_0/norm_1/scale',))
    """
    there, here = f"{theirs}.", f"{ours}/" if ours else ""
    return tuple(
        Row(
            tuple(f"{there}{name}" for name in several(row.theirs)),
            tuple(f"{here}{name}" for name in several(row.ours)),
            row.transform,
        )
        for row in rows
    )


def several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names on one side of a row, of which there may be one."""
    return (names,) if isinstance(names, str) else names


def to_ours(
    state: Mapping[str, Any],
    table: Table,
    expected: Any,
    source: str,
    unused: Sequence[str] = (),
    place: Place = in_memory,
) -> Any:
    """Converts published tensors to the parameters of a network.

    Names, shapes and types are compared before the first tensor is read. Arrays are views of the
    tensors where that is possible, so that those of a file are read when they are used.

    Args:
        state: arrays or tensors of a file (`read_state_dict`), by name.
        table: the rows.
        expected: the network's parameters as nested dicts of `jax.ShapeDtypeStruct`.
        source: name of the file, for errors.
        unused: patterns of names that may be there and are left out, such as `text_model.*`.
        place: is called with the path of each parameter and its array, and returns what takes its
            place, such as an array on devices. Each parameter is read after the one before it has
            been placed, so a file needs no second place in memory.

    Returns:
        Nested dicts of arrays like `expected`.

    Raises:
        UserError: tensors are missing, unknown, or of another shape or type, all in one line; or
            one of them has a NaN or an infinity.

    Example:
        >>> from diffjax.pretrained.transforms import dense
        >>> table = (Row("fc.weight", "fc/kernel", dense),)
        >>> expected = {"fc": {"kernel": jax.ShapeDtypeStruct((3, 2), np.float32)}}
        >>> to_ours({"fc.weight": np.zeros((2, 3))}, table, expected, "w.pth")["fc"]["kernel"].shape
        (3, 2)
        >>> to_ours({"fc.weights": np.zeros((2, 3))}, table, expected, "w.pth")
        Traceback (most recent call last):
        ...
        diffjax.errors.UserError: w.pth is of another network: it lacks fc.weight (it has
        fc.weights); it has fc.weights (known fc.weight) too many
    """
    wanted: Any = traverse_util.flatten_dict(expected, sep="/")
    rows = applied(table, wanted)
    _check(state, rows, wanted, source, unused)
    found = {}
    for row in rows:
        try:
            tensors: Any = tuple(finite(name, state[name], source) for name in row.theirs)
            if not row.transform.reads:
                tensors = tuple(np.asarray(tensor) for tensor in tensors)
            arrays = row.transform.to_ours(tensors)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{source}: {_listed(row.theirs)} {error}") from error
        for path, array in zip(row.ours, arrays, strict=True):
            found[path] = place(path, array.astype(wanted[path].dtype, copy=False))
    return traverse_util.unflatten_dict(found, sep="/")


def check(
    state: Mapping[str, Any],
    table: Table,
    expected: Any,
    source: str,
    unused: Sequence[str] = (),
) -> None:
    """Compares names, shapes and types of published tensors, without reading one.

    Raises:
        UserError: as `to_ours`.
    """
    wanted: Any = traverse_util.flatten_dict(expected, sep="/")
    _check(state, applied(table, wanted), wanted, source, unused)


def published_shapes(table: Table, expected: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Names and shapes of the published tensors of a network.

    Args:
        table: the rows.
        expected: the network's parameters as nested dicts of `jax.ShapeDtypeStruct`.

    Example:
        >>> expected = {"fc": {"kernel": jax.ShapeDtypeStruct((3, 2), np.float32)}}
        >>> published_shapes((Row("fc.weight", "fc/kernel", dense),), expected)["fc.weight"].shape
        (2, 3)
    """
    wanted: Any = traverse_util.flatten_dict(expected, sep="/")
    shapes = _shapes(applied(table, wanted), wanted)
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def to_theirs(params: Any, table: Table) -> dict[str, np.ndarray]:
    """Converts the parameters of a network to published tensors: the inverse of `to_ours`.

    Args:
        params: nested dicts of arrays.
        table: the rows.

    Example:
        >>> from diffjax.pretrained.transforms import dense
        >>> table = (Row("fc.weight", "fc/kernel", dense),)
        >>> to_theirs({"fc": {"kernel": np.zeros((3, 2))}}, table)["fc.weight"].shape
        (2, 3)
    """
    ours: Any = traverse_util.flatten_dict(params, sep="/")
    state = {}
    for row in applied(table, ours):
        arrays = row.transform.to_theirs(tuple(np.asarray(ours[path]) for path in row.ours))
        state.update(zip(row.theirs, arrays, strict=True))
    return state


def count(pattern: str, names: Iterable[str]) -> int:
    """The number of names that match a pattern, such as the depth of a network.

    Example:
        >>> count("blocks.{i}.norm1.bias", ["blocks.0.norm1.bias", "blocks.1.norm1.bias", "norm"])
        2
    """
    matcher = _matcher(pattern)
    return sum(matcher.fullmatch(name) is not None for name in names)


class Applied(NamedTuple):
    """A row with its names written out."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform


def applied(table: Table, paths: Mapping[str, Any]) -> list[Applied]:
    """The rows of these parameters, one per parameter.

    Raises:
        ValueError: a fault of the table: a parameter has no row, or two.
    """
    rows = []
    for theirs, ours, transform in table:
        theirs, ours = several(theirs), several(ours)
        found = [{}]
        if ours:
            matcher = _matcher(ours[0])
            found = [match.groupdict() for path in paths if (match := matcher.fullmatch(path))]
        for values in found:
            names, places = (tuple(x.format(**values) for x in side) for side in (theirs, ours))
            rows.append(Applied(names, places, transform))
    covered = Counter(path for row in rows for path in row.ours)
    if covered != Counter(iter(paths)):
        raise ValueError(
            f"a table has no row for {sorted(set(paths) - set(covered))}, several for "
            f"{[path for path, times in covered.items() if times > 1]}, and rows for "
            f"{sorted(set(covered) - set(paths))}, which the network lacks"
        )
    return rows


def _matcher(pattern: str) -> re.Pattern[str]:
    known: set[str] = set()
    parts = []
    for text, name, kind, _ in string.Formatter().parse(pattern):
        parts.append(re.escape(text))
        if name is not None:
            one = "[^./]+" if kind == "s" else "[0-9]+"
            parts.append(f"(?P={name})" if name in known else f"(?P<{name}>{one})")
            known.add(name)
    return re.compile("".join(parts))


def _check(
    state: Mapping[str, Any],
    rows: Sequence[Applied],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    source: str,
    unused: Sequence[str],
) -> None:
    """Compares names, shapes and types, without reading a tensor."""
    shapes = _shapes(rows, wanted)
    lacking = [name for name in shapes if name not in state]
    unknown = [
        name
        for name in state
        if name not in shapes and not any(fnmatchcase(name, pattern) for pattern in unused)
    ]
    there = [name for name in shapes if name in state]
    others = [
        f"{name} is {list(state[name].shape)}, not {list(shapes[name])}"
        for name in there
        if tuple(state[name].shape) != shapes[name]
    ]
    others += [
        f"{name} has the type {state[name].dtype}"
        for name in there
        if not jnp.issubdtype(state[name].dtype, jnp.floating)
    ]
    faults = []
    if lacking:
        near = [_near(name, unknown, "it has") for name in lacking[:_MOST_NAMED]]
        faults.append(f"it lacks {_listed(near, len(lacking))}")
    if unknown:
        near = [_near(name, lacking or shapes, "known") for name in unknown[:_MOST_NAMED]]
        faults.append(f"it has {_listed(near, len(unknown))} too many")
    if others:
        faults.append(_listed(others))
    if faults:
        raise UserError(f"{source} is of another network: {'; '.join(faults)}")


def _shapes(rows: Sequence[Applied], wanted: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the published tensors of these parameters."""
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:
        # Arrays that take no memory, however large they are.
        like = tuple(np.broadcast_to(np.False_, wanted[path].shape) for path in row.ours)
        arrays = row.transform.to_theirs(like)
        shapes.update({name: x.shape for name, x in zip(row.theirs, arrays, strict=True)})
    return shapes


def _near(name: str, known: Iterable[str], which: str) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"{name} ({which} {close[0]})" if close else name


def _listed(names: Sequence[str], total: int | None = None) -> str:
    total = len(names) if total is None else total
    text = ", ".join(names[:_MOST_NAMED])
    return text if total <= _MOST_NAMED else f"{text} and {total - _MOST_NAMED} more"
