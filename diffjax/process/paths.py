"""Paths from data to noise: `x_t = a(t)·x0 + s(t)·eps` with `eps ~ N(0, I)`.

Time increases from clean to noisy. At `t = 0` every path is exactly clean (`a = 1`, `s = 0`).
Samplers end there, but no network is evaluated there: networks are trained and evaluated on
`[t_min, t_noise]`, and sampling starts from noise at `t_noise`. Each path keeps the time of its
paper; two paths are compared by log-SNR, `λ = log(a²/s²)`.

Every path has the two fields

    t_min    the smallest time at which the network is evaluated, above 0 because s(0) = 0 would be
             a divisor; typically 1e-3 where time runs from 0 to 1
    t_noise  the largest time, where sampling starts from s(t_noise)·N(0, I); 1, or a little less
             where a target can't be decoded without any signal
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial, register_dataclass

from diffjax.kinds import NotNegative, Positive, UnitTime
from diffjax.process.bisection import bisect
from diffjax.shapes import AnyShape, PerSample, Samples

Scalar = float | Array


@runtime_checkable
class Path(Protocol):
    """A path from data to noise: any object with these two times and two functions."""

    @property
    def t_min(self) -> Scalar:
        """The smallest time at which the network is evaluated; above 0, where `s` is 0."""
        ...

    @property
    def t_noise(self) -> Scalar:
        """The largest time, where sampling starts."""
        ...

    def alpha(self, t: AnyShape) -> AnyShape:
        """The scale of the signal, `a(t)`, of the shape of `t`, with `a(0) = 1`."""
        ...

    def sigma(self, t: AnyShape) -> AnyShape:
        """The scale of the noise, `s(t)`, of the shape of `t`, with `s(0) = 0`."""
        ...


@register_dataclass
@dataclass(frozen=True)
class Linear:
    """The straight path of flow matching: `a = 1 - t`, `s = t`.

    Lipman et al. 2023 (arXiv:2210.02747) and Liu et al. 2023 (arXiv:2209.03003). Their time runs
    from noise to data; here it runs from data to noise.

    Attributes:
        t_min: the smallest time at which the network is evaluated.
        t_noise: where sampling starts. At 1 no signal is left, so a network that predicts the noise
            can't be used: predict the velocity, v or x0 instead, or end at 0.999.
    """

    t_min: NotNegative[Scalar] = 1e-3
    t_noise: UnitTime[Scalar] = 1.0

    def alpha(self, t: AnyShape) -> AnyShape:
        return 1.0 - t

    def sigma(self, t: AnyShape) -> AnyShape:
        return t


@register_dataclass
@dataclass(frozen=True)
class Cosine:
    """The cosine path, which preserves variance: `a = cos(πt/2)`, `s = sin(πt/2)`.

    Albergo & Vanden-Eijnden 2023 (arXiv:2209.15571). It is near the cosine schedule of Nichol &
    Dhariwal 2021 (arXiv:2102.09672), without its offset of 0.008.

    Attributes:
        t_min: the smallest time at which the network is evaluated.
        t_noise: where sampling starts. At the default some signal is left (`a(0.999) = 0.0016`), so
            that x0 can be decoded from a predicted noise. With 1, predict the velocity, v or x0.
    """

    t_min: NotNegative[Scalar] = 1e-3
    t_noise: UnitTime[Scalar] = 0.999

    def alpha(self, t: AnyShape) -> AnyShape:
        return jnp.cos(0.5 * jnp.pi * t)

    def sigma(self, t: AnyShape) -> AnyShape:
        return jnp.sin(0.5 * jnp.pi * t)


@register_dataclass
@dataclass(frozen=True)
class LinearBeta:
    """DDPM's variance-preserving path in continuous time (the VP SDE).

        log a(t) = -½ ∫₀ᵗ β(τ) dτ,    s² = 1 - a²,    β(t) = beta_min + t·(beta_max - beta_min)

    Ho et al. 2020 (arXiv:2006.11239); Song et al. 2021 (arXiv:2011.13456), equation 33.

    Attributes:
        beta_min: the rate of noise at `t = 0`: 1,000 times DDPM's first beta, 1e-4.
        beta_max: the rate of noise at `t = 1`: 1,000 times DDPM's last beta, 0.02.
        t_min: the smallest time at which the network is evaluated.
        t_noise: where sampling starts.
    """

    beta_min: NotNegative[Scalar] = 0.1
    beta_max: Positive[Scalar] = 20.0
    t_min: NotNegative[Scalar] = 1e-3
    t_noise: UnitTime[Scalar] = 1.0

    def _log_alpha(self, t: Array) -> Array:
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: AnyShape) -> AnyShape:
        return jnp.exp(self._log_alpha(t))

    def sigma(self, t: AnyShape) -> AnyShape:
        # 1 - a² by expm1: near t = 0 the subtraction would lose all its digits.
        return jnp.sqrt(-jnp.expm1(2.0 * self._log_alpha(t)))


class Coeffs(NamedTuple):
    """A path and its time derivatives at given times, shaped to broadcast against images.

    Attributes:
        t: the times.
        a: the scale of the signal.
        s: the scale of the noise.
        da: `da/dt`.
        ds: `ds/dt`.
    """

    t: Array
    a: Array
    s: Array
    da: Array
    ds: Array


class Pair(NamedTuple):
    """The two parts of a noisy image, `x_t = a·x0 + s·eps`.

    Attributes:
        x0: the clean data, `[B, …]`.
        eps: the noise, of the same shape.
        share: where the network predicts the variance of a reverse step, as
            `smallest^(1 - share)·largest^share`: 0 is the posterior's variance, 1 that of the
            forward step. Of the shape of `x0`, or None.
    """

    x0: Array
    eps: Array
    share: Array | None = None


def coeffs(path: Path, t: PerSample, ndim: int) -> Coeffs:
    """Evaluates a path and its derivatives at times `t`, shaped to broadcast against `[B, …]`.

    Times are broadcast here and nowhere else.

    Args:
        path: any path.
        t: `[B]`, in the path's native time.
        ndim: the rank of the array that the coefficients will multiply.

    Returns:
        Each field of shape `[B, 1, …, 1]`, of rank `ndim`.

    Example:
        >>> c = coeffs(Linear(), jnp.array([0.25]), ndim=4)
        >>> c.a.shape, float(c.a.item()), float(c.ds.item())
        ((1, 1, 1, 1), 0.75, 1.0)
    """
    return coeffs_at(path, jnp.reshape(t, (-1,) + (1,) * (ndim - 1)))


def coeffs_at(path: Path, t: AnyShape) -> Coeffs:
    """A path and its time derivatives, computed by `jax.jvp`, at times `t` of any shape.

    Each field has the shape of `t`.
    """
    t = jnp.asarray(t)
    a, da = jax.jvp(path.alpha, (t,), (jnp.ones_like(t),))
    s, ds = jax.jvp(path.sigma, (t,), (jnp.ones_like(t),))
    return Coeffs(t, a, s, da, ds)


def mix(c: Coeffs, pair: Pair) -> Samples:
    """The noisy images `x_t = a·x0 + s·eps`, `[B, …]`."""
    return c.a * pair.x0 + c.s * pair.eps


def log_snr_of(c: Coeffs) -> Array:
    """Log-SNR of given coefficients, `λ = log(a²/s²)`, of their shape."""
    return 2.0 * (jnp.log(c.a) - jnp.log(c.s))


def log_snr(path: Path, t: AnyShape) -> AnyShape:
    """Log-SNR of a path at times `t`, `λ(t) = log(a²/s²)`, of the shape of `t`.

    Example:
        >>> float(log_snr(Linear(), jnp.array(0.5)))
        0.0
    """
    return 2.0 * (jnp.log(path.alpha(t)) - jnp.log(path.sigma(t)))


def time_of_log_snr(path: Path, value: AnyShape) -> AnyShape:
    """The time in `[t_min, t_noise]` at which log-SNR has a given value, by bisection.

    Log-SNR decreases with time on every path, so there is at most one such time. For values
    outside of the path's range the nearer end is returned. Exact to float32's resolution of `t`.

    Args:
        path: any path.
        value: values of log-SNR, of any shape.

    Returns:
        Times of the same shape, in float32.

    Example:
        >>> round(float(time_of_log_snr(Linear(), jnp.array(0.0))), 6)
        0.5
    """
    low = jnp.full(jnp.shape(value), path.t_min, jnp.float32)
    high = jnp.full(jnp.shape(value), path.t_noise, jnp.float32)
    return bisect(Partial(_noisiness, path), -value, low, high, 40)


def _noisiness(path: Path, t: Array) -> Array:
    return -log_snr(path, t)
