"""The way from noise to pictures, in many steps and in one."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from diffjax import lookup
from diffjax.errors import UserError
from diffjax.process.paths import Path
from diffjax.process.precond import Meaning
from diffjax.runs.samples.model import Model, Request
from diffjax.sampling.sample import Recipe, interval_of, last_step, padded
from diffjax.sampling.solvers import Denoise, Solver
from diffjax.shapes import Keys, Samples, WalkTimes
from diffjax.wiring import check_recipe

FRAMES = 24


class WayBack(NamedTuple):
    """States of a walk at F of its n steps, and the end of a walk from the same noise in one step.

    Attributes:
        num_steps: n.
        steps: `[F]`, the number of steps made before each frame; the last is n − 1.
        t: `[F]`, the time of each.
        x: `[F, B, h, w, c]`, the states.
        x0: `[F, B, h, w, c]`, the clean pictures predicted from them; the last are the samples.
        in_one: `[B, h, w, c]`, the samples of one step.
    """

    num_steps: int
    steps: np.ndarray
    t: np.ndarray
    x: np.ndarray
    x0: np.ndarray
    in_one: np.ndarray


def step_recipe(model: Model, recipe: Recipe, num_steps: int) -> Recipe:
    """A recipe of so many steps without guidance, with one evaluation a step where that suits.

    Raises:
        UserError: the model can't be sampled with it.
    """
    meaning = model.wired.objective.traits.meaning
    solver = recipe.solver
    if meaning is Meaning.POSTERIOR_MEAN:
        solver = lookup.solver_called("ddim")
    found = replace(recipe, solver=solver, num_steps=num_steps, guidance_scale=1.0)
    check_recipe(found, model.wired)
    return found


def way_back(model: Model, recipe: Recipe, condition: Any, num_steps: int, seed: int) -> WayBack:
    """Samples in `num_steps` steps and in one, by one compiled program.

    Args:
        model: the network.
        recipe: the recipe of the run; its grid is kept.
        condition: the condition of the samples.
        num_steps: the number of steps of the long walk.
        seed: the seed of the noise.

    Raises:
        UserError: a solver that does not end in the prediction; the model can't be sampled so.
    """
    request = Request(condition, seed)

    def walked(steps: int) -> tuple[np.ndarray, np.ndarray, Any]:
        own = step_recipe(model, recipe, steps)
        times = np.asarray(own.times(model.wired.path))
        last = len(times) - 2
        if not own.solver.finishes:
            raise UserError("the way back needs a solver whose last step is the prediction")
        marks = np.rint(np.linspace(0, last, FRAMES)).astype(np.int32)
        longest = padded(jnp.zeros(num_steps + 1)).shape[0]
        filled = jnp.pad(times, (0, longest - len(times)))
        return marks, times[marks], model.walk(Partial(_frames, marks), own, request, filled)

    marks, t, (x, x0) = walked(num_steps)
    *_, (_, in_one) = walked(1)
    return WayBack(num_steps, marks, t, x, x0, in_one[-1])


def _frames(
    marks: Array,
    denoise: Denoise,
    solver: Solver,
    path: Path,
    times: WalkTimes,
    keys: Keys,
    x: Samples,
) -> tuple[Array, Array]:
    """The states after `marks[F]` steps, which do not decrease, and the predictions at them."""

    def one(i: Array, state: tuple) -> tuple:
        return solver.step(denoise, interval_of(path, times, i, keys), state[1], state[0])

    def to_mark(state: tuple, ends: tuple[Array, Array]) -> tuple[tuple, tuple[Array, Array]]:
        begin, end = ends
        state = jax.lax.fori_loop(begin, end, one, state)
        return state, (state[0], last_step(denoise, solver, state[0], times[end]))

    begins = jnp.concatenate([jnp.zeros(1, marks.dtype), marks[:-1]])
    return jax.lax.scan(to_mark, (x, solver.init(x)), (begins, marks))[1]
