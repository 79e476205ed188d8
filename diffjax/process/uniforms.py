"""Uniform random numbers for the times of a batch: independent, or spread over [0, 1).

Each number by itself is uniform in all of these, so none changes the expected loss. All but
`Independent` spread the numbers of a batch over the noise levels, which lowers the variance of the
batch's mean loss.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass
from jaxtyping import Float

from diffjax.shapes import Array, OneKey

Uniforms = Callable[[Array, int], Array]
"""`(key, n) -> u[n]` in [0, 1), in no particular order."""


@register_dataclass
@dataclass(frozen=True)
class Independent:
    """Independent uniform numbers, `u_i ~ U[0, 1)`."""

    def __call__(self, key: OneKey, n: int) -> Float[Array, " {n}"]:
        return jax.random.uniform(key, (n,))


@register_dataclass
@dataclass(frozen=True)
class Stratified:
    """Stratified sampling: `u_i = (i + r_i)/n` with independent `r_i ~ U[0, 1)`, in random order.

    Example:
        >>> u = Stratified()(jax.random.key(0), 4)
        >>> jnp.sort(jnp.floor(4 * u)).tolist()
        [0.0, 1.0, 2.0, 3.0]
    """

    def __call__(self, key: OneKey, n: int) -> Float[Array, " {n}"]:
        inner, order = jax.random.split(key)
        u = (jnp.arange(n, dtype=float) + jax.random.uniform(inner, (n,))) / n
        return _below_one(jax.random.permutation(order, u))


@register_dataclass
@dataclass(frozen=True)
class LowDiscrepancy:
    """Equally spaced numbers with one random offset: `u_i = (i + r)/n` with `r ~ U[0, 1)`.

    In random order. Kingma et al. 2021 (arXiv:2107.00630), appendix I.1.
    """

    def __call__(self, key: OneKey, n: int) -> Float[Array, " {n}"]:
        inner, order = jax.random.split(key)
        u = (jnp.arange(n, dtype=float) + jax.random.uniform(inner)) / n
        return _below_one(jax.random.permutation(order, u))


@register_dataclass
@dataclass(frozen=True)
class Antithetic:
    """Antithetic pairs `u` and `1 - u`; if `n` is odd, the last number has no partner."""

    def __call__(self, key: OneKey, n: int) -> Float[Array, " {n}"]:
        half = jax.random.uniform(key, ((n + 1) // 2,))
        return _below_one(jnp.stack([half, 1.0 - half], axis=1).ravel()[:n])


def _below_one(u: Array) -> Array:
    """Rounding may reach 1, which the interval excludes."""
    return jnp.minimum(u, 1.0 - jnp.finfo(u.dtype).epsneg)
