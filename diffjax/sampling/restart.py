"""Solvers that go back up: part of the way is walked again, with fresh noise."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.errors import UserError
from diffjax.kinds import Positive
from diffjax.process.paths import Path, log_snr, time_of_log_snr
from diffjax.sampling import solvers
from diffjax.sampling.solvers import Denoise, Solver, same_for_equal
from diffjax.shapes import OneNumber, Samples


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
    noise shrinks what errors have piled up, and within the interval few new ones are made. Xu et
    al. 2023 (arXiv:2306.14878), algorithm 1.

    Args:
        solver: takes the steps down.
        low: the paper's `t_min`, in units of `σ = s/a`.
        high: its `t_max`.
        times: its K.
        num_steps: its `N_Restart`, less 1.

    Raises:
        UserError: `low` is not below `high`.
    """
    if not 0.0 < low < high:
        raise UserError(f"restart goes from low={low:g} up to high={high:g}: give low < high")

    def route(path: Path, grid: Array) -> Array:
        edges = time_of_log_snr(path, -2.0 * jnp.log(jnp.array([low, high])))
        positive = np.asarray(grid)[:-1]
        at = min(int(np.sum(positive > edges[0])), len(positive) - 1)
        top = jnp.maximum(edges[1], grid[at])
        begin, end = log_snr(path, jnp.stack([top, grid[at]]))
        levels = jnp.linspace(begin, end, num_steps + 1)
        loop = time_of_log_snr(path, levels[1:-1])
        again = jnp.tile(jnp.concatenate([top[None], loop, grid[at][None]]), times)
        return jnp.concatenate([grid[: at + 1], again, grid[at + 1 :]])

    inner_steps = solver.steps
    return _rising(solver)._replace(
        route=route, steps=lambda intervals: inner_steps(intervals) + times * num_steps
    )


@same_for_equal
def resampled(solver: Solver, jump: int = 5, times: int = 3) -> Solver:
    """RePaint's resampling: each `jump` steps of the grid are walked `times` times.

    Between two walks the sample goes back up in one step of the forward process. It harmonises what
    `editing.keep_known` puts in with the rest: put that one inside. Lugmayr et al. 2022
    (arXiv:2201.09865), algorithm 1 and section 4.2.

    Args:
        solver: takes the steps down.
        jump: the paper's j.
        times: its r, 1 is off.
    """

    def visits(intervals: int) -> list[int]:
        order = [0]
        for begin in range(0, intervals, jump):
            end = min(begin + jump, intervals)
            order += [*range(begin + 1, end + 1), *([*range(begin, end + 1)] * (times - 1))]
        return order

    def route(path: Path, grid: Array) -> Array:
        del path
        return jnp.append(grid[jnp.array(visits(len(grid) - 2))], 0.0)

    def steps(intervals: int) -> int:
        return sum(here < there for here, there in pairwise(visits(intervals)))

    return _rising(solver)._replace(route=route, steps=steps)


def _rising(solver: Solver) -> Solver:
    """A solver that, where times rise, adds noise as the forward process does."""

    def step(
        denoise: Denoise,
        path: Path,
        memory: object,
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, object]:
        def up() -> tuple[Array, object]:
            ratio = path.alpha(t_next) / path.alpha(t)
            variance = path.sigma(t_next) ** 2 - (ratio * path.sigma(t)) ** 2
            z = solvers.normal(keys, x.shape[1:])
            # Evaluations from before are of no use after.
            return ratio * x + jnp.sqrt(jnp.maximum(variance, 0.0)) * z, solver.init(x)

        def down() -> tuple[Array, object]:
            return solver.step(denoise, path, memory, x, t, t_next, keys)

        return jax.lax.cond(t_next > t, up, down)

    return solver._replace(step=step, fresh_noise=True, order=min(solver.order, 1))
