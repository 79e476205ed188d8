"""Flow maps of the probability-flow ODE, integrated to the precision of float64.

With `r = √(a² + s²)` and the angle `θ = atan2(s, a)`, `y = x_t / r` equals `cos θ·x0 + sin θ·eps`.
So in `y` and `θ` the ODE is the same for all paths,

    dy/dθ = E[cos θ·eps - sin θ·x0 | y],      0 <= θ <= π/2

and it is regular at both ends, also where no signal is left (`a = 0`) or where `s'` is infinite.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.compiling import once
from diffjax.process.paths import Coeffs, Path, coeffs
from diffjax.shapes import OneNumber, PerSample, Samples

TimeOrTimes = float | OneNumber | PerSample
"""One for all samples, or one for each."""

_TOLERANCE = 1e-11  # of one step, relative to the largest entry or absolute
_MOST_STEPS = 10_000
_SMALLEST_ANGLE = 1e-7  # from here to θ = 0 is one step, with an error of the order of its square


class KnownFlow(Protocol):
    """Data with a known denoiser, as `diffjax.oracle.analytic` has them."""

    def infer(self) -> Callable[[Coeffs, Array], Any]:
        """`(Coeffs, x[B, d]) ->` an object with `x0` and `score`, each `[B, d]`."""
        ...

    def velocity(self, path: Path, x: Samples, t: PerSample) -> Samples:
        """The velocity of the probability-flow ODE, of the shape of `x`."""
        ...

    def flow(self, path: Path, x: Samples, t_from: TimeOrTimes, t_to: TimeOrTimes) -> Samples:
        """The solution of the probability-flow ODE at `t_to`, of the shape of `x`."""
        ...


def integrated(
    data: KnownFlow, path: Path, x: Samples, t_from: TimeOrTimes, t_to: TimeOrTimes
) -> Samples:
    """Integrates the probability-flow ODE from `x[B, …]` at `t_from` to `t_to`, each `[]` or `[B]`.

    Each sample has its own step sizes, so no result depends on the rest of the batch. It works
    under `jit`, `vmap` and `jvp`, but not in reverse mode, because the loop is adaptive. The result
    is NaN where 10,000 steps were not enough.
    """
    x = jnp.asarray(x)
    with jax.enable_x64(True):
        here, there = (coeffs(path, _times(t, x), ndim=2) for t in (t_from, t_to))
        angles = (jnp.ravel(jnp.arctan2(c.s, c.a)) for c in (here, there))
        y = jnp.reshape(x, (len(x), -1)).astype(jnp.float64) / jnp.hypot(here.a, here.s)
        y = _rotate(_in_float64(data), y, *angles) * jnp.hypot(there.a, there.s)
        return y.reshape(x.shape).astype(x.dtype)


def average_velocity(
    data: KnownFlow, path: Path, x: Samples, t_from: TimeOrTimes, t_to: TimeOrTimes
) -> Samples:
    """The average velocity `(flow - x)/(t_to - t_from)`; the velocity where the times are equal.

    Of the shape of `x`. The difference is computed in float64. Geng et al. 2025 (arXiv:2505.13447),
    equation 3.
    """
    x = jnp.asarray(x)
    with jax.enable_x64(True):
        data, wide = _in_float64(data), x.astype(jnp.float64)
        start, end = _times(t_from, x), _times(t_to, x)
        moved = data.flow(path, wide, start, end) - wide
        span = jnp.reshape(end - start, (-1,) + (1,) * (x.ndim - 1))
        average = moved / jnp.where(span == 0.0, 1.0, span)
        return jnp.where(span == 0.0, data.velocity(path, wide, start), average).astype(x.dtype)


def _times(t: TimeOrTimes, x: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(t, jnp.float64), len(x))


def _in_float64(data: KnownFlow) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), data)


@once()
def _rotate(data: KnownFlow, y: Array, angle_from: Array, angle_to: Array) -> Array:
    """Integrates the ODE of `y[B, d]` from one angle to another, each `[B]`."""
    infer = data.infer()

    def slope(angle: Array, y: Array) -> tuple[Array, Array]:
        cos, sin = jnp.cos(angle)[None, None], jnp.sin(angle)[None, None]
        posterior = infer(Coeffs(angle[None, None], cos, sin, -sin, cos), y[None])
        x0, eps = posterior.x0[0], -(sin * posterior.score)[0]
        return cos[0] * eps - sin[0] * x0, x0

    def one(y: Array, start: Array, end: Array) -> Array:
        start, last = jnp.maximum(start, _SMALLEST_ANGLE), jnp.maximum(end, _SMALLEST_ANGLE)
        y = _solve(lambda angle, y: slope(angle, y)[0], y, start, last)
        # At the smallest angle, y is the data up to rounding.
        return jnp.where(end < _SMALLEST_ANGLE, slope(last, y)[1], y)

    return jax.vmap(one)(y, angle_from, angle_to)


def _tableau() -> tuple[np.ndarray, ...]:
    """The coefficients of Dormand & Prince's method of order 8, with 13 stages.

    The last stage is the solution at the end of the step, whose slope the error estimate needs.
    Hairer, Nørsett & Wanner 1993, II.10.
    """
    # Imported here, because it takes a second, which only those who integrate should wait.
    from scipy.integrate import DOP853

    stages = np.zeros((13, 13))
    stages[:12, :12], stages[12, :12] = DOP853.A, DOP853.B
    return stages, np.append(DOP853.C, 1.0), DOP853.E5, DOP853.E3


def _solve(slope: Callable[[Array, Array], Array], y: Array, start: Array, end: Array) -> Array:
    """Solves `y' = slope(time, y)` for one sample `y[d]`, with adaptive step sizes.

    Time is `start + u·(end - start)` with `u` from 0 to 1, so that derivatives with respect to both
    ends are those of the solution. The step sizes themselves are not differentiated.
    """
    stages, nodes, order_5, order_3 = map(jnp.asarray, _tableau())

    def attempt(u: Array, step: Array, y: Array) -> tuple[Array, Array]:
        """The solution after one step, and its error in units of the tolerance."""

        def stage(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            slopes, _ = carry
            position = y + step * (stages[i] @ slopes)
            time = start + (u + nodes[i] * step) * (end - start)
            return slopes.at[i].set((end - start) * slope(time, position)), position

        slopes, after = jax.lax.fori_loop(0, 13, stage, (jnp.zeros((13, len(y))), y))
        high, low = (jnp.max(jnp.abs(step * (e @ slopes))) for e in (order_5, order_3))
        # The method's authors combine two estimates, of orders 5 and 3, to one of order 8 like
        # this. The floor is not smaller because XLA may multiply it with the tolerance below.
        error = high**2 / jnp.maximum(jnp.sqrt(high**2 + 0.01 * low**2), 1e-100)
        return after, error / (_TOLERANCE * (1.0 + jnp.max(jnp.abs(y))))

    def unfinished(state: tuple[Array, Array, Array, Array]) -> Array:
        u, _, _, attempts = state
        return (u < 1.0) & (attempts < _MOST_STEPS)

    def advance(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        u, step, y, attempts = state
        after, error = attempt(u, step, y)
        error = jax.lax.stop_gradient(error)
        good = error <= 1.0  # false for NaN
        factor = jnp.clip(0.9 * jnp.maximum(error, 1e-30) ** (-1 / 8), 0.2, 8.0)
        factor = jnp.where(jnp.isfinite(factor), factor, 0.2)
        u, y = jnp.where(good, u + step, u), jnp.where(good, after, y)
        # The last step ends at exactly 1, in spite of rounding.
        left = 1.0 - u
        u = jnp.where(left < 1e-14, 1.0, u)
        return u, jnp.minimum(step * factor, left), y, attempts + 1

    state = (jnp.zeros(()), jnp.full((), 0.02), y, jnp.zeros((), jnp.int32))
    u, _, y, _ = jax.lax.while_loop(unfinished, advance, state)
    return jnp.where(u < 1.0, jnp.nan, y)
