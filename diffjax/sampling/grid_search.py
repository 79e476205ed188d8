"""Grids found for a given model: the n steps that bring its solver nearest to an accurate teacher.

A one-step solver at `x_i`, on the teacher's way, jumps to the later candidate `t_j` and misses the
teacher's `x_j` by `e_ij`. The flow carries that to the end, where it is `J_j·e_ij` to first order.
A jump costs the size of this. The costs of n jumps from noise to data bound the error at the end
(the triangle inequality), and dynamic programming finds the n jumps with the least sum. Watson et
al. 2021 (arXiv:2106.03802) do so with the terms of a variational bound, Chen et al. 2024 (GITS,
arXiv:2405.11326) with `|e_ij|` and a factor per step in place of `J_j`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.errors import UserError
from diffjax.process.paths import Path, log_snr, time_of_log_snr
from diffjax.sampling.sample import trace
from diffjax.sampling.solvers import Denoise, Solver, normal
from diffjax.shapes import Keys, Samples, WalkTimes

_FARTHEST_LOG_SNR = 14.0
_MOST_ROUNDS = 10


def candidates(path: Path, n: int) -> WalkTimes:
    """A fine grid for any path, by its noise alone: `[n+1]` times, falling, the last 0.

    Equal steps in the mean of two measures, each scaled to [0, 1]: the angle `atan2(s, a)`, which
    is fine where signal and noise are alike, and log-SNR, which is fine at both ends.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> [round(t, 3) for t in candidates(Linear(), 5).tolist()]
        [1.0, 0.842, 0.502, 0.162, 0.001, 0.0]
    """
    ends = log_snr(path, jnp.stack([jnp.asarray(path.t_noise), jnp.asarray(path.t_min)]))
    first, last = np.clip(ends, -_FARTHEST_LOG_SNR, _FARTHEST_LOG_SNR)
    values = np.linspace(first, last, 4096)
    angle = np.arctan(np.exp(-0.5 * values))
    position = 0.5 * (values - first) / (last - first)
    position += 0.5 * (angle[0] - angle) / (angle[0] - angle[-1])
    inner = np.interp(np.linspace(0.0, 1.0, n), position, values)
    times = time_of_log_snr(path, jnp.asarray(inner, jnp.float32))
    return jnp.append(times.at[0].set(path.t_noise), 0.0)


class Jumps(NamedTuple):
    """What it costs to jump from one candidate to another.

    Attributes:
        times: `[M+1]`, the candidates, falling, the last 0.
        costs: `[M, M+1]`, from i to j; infinite for `j <= i` and where a step is not finite.
    """

    times: Array
    costs: Array


def measure_jumps(
    denoise: Denoise,
    solver: Solver,
    path: Path,
    times: WalkTimes,
    keys: Keys,
    x: Samples,
    *,
    teacher: Solver,
    probes: int = 1,
) -> Jumps:
    """The error that each jump leaves at the end, to first order: mean over samples, per number.

    `cost_ij` is the mean over samples of `|J_j·e_ij|/√d`, with `e_ij` a step of the solver from
    the teacher's `x_i` minus the teacher's `x_j`, and `J_j` the derivative of the teacher's end by
    `x_j`. It is had without bias from `|v·w| = |w|·√(2/π)`, which holds in the mean over normal
    `v`: one pass backwards through the teacher gives `J_jᵀ·v` at all j. The last jump takes the
    predicted x0: `cost_iM` is that of `x0(x_i, t_i) - x_end`.

    The network sees up to `M·B` images at a time. Solvers that look back step as they do from a
    standing start.

    Args:
        denoise: the model.
        solver: whose steps are judged; without fresh noise.
        path: the path the model was trained on.
        times: `[M+1]`, the candidates, ending in 0.
        keys: `[B]`, one for each sample.
        x: `[B, …]`, noise at `times[0]`.
        teacher: an accurate solver that does not look back, for the steps between candidates.
        probes: normal vectors a sample.
    """
    walked = trace(denoise, teacher, path, times, keys, x)
    xs, end = walked.x[:-1], walked.x[-1]
    # Keys of their own: the teacher's steps fold in small numbers.
    own = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 2**31), probes))(keys)
    v = jax.vmap(lambda keys: normal(keys, x.shape[1:]), in_axes=1)(own)
    back = jax.vmap(lambda v: _carried_back(denoise, teacher, path, times, keys, xs, v))(v)

    def row(_: None, here: tuple) -> tuple[None, Array]:
        x, t = here
        jump = jax.vmap(lambda u: solver.step(denoise, path, solver.init(x), x, t, u, keys)[0])
        missed = (jump(times[:-1]) - xs)[None]
        products = jnp.sum(back * missed, axis=tuple(range(3, back.ndim)))
        return None, jnp.mean(jnp.abs(products), axis=(0, 2))

    _, inner = jax.lax.scan(row, None, (xs, times[:-1]))
    inner *= jnp.sqrt(0.5 * jnp.pi / x[0].size)
    squares = jnp.mean((walked.x0 - end[None]) ** 2, axis=tuple(range(2, xs.ndim)))
    last = jnp.mean(jnp.sqrt(squares), 1)
    costs = jnp.concatenate([inner, last[:, None]], axis=1)
    later = jnp.arange(len(times))[None] > jnp.arange(len(times) - 1)[:, None]
    return Jumps(times, jnp.where(later & jnp.isfinite(costs), costs, jnp.inf))


def _carried_back(
    denoise: Denoise, teacher: Solver, path: Path, times: Array, keys: Array, xs: Array, v: Array
) -> Array:
    """`J_jᵀ·v`, `[M, B, …]`: the end's derivative at each `x_j`, for `v[B, …]` at the end."""

    def pulled(f: Callable[[Array], Array], x: Array, v: Array) -> Array:
        return jax.vjp(f, x)[1](v)[0]

    def body(v: Array, interval: tuple) -> tuple[Array, Array]:
        x, t, t_next = interval

        def step(x: Array) -> Array:
            return teacher.step(denoise, path, teacher.init(x), x, t, t_next, keys)[0]

        v = pulled(step, x, v)
        return v, v

    last = pulled(lambda x: denoise(x, times[-2]).x0, xs[-1], v)
    _, earlier = jax.lax.scan(body, last, (xs[:-1], times[:-2], times[1:-1]), reverse=True)
    return jnp.concatenate([earlier, last[None]])


def cheapest(costs: np.ndarray | Array, n: int) -> list[int]:
    """The n jumps from the first candidate to the end with the least sum of costs.

    `V_k(i) = min_j (cost_ij + V_(k-1)(j))`, as in Watson et al. 2021 (arXiv:2106.03802), section 3.

    Args:
        costs: `[M, M+1]`, from i to j.
        n: how many.

    Returns:
        The n candidates that are jumped from, the first of them 0.

    Raises:
        UserError: there are fewer candidates than jumps, or no way has a finite cost.

    Example:
        >>> cheapest(np.array([[np.inf, 1.0, 5.0], [np.inf, np.inf, 2.0]]), 2)
        [0, 1]
    """
    costs = np.asarray(costs, np.float64)
    value = np.append(np.full(len(costs), np.inf), 0.0)
    following = []
    for _ in range(n):
        totals = costs + value
        following.append(np.argmin(totals, axis=1))
        value = np.append(np.min(totals, axis=1), np.inf)
    if not np.isfinite(value[0]):
        raise UserError(
            f"no grid of {n} steps has a finite error on {len(costs)} candidates: take at least "
            f"{n} candidates, and a solver and a teacher that can walk this path"
        )
    chosen = [0]
    for choice in following[:0:-1]:
        chosen.append(int(choice[chosen[-1]]))
    return chosen


def refined(
    end_error: Callable[[Sequence[int]], float], chosen: Sequence[int], num_candidates: int
) -> list[int]:
    """Moves the inner times one by one to neighbouring candidates while that lowers an error.

    The sum of costs is a bound: it knows neither that errors cancel, nor that a solver that looks
    back has more to go by than one step. What is lowered here can be the error itself.

    Args:
        end_error: of a grid, by its candidates.
        chosen: where to begin, as from `cheapest`.
        num_candidates: how many there are.

    Example:
        >>> refined(lambda grid: (grid[1] - 7) ** 2, [0, 3], 9)
        [0, 7]
    """
    best, least = list(chosen), end_error(chosen)
    for _ in range(_MOST_ROUNDS):
        before = best
        for k in range(1, len(best)):
            for way in (-1, 1):
                while True:
                    moved = [*best[:k], best[k] + way, *best[k + 1 :]]
                    inside = moved[k - 1] < moved[k] < [*moved, num_candidates][k + 1]
                    error = end_error(moved) if inside else np.inf
                    if not error < least:
                        break
                    best, least = moved, error
        if best == before:
            break
    return best


def summed(costs: np.ndarray | Array, chosen: Sequence[int]) -> float:
    """The sum of a grid's costs: what its error at the end is at most, to first order.

    Args:
        costs: `[M, M+1]`, from i to j.
        chosen: the candidates that are jumped from.
    """
    costs = np.asarray(costs, np.float64)
    return float(sum(costs[i, j] for i, j in zip(chosen, [*chosen[1:], len(costs)], strict=True)))
