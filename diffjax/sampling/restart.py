"""Solvers that walk a part of the way again, with fresh noise."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.errors import UserError
from diffjax.kinds import Positive
from diffjax.process.paths import Path, log_snr, time_of_log_snr
from diffjax.sampling import solvers
from diffjax.sampling.solvers import Denoise, Interval, Solver, same_for_equal
from diffjax.shapes import Samples


@same_for_equal
def restart(
    solver: Solver,
    low: Positive[float] = 0.1,
    high: Positive[float] = 1.0,
    times: Positive[int] = 2,
    num_steps: Positive[int] = 4,
) -> Solver:
    """Restart: from `σ = low` back up to `high` with fresh noise, and down again.

    At the first time of the grid with `σ = s/a ≤ low` (or its last one before 0), `times` times:
    up in one step of the forward process, then down in `num_steps` steps, equal in log-SNR. Fresh
    noise reduces the errors of the steps before, and the few steps of the interval add little. Xu
    et al. 2023 (arXiv:2306.14878), algorithm 1.

    Args:
        solver: takes the steps down.
        low: the paper's `t_min`, in units of `σ = s/a`; typically 0.05 to 0.3.
        high: its `t_max`; typically 3 to 10 times `low`.
        times: its K, the number of repetitions; typically 1 to 10.
        num_steps: its `N_Restart`, minus 1; typically 2 to 8.

    Raises:
        UserError: `low` is not below `high`.
    """
    if not 0.0 < low < high:
        raise UserError(f"restart goes from low={low:g} up to high={high:g}: set low < high")

    def route(path: Path, grid: Array) -> Array:
        # In NumPy where lengths depend on the grid: JAX would compile each operation for each.
        given = np.asarray(grid)
        edges = np.asarray(time_of_log_snr(path, -2.0 * jnp.log(jnp.array([low, high]))))
        at = min(int(np.sum(given[:-1] > edges[0])), len(given) - 2)
        ends = np.array([max(edges[1], given[at]), given[at]], given.dtype)
        begin, end = log_snr(path, jnp.asarray(ends))
        levels = jnp.linspace(begin, end, num_steps + 1)
        loop = np.asarray(time_of_log_snr(path, levels[1:-1]))
        again = np.tile(np.concatenate([ends[:1], loop, ends[1:]]), times)
        return jax.device_put(np.concatenate([given[: at + 1], again, given[at + 1 :]]))

    inner_steps = solver.steps
    return _rising(solver)._replace(
        route=route, steps=lambda intervals: inner_steps(intervals) + times * num_steps
    )


@same_for_equal
def resampled(solver: Solver, jump: int = 5, times: int = 3) -> Solver:
    """RePaint's resampling: each `jump` steps of the grid are walked `times` times.

    Between two walks the sample goes back up in one step of the forward process. With
    `editing.keep_known` as its solver it makes the generated part fit the known one. Lugmayr et al.
    2022 (arXiv:2201.09865), algorithm 1 and section 4.2.

    Args:
        solver: takes the steps down.
        jump: the paper's j; 10 of 250 steps there.
        times: its r; 10 there, 1 is off.
    """

    def visits(intervals: int) -> list[int]:
        order = [0]
        for begin in range(0, intervals, jump):
            end = min(begin + jump, intervals)
            order += [*range(begin + 1, end + 1), *([*range(begin, end + 1)] * (times - 1))]
        return order

    def route(path: Path, grid: Array) -> Array:
        del path
        return jnp.take(grid, np.array([*visits(len(grid) - 2), len(grid) - 1]))

    def steps(intervals: int) -> int:
        return sum(here < there for here, there in pairwise(visits(intervals)))

    return _rising(solver)._replace(route=route, steps=steps)


def _rising(solver: Solver) -> Solver:
    """A solver that adds noise as the forward process does, where times rise."""

    def step(
        denoise: Denoise, interval: Interval, memory: object, x: Samples
    ) -> tuple[Samples, object]:
        def up() -> tuple[Array, object]:
            begin, end = interval.begin, interval.end
            ratio = end.a / begin.a
            variance = end.s**2 - (ratio * begin.s) ** 2
            z = solvers.normal(interval.keys, x.shape[1:])
            # Evaluations from before the new noise are not used after it.
            return ratio * x + jnp.sqrt(jnp.maximum(variance, 0.0)) * z, solver.init(x)

        def down() -> tuple[Array, object]:
            return solver.step(denoise, interval, memory, x)

        return jax.lax.cond(interval.t_next > interval.t, up, down)

    return solver._replace(step=step, fresh_noise=True, order=min(solver.order, 1))
