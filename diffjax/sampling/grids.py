"""The times at which a solver stops on its way from noise to data."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.process.paths import Path, Scalar, log_snr, time_of_log_snr

Grid = Callable[[Path, int], Array]
"""`(path, n) -> t[n+1]`, falling from `t_noise` to exactly 0; all but the last at least `t_min`."""


@register_dataclass
@dataclass(frozen=True)
class Power:
    """`t_i = t_noise·(1 - i/n)^exponent`: 1 is uniform in time, 2 quadratic.

    Larger exponents spend more steps near the data. Song et al. 2021 (arXiv:2010.02502),
    appendix D.2, has both.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> Power()(Linear(), 4).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    exponent: Scalar = 1.0

    def __call__(self, path: Path, n: int) -> Array:
        u = (1.0 - jnp.arange(n) / n) ** self.exponent
        return _end_clean(path, path.t_noise * u)


@register_dataclass
@dataclass(frozen=True)
class UniformLogSNR:
    """Equal steps in log-SNR from `t_noise` to `t_min`, then one to clean data.

    Where the path ends in pure noise (log-SNR of minus infinity), the first step goes to
    `lowest`. Lu et al. 2022 (arXiv:2206.00927), section 5.1.
    """

    lowest: Scalar = -14.0

    def __call__(self, path: Path, n: int) -> Array:
        first = jnp.maximum(log_snr(path, jnp.asarray(path.t_noise)), self.lowest)
        last = log_snr(path, jnp.asarray(path.t_min))
        inner = time_of_log_snr(path, jnp.linspace(first, last, n))
        return _end_clean(path, inner.at[0].set(path.t_noise))


@register_dataclass
@dataclass(frozen=True)
class Karras:
    """Equal steps in `σ^(1/rho)`, where `σ = s/a` is the noise per unit of signal; then clean data.

    `σ_i = (σ_0^(1/ρ) + i/(n-1)·(σ_(n-1)^(1/ρ) - σ_0^(1/ρ)))^ρ` from `t_noise` to `t_min`. Where the
    path ends in pure noise (σ infinite), the first step goes on from `highest`. Karras et al. 2022
    (arXiv:2206.00364), equation 5.

    Example:
        >>> from diffjax.process.schedules import EDM
        >>> Karras()(EDM(), 4).round(3).tolist()
        [80.0, 9.723, 0.47, 0.002, 0.0]
    """

    rho: Scalar = 7.0
    highest: Scalar = 80.0

    def __call__(self, path: Path, n: int) -> Array:
        ends = log_snr(path, jnp.stack([jnp.asarray(path.t_noise), jnp.asarray(path.t_min)]))
        first, last = jnp.minimum(jnp.exp(-0.5 * ends), self.highest) ** (1.0 / self.rho)
        sigma = jnp.linspace(first, last, n) ** self.rho
        inner = time_of_log_snr(path, -2.0 * jnp.log(sigma))
        return _end_clean(path, inner.at[0].set(path.t_noise))


def _end_clean(path: Path, times: Array) -> Array:
    return jnp.append(jnp.maximum(times, path.t_min), 0.0)
