"""Published paths beyond the three basic ones: sigmoid, sub-VP, variance exploding, EDM, VDM."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import NotNegative, Positive, UnitTime
from diffjax.process.paths import Scalar
from diffjax.shapes import AnyShape


@register_dataclass
@dataclass(frozen=True)
class Sigmoid:
    """`a² = (σ(end/τ) - σ(z))/(σ(end/τ) - σ(start/τ))` with `z = (start + t·(end - start))/τ`.

    Variance preserving. It ends short of pure noise, where the velocity of `a` would be infinite.
    Jabri et al. 2022 (arXiv:2212.11972); Chen 2023 (arXiv:2301.10972), algorithm 1.
    """

    start: Scalar = -3.0
    end: Scalar = 3.0
    tau: Positive[Scalar] = 1.0
    t_min: NotNegative[Scalar] = 1e-3
    t_noise: UnitTime[Scalar] = 0.999

    def alpha(self, t: AnyShape) -> AnyShape:
        return jnp.sqrt(self._rise(t, 1.0) / self._rise(0.0, 1.0))

    def sigma(self, t: AnyShape) -> AnyShape:
        return jnp.sqrt(self._rise(0.0, t) / self._rise(0.0, 1.0))

    def _rise(self, t_from: Scalar, t_to: Scalar) -> Array:
        """`σ(z(t_to)) - σ(z(t_from))`, by hyperbolic functions, which lose no digits."""
        low, high = (
            0.5 * (self.start + t * (self.end - self.start)) / self.tau for t in (t_from, t_to)
        )
        # Not high - low, whose rounding is as large as all of it where the times are near.
        rise = 0.5 * (t_to - t_from) * (self.end - self.start) / self.tau
        return jnp.sinh(rise) / (2.0 * jnp.cosh(low) * jnp.cosh(high))


@register_dataclass
@dataclass(frozen=True)
class SubVP:
    """`log a = -½ ∫₀ᵗ β`, `s = 1 - a²`: less noise than the variance-preserving path.

    Song et al. 2021 (arXiv:2011.13456), equation 29.
    """

    beta_min: NotNegative[Scalar] = 0.1
    beta_max: Positive[Scalar] = 20.0
    t_min: NotNegative[Scalar] = 1e-3
    t_noise: UnitTime[Scalar] = 1.0

    def alpha(self, t: AnyShape) -> AnyShape:
        return jnp.exp(self._log_alpha(t))

    def sigma(self, t: AnyShape) -> AnyShape:
        return -jnp.expm1(2.0 * self._log_alpha(t))

    def _log_alpha(self, t: Array) -> Array:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min


@register_dataclass
@dataclass(frozen=True)
class VarianceExploding:
    """`a = 1`, `s² = sigma_min²·((sigma_max/sigma_min)^{2t} - 1)`.

    The kernel of the SDE from exactly clean data; the paper leaves out the -1. Sampling starts
    from noise alone, so `sigma_max` has to be far above the data's spread. Song et al. 2021
    (arXiv:2011.13456), equations 29 and 30.
    """

    sigma_min: Positive[Scalar] = 0.01
    sigma_max: Positive[Scalar] = 50.0
    t_min: NotNegative[Scalar] = 1e-3
    t_noise: UnitTime[Scalar] = 1.0

    def alpha(self, t: AnyShape) -> AnyShape:
        return jnp.ones_like(t)

    def sigma(self, t: AnyShape) -> AnyShape:
        log_ratio = jnp.log(self.sigma_max) - jnp.log(self.sigma_min)
        return self.sigma_min * jnp.sqrt(jnp.expm1(2.0 * t * log_ratio))


@register_dataclass
@dataclass(frozen=True)
class EDM:
    """`a = 1`, `s = t`: time is the noise's standard deviation.

    Karras et al. 2022 (arXiv:2206.00364), table 1. Use it with `LogSNRLabel` and `UnitVariance`.
    """

    t_min: NotNegative[Scalar] = 0.002
    t_noise: Positive[Scalar] = 80.0

    def alpha(self, t: AnyShape) -> AnyShape:
        return jnp.ones_like(t)

    def sigma(self, t: AnyShape) -> AnyShape:
        return t


@register_dataclass
@dataclass(frozen=True)
class LinearLogSNR:
    """Variance preserving, log-SNR linear in time from `log_snr_max` at `t_min` to `log_snr_min`.

    `a² = sigmoid(λ)`. Below `t_min`, where no network is asked, `λ` goes on to infinity, so that
    data are clean at 0. VDM's schedule before it is learned: Kingma et al. 2021
    (arXiv:2107.00630), appendix H.
    """

    log_snr_max: Scalar = 13.3
    log_snr_min: Scalar = -5.0
    t_min: NotNegative[Scalar] = 1e-3
    t_noise: UnitTime[Scalar] = 1.0

    def alpha(self, t: AnyShape) -> AnyShape:
        return jnp.sqrt(jax.nn.sigmoid(self._log_snr(t)))

    def sigma(self, t: AnyShape) -> AnyShape:
        return jnp.sqrt(jax.nn.sigmoid(-self._log_snr(t)))

    def _log_snr(self, t: Array) -> Array:
        share = (t - self.t_min) / (self.t_noise - self.t_min)
        inside = self.log_snr_max + share * (self.log_snr_min - self.log_snr_max)
        below = self.log_snr_max + 2.0 * jnp.log(self.t_min / t)
        return jnp.where(t < self.t_min, below, inside)
