"""The walk itself: one `lax.scan` over the grid, and the last step onto clean data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.process.paths import Pair, Path
from diffjax.process.precond import Predict
from diffjax.sampling.grids import Grid
from diffjax.sampling.guidance import ClassifierFree, Rule, guide
from diffjax.sampling.solvers import Denoise, Solver, normal


def integrate(
    denoise: Denoise, solver: Solver, path: Path, times: Array, keys: Array, x: Array
) -> Array:
    """Walks along all the given times, in either direction.

    Args:
        denoise: the model.
        solver: how to step.
        path: the path it was trained on.
        times: `[n+1]`, all within `[t_min, t_noise]`.
        keys: `[B]`, one for each sample; each step folds in its number.
        x: `[B, …]` at `times[0]`.

    Returns:
        `[B, …]` at `times[n]`.
    """

    def body(state: tuple, interval: tuple) -> tuple[tuple, None]:
        x, memory = state
        i, t, t_next = interval
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        return solver.step(denoise, path, memory, x, t, t_next, step_keys), None

    intervals = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    (x, _), _ = jax.lax.scan(body, (x, solver.init(x)), intervals)
    return x


def sample(
    denoise: Denoise, solver: Solver, path: Path, times: Array, keys: Array, x: Array
) -> Array:
    """Walks a grid that ends in clean data.

    The last interval ends where `a = 1` and `s = 0`. There the step of every solver that is exact
    for a constant prediction is x0 itself, so that is what it takes: no noise is left over, and no
    network is asked at `t = 0`.

    Args:
        denoise: the model.
        solver: how to take all but the last step.
        path: the path it was trained on.
        times: `[n+1]` from a grid, ending in 0.
        keys: `[B]`, one for each sample.
        x: `[B, …]`, noise at `times[0]`.

    Returns:
        Clean samples, `[B, …]`.
    """
    x = integrate(denoise, solver, path, times[:-1], keys, x)
    return denoise(x, times[-2]).x0


class Trace(NamedTuple):
    """What happened on the way from noise to data.

    Attributes:
        times: `[n+1]`.
        x: `[n+1, B, …]`, at each of them; the last is the clean sample.
        x0: `[n, B, …]`, the prediction at each but the last.
    """

    times: Array
    x: Array
    x0: Array


def trace(
    denoise: Denoise, solver: Solver, path: Path, times: Array, keys: Array, x: Array
) -> Trace:
    """As `sample`, with all that lies between; one more evaluation a step, for x0."""

    def body(state: tuple, interval: tuple) -> tuple[tuple, tuple[Array, Array]]:
        x, memory = state
        i, t, t_next = interval
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        passed = x, denoise(x, t).x0
        return solver.step(denoise, path, memory, x, t, t_next, step_keys), passed

    intervals = (jnp.arange(len(times) - 2), times[:-2], times[1:-1])
    (end, _), (xs, x0s) = jax.lax.scan(body, (x, solver.init(x)), intervals)
    last = denoise(end, times[-2]).x0
    return Trace(
        times, jnp.concatenate([xs, end[None], last[None]]), jnp.concatenate([x0s, last[None]])
    )


@dataclass(frozen=True)
class Recipe:
    """All that has to be said about how samples were drawn, but for the seed.

    Attributes:
        solver: how to step.
        grid: where to step.
        num_steps: intervals of the grid.
        guidance_scale: 1 is off.
        guidance: what to make of the predictions with and without label.
    """

    solver: Solver
    grid: Grid
    num_steps: int = 18
    guidance_scale: float = 1.0
    guidance: Rule = ClassifierFree()

    @property
    def nfe(self) -> int:
        """Network evaluations per sample, guidance counted.

        Example:
            >>> from diffjax.sampling.grids import Power
            >>> from diffjax.sampling.solvers import heun
            >>> Recipe(heun(), Power(), num_steps=18, guidance_scale=2.0).nfe
            70
        """
        steps = (self.num_steps - 1) * self.solver.nfe + 1
        return steps * (1 if self.guidance_scale == 1.0 else 2)


def draw(
    predict: Predict,
    path: Path,
    solver: Solver,
    times: Array,
    keys: Array,
    labels: Array | None,
    shape: tuple[int, ...],
    *,
    guidance: Rule = ClassifierFree(),
    guidance_scale: Array | None = None,
    null_label: int = 0,
    start: Callable[[Array], Array] | None = None,
    walk: Callable[..., Any] = sample,
) -> Any:
    """Draws one batch of samples from noise, or from where `start` says.

    Sample i depends on `keys[i]` and `labels[i]` alone.

    Args:
        predict: the model.
        path: the path it was trained on.
        solver: how to step.
        times: `[n+1]` from a grid, ending in 0.
        keys: `[B]`, one for each sample.
        labels: `[B]`, or None for an unconditional model.
        shape: of one sample, `(H, W, C)`.
        guidance: what to make of the predictions with and without label.
        guidance_scale: None is off; a number is traced, so that another one does not recompile.
        null_label: what "no label" is to the model, for guidance.
        walk: `sample`, or `trace` to have all that lies between.
        start: standard normal noise `[B, H, W, C]` to `x` at `times[0]`; by default `s` times it.

    Returns:
        What `walk` gives: samples `[B, H, W, C]`.
    """
    predict = guide(predict, path, guidance, guidance_scale, null_label)
    both = jax.vmap(jax.random.split)(keys)
    noise = normal(both[:, 0], shape)
    x = path.sigma(times[0]) * noise if start is None else start(noise)

    def denoise(x: Array, t: Array) -> Pair:
        return predict(x, jnp.full(len(x), t), labels)

    return walk(denoise, solver, path, times, both[:, 1], x)
