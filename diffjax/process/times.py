"""At which noise levels training spends its examples.

A density over time is its quantile function, from the unit interval onto `[t_min, t_noise]`, and
its log-density, so that importance weights are exact. How the uniform numbers themselves are drawn
(independently, stratified, …) is a choice of its own: `diffjax.process.uniforms`.
"""

from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import betainc, betaln, logit, ndtr, ndtri
from jax.tree_util import Partial, register_dataclass

from diffjax.kinds import Interval, Positive, UnitTime
from diffjax.process.bisection import bisect
from diffjax.process.paths import Path, Scalar, log_snr, time_of_log_snr
from diffjax.shapes import AnyShape


@runtime_checkable
class Times(Protocol):
    """A density over the times of a path."""

    def quantile(self, u: AnyShape, path: Path) -> AnyShape:
        """The time below which a share `u[n]` of `[0, 1)` lies, in `[t_min, t_noise]`."""
        ...

    def log_density(self, t: AnyShape, path: Path) -> AnyShape:
        """Log of the density with respect to `t`, of the shape of `t`."""
        ...


@register_dataclass
@dataclass(frozen=True)
class Uniform:
    """Every time alike.

    Example:
        >>> from diffjax.process.paths import Linear
        >>> Uniform().quantile(jnp.array([0.0, 0.5]), Linear(t_min=0.0)).tolist()
        [0.0, 0.5]
    """

    def quantile(self, u: AnyShape, path: Path) -> AnyShape:
        return _from_unit(u, path)

    def log_density(self, t: AnyShape, path: Path) -> AnyShape:
        return jnp.full(jnp.shape(t), -jnp.log(_span(path)))


@register_dataclass
@dataclass(frozen=True)
class DiscreteUniform:
    """`gap`, `2·gap`, … up to `t_noise`, all alike: the steps of a table of betas.

    The density is that of the histogram with these times as right ends of its bars. Ho et al. 2020
    (arXiv:2006.11239).
    """

    gap: UnitTime[Scalar] = 1e-3

    def quantile(self, u: AnyShape, path: Path) -> AnyShape:
        step = jnp.minimum(jnp.floor(u * self._num_steps(path)) + 1.0, self._num_steps(path))
        return jnp.clip(step * self.gap, path.t_min, path.t_noise)

    def log_density(self, t: AnyShape, path: Path) -> AnyShape:
        return jnp.full(jnp.shape(t), -jnp.log(self._num_steps(path) * self.gap))

    def _num_steps(self, path: Path) -> Array:
        return jnp.round(jnp.asarray(path.t_noise) / self.gap)


@register_dataclass
@dataclass(frozen=True)
class LogitNormal:
    """`logit(u) ~ N(mean, std²)`: most examples at middling noise.

    A positive mean leans towards noise. Esser et al. 2024 (arXiv:2403.03206), section 3.1.
    """

    mean: Scalar = 0.0
    std: Positive[Scalar] = 1.0

    def quantile(self, u: AnyShape, path: Path) -> AnyShape:
        return _from_unit(jax.nn.sigmoid(self.mean + self.std * ndtri(u)), path)

    def log_density(self, t: AnyShape, path: Path) -> AnyShape:
        v = _to_unit(t, path)
        normal = jax.scipy.stats.norm.logpdf(logit(v), self.mean, self.std)
        return normal - jnp.log(v) - jnp.log1p(-v) - jnp.log(_span(path))


@register_dataclass
@dataclass(frozen=True)
class Mode:
    """SD3's heavy-tailed density with an adjustable mode.

    `t = 1 - u - scale·(cos²(πu/2) - 1 + u)` with `u` uniform; `scale` above 0 favours the middle,
    below 0 the ends. Esser et al. 2024 (arXiv:2403.03206), equation 20.

    Attributes:
        scale: from -1 to 2/(π - 2) = 1.75, where `t` is monotone in `u`.
    """

    scale: Annotated[Scalar, Interval("[-1, 1.7519]")] = 1.29

    def quantile(self, u: AnyShape, path: Path) -> AnyShape:
        # The paper's t falls with its u; with u for 1 - u it rises, as a quantile does.
        return _from_unit(self._unit(u), path)

    def log_density(self, t: AnyShape, path: Path) -> AnyShape:
        u = _solve(Partial(Mode._unit, self), _to_unit(t, path))
        slope = 1.0 + self.scale * (1.0 - 0.5 * jnp.pi * jnp.sin(jnp.pi * u))
        return -jnp.log(slope) - jnp.log(_span(path))

    def _unit(self, u: Array) -> Array:
        return u - self.scale * (jnp.sin(0.5 * jnp.pi * u) ** 2 - u)


@register_dataclass
@dataclass(frozen=True)
class CosMap:
    """`t = 1 - 1/(tan(πu/2) + 1)`: the cosine schedule's log-SNRs, on the linear path.

    Esser et al. 2024 (arXiv:2403.03206), equation 21.
    """

    def quantile(self, u: AnyShape, path: Path) -> AnyShape:
        # The same without a tangent, which is infinite at u = 1.
        sine, cosine = jnp.sin(0.5 * jnp.pi * u), jnp.cos(0.5 * jnp.pi * u)
        return _from_unit(sine / (sine + cosine), path)

    def log_density(self, t: AnyShape, path: Path) -> AnyShape:
        v = _to_unit(t, path)
        return jnp.log(2.0 / jnp.pi) - jnp.log(1.0 - 2.0 * v + 2.0 * v**2) - jnp.log(_span(path))


@register_dataclass
@dataclass(frozen=True)
class LogNormal:
    """EDM's: `log(s/a) ~ N(mean, std²)`, cut off at the ends of the path.

    A density over noise levels, the same on every path. Karras et al. 2022 (arXiv:2206.00364),
    table 1; EDM2 has mean -0.4 and deviation 1.0 (arXiv:2312.02696).
    """

    mean: Scalar = -1.2
    std: Positive[Scalar] = 1.2

    def quantile(self, u: AnyShape, path: Path) -> AnyShape:
        low, high = self._ends(path)
        log_sigma = self.mean + self.std * ndtri(low + u * (high - low))
        return time_of_log_snr(path, -2.0 * log_sigma)

    def log_density(self, t: AnyShape, path: Path) -> AnyShape:
        low, high = self._ends(path)
        value, speed = _log_sigma_and_speed(t, path)
        normal = jax.scipy.stats.norm.logpdf(value, self.mean, self.std)
        return normal + jnp.log(speed) - jnp.log(high - low)

    def _ends(self, path: Path) -> tuple[Array, Array]:
        """Shares of the normal below each end of the path."""
        ends = -0.5 * log_snr(path, jnp.stack([jnp.asarray(path.t_min), jnp.asarray(path.t_noise)]))
        low, high = ndtr((ends - self.mean) / self.std)
        return low, high


@register_dataclass
@dataclass(frozen=True)
class UniformLogSNR:
    """Every log-SNR alike, from that of `t_min` down to that of `t_noise` or `lowest`.

    Times at which log-SNR is below `lowest` are never drawn: it is minus infinity where a path
    ends in pure noise.
    """

    lowest: Scalar = -15.0

    def quantile(self, u: AnyShape, path: Path) -> AnyShape:
        first, last = self._ends(path)
        return time_of_log_snr(path, first + u * (last - first))

    def log_density(self, t: AnyShape, path: Path) -> AnyShape:
        first, last = self._ends(path)
        value, speed = _log_sigma_and_speed(t, path)
        inside = -2.0 * value >= last
        return jnp.where(inside, jnp.log(2.0 * speed) - jnp.log(first - last), -jnp.inf)

    def _ends(self, path: Path) -> tuple[Array, Array]:
        first, last = log_snr(path, jnp.stack([jnp.asarray(path.t_min), jnp.asarray(path.t_noise)]))
        return first, jnp.maximum(last, self.lowest)


@register_dataclass
@dataclass(frozen=True)
class Beta:
    """`Beta(alpha, beta)`: mean `alpha/(alpha + beta)`, so `alpha > beta` leans towards noise.

    Black et al. 2024 (arXiv:2410.24164) train π0 with `Beta(1.5, 1)`, in our direction of time.
    """

    alpha: Positive[Scalar] = 2.0
    beta: Positive[Scalar] = 2.0

    def quantile(self, u: AnyShape, path: Path) -> AnyShape:
        return _from_unit(_solve(Partial(betainc, self.alpha, self.beta), u), path)

    def log_density(self, t: AnyShape, path: Path) -> AnyShape:
        v = _to_unit(t, path)
        log_mass = (self.alpha - 1.0) * jnp.log(v) + (self.beta - 1.0) * jnp.log1p(-v)
        return log_mass - betaln(self.alpha, self.beta) - jnp.log(_span(path))


def log_snr_density(times: Times, path: Path, t: AnyShape) -> AnyShape:
    """The density of log-SNR at times `t`: `p(λ) = p(t)/|dλ/dt|`, of the shape of `t`."""
    _, speed = _log_sigma_and_speed(t, path)
    return jnp.exp(times.log_density(t, path)) / (2.0 * speed)


def _log_sigma_and_speed(t: Array, path: Path) -> tuple[Array, Array]:
    """`log(s/a)` and its derivative in time."""
    return jax.jvp(lambda t: -0.5 * log_snr(path, t), (t,), (jnp.ones_like(t),))


def _solve(rising: Partial, value: Array) -> Array:
    """The `u` in [0, 1] at which a rising function has given values."""
    return bisect(rising, value, jnp.zeros_like(value), jnp.ones_like(value), 26)


def _span(path: Path) -> Scalar:
    return path.t_noise - path.t_min


def _from_unit(u: Array, path: Path) -> Array:
    return path.t_min + u * _span(path)


def _to_unit(t: Array, path: Path) -> Array:
    return (t - path.t_min) / _span(path)
