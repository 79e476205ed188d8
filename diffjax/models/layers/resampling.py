"""Halving and doubling of maps `[B, H, W, C]` by a separable filter, without parameters."""

from collections.abc import Iterable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffjax.errors import UserError

BOX = (1, 1)
"""The mean of two by two pixels, and each pixel twice by twice: DDPM, DDPM++ and ADM."""
SMOOTH = (1, 3, 3, 1)
"""A binomial filter of four pixels, of NCSN++: its frequencies fold back less."""


def check_filter(taps: Sequence[float]) -> None:
    """Refuses filters that would shift an image by half a pixel, or have no sum.

    Raises:
        UserError: the number of taps is odd, or their sum is 0.
    """
    if len(taps) % 2 or not sum(taps):
        raise UserError(f"a resampling filter has an even number of taps, as {BOX}; not {taps}")


def halved(x: jax.Array, taps: Sequence[float] = BOX, *, padded: bool = True) -> jax.Array:
    """The map at half the size: filtered, and every second pixel of it.

        y_i = Σ_k f_k x_{2i + k − p} / Σ_k f_k        p = (n − 1) // 2, along each axis

    Args:
        x: `[B, H, W, C]`; the sides are even, with `padded`.
        taps: the numbers f of the filter, an even number of them.
        padded: whether there are p pixels of zeros around the map; otherwise it has p pixels more
            on each side than it returns pixels for.

    Example:
        >>> halved(jnp.arange(4.0).reshape(1, 2, 2, 1)).ravel()
        Array([1.5], dtype=float32)
    """
    if tuple(taps) == BOX:
        return nn.avg_pool(x, (2, 2), (2, 2))
    pad = (len(taps) - 1) // 2
    for axis in (1, 2):
        size = x.shape[axis] if padded else x.shape[axis] - 2 * pad
        wide = _padded(x, axis, pad, pad) if padded else x
        x = _summed(
            jax.lax.slice_in_dim(wide, k, k + size - 1, 2, axis) * weight
            for k, weight in enumerate(_normalised(taps))
        )
    return x


def doubled(x: jax.Array, taps: Sequence[float] = BOX) -> jax.Array:
    """The map at twice the size: zeros between its pixels, then filtered; four times the transpose.

        y_{2i + k − p} = 2 Σ f_k x_i / Σ_k f_k        p = (n − 1) // 2, along each axis

    Example:
        >>> doubled(jnp.ones((1, 1, 1, 1)))[0, :, :, 0].tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """
    if tuple(taps) == BOX:
        return x.repeat(2, axis=1).repeat(2, axis=2)
    num, pad = len(taps), (len(taps) - 1) // 2
    for axis in (1, 2):
        size = 2 * x.shape[axis]
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        apart = jnp.stack([x, jnp.zeros_like(x)], axis=axis + 1).reshape(shape)
        wide = _padded(apart, axis, num - 1 - pad, pad)
        x = _summed(
            jax.lax.slice_in_dim(wide, num - 1 - k, num - 1 - k + size, 1, axis) * (2 * weight)
            for k, weight in enumerate(_normalised(taps))
        )
    return x


def _normalised(taps: Sequence[float]) -> list[float]:
    return [tap / sum(taps) for tap in taps]


def _padded(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    return jnp.pad(x, [(before, after) if i == axis else (0, 0) for i in range(x.ndim)])


def _summed(parts: Iterable[jax.Array]) -> jax.Array:
    total, *rest = parts
    for part in rest:
        total = total + part
    return total
