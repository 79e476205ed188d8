"""Features of places in an image from a small network that is drawn, for REPA."""

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.evaluation.extractors.features import Extractor


def patches(rows: int = 2, columns: int = 2, numbers: int = 5) -> Extractor:
    """A random layer over equal patches, with the interface of `dinov2_patches`."""

    @jax.jit
    def apply(images):
        batch, height, width, channels = images.shape
        parts = images.reshape(batch, rows, height // rows, columns, width // columns, channels)
        flat = parts.swapaxes(2, 3).reshape(batch, rows, columns, -1)
        drawn = np.random.default_rng(0).normal(size=(flat.shape[-1], numbers))
        return jnp.tanh(flat @ jnp.asarray(drawn, jnp.float32)), None

    return Extractor(f"patches:{rows}x{columns}x{numbers}", "0" * 64, None, apply)
