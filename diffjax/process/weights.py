"""How much an error counts at each noise level.

A weight multiplies the squared error in the target's own space. One factor carries it to another
space: an error `e` of the prediction is an error `(s/D)·e` of x0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.process.paths import Coeffs, Scalar
from diffjax.process.targets import Mix, determinant

Weight = Callable[[Coeffs, Mix], Array]


def x0_factor(c: Coeffs, k: Mix) -> Array:
    """`(s/D)²`: squared error in x0 per squared error of the prediction."""
    return jnp.square(c.s / determinant(c, k))


@register_dataclass
@dataclass(frozen=True)
class Constant:
    """1 in the target's own space: the plain loss of each paper."""

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return jnp.ones_like(c.t)


@register_dataclass
@dataclass(frozen=True)
class MinSNR:
    """`min(SNR, γ)` in the space of x0, whatever the target.

    For noise prediction that is `min(SNR, γ)/SNR`, for v on a variance-preserving path
    `min(SNR, γ)/(SNR + 1)`. Hang et al. 2023 (arXiv:2303.09556).
    """

    gamma: Scalar = 5.0

    def __call__(self, c: Coeffs, k: Mix) -> Array:
        return jnp.minimum(jnp.square(c.a / c.s), self.gamma) * x0_factor(c, k)
