"""A run's sampler as a function of arrays alone, which can leave the project."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.errors import UserError
from diffjax.host.processes import to_host
from diffjax.runs.generate import Weaker, sample_keys
from diffjax.runs.load import Run, weaker_models
from diffjax.sampling.export import check_size
from diffjax.sampling.guidance import guide
from diffjax.sampling.sample import Recipe, draw
from diffjax.wiring import Wired, check_recipe, wire


def portable_sampler(
    run: Run, recipe: Recipe, weights: str | None = None, *, noise: bool = False
) -> Callable[..., Array]:
    """`(seed, labels[b]) -> [b, H, W, C]`: what `run.sample` draws, with its weights inside.

    Args:
        run: a trained model; its network is asked with attention that runs on every platform.
        recipe: how to draw.
        weights: `live` or the name of an average; by default those of the config.
        noise: the first argument is standard normal noise `[b, H, W, C]`, and no seed.

    Returns:
        The function; for runs between two sets it takes a third argument, the sources.

    Raises:
        UserError: weights that are too large for a file; noise for a solver that adds more of it.
    """
    if noise and recipe.solver.fresh_noise:
        raise UserError(
            "this solver draws noise at every step: export it with a seed, or take a deterministic "
            "one, as --solver=heun"
        )
    setup = run.setup._replace(wired=portable(run.setup.wired, run))
    wired = setup.wired
    check_recipe(recipe, wired)
    # Weights on several devices would tie the program to as many.
    params = to_host(run.weights(weights))
    weaker = weaker_models(recipe, setup)(run.arrays)
    weak = None if weaker is None else to_host(weaker.params)
    check_size((params, weak))

    def sampler(start: Array, labels: Array, source: Array | None = None) -> Array:
        rows = jnp.arange(labels.shape[0])
        # Layers cast NumPy's arrays before they are traced, and the file would hold what they made.
        traced, other = jax.tree.map(jnp.asarray, (params, weak))
        against = None if weaker is None else weaker._replace(params=other)
        predict = _guided(wired, traced, recipe, source, against)
        return draw(
            predict,
            wired.path,
            recipe.solver,
            recipe.times(wired.path),
            sample_keys(0 if noise else start, rows),
            labels,
            wired.image_shape,
            start=lambda drawn: wired.objective.start(start if noise else drawn, source),
        )

    return sampler


def portable(wired: Wired, run: Run) -> Wired:
    """The same parts, with attention that XLA compiles for every platform."""
    config = run.config.copy_and_resolve_references()
    if "attention" not in config.model:
        return wired
    with config.unlocked():
        config.model.attention = "xla"
    return wire(config, wired.image_shape, wired.num_classes)


def _guided(
    wired: Wired, params: Any, recipe: Recipe, source: Array | None, weaker: Weaker | None
) -> Any:
    other = None if weaker is None else weaker.model(weaker.params, source)
    scale = None if recipe.calls == 1 else jnp.float32(recipe.guidance_scale)
    models = wired.models(params, source, other)
    return guide(models, wired.path, recipe.guidance, scale, recipe.against)
