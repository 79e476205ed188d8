"""At which noise levels training spends its examples.

Each density is given on the unit interval and mapped onto `[t_min, t_noise]` of the path.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.process.paths import Path, Scalar


class Times(Protocol):
    """A density over the times of a path."""

    def __call__(self, key: Array, n: int, path: Path) -> Array:
        """Draws `t[n]` in `[t_min, t_noise]`."""
        ...

    def log_density(self, t: Array, path: Path) -> Array:
        """Log of the density with respect to `t`, of the shape of `t`."""
        ...


@register_dataclass
@dataclass(frozen=True)
class Uniform:
    """Every time alike.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> t = Uniform()(jax.random.key(0), 4, Linear())
        >>> t.shape
        (4,)
    """

    def __call__(self, key: Array, n: int, path: Path) -> Array:
        return _from_unit(jax.random.uniform(key, (n,)), path)

    def log_density(self, t: Array, path: Path) -> Array:
        return jnp.full(jnp.shape(t), -jnp.log(_span(path)))


@register_dataclass
@dataclass(frozen=True)
class LogitNormal:
    """`logit(u) ~ N(mean, std²)`: most examples at middling noise.

    A positive mean leans towards noise. Esser et al. 2024 (arXiv:2403.03206), section 3.1.
    """

    mean: Scalar = 0.0
    std: Scalar = 1.0

    def __call__(self, key: Array, n: int, path: Path) -> Array:
        return _from_unit(jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (n,))), path)

    def log_density(self, t: Array, path: Path) -> Array:
        u = (t - path.t_min) / _span(path)
        logit = jnp.log(u) - jnp.log1p(-u)
        normal = jax.scipy.stats.norm.logpdf(logit, self.mean, self.std)
        return normal - jnp.log(u) - jnp.log1p(-u) - jnp.log(_span(path))


def _span(path: Path) -> Scalar:
    return path.t_noise - path.t_min


def _from_unit(u: Array, path: Path) -> Array:
    return path.t_min + u * _span(path)
