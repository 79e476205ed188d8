"""Rotary positions: rotated queries and keys (RoPE, Su et al. 2021, arXiv:2104.09864)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffjax.errors import UserError
from diffjax.shapes import Array, Queries


class Rotation(NamedTuple):
    """Cosines and sines of the angles of each token, `[T, d/2]` for heads of the width d."""

    cos: Float[Array, " tokens pairs"]
    sin: Float[Array, " tokens pairs"]


def rotation_2d(
    height: int, width: int, head_width: int, span: float = 0.0, before: int = 0
) -> Rotation:
    """The rotation of a grid of tokens: half of the pairs by the row, half by the column.

        angle = ω_i · position,     ω_i = 10000^(−i / n),  i = 0 … n−1,  n = d / 4

    Args:
        height: the number of rows of tokens.
        width: the number of columns of tokens.
        head_width: the width d of a head, a multiple of 4.
        span: positions along an axis are 0, 1, 2, …, or, if this is not 0, equally spaced from 0 to
            `span`, whatever the number of tokens; 16 in DDT.
        before: the number of tokens before those of the grid, which are not rotated.

    Raises:
        UserError: the width of a head is not a multiple of 4.

    Example:
        >>> rotation_2d(2, 3, 8, before=1).cos.shape
        (7, 4)
    """
    if head_width % 4:
        raise UserError(
            f"rotary: heads of the width {head_width}, which is no multiple of 4: change "
            "hidden_size or num_heads"
        )
    quarter = head_width // 4
    frequencies = 10_000.0 ** (-np.arange(quarter) / quarter)
    rows, columns = (
        np.linspace(0.0, span, count) if span else np.arange(count) for count in (height, width)
    )
    row, column = np.repeat(rows, width), np.tile(columns, height)
    angles = np.concatenate([at[:, None] * frequencies for at in (row, column)], axis=-1)
    angles = np.concatenate([np.zeros((before, 2 * quarter)), angles])
    return Rotation(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


def rotate(x: Queries, rotation: Rotation) -> Queries:
    """Rotates the pairs `(x[..., i], x[..., i + d/2])` of each token by its angles.

        y₁ = x₁ cos − x₂ sin        y₂ = x₂ cos + x₁ sin

    Products of a rotated query and a rotated key depend on the offset of their positions alone.

    Args:
        x: queries or keys `[B, T, heads, d]`.
        rotation: of T tokens.

    Example:
        >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
        >>> quarter_turn = Rotation(np.zeros((1, 1), "f"), np.ones((1, 1), "f"))
        >>> rotate(x, quarter_turn).ravel()
        Array([0., 1.], dtype=float32)
    """
    cos, sin = (jnp.asarray(part)[None, :, None] for part in rotation)
    one, two = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
    return turned.astype(x.dtype)
