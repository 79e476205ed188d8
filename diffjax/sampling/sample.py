"""Sampling: a solver walks a grid from noise to data, as one `lax.scan` and a last step to x0."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial
from jaxtyping import Float, Int

from diffjax.compiling import once
from diffjax.kinds import NumSteps
from diffjax.process.paths import Pair, Path
from diffjax.process.precond import Meaning, Predict
from diffjax.sampling.grids import Grid
from diffjax.sampling.guidance import Against, ClassifierFree, NullCondition, Rule
from diffjax.sampling.solvers import Denoise, Interval, Solver, normal
from diffjax.shapes import Keys, OneNumber, Samples, WalkTimes


@once(1)
def integrate(
    denoise: Denoise, solver: Solver, path: Path, times: WalkTimes, keys: Keys, x: Samples
) -> Samples:
    """Walks from the first of the times to the last, in either direction.

    Args:
        denoise: the model.
        solver: takes the steps.
        path: the path it was trained on.
        times: `[n+1]`, all within `[t_min, t_noise]`.
        keys: `[B]`, one for each sample; each step folds its number into them.
        x: `[B, …]` at `times[0]`.

    Returns:
        `[B, …]` at `times[n]`.
    """

    def body(state: tuple, i: Array) -> tuple[tuple, None]:
        x, memory = state
        return solver.step(denoise, interval_of(path, times, i, keys), memory, x), None

    (x, _), _ = jax.lax.scan(body, (x, solver.init(x)), jnp.arange(len(times) - 1))
    return x


def interval_of(path: Path, times: WalkTimes, i: Array, keys: Keys) -> Interval:
    """The i-th interval of a walk, with keys that belong to this step alone."""
    times = jnp.asarray(times)
    step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
    return Interval(path, times[i], times[i + 1], step_keys)


@once(1)
def sample(
    denoise: Denoise, solver: Solver, path: Path, times: WalkTimes, keys: Keys, x: Samples
) -> Samples:
    """Walks a grid that ends in clean data.

    The last interval ends where `a = 1` and `s = 0`. Every solver that is exact for a constant
    prediction returns x0 there, so the last step is x0: no noise is left, and the network is never
    evaluated at `t = 0`.

    Args:
        denoise: the model.
        solver: takes all but the last step.
        path: the path it was trained on.
        times: `[n+1]` from a grid, ending in 0.
        keys: `[B]`, one for each sample.
        x: `[B, …]`, noise at `times[0]`.

    Returns:
        Clean samples, `[B, …]`.
    """
    if not solver.finishes:
        return integrate(denoise, solver, path, times, keys, x)
    x = integrate(denoise, solver, path, times[:-1], keys, x)
    return last_step(denoise, solver, x, jnp.asarray(times[-2]))


def last_step(denoise: Denoise, solver: Solver, x: Samples, t: OneNumber) -> Samples:
    """The step from `x[B, …]` at `t[]` to clean data: the predicted x0."""
    to_the_end = solver.needs is Meaning.AVERAGE_VELOCITY
    return denoise(x, jnp.stack([t, jnp.zeros_like(t)]) if to_the_end else t).x0


@once(1)
def sample_padded(
    denoise: Denoise, solver: Solver, path: Path, times: WalkTimes, keys: Keys, x: Samples
) -> Samples:
    """As `sample`, for times that end in any number of zeros (`padded`).

    So one compiled program serves many numbers of steps. It is a `lax.fori_loop` whose length is
    traced, so it can be differentiated in forward mode only.
    """
    return _walk_padded(denoise, solver, path, times, keys, x)[0]


@once(1)
def count_padded(
    denoise: Denoise, solver: Solver, path: Path, times: WalkTimes, keys: Keys, x: Samples
) -> Int[Array, ""]:
    """The number of evaluations of `sample_padded`, `[]`, for a solver that counts its own."""
    return _walk_padded(denoise, solver, path, times, keys, x)[1] + 1


def _walk_padded(
    denoise: Denoise, solver: Solver, path: Path, times: Array, keys: Array, x: Array
) -> tuple[Array, Any]:
    last = jnp.count_nonzero(times) - 1

    def body(i: Array, state: tuple) -> tuple:
        x, memory = state
        return solver.step(denoise, interval_of(path, times, i, keys), memory, x)

    x, memory = jax.lax.fori_loop(0, last, body, (x, solver.init(x)))
    return last_step(denoise, solver, x, times[last]) if solver.finishes else x, memory


def padded(times: WalkTimes) -> Float[Array, " padded"]:
    """Times followed by zeros, up to a length of 65, 129, 257 …

    Example:
        >>> padded(jnp.array([1.0, 0.5, 0.0])).shape
        (65,)
    """
    steps = max(64, 2 ** math.ceil(math.log2(len(times) - 1)))
    return jnp.pad(times, (0, steps + 1 - len(times)))


class Trace(NamedTuple):
    """A walk from noise to data with all of its states.

    Attributes:
        times: `[n+1]`.
        x: `[n+1, B, …]`, at each of them; the last is the clean sample.
        x0: `[n, B, …]`, the prediction at each but the last.
    """

    times: Array
    x: Array
    x0: Array


@once(1)
def trace(
    denoise: Denoise, solver: Solver, path: Path, times: WalkTimes, keys: Keys, x: Samples
) -> Trace:
    """As `sample`, with all states from noise to data; it takes one more evaluation per step."""

    def body(state: tuple, i: Array) -> tuple[tuple, tuple[Array, Array]]:
        x, memory = state
        passed = x, last_step(denoise, solver, x, times[i])
        return solver.step(denoise, interval_of(path, times, i, keys), memory, x), passed

    number = len(times) - 1 - solver.finishes
    (end, _), (xs, x0s) = jax.lax.scan(body, (x, solver.init(x)), jnp.arange(number))
    if not solver.finishes:
        return Trace(times, jnp.concatenate([xs, end[None]]), x0s)
    last = last_step(denoise, solver, end, times[-2])
    return Trace(
        times, jnp.concatenate([xs, end[None], last[None]]), jnp.concatenate([x0s, last[None]])
    )


class State(NamedTuple):
    """One state of a walk from noise to data.

    Attributes:
        number: the number of steps before it, from 0; for the clean samples, the number of steps.
        t: the time; 0 for the clean samples.
        x: `[B, …]`, the state.
        x0: `[B, …]`, the data predicted from it; for the clean samples, `x` itself.
    """

    number: int
    t: float
    x: Array
    x0: Array


Around = Callable[[Solver], Solver]
"""Makes a solver from another one, such as `Partial(keep_known, image=image, mask=mask)`. Arrays in
a `jax.tree_util.Partial` are arguments of the compiled program, so new ones do not recompile."""


def start_walk(around: Around, *walk: Any) -> tuple[Samples, Any]:
    """The state before the first step, for `one_step`: the noise `[B, …]` and the solver's memory.

    Args:
        around: changes the solver.
        *walk: the arguments of `sample`; those of `predicted` and `one_step` are the same.
    """
    _, solver, *_, x = walk
    return x, around(solver).init(x)


def predicted(i: Array, state: tuple[Samples, Any], *walk: Any) -> Samples:
    """The data `[B, …]` predicted from the state before step i; at the last step, the samples."""
    denoise, solver, _, times, *_ = walk
    return last_step(denoise, solver, state[0], times[i])


def one_step(
    around: Around, i: Array, state: tuple[Samples, Any], *walk: Any
) -> tuple[Samples, Any]:
    """The state after step i of `sample`: `x` `[B, …]` and the solver's memory."""
    denoise, solver, path, times, keys, _ = walk
    x, memory = state
    return around(solver).step(denoise, interval_of(path, times, i, keys), memory, x)


@dataclass(frozen=True)
class Recipe:
    """How samples are drawn: everything but the seed.

    Attributes:
        solver: takes the steps.
        grid: the times.
        num_steps: the number of intervals of the grid; typically 10 to 50, and 1,000 for DDPM.
        guidance_scale: 1 is no guidance; typically 1.5 to 7.5.
        guidance: how the two predictions are combined.
        against: where the second prediction comes from.
        unit_start: whether sampling starts from noise of standard deviation 1, as in diffusers, and
            not from that of the path at `t_noise`, which is 0.998 in Stable Diffusion.
    """

    solver: Solver
    grid: Grid
    num_steps: NumSteps = 18
    guidance_scale: float = 1.0
    guidance: Rule = ClassifierFree()
    against: Against = NullCondition()
    unit_start: bool = False

    def times(self, path: Path) -> WalkTimes:
        """The times of the walk, ending in 0: those of the grid, along the solver's route."""
        return self.solver.route(path, self.grid(path, self.num_steps))

    @property
    def nfe(self) -> int | None:
        """Network evaluations per sample, with guidance; None where it depends on the model.

        Example:
            >>> from diffjax.sampling.grids import Power
            >>> from diffjax.sampling.solvers import heun
            >>> Recipe(heun(), Power(), num_steps=18, guidance_scale=2.0).nfe
            70
        """
        if self.solver.nfe is None:
            return None
        last = 1 if self.solver.finishes else self.solver.nfe
        return (self.solver.steps(self.num_steps - 1) * self.solver.nfe + last) * self.calls

    @property
    def calls(self) -> int:
        """Network evaluations for one prediction."""
        return 1 if self.guidance_scale == 1.0 else self.against.calls


def starting_noise(keys: Keys, shape: tuple[int, ...]) -> tuple[Samples, Keys]:
    """Standard normal noise `[B, *shape]`, and the keys `[B]` of the walk that starts from it.

    Noise i depends on `keys[i]` alone.
    """
    both = jax.vmap(jax.random.split)(keys)
    return normal(both[:, 0], shape), both[:, 1]


def draw(
    denoise: Denoise,
    solver: Solver,
    path: Path,
    times: WalkTimes,
    keys: Keys,
    shape: tuple[int, ...],
) -> Samples:
    """Draws one batch of samples, as `sample` does, from noise of `s(times[0])`.

    Sample i depends on `keys[i]` and on row i of the condition that the model is bound to alone.

    Args:
        denoise: the model, guided or not, with its condition (`with_condition`).
        solver: takes the steps.
        path: the path it was trained on.
        times: `[n+1]`, ending in 0, from a grid along the solver's route (`Recipe.times`).
        keys: `[B]`, one for each sample.
        shape: the shape of one sample, `(H, W, C)`.

    Returns:
        Clean samples, `[B, H, W, C]`.
    """
    noise, keys = starting_noise(keys, shape)
    return sample(denoise, solver, path, times, keys, path.sigma(times[0]) * noise)


def with_condition(predict: Predict, cond: Any) -> Denoise:
    """A model with its condition (B rows) bound, as solvers evaluate it: `(x[B, …], t[]) -> Pair`.

    If `predict` is a `jax.tree_util.Partial` of a function and its arrays, so is the result, and
    the walks of this module are compiled once for equal functions. With a closure they are traced
    at each call.

    Example:
        >>> from diffjax.oracle.analytic import Gaussian
        >>> from diffjax.process.paths import Linear
        >>> data = Gaussian(jnp.ones(1), jnp.eye(1))
        >>> denoise = with_condition(data.predict(Linear()), None)
        >>> jax.jit(denoise)(jnp.ones((3, 1)), jnp.array(0.5)).x0.shape
        (3, 1)
    """
    return Partial(_with_condition, predict, cond)


def _with_condition(predict: Predict, cond: Any, x: Array, t: Array) -> Pair:
    return predict(x, jnp.broadcast_to(t, (x.shape[0], *t.shape)), cond)
