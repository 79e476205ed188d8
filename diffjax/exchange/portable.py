"""A run's sampler as a function of arrays alone, which can leave the project."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.errors import UserError
from diffjax.host.processes import to_host
from diffjax.runs.load import Run
from diffjax.runs.samples.model import Model, Programs, sample_keys
from diffjax.runs.samples.model import start as walk_start
from diffjax.sampling.export import check_export_size
from diffjax.sampling.sample import Recipe, sample, starting_noise, with_condition
from diffjax.wiring import Wired, check_recipe, wire


def portable_model(run: Run, weights: str | None = None) -> Model:
    """A run's model with attention that runs on every platform, and its weights on the host.

    Weights on several devices would tie a program to as many.

    Args:
        run: a trained model.
        weights: `live` or the name of an average; by default those of the config.
    """
    programs = Programs(_portable(run), run.parts.mesh, run.parts.codec)
    find = cache(lambda name: portable_model(*run.called(name)))
    return Model(programs, to_host(run.weights(weights)), find)


def portable_sampler(model: Model, recipe: Recipe, *, noise: bool = False) -> Callable[..., Array]:
    """`(seed, condition of b rows) -> [b, H, W, C]`: what `run.sample` draws, weights inside.

    The codec is inside too.

    Args:
        model: a `portable_model`.
        recipe: how to draw.
        noise: the first argument is standard normal noise of the latents' shape, and no seed.

    Returns:
        The function; for runs between two sets it takes a third argument, the source images.

    Raises:
        UserError: weights that are too large for a file; noise for a solver that adds more of it.
    """
    if noise and recipe.solver.fresh_noise:
        raise UserError(
            "this solver draws noise at every step: export it with a seed, or take a deterministic "
            "one, as --solver=heun"
        )
    wired, weaker = model.wired, model.weaker(recipe)
    check_recipe(recipe, wired)
    codec, times = model.codec, recipe.times(wired.path)
    check_export_size(
        [codec.params, *(each.params for each in (model, weaker) if each is not None)]
    )

    def sampler(start: Array, cond: Any, source: Array | None = None) -> Array:
        # Layers cast NumPy's arrays before they are traced, and the file would hold what they made.
        params = jax.tree.map(jnp.asarray, codec.params)
        if source is not None:
            source = codec.encode(params, source)
        predict = model.map(jnp.asarray).guided(recipe, source)
        rows = jnp.arange(jax.tree.leaves(cond)[0].shape[0])
        drawn, keys = starting_noise(sample_keys(0 if noise else start, rows), wired.image_shape)
        x = walk_start(wired.objective, recipe, start if noise else drawn, source)
        walk = (recipe.solver, wired.path, times, keys, x)
        return codec.decode(params, sample(with_condition(predict, cond), *walk))

    return sampler


def _portable(run: Run) -> Wired:
    """The parts of a run on no mesh, with attention that XLA compiles for every platform."""
    wired, config = run.parts.wired, run.config.copy_and_resolve_references()
    if "attention" not in config.model:
        return run.parts.programs.unplaced.wired
    with config.unlocked():
        config.model.attention = "xla"
    return wire(config, wired.image_shape, wired.condition)
