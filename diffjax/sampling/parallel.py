"""Sampling that is parallel in time: many steps at once, repeated until they agree."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Sharding

from diffjax.errors import UserError
from diffjax.process.paths import Path
from diffjax.sampling.sample import last_step
from diffjax.sampling.solvers import Denoise, Solver
from diffjax.shapes import Keys, Samples, WalkTimes


class Parallel(NamedTuple):
    """Samples, and what they took.

    Attributes:
        x: clean samples, `[B, …]`.
        rounds: `[]`, evaluations one after another, each of `window·B` images.
    """

    x: Array
    rounds: Array


def sample_in_parallel(
    denoise: Denoise,
    solver: Solver,
    path: Path,
    times: WalkTimes,
    keys: Keys,
    x: Samples,
    *,
    window: int = 16,
    tolerance: float = 1e-2,
    place: Sharding | None = None,
) -> Parallel:
    """As `sample`, by Picard's iteration over a window of steps that slides towards the data.

    Of a guess for all points in the window, each step is taken from its own point; the increments
    add up to a better guess, `x_i ← x_begin + Σ (Φ_j(x_j) - x_j)`, whose first point is exact. The
    window moves on by the points that changed by no more than the tolerance. More evaluations in
    all, but fewer one after another: for devices that a small batch leaves idle. Shih et al. 2023
    (ParaDiGMS, arXiv:2305.16317), algorithm 1.

    Args:
        denoise: the model; it is asked about `window` batches at once, under `jax.vmap`.
        solver: without memory, as `ddim`; its noise is that of `sample`.
        path: the path it was trained on.
        times: `[n+1]` from a grid, ending in 0.
        keys: `[B]`, one for each sample.
        x: `[B, …]`, noise at `times[0]`.
        window: steps at once, at most n - 1 of use.
        tolerance: root mean square change of a sample at which its point counts as final; 0 gives
            what `sample` gives, up to rounding.
        place: of arrays `[window, B, …]`, to spread the window over devices.

    Raises:
        UserError: the solver looks back at earlier steps.

    Example:
        >>> from diffjax.oracle.analytic import Gaussian
        >>> from diffjax.process.paths import Linear
        >>> from diffjax.sampling.grids import Power
        >>> from diffjax.sampling.solvers import ddim
        >>> predict = Gaussian(jnp.zeros(2), jnp.eye(2)).predict(Linear())
        >>> found = sample_in_parallel(
        ...     lambda x, t: predict(x, jnp.full(len(x), t), None), ddim(), Linear(),
        ...     Power()(Linear(), 40), jax.random.split(jax.random.key(0), 3), jnp.ones((3, 2)),
        ... )
        >>> found.x.shape, int(found.rounds) < 20
        ((3, 2), True)
    """
    if jax.tree.leaves(solver.init(x)):
        raise UserError(
            "this solver looks back at earlier steps, which are not there yet in parallel: take "
            "one that does not, as ddim"
        )
    last = len(times) - 2  # of the points before 0
    window = min(window, last)
    axes = tuple(range(2, x.ndim + 1))

    def one(x: Array, i: Array) -> Array:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        memory = solver.init(x)
        return solver.step(denoise, path, memory, x, times[i], times[i + 1], step_keys)[0]

    def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        points, begin, rounds = state
        here = begin + jnp.arange(window)
        used = (here < last).reshape(-1, *[1] * x.ndim)
        here = jnp.minimum(here, last - 1)
        now = points[here]
        if place is not None:
            now = jax.lax.with_sharding_constraint(now, place)
        change = jnp.where(used, jax.vmap(one)(now, here) - now, 0.0)
        new = points[begin][None] + jnp.cumsum(change, axis=0)
        moved = jnp.sqrt(jnp.mean((new - points[here + 1]) ** 2, axis=axes)).max(axis=1)
        # The first is exact; after it, as many as did not move.
        settled = jnp.cumprod((moved <= tolerance).at[0].set(True)).sum()
        # Points that the window has not reached start where its last one is.
        ahead = jnp.arange(last + 1) > begin
        points = jnp.where(
            ahead.reshape(-1, *[1] * x.ndim),
            new[jnp.clip(jnp.arange(last + 1) - begin - 1, 0, window - 1)],
            points,
        )
        return points, jnp.minimum(begin + settled, last), rounds + 1

    start = (jnp.broadcast_to(x, (last + 1, *x.shape)), jnp.asarray(0), jnp.asarray(0))
    if last:
        start = jax.lax.while_loop(lambda state: state[1] < last, body, start)
    points, _, rounds = start
    return Parallel(last_step(denoise, solver, points[last], times[last]), rounds + 1)
