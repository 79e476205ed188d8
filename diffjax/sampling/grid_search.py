"""Grids found for a given model: the n steps that bring its solver nearest to an accurate teacher.

A one-step solver at `x_i`, on the teacher's trajectory, jumps to the later candidate `t_j` and
misses the teacher's `x_j` by `e_ij`. The flow carries this error to the end, where it is `J_j·e_ij`
to first order; its size is the cost of the jump. The sum of the costs of n jumps from noise to data
is a bound on the error at the end (the triangle inequality), and dynamic programming finds the n
jumps with the smallest sum. Watson et al. 2021 (arXiv:2106.03802) use the terms of a variational
bound as costs, Chen et al. 2024 (GITS, arXiv:2405.11326) `|e_ij|` and a factor per step instead of
`J_j`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.errors import UserError
from diffjax.process.paths import Path, log_snr, time_of_log_snr
from diffjax.sampling.sample import trace
from diffjax.sampling.solvers import Denoise, Interval, Solver, normal
from diffjax.shapes import Keys, Samples, WalkTimes

_FARTHEST_LOG_SNR = 14.0
_MOST_ROUNDS = 10


def candidate_times(path: Path, n: int) -> WalkTimes:
    """A fine grid for any path: `[n+1]` times, falling, the last 0.

    Equal steps in the mean of two measures of the noise, each scaled to [0, 1]: the angle
    `atan2(s, a)`, which resolves the middle, where signal and noise have the same size, and
    log-SNR, which resolves both ends.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> [round(t, 3) for t in candidate_times(Linear(), 5).tolist()]
        [1.0, 0.842, 0.502, 0.162, 0.001, 0.0]
    """
    ends = log_snr(path, jnp.stack([jnp.asarray(path.t_noise), jnp.asarray(path.t_min)]))
    first, last = np.clip(ends, -_FARTHEST_LOG_SNR, _FARTHEST_LOG_SNR)
    values = np.linspace(first, last, 4096)
    angle = np.arctan(np.exp(-0.5 * values))
    position = 0.5 * (values - first) / (last - first)
    position += 0.5 * (angle[0] - angle) / (angle[0] - angle[-1])
    inner = np.interp(np.linspace(0.0, 1.0, n), position, values)
    # In NumPy: JAX would compile each operation for each n.
    times = np.append(time_of_log_snr(path, inner.astype(np.float32)), np.float32(0.0))
    times[0] = path.t_noise
    return jax.device_put(times)


class Jumps(NamedTuple):
    """The costs of jumps from one candidate to another.

    Attributes:
        times: `[M+1]`, the candidates, falling, the last 0.
        costs: `[M, M+1]`, from i to j; infinite for `j <= i` and where a step is not finite.
    """

    times: Array
    costs: Array


@dataclass(frozen=True)
class JumpCosts:
    """A walk that measures the error of each jump at the end, to first order, as `Jumps`.

    `cost_ij` is the mean over samples of `|J_j·e_ij|/√d`. Here `e_ij` is a step of the solver from
    the teacher's `x_i` minus the teacher's `x_j`, and `J_j` is the derivative of the teacher's end
    with respect to `x_j`. The estimate is unbiased, because `E|v·w| = |w|·√(2/π)` for normal `v`:
    one pass backwards through the teacher computes `J_jᵀ·v` at all j. The last jump returns the
    predicted x0: `cost_iM` is the error of `x0(x_i, t_i)`.

    Called as `sample` is, with the candidates `times[M+1]`, ending in 0. The solver must not add
    noise, and a multistep solver steps as it does without a history. The network sees up to `M·B`
    images at a time.

    Attributes:
        teacher: an accurate solver without memory, for the steps between candidates, such as `rk4`.
        probes: the number of normal vectors per sample.
    """

    teacher: Solver
    probes: int = 1

    def __call__(
        self,
        denoise: Denoise,
        solver: Solver,
        path: Path,
        times: WalkTimes,
        keys: Keys,
        x: Samples,
    ) -> Jumps:
        def step(solver: Solver, x: Array, t: Array, t_next: Array) -> Array:
            interval = Interval(path, t, t_next, keys)
            return solver.step(denoise, interval, solver.init(x), x)[0]

        def clean(x: Array) -> Array:
            return denoise(x, times[-2]).x0

        walked = trace(denoise, self.teacher, path, times, keys, x)
        xs, end = walked.x[:-1], walked.x[-1]
        # Keys of their own: the teacher's steps fold in small numbers.
        own = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 2**31), self.probes))(
            keys
        )
        v = jax.vmap(lambda keys: normal(keys, x.shape[1:]), in_axes=1)(own)
        carry = partial(_carried_back, partial(step, self.teacher), clean, times, xs)
        back = jax.vmap(carry)(v)

        def row(_: None, here: tuple) -> tuple[None, Array]:
            x, t = here
            missed = (jax.vmap(lambda u: step(solver, x, t, u))(times[:-1]) - xs)[None]
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
    step: Callable[[Array, Array, Array], Array],
    clean: Callable[[Array], Array],
    times: Array,
    xs: Array,
    v: Array,
) -> Array:
    """`J_jᵀ·v`, `[M, B, …]`: the end's derivative at each `x_j`, for `v[B, …]` at the end."""

    def pulled(f: Callable[[Array], Array], x: Array, v: Array) -> Array:
        return jax.vjp(f, x)[1](v)[0]

    def body(v: Array, interval: tuple) -> tuple[Array, Array]:
        x, t, t_next = interval
        v = pulled(lambda x: step(x, t, t_next), x, v)
        return v, v

    last = pulled(clean, xs[-1], v)
    _, earlier = jax.lax.scan(body, last, (xs[:-1], times[:-2], times[1:-1]), reverse=True)
    return jnp.concatenate([earlier, last[None]])


def cheapest(costs: np.ndarray | Array, n: int) -> list[int]:
    """The n jumps from the first candidate to the end with the smallest sum of costs.

    `V_k(i) = min_j (cost_ij + V_(k-1)(j))`, as in Watson et al. 2021 (arXiv:2106.03802), section 3.

    Args:
        costs: `[M, M+1]`, from i to j.
        n: the number of jumps.

    Returns:
        The n candidates that the jumps start from; the first is 0.

    Raises:
        UserError: there are fewer candidates than jumps, or no n jumps have a finite cost.

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
            f"no grid of {n} steps has a finite error on {len(costs)} candidates: use at least "
            f"{n} candidates, and a solver and a teacher that can walk this path"
        )
    chosen = [0]
    for choice in following[:0:-1]:
        chosen.append(int(choice[chosen[-1]]))
    return chosen


def refined(
    end_error: Callable[[Sequence[int]], float], chosen: Sequence[int], num_candidates: int
) -> list[int]:
    """Moves the inner times one by one to neighbouring candidates while this reduces an error.

    The sum of costs is a bound: errors can cancel, and a multistep solver uses more than one
    evaluation in a step. The error that is reduced here can be the one at the end itself.

    Args:
        end_error: the error of a grid as a function of its candidates.
        chosen: the first grid, such as that of `cheapest`.
        num_candidates: the number of candidates.

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
    """The sum of a grid's costs: to first order, a bound on its error at the end.

    Args:
        costs: `[M, M+1]`, from i to j.
        chosen: the candidates that the jumps start from.
    """
    costs = np.asarray(costs, np.float64)
    return float(sum(costs[i, j] for i, j in zip(chosen, [*chosen[1:], len(costs)], strict=True)))
