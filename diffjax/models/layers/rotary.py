"""Rotary positions: rotated queries and keys (RoPE, Su et al. 2021, arXiv:2104.09864)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffjax.errors import UserError
from diffjax.shapes import Queries


class Rotation(NamedTuple):
    """Cosines and sines of the angles of each token, `[T, d/2]` for heads of the width d."""

    cos: np.ndarray
    sin: np.ndarray


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
    rows, columns = (
        np.linspace(0.0, span, count) if span else np.arange(count) for count in (height, width)
    )
    grid = np.stack([np.repeat(rows, width), np.tile(columns, height)], axis=-1)
    positions = np.concatenate([np.zeros((before, 2)), grid])
    return rotation_of(positions, (head_width // 2, head_width // 2))


def rotation_of(
    positions: np.ndarray, widths: Sequence[int], max_period: float = 10_000.0
) -> Rotation:
    """The rotation of tokens with positions along several axes, each for a part of the pairs.

        angle = ω_i · position,     ω_i = max_period^(−i / n),  i = 0 … n−1,  n = width / 2

    Args:
        positions: `[T, axes]`.
        widths: the part of a head for each axis, an even number; their sum is the width of a head.
        max_period: the longest period, over 2π; 10,000 is usual, and 2,000 in Flux.2.

    Raises:
        UserError: a width is odd.

    Example:
        >>> rotation_of(np.zeros((5, 3)), (2, 4, 4)).cos.shape
        (5, 5)
    """
    if any(width % 2 for width in widths):
        raise UserError(f"rotary: widths {tuple(widths)} of the axes have to be even")
    angles = [
        at[:, None] * max_period ** (-np.arange(width // 2) / (width // 2))
        for at, width in zip(positions.T, widths, strict=True)
    ]
    both = np.concatenate(angles, axis=-1)
    return Rotation(np.cos(both).astype(np.float32), np.sin(both).astype(np.float32))


def rotate(x: Queries, rotation: Rotation) -> Queries:
    """Rotates the pairs `(x[..., i], x[..., i + d/2])` of each token by its angles.

        y₁ = x₁ cos − x₂ sin        y₂ = x₂ cos + x₁ sin

    Products of a rotated query and a rotated key depend on the offset of their positions alone.

    Args:
        x: queries or keys `[B, T, heads, d]`.
        rotation: the rotation of T tokens.

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
