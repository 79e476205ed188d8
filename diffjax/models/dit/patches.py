"""Images as patches, and back; the fixed positions of patches."""

import numpy as np
from jaxtyping import Float

from diffjax.shapes import Array, Images


def patchify(x: Images, patch_size: int) -> Float[Array, " batch tokens numbers"]:
    """Splits images `[B,H,W,C]` into tokens `[B, (H/p)·(W/p), p·p·C]`, row by row.

    Example:
        >>> import jax.numpy as jnp
        >>> patchify(jnp.zeros((1, 8, 8, 3)), 2).shape
        (1, 16, 12)
    """
    batch, height, width, channels = x.shape
    p = patch_size
    x = x.reshape(batch, height // p, p, width // p, p, channels)
    return x.swapaxes(2, 3).reshape(batch, (height // p) * (width // p), p * p * channels)


def unpatchify(
    tokens: Float[Array, " batch tokens numbers"], patch_size: int, height: int, width: int
) -> Float[Array, " batch {height} {width} channels"]:
    """Joins tokens `[B, (H/p)·(W/p), p·p·C]` to images `[B,H,W,C]`: the inverse of `patchify`.

    Example:
        >>> import jax.numpy as jnp
        >>> unpatchify(jnp.zeros((1, 16, 12)), 2, height=8, width=8).shape
        (1, 8, 8, 3)
    """
    p = patch_size
    tokens = tokens.reshape(tokens.shape[0], height // p, width // p, p, p, -1)
    return tokens.swapaxes(2, 3).reshape(tokens.shape[0], height, width, -1)


def positions_2d(height: int, width: int, features: int, spacing: float = 1.0) -> np.ndarray:
    """Fixed sinusoidal position embeddings of a grid, one row per token, row by row.

        [sin(ω_i x), cos(ω_i x), sin(ω_i y), cos(ω_i y)]        ω_i = 10000^(−i / n),  n = D / 4

    with `x` the column and `y` the row of the token, counted from 0, times `spacing`.

    Args:
        height: the number of rows of tokens.
        width: the number of columns of tokens.
        features: the width D of a token, a multiple of 4.
        spacing: the distance of neighbours.

    Returns:
        `[height·width, features]` float32.

    Example:
        >>> positions_2d(1, 1, 8)
        array([[0., 0., 1., 1., 0., 0., 1., 1.]], dtype=float32)

    References:
        Peebles & Xie, "Scalable Diffusion Models with Transformers", 2022, arXiv:2212.09748
    """
    quarter = features // 4
    frequencies = 10_000.0 ** (-np.arange(quarter) / quarter)
    row, column = np.divmod(np.arange(height * width), width)
    places = spacing * column, spacing * row
    waves = [wave(at[:, None] * frequencies) for at in places for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=-1).astype(np.float32)
