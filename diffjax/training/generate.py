"""Many samples from one model, batch by batch over the mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from diffjax.process.precond import denoiser
from diffjax.sampling.sample import Recipe, draw
from diffjax.sampling.solvers import Solver
from diffjax.training.sharding import batch_sharding, replicated
from diffjax.wiring import Wired, check_guidance

Generate = Callable[[Any, Recipe, np.ndarray, int], np.ndarray]
"""`(params, recipe, labels[n], seed) -> images[n, H, W, C]`."""


def make_generator(
    wired: Wired,
    mesh: Mesh,
    *,
    batch_size: int,
) -> Generate:
    """A function that draws any number of samples.

    Sample i depends on the seed, on i and on its label, not on the batch or the mesh. Another
    number of samples, seed or guidance scale does not recompile.

    Args:
        wired: the model.
        mesh: the devices.
        batch_size: samples at a time; rounded up to what the mesh divides.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-batch_size // rows) * rows

    @partial(jax.jit, static_argnames="solver", out_shardings=replicated(mesh))
    def draw_batch(
        params: Any, times: Array, keys: Array, labels: Array, scale: Array | None, solver: Solver
    ) -> Array:
        predict = denoiser(wired.apply, params, wired.path, wired.precond)
        return draw(
            predict,
            wired.path,
            solver,
            times,
            keys,
            labels,
            wired.image_shape,
            guidance_scale=scale,
            null_label=wired.num_classes,
        )

    def generate(params: Any, recipe: Recipe, labels: np.ndarray, seed: int) -> np.ndarray:
        check_guidance(recipe.guidance_scale, wired)
        scale = None if recipe.guidance_scale == 1.0 else jnp.float32(recipe.guidance_scale)
        times = recipe.grid(wired.path, recipe.num_steps)
        root = jax.random.key(seed)
        place = batch_sharding(mesh)
        images = []
        for start in range(0, len(labels), batch_size):
            # The last batch is filled up, so that every batch has the shape that was compiled.
            rows_here = np.arange(start, start + batch_size)
            keys = jax.vmap(partial(jax.random.fold_in, root))(rows_here)
            padded = np.asarray(labels)[np.minimum(rows_here, len(labels) - 1)]
            arguments = [
                jax.device_put(argument, place) for argument in (keys, padded.astype(np.int32))
            ]
            batch = draw_batch(params, times, *arguments, scale, solver=recipe.solver)
            images.append(np.asarray(batch)[: len(labels) - start])
        return np.concatenate(images) if images else np.zeros((0, *wired.image_shape), np.float32)

    return generate


def balanced_labels(n: int, num_classes: int) -> np.ndarray:
    """`0, 1, …, num_classes - 1, 0, …`, `[n]`; all 0 for an unconditional model.

    Example:
        >>> balanced_labels(5, 3).tolist()
        [0, 1, 2, 0, 1]
    """
    return np.arange(n, dtype=np.int32) % max(num_classes, 1)
