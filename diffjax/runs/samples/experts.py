"""Two models on one grid: the first takes the steps with much noise, the second the last ones.

An ensemble of expert denoisers (Balaji et al. 2022, arXiv:2211.01324), as SDXL and its refiner
(Podell et al. 2023, arXiv:2307.01952, section 2.5).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax import Array

from diffjax.errors import UserError
from diffjax.runs.samples.model import Model, Request
from diffjax.sampling.sample import Recipe, integrate, sample
from diffjax.shapes import WalkTimes


class Expert(NamedTuple):
    """A model and how it is sampled.

    Attributes:
        model: the network; both have one path and latents of one shape.
        recipe: solver and guidance. Grid and number of steps are those of the first model.
        request: as many samples as of the other one, with conditions of its own kind.
    """

    model: Model
    recipe: Recipe
    request: Request


def batches_of_two(
    first: Expert, second: Expert, share: float, batch_size: int
) -> Iterator[np.ndarray]:
    """Draws samples, batch by batch, each decoded by the codec of the first model.

    Args:
        first: begins with the noise of its request.
        second: goes on from there.
        share: the part of the path's time, in (0, 1), from which on the second model takes the
            steps; 0.2 in SDXL (`denoising_end=0.8` in diffusers).
        batch_size: samples at a time.

    Raises:
        UserError: the models have other paths or shapes, or one of them is left without a step.
    """
    path, other = first.model.wired.path, second.model.wired.path
    shapes = first.model.wired.image_shape, second.model.wired.image_shape
    if repr(path) != repr(other) or shapes[0] != shapes[1]:
        raise UserError(
            f"two models on one grid have one path and one size: these have {path} and {other}, "
            f"{shapes[0]} and {shapes[1]}"
        )
    early, late = divided(first.recipe.times(path), share * float(path.t_noise))
    for number in range(0, len(first.request), batch_size):
        rows = np.arange(number, min(number + batch_size, len(first.request)))
        x = first.model.walk(integrate, first.recipe, first.request.only(rows), early)
        latents = second.model.walk(sample, second.recipe, second.request.only(rows), late, x)
        yield first.model.decoded(np.asarray(latents))


def divided(times: WalkTimes, at: float) -> tuple[Array, Array]:
    """The times of a walk down to the first that is at most `at`, and those from there.

    Raises:
        UserError: one of both parts has no step.

    Example:
        >>> [part.tolist() for part in divided(np.array([1.0, 0.75, 0.5, 0.25, 0.0]), 0.5)]
        [[1.0, 0.75, 0.5], [0.5, 0.25, 0.0]]
    """
    count = int(np.sum(np.asarray(times) > at + 1e-6))
    if not 0 < count < len(times) - 1:
        raise UserError(
            f"of {len(times) - 1} steps none is left to the {'second' if count else 'first'} of "
            f"two models, which change at time {at:g}: take more steps or another share"
        )
    return times[: count + 1], times[count:]
