"""`jax.jit`, with XLA's options for the programs that take time, and once for equal calls."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

F = TypeVar("F", bound=Callable[..., Any])

# XLA:CPU hands convolutions, matrix products and sums to a library (YNN). Gradients of convolutions
# take two to eight times as long there as by XLA itself, products within a network a tenth longer
# (docs/performance.md); its sums are fast.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


def jit(function: Callable[..., Any], mesh: Mesh | None = None, **how: Any) -> Any:
    """`jax.jit(function, **how)`, on CPUs with convolutions and products by XLA itself.

    An XLA that has no such option is not asked. As every program with compiler options, it can't be
    called within another one.

    Args:
        function: what is compiled.
        mesh: the devices that run it; JAX's own by default.
        **how: further arguments of `jax.jit`.

    Example:
        >>> jit(lambda x: 2 * x)(3).item()
        6
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return jax.jit(function, compiler_options=_options(platform), **how)


def once(*static: int) -> Callable[[F], F]:
    """`jax.jit` for a function that may also be called with closures; those are traced each time.

    A closure can refer to other numbers at each call, so nothing compiled for one call may serve
    another. Where all arguments are arrays or trees of numbers, the function is compiled once for
    all calls alike: give a `jax.tree_util.Partial` of a function and its numbers for a closure.

    Args:
        *static: positions of arguments that are no numbers and are compared by `==`.

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
        @functools.cache
        def compiled(structure: str) -> Callable[..., Any]:
            # JAX 0.10 takes structures of unlike dataclasses with as many fields for equal, and may
            # run the program of another one: each has a function of its own.
            del structure
            return jax.jit(lambda *arguments: function(*arguments), static_argnums=static)

        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            arguments = signature.bind(*arguments, **named).args if named else arguments
            values = [a for i, a in enumerate(arguments) if i not in static]
            is_known = all(isinstance(leaf, _NUMBERS) for leaf in jax.tree.leaves(values))
            if not is_known:
                return function(*arguments)
            return compiled(str(jax.tree.structure(values)))(*arguments)

        return call  # type: ignore[return-value]

    return decorate


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
