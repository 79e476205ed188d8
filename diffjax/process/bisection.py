"""The inverse of an increasing function, by bisection."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.compiling import once
from diffjax.shapes import AnyShape


@once(4)
def bisect(
    rising: Callable[[Array], Array],
    value: AnyShape,
    low: AnyShape,
    high: AnyShape,
    halvings: int,
) -> AnyShape:
    """Solves `rising(t) = value` for `t` in `[low, high]`, by bisection.

    Each halving of the interval adds one bit; 26 are all that float32 has in [0, 1]. Where `value`
    is outside of the function's range, the nearer end of the interval is returned.

    Args:
        rising: an increasing function, element by element, from `t` to values of the same shape. A
            `jax.tree_util.Partial` is compiled once, a closure is compiled at every call.
        value: the values, of any shape.
        low: the lower end of the interval, of the shape and type of the result.
        high: the upper end, of the same shape and type.
        halvings: the number of times that the interval is halved.

    Example:
        >>> round(float(bisect(jnp.square, jnp.array(2.0), jnp.array(0.0), jnp.array(2.0), 26)), 4)
        1.4142
    """

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        below = rising(middle) < value
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, halvings, halve, (low, high))
    return 0.5 * (low + high)
