"""Sampling that is parallel in time: many steps at once, repeated until they agree."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Sharding

from diffjax.errors import UserError
from diffjax.process.paths import Path
from diffjax.sampling.sample import interval_of, last_step
from diffjax.sampling.solvers import Denoise, Solver
from diffjax.shapes import Keys, Samples, WalkTimes


class Parallel(NamedTuple):
    """Samples, and the number of rounds that they took.

    Attributes:
        x: clean samples, `[B, …]`.
        rounds: `[]`, evaluations one after another, each of `window·B` images.
    """

    x: Array
    rounds: Array


@dataclass(frozen=True)
class InParallel:
    """The walk of `sample` by Picard's iteration, over a window of steps that moves to the data.

    From a guess of all points in the window, each step starts at its own point. The sum of the
    increments is a better guess,

        x_i ← x_begin + Σ (Φ_j(x_j) - x_j),

    whose first point is exact. The window moves on by the number of points that changed by no more
    than the tolerance. It takes more evaluations in all, but fewer one after another: for devices
    that a small batch does not fill. Shih et al. 2023 (ParaDiGMS, arXiv:2305.16317), algorithm 1.

    It is called as `sample` is, with a solver without memory, such as `ddim`, and the same noise.
    The denoiser sees `window` batches at once, under `jax.vmap`.

    Attributes:
        window: the number of steps at once; at most n - 1 are used. Typically 8 to 64.
        tolerance: the root mean square change of a sample at which its point is final. With 0 the
            samples are those of `sample`, up to rounding; 1e-3 to 1e-1 is usual.
        place: the sharding of arrays `[window, B, …]`, to spread the window over devices.

    Example:
        >>> from diffjax.oracle.analytic import Gaussian
        >>> from diffjax.process.paths import Linear
        >>> from diffjax.sampling.grids import Power
        >>> from diffjax.sampling.solvers import ddim
        >>> predict = Gaussian(jnp.zeros(2), jnp.eye(2)).predict(Linear())
        >>> found = InParallel()(
        ...     lambda x, t: predict(x, jnp.full(len(x), t), None), ddim(), Linear(),
        ...     Power()(Linear(), 40), jax.random.split(jax.random.key(0), 3), jnp.ones((3, 2)),
        ... )
        >>> found.x.shape, int(found.rounds) < 20
        ((3, 2), True)
    """

    window: int = 16
    tolerance: float = 1e-2
    place: Sharding | None = None

    def __call__(
        self,
        denoise: Denoise,
        solver: Solver,
        path: Path,
        times: WalkTimes,
        keys: Keys,
        x: Samples,
    ) -> Parallel:
        """Samples `[B, …]` from noise `x[B, …]` at `times[0]`, along `times[n+1]`, ending in 0.

        Raises:
            UserError: the solver uses earlier evaluations.
        """
        if jax.tree.leaves(solver.init(x)):
            raise UserError(
                "this solver uses earlier evaluations, which do not exist yet in parallel: use one "
                "that does not, such as ddim"
            )
        last = len(times) - 1 - solver.finishes  # steps, before the one to the predicted x0
        window = min(self.window, last)
        axes = tuple(range(2, x.ndim + 1))

        def one(x: Array, i: Array) -> Array:
            interval = interval_of(path, times, i, keys)
            return solver.step(denoise, interval, solver.init(x), x)[0]

        def body(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            points, begin, rounds = state
            here = begin + jnp.arange(window)
            used = (here < last).reshape(-1, *[1] * x.ndim)
            here = jnp.minimum(here, last - 1)
            now = points[here]
            if self.place is not None:
                now = jax.lax.with_sharding_constraint(now, self.place)
            change = jnp.where(used, jax.vmap(one)(now, here) - now, 0.0)
            new = points[begin][None] + jnp.cumsum(change, axis=0)
            moved = jnp.sqrt(jnp.mean((new - points[here + 1]) ** 2, axis=axes)).max(axis=1)
            # The first is exact; after it, as many as did not move.
            settled = jnp.cumprod((moved <= self.tolerance).at[0].set(True)).sum()
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
        if not solver.finishes:
            return Parallel(points[last], rounds)
        return Parallel(last_step(denoise, solver, points[last], times[last]), rounds + 1)
