"""Paths turn data into noise: `x_t = a(t)·x0 + s(t)·eps` with `eps ~ N(0, I)`.

Time rises from clean to noisy. At `t = 0` every path is exactly clean (`a = 1`, `s = 0`); samplers
end there, but no network is ever asked there. Networks live on `[t_min, t_noise]`, and sampling
starts from noise at `t_noise`. Each path keeps its native time; log-SNR is what they share.
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
    """What every path offers; any object with these is one."""

    @property
    def t_min(self) -> Scalar:
        """The smallest time that a network sees, above 0 where `s = 0` would divide."""
        ...

    @property
    def t_noise(self) -> Scalar:
        """The largest time; sampling starts here."""
        ...

    def alpha(self, t: AnyShape) -> AnyShape:
        """The signal's scale `a(t)`, of the shape of `t`, with `a(0) = 1`."""
        ...

    def sigma(self, t: AnyShape) -> AnyShape:
        """The noise's scale `s(t)`, of the shape of `t`, with `s(0) = 0`."""
        ...


@register_dataclass
@dataclass(frozen=True)
class Linear:
    """The straight path of flow matching: `a = 1 - t`, `s = t`.

    Lipman et al. 2023 (arXiv:2210.02747) and Liu et al. 2023 (arXiv:2209.03003), with time
    reversed where theirs runs from noise to data.
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
    """The trigonometric variance-preserving path: `a = cos(πt/2)`, `s = sin(πt/2)`.

    It ends short of pure noise so that noise prediction stays decodable (`a(0.999) = 0.0016`);
    with `t_noise=1` use a velocity or v target. Albergo & Vanden-Eijnden 2023 (arXiv:2209.15571);
    close to Nichol & Dhariwal 2021 (arXiv:2102.09672) without its offset.
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
    """DDPM's variance-preserving path in continuous time.

    With `β(t) = beta_min + t·(beta_max - beta_min)`: `log a = -½ ∫₀ᵗ β`, `s² = 1 - a²`. The
    defaults are the limit of DDPM's 1,000 steps with `β` from 1e-4 to 0.02. Ho et al. 2020
    (arXiv:2006.11239); Song et al. 2021 (arXiv:2011.13456), equation 33.
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
    """A path and its derivatives at given times, shaped to broadcast against images."""

    t: Array
    a: Array
    s: Array
    da: Array
    ds: Array


class Pair(NamedTuple):
    """A noisy image taken apart: the clean data and the noise it is made of.

    Attributes:
        x0: the clean data.
        eps: the noise.
        share: of the largest variance in that of a reverse step, for each number; where a network
            predicts it.
    """

    x0: Array
    eps: Array
    share: Array | None = None


def coeffs(path: Path, t: PerSample, ndim: int) -> Coeffs:
    """The path at times `t`, with derivatives, shaped to broadcast against `[B, …]`.

    This is the one place where time is broadcast.

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
    t = jnp.reshape(t, (-1,) + (1,) * (ndim - 1))
    a, da = jax.jvp(path.alpha, (t,), (jnp.ones_like(t),))
    s, ds = jax.jvp(path.sigma, (t,), (jnp.ones_like(t),))
    return Coeffs(t, a, s, da, ds)


def mix(c: Coeffs, pair: Pair) -> Samples:
    """The noisy image `x_t = a·x0 + s·eps`, `[B, …]`."""
    return c.a * pair.x0 + c.s * pair.eps


def log_snr_of(c: Coeffs) -> Array:
    """`λ = log(a²/s²)`, of the shape of the coefficients."""
    return 2.0 * (jnp.log(c.a) - jnp.log(c.s))


def log_snr(path: Path, t: AnyShape) -> AnyShape:
    """`λ(t) = log(a²/s²)`, of the shape of `t`.

    Example:
        >>> float(log_snr(Linear(), jnp.array(0.5)))
        0.0
    """
    return 2.0 * (jnp.log(path.alpha(t)) - jnp.log(path.sigma(t)))


def time_of_log_snr(path: Path, value: AnyShape) -> AnyShape:
    """The time in `[t_min, t_noise]` at which log-SNR has a given value, by bisection.

    Log-SNR falls with time on every path, so the root is unique; values outside the path's range
    give the nearer end. Exact to float32's resolution of `t`.

    Args:
        path: any path.
        value: log-SNR, any shape.

    Example:
        >>> round(float(time_of_log_snr(Linear(), jnp.array(0.0))), 6)
        0.5
    """
    low = jnp.full(jnp.shape(value), path.t_min, jnp.float32)
    high = jnp.full(jnp.shape(value), path.t_noise, jnp.float32)
    return bisect(Partial(_noisiness, path), -value, low, high, 40)


def _noisiness(path: Path, t: Array) -> Array:
    return -log_snr(path, t)
