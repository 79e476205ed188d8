"""The networks of DINOv2: vision transformers with layer scale and optional registers."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.models.vit import ViT

PATCH = 14
GRID = 37
"""Patches per side in the last part of training, at 518 pixels: so many positions are learned."""


def dinov2(
    width: int,
    depth: int,
    num_heads: int,
    num_registers: int = 0,
    grid: int = GRID,
    affine_end: bool = True,
) -> ViT:
    """A network of DINOv2; its first token is what distances of images are measured on.

    Args:
        width: the width of a token.
        depth: the number of blocks.
        num_heads: the number of attention heads.
        num_registers: the number of registers, 0 or 4.
        grid: the number of patches per side for which there are positions.
        affine_end: whether the last normalisation has a scale and a bias, as in the published ones.
    """
    return ViT(
        width,
        depth,
        num_heads,
        grid,
        PATCH,
        num_registers=num_registers,
        layer_scale=True,
        resize_positions=partial(resize_positions, like_registers=num_registers > 0),
        affine_end=affine_end,
    )


def resize_positions(positions: jax.Array, size: int, *, like_registers: bool) -> jax.Array:
    """Resizes position embeddings to another number of patches, as in the authors' code.

    They were trained on 37x37 patches, and 224 pixels have 16x16. Networks with registers use
    bicubic interpolation with antialiasing (a = -1/2) of the whole grid. Networks without registers
    use bicubic interpolation without antialiasing (a = -3/4), in steps of 37/16.1 instead of 37/16,
    as in the first release. A grid of the right size is not changed.

    Args:
        positions: `[G, G, D]`.
        size: patches per side of the result.
        like_registers: whether to interpolate as in networks with registers.

    Returns:
        `[size, size, D]`.
    """
    grid = len(positions)
    if grid == size:
        return positions
    if like_registers:
        return jax.image.resize(positions, (size, size, positions.shape[-1]), "cubic")
    weights = jnp.asarray(cubic_weights(grid, size, step=grid / (size + 0.1)), jnp.float32)
    return jnp.einsum("ih,jw,hwd->ijd", weights, weights, positions)


def cubic_weights(size: int, new_size: int, step: float) -> np.ndarray:
    """`[new_size, size]`: Keys' cubic with a = -3/4 at `step (i + 1/2) - 1/2`, edges repeated."""
    a = -0.75
    weights = np.zeros((new_size, size))
    for i in range(new_size):
        centre = step * (i + 0.5) - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - j)
            near = ((a + 2) * d - (a + 3)) * d**2 + 1
            far = a * (((d - 5) * d + 8) * d - 4)
            weights[i, min(max(j, 0), size - 1)] += near if d <= 1 else far
    return weights
