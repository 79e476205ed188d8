"""Further published paths: sigmoid, sub-VP, variance exploding, EDM and VDM's linear log-SNR.

In all of them `t_min` is the smallest time at which the network is evaluated, and `t_noise` the
largest, where sampling starts (`diffjax.process.paths`).
"""

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
    """The sigmoid path, which preserves variance: `a²` falls as a sigmoid of time.

        a² = (σ(end/τ) - σ(z))/(σ(end/τ) - σ(start/τ)),    z = (start + t·(end - start))/τ

    where `σ` is the logistic sigmoid. Jabri et al. 2022 (arXiv:2212.11972); Chen 2023
    (arXiv:2301.10972), algorithm 1.

    Attributes:
        start: the sigmoid's argument at the clean end, times `τ`. Algorithm 1 has -3.
        end: its argument at the noisy end, times `τ`. Algorithm 1 has 3.
        tau: `τ`, the temperature; smaller values make the sigmoid steeper. Algorithm 1 has 1.
        t_min: the smallest time at which the network is evaluated.
        t_noise: where sampling starts; below 1, where the derivative of `a` would be infinite.
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
        """`σ(z(t_to)) - σ(z(t_from))`, by hyperbolic functions, without loss of digits."""
        low, high = (
            0.5 * (self.start + t * (self.end - self.start)) / self.tau for t in (t_from, t_to)
        )
        # Not high - low, whose rounding error is as large as itself where the times are near.
        rise = 0.5 * (t_to - t_from) * (self.end - self.start) / self.tau
        return jnp.sinh(rise) / (2.0 * jnp.cosh(low) * jnp.cosh(high))


@register_dataclass
@dataclass(frozen=True)
class SubVP:
    """The sub-VP path: the signal of the variance-preserving path, with less noise.

        log a(t) = -½ ∫₀ᵗ β(τ) dτ,    s = 1 - a²,    β(t) = beta_min + t·(beta_max - beta_min)

    Song et al. 2021 (arXiv:2011.13456), equation 29.

    Attributes:
        beta_min: the rate of noise at `t = 0`; 0.1 in the paper.
        beta_max: the rate of noise at `t = 1`; 20 in the paper.
        t_min: the smallest time at which the network is evaluated.
        t_noise: where sampling starts.
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
    """The variance-exploding path: `a = 1`, `s² = sigma_min²·((sigma_max/sigma_min)^{2t} - 1)`.

    This is the transition kernel of the SDE from exactly clean data; the paper leaves out the -1.
    Song et al. 2021 (arXiv:2011.13456), equations 29 and 30.

    Attributes:
        sigma_min: the smallest noise level of the paper's schedule; 0.01 in the paper. It sets the
            spacing of noise levels: `s` is about `sigma_min·√(2t·log(sigma_max/sigma_min))` near 0.
        sigma_max: the noise's standard deviation at `t = 1`. Sampling starts from noise alone, so
            it has to be far above the data's spread: the paper has the largest distance of two
            training images, 50 for CIFAR-10 with pixels in [0, 1].
        t_min: the smallest time at which the network is evaluated.
        t_noise: where sampling starts.
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
    """EDM's path: `a = 1`, `s = t`, so time is the standard deviation of the noise.

    Use it with the noise label `LogSNRLabel` and the input scale `UnitVariance`. Karras et al. 2022
    (arXiv:2206.00364), table 1.

    Attributes:
        t_min: the smallest noise level; 0.002 in the paper.
        t_noise: the largest noise level, where sampling starts; 80 in the paper, for images in
            [-1, 1].
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
    """VDM's initial path, which preserves variance: log-SNR is linear in time.

        λ(t) = log_snr_max + (log_snr_min - log_snr_max)·(t - t_min)/(t_noise - t_min)
        a² = sigmoid(λ),    s² = sigmoid(-λ)

    Below `t_min`, where no network is evaluated, `λ` increases to infinity, so that data are clean
    at `t = 0`. Kingma et al. 2021 (arXiv:2107.00630), appendix H.

    Attributes:
        log_snr_max: log-SNR at `t_min`; 13.3 in the paper, where the noise is 0.0013 of the signal.
        log_snr_min: log-SNR at `t_noise`; -5 in the paper, where the signal is 0.08 of the noise.
        t_min: the smallest time at which the network is evaluated.
        t_noise: where sampling starts.
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
