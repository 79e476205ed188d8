"""A trainable subset of the parameters, by patterns of their paths; the rest is frozen.

    config.trainable = "*head*"                          # parameters whose path matches
    config.trainable = "*attention/*,*modulation/*"      # or one of several patterns

Only trainable parameters have a gradient, moments of the optimizer and averages. A tree of some of
the parameters is a tree of all without the others' names.
"""

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax

from diffjax.errors import UserError, nearest


def split(params: Any, trainable: str) -> tuple[Any, Any]:
    """Parameters as those that are trained and those that are frozen.

    Args:
        params: nested dicts of arrays or shapes.
        trainable: patterns as of shells (`fnmatch`), joined by commas, of the paths of parameters,
            as `block_0/attention/qkv/kernel`; `*` matches `/` as well, and "" is all.

    Returns:
        Two trees that `merged` joins; the second is `()` where nothing is frozen.

    Raises:
        UserError: a pattern that matches nothing, with the nearest path.

    Example:
        >>> params = {"body": {"kernel": 1.0}, "head": {"kernel": 2.0, "bias": 3.0}}
        >>> split(params, "*head*")
        ({'head': {'kernel': 2.0, 'bias': 3.0}}, {'body': {'kernel': 1.0}})
        >>> split(params, "*")[1], split(params, "")[1]
        ((), ())
    """
    if not trainable:
        return params, ()
    patterns = [pattern.strip() for pattern in trainable.split(",")]
    names = _names(params)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"config.trainable: no parameter matches {pattern!r}; {_nearest(pattern, names)}"
            )
    chosen = {name for name in names if any(fnmatchcase(name, each) for each in patterns)}
    if len(chosen) == len(names):
        return params, ()
    return _only(params, chosen), _only(params, set(names) - chosen)


def merged(trained: Any, frozen: Any) -> Any:
    """One tree of the two that `split` returns; where nothing is frozen, the first as it is.

    Example:
        >>> merged({"head": {"bias": 3.0}}, {"head": {"kernel": 2.0}, "body": 1.0})
        {'head': {'bias': 3.0, 'kernel': 2.0}, 'body': 1.0}
    """
    if not jax.tree.leaves(frozen):
        return trained
    if not (isinstance(trained, Mapping) and isinstance(frozen, Mapping)):
        raise ValueError("a parameter is both trained and frozen")
    whole = {**trained, **frozen}
    for name in trained.keys() & frozen.keys():
        whole[name] = merged(trained[name], frozen[name])
    return whole


def _names(params: Any) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def _only(params: Any, names: set[str], prefix: str = "") -> Any:
    """The part of a tree that these paths name, without empty dicts."""
    kept = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            value = _only(value, names, f"{name}/")
            if value:
                kept[key] = value
        elif name in names:
            kept[key] = value
    return kept


def _nearest(pattern: str, names: list[str]) -> str:
    """The path, or the part of one, that a pattern may have meant; else how paths begin."""
    parts = {part for name in names for part in (name, *name.split("/"))}
    close = difflib.get_close_matches(pattern.strip("*/"), sorted(parts), n=1)
    return nearest(pattern.strip("*/"), close or {name.split("/")[0] for name in names})
