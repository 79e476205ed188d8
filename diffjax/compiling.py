"""`jax.jit` with XLA's options for long computations, and compiled once for equal functions."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

F = TypeVar("F", bound=Callable[..., Any])

# XLA:CPU calls a library (YNN) for convolutions, matrix products and sums. There gradients of
# convolutions take two to eight times as long as by XLA itself, products within a network a tenth
# longer (docs/performance.md); its sums are fast.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


def jit(function: Callable[..., Any], mesh: Mesh | None = None, **how: Any) -> Any:
    """`jax.jit(function, **how)` with options that make convolutions and products fast on CPUs.

    The options are left out if this version of XLA does not have them. As any program with compiler
    options, it can't be called inside another `jax.jit`.

    Args:
        function: the function to compile.
        mesh: the devices that run it; JAX's own by default.
        **how: further arguments of `jax.jit`.

    Example:
        >>> jit(lambda x: 2 * x)(3).item()
        6
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return jax.jit(function, compiler_options=_options(platform), **how)


def once(*static: int) -> Callable[[F], F]:
    """`jax.jit` for a function whose arguments may be functions; closures are traced at each call.

    A closure may refer to other values at each call, so a program that was compiled for one call
    can't be reused. To compile once, pass a `jax.tree_util.Partial` of a function and its arrays
    instead: if all arguments are arrays or trees of arrays, the program is reused for all calls
    with equal structures and shapes.

    Args:
        *static: positions of arguments that are not arrays and are compared by `==`.

    Example:
        >>> @once()
        ... def at_two(f):
        ...     return f(2.0)
        >>> float(at_two(jax.tree_util.Partial(jax.numpy.power, 3.0)))
        9.0
        >>> at_two(lambda x: 2.0 * x)
        4.0
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.partial(jax.jit, static_argnums=(0, 1))
        def compiled(tree: _Tree, fixed: tuple, leaves: list) -> Any:
            arguments = list(tree.structure.unflatten(leaves))
            for i, value in zip(static, fixed, strict=True):
                arguments[i] = value
            return function(*arguments)

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            arguments = signature.bind(*arguments, **named).args if named else arguments
            numbers = [None if i in static else value for i, value in enumerate(arguments)]
            leaves, structure = jax.tree.flatten(numbers)
            if not all(isinstance(leaf, _NUMBERS) for leaf in leaves):
                return function(*arguments)
            fixed = tuple(arguments[i] for i in static)
            return compiled(_Tree(structure, _classes(structure)), fixed, leaves)

        return call  # type: ignore[return-value]

    return decorate


class _Tree(NamedTuple):
    """The structure of arguments, and the classes in it.

    JAX 0.10 compares trees of different dataclasses as equal if these have the same number of
    fields, and may then run the program that it compiled for another class.
    """

    structure: Any
    classes: tuple


def _classes(structure: Any) -> tuple:
    node = structure.node_data()
    return (node and node[0], *map(_classes, structure.children()))


@contextmanager
def implicit_promotion() -> Iterator[None]:
    """A context in which JAX broadcasts ranks and promotes types, for calls of other libraries.

    This library broadcasts and promotes explicitly, so it also runs under
    `jax_numpy_rank_promotion="raise"` and `jax_numpy_dtype_promotion="strict"`, which a user may
    have set. Other libraries, such as optax, do not.

    Example:
        >>> with jax.numpy_rank_promotion("raise"), implicit_promotion():
        ...     (jax.numpy.ones((2, 3)) + jax.numpy.ones(3)).shape
        (2, 3)
    """
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


_NUMBERS = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


@functools.cache
def _options(platform: str) -> dict[str, str] | None:
    if platform != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=_CPU).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return _CPU
