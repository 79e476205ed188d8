"""Counting the arithmetic of a program from what JAX traced of it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from diffjax.errors import UserError

# Kernels of their own, whose matrix products no trace shows.
_OPAQUE = ("dot_product_attention_", "ffi_call", "pallas_call", "ragged_dot")


def matrix_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of all matrix products and convolutions in a function.

        product  [m, k] x [k, n]:   2·m·k·n
        convolution:                2·outputs·kernel positions·(input channels / groups)

    Nothing is compiled or run. A multiply-add is two operations. A convolution counts its padding
    as if it were image, which is the usual convention, but not the zeros that a dilated input
    has between its pixels: so the gradient of a strided convolution costs what the convolution
    does. Element-wise work is left out. Loops count as often as they run, of several branches the
    dearest one, recomputation under `jax.checkpoint` each time, `shard_map` on every device.

    Args:
        function: what `jax.jit` could take.
        *arguments: the arguments of the function; `jax.ShapeDtypeStruct` will do for arrays.

    Returns:
        The operations of one call, as a float because 2⁵³ is soon reached. Results that nobody
        uses count as well.

    Raises:
        UserError: a matrix product in a `while_loop`, which may run any number of times, or in a
            kernel that can't be looked into.

    Example:
        >>> x, w = jax.ShapeDtypeStruct((8, 3), "float32"), jax.ShapeDtypeStruct((3, 5), "float32")
        >>> matrix_flops(lambda x, w: x @ w, x, w)
        240.0
    """
    return float(_count(jax.make_jaxpr(function)(*arguments).jaxpr))


def flops_if_countable(function: Callable[..., Any], *arguments: Any) -> float | None:
    """As `matrix_flops`; None where the operations can't be counted."""
    try:
        return matrix_flops(function, *arguments)
    except UserError:
        return None


def _count(jaxpr: Jaxpr) -> int:
    return sum(_RULES.get(eqn.primitive.name, _inside)(eqn) for eqn in jaxpr.eqns)


def _inside(eqn: JaxprEqn) -> int:
    """Of any other operation: whatever functions it calls, once."""
    if eqn.primitive.name.startswith(_OPAQUE):
        raise UserError(
            f"can't count the operations of {eqn.primitive.name}: choose an implementation made of "
            "matrix products, as --config.model.attention=xla"
        )
    return sum(map(_count, _called(eqn)))


def _called(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _dot_general(eqn: JaxprEqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, output = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    return 2 * math.prod(output) * math.prod(left[axis] for axis in contracted)


def _convolution(eqn: JaxprEqn) -> int:
    kernel, output = _shape(eqn.invars[1]), _shape(eqn.outvars[0])
    output_channels = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    per_output = math.prod(kernel) // output_channels
    return 2 * math.prod(output) * per_output // math.prod(eqn.params["lhs_dilation"])


def _scan(eqn: JaxprEqn) -> int:
    return eqn.params["length"] * _inside(eqn)


def _while(eqn: JaxprEqn) -> int:
    if flops := _inside(eqn):
        raise UserError(
            f"a while_loop with a matrix product ({flops:,} operations a turn) can't be counted: "
            "its number of iterations is unknown; use lax.scan"
        )
    return 0


def _cond(eqn: JaxprEqn) -> int:
    return max(map(_count, _called(eqn)))


def _shard_map(eqn: JaxprEqn) -> int:
    # Inside, shapes are those of one device. The parameter's name depends on the version of JAX.
    (manual,) = (axes for name, axes in eqn.params.items() if name.endswith("manual_axes"))
    return math.prod(eqn.params["mesh"].shape[axis] for axis in manual) * _inside(eqn)


_RULES: dict[str, Callable[[JaxprEqn], int]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
