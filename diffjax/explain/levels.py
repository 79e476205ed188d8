"""Training pictures at several noise levels, and what the network makes of each."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.compiling import jit
from diffjax.process.paths import Pair, Path, coeffs, mix
from diffjax.runs.samples.model import Model
from diffjax.sampling.grids import Grid

NUM_LEVELS = 1_000
SHOWN = (1, 50, 100, 175, 250, 350, 500, 600, 700, 800, 900, 1_000)
"""The levels of a page, of `NUM_LEVELS`."""


class Levels(NamedTuple):
    """Pictures at L noise levels, `x_t = a·x0 + s·eps`, each with the same noise at all of them.

    Attributes:
        numbers: `[L]`, from 1 (hardly any noise) to `NUM_LEVELS` (the noise that samples start at).
        t: `[L]`, their times on the run's path.
        a: `[L]`, the scale of the picture.
        s: `[L]`, the scale of the noise.
        noisy: `[L, n, h, w, c]`.
        guess: `[L, n, h, w, c]`, the clean pictures that the network predicts from them.
    """

    numbers: np.ndarray
    t: np.ndarray
    a: np.ndarray
    s: np.ndarray
    noisy: np.ndarray
    guess: np.ndarray


def times_of_levels(grid: Grid, path: Path) -> np.ndarray:
    """The times of the levels 0 (clean), 1, … `NUM_LEVELS`: those of the grid, backwards.

    So 1,000 steps of sampling pass each level once. `[NUM_LEVELS + 1]`.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> from diffjax.sampling.grids import Power
        >>> times = times_of_levels(Power(), Linear())
        >>> times.shape, float(times[0]), float(times[-1])
        ((1001,), 0.0, 1.0)
    """
    return np.asarray(grid(path, NUM_LEVELS))[::-1]


def level_of(t: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The numbers of the levels that are nearest to some times, at least 1.

    Example:
        >>> level_of(np.array([0.0, 0.26, 9.0]), np.linspace(0, 1, 1_001)).tolist()
        [1, 260, 1000]
    """
    return np.abs(np.asarray(t)[:, None] - times[None, 1:]).argmin(axis=1) + 1


def at_levels(
    model: Model, grid: Grid, images: np.ndarray, condition: Any, seed: int = 0
) -> Levels:
    """Adds noise of all levels in `SHOWN` to pictures, and predicts the clean pictures again.

    Args:
        model: the network.
        grid: the times of its sampling.
        images: `[n, h, w, c]`, clean, as the network has them.
        condition: n rows.
        seed: the seed of the noise.
    """
    path, n, numbers = model.wired.path, len(images), np.array(SHOWN)
    t = times_of_levels(grid, path)[numbers]
    noise = np.random.default_rng(seed).standard_normal(images.shape, np.float32)

    def noisy_and_guess(params: Any, images: Any, noise: Any, t: Any, cond: Any) -> Any:
        c = coeffs(path, t, images.ndim)
        x = mix(c, Pair(images, noise))
        return x, model.wired.predict(params)(x, t, cond).x0, jnp.ravel(c.a), jnp.ravel(c.s)

    def at_all(rows: Any) -> np.ndarray:
        return np.concatenate([np.asarray(rows)] * len(t))

    found = jit(noisy_and_guess, model.mesh)(
        model.params,
        at_all(images),
        at_all(noise),
        np.repeat(t, n),
        jax.tree.map(at_all, condition),
    )
    x, guess, a, s = (np.asarray(rows).reshape(len(t), n, *rows.shape[1:]) for rows in found)
    return Levels(numbers, t, a[:, 0], s[:, 0], x, guess)
