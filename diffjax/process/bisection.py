"""Where a monotone function has a value."""

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
    """The `t` between `low` and `high` at which a rising function has given values.

    Each halving of the interval adds a bit; 26 are all that float32 has in [0, 1]. Values outside
    the function's range give the nearer end.

    Args:
        rising: from times to values, of one shape. A `jax.tree_util.Partial` is compiled once, a
            closure at each call.
        value: any shape.
        low: of the shape of `value`, in the precision of the result.
        high: likewise.
        halvings: of the interval.

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
