"""`jax.jit`, with what is asked of XLA for the programs that take time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

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


@functools.cache
def _options(platform: str) -> dict[str, str] | None:
    if platform != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=_CPU).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return _CPU
