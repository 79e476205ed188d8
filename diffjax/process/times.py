"""Densities of the training times: how often each noise level is sampled.

A density has a quantile function, from [0, 1) onto `[t_min, t_noise]`, and a log-density, so that
importance weights are exact. Training samples `t = quantile(u)` with uniform numbers `u`. How `u`
is sampled (independent, stratified, …) is a separate choice: `diffjax.process.uniforms`.

Most densities are defined on the unit interval, for `v = (t - t_min)/(t_noise - t_min)`, where
`v = 0` is the clean end and `v = 1` the noisy end. `LogNormal` and `UniformLogSNR` are densities of
log-SNR, `λ = log(a²/s²)`: between the ends of a path, they are the same on all paths.
"""

from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import betainc, betaln, logit, ndtr, ndtri
from jax.tree_util import Partial, register_dataclass

from diffjax.kinds import Positive, Range, UnitTime
from diffjax.process.bisection import bisect
from diffjax.process.paths import Path, Scalar, log_snr, time_of_log_snr
from diffjax.shapes import AnyShape


@runtime_checkable
class Times(Protocol):
    """A density over the times of a path, with its quantile function."""

    def quantile(self, u: AnyShape, path: Path) -> AnyShape:
        """The times `[n]` in `[t_min, t_noise]` with cumulative probability `u[n]`, in [0, 1)."""
        ...

    def log_density(self, t: AnyShape, path: Path) -> AnyShape:
        """The log of the density with respect to `t`, of the shape of `t`."""
        ...


@register_dataclass
@dataclass(frozen=True)
class Uniform:
    """The uniform density of times: `p(t) = 1/(t_noise - t_min)`.

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
    """The times `gap`, `2·gap`, …, `t_noise`, each equally likely: the steps of a table of betas.

    `log_density` is that of a histogram, whose bars have these times as right ends. Ho et al. 2020
    (arXiv:2006.11239).

    Attributes:
        gap: the distance of two times, `1/T` for a table of `T` steps. DDPM has T = 1,000.
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
    """The logit-normal density: `logit(v) ~ N(mean, std²)`, most times in the middle.

        p(v) = 1/(std·√(2π)·v·(1 - v))·exp(-(logit(v) - mean)²/(2·std²))

    Esser et al. 2024 (arXiv:2403.03206), section 3.1.

    Attributes:
        mean: the median is `v = sigmoid(mean)`, so positive values prefer noisy times. SD3 has 0,
            MeanFlow -0.4.
        std: the spread of `logit(v)`. Small values sample times near the median alone; above √2
            (with mean 0) the density has two modes, towards the ends. SD3 and MeanFlow have 1.
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
    """SD3's mode sampling: a density with heavy tails, positive at both ends.

        v = 1 - u - scale·(cos²(πu/2) - 1 + u),      u uniform in [0, 1]

    Esser et al. 2024 (arXiv:2403.03206), equation 20.

    Attributes:
        scale: above 0 the middle is sampled more often, below 0 the two ends, and 0 is uniform.
            From -1 to 2/(π - 2) = 1.75, where `v` is monotone in `u`. SD3 reports 1.29.
    """

    scale: Annotated[Scalar, Range("[-1, 1.7519]")] = 1.29

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
    """SD3's CosMap: the linear path then has the log-SNR distribution of the cosine schedule.

        v = 1 - 1/(tan(πu/2) + 1),    p(v) = 2/(π·(1 - 2v + 2v²)),      u uniform in [0, 1]

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
    """EDM's log-normal density of noise levels: `log σ ~ N(mean, std²)` with `σ = s/a`.

    It is truncated at the ends of the path. `log σ = -λ/2`, so log-SNR is normal with mean
    `-2·mean` and standard deviation `2·std`, on every path. Karras et al. 2022 (arXiv:2206.00364),
    table 1; Karras et al. 2024 (EDM2, arXiv:2312.02696).

    Attributes:
        mean: the mean of `log σ` (`P_mean`). EDM has -1.2, which is σ = 0.30; EDM2 has -0.4.
        std: the standard deviation of `log σ` (`P_std`). EDM has 1.2, EDM2 1.0.
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
        """The normal distribution's cumulative probability at each end of the path."""
        ends = -0.5 * log_snr(path, jnp.stack([jnp.asarray(path.t_min), jnp.asarray(path.t_noise)]))
        low, high = ndtr((ends - self.mean) / self.std)
        return low, high


@register_dataclass
@dataclass(frozen=True)
class UniformRoot:
    """The uniform density of `σ^(1/rho)`, with `σ = s/a`: that of the levels of Karras et al.

    Consistency training draws its levels from it. Song et al. 2023 (arXiv:2303.01469), section 5.

    Attributes:
        rho: 7 in the paper; 1 is uniform in σ.
    """

    rho: Positive[Scalar] = 7.0

    def quantile(self, u: AnyShape, path: Path) -> AnyShape:
        low, high = self._ends(path)
        return time_of_log_snr(path, -2.0 * self.rho * jnp.log(low + u * (high - low)))

    def log_density(self, t: AnyShape, path: Path) -> AnyShape:
        low, high = self._ends(path)
        value, speed = _log_sigma_and_speed(t, path)
        inside = value <= self.rho * jnp.log(high) + 1e-4
        density = value / self.rho + jnp.log(speed) - jnp.log(self.rho * (high - low))
        return jnp.where(inside, density, -jnp.inf)

    def _ends(self, path: Path) -> tuple[Array, Array]:
        """The root of σ at each end of the path."""
        ends = jnp.stack([jnp.asarray(path.t_min), jnp.asarray(path.t_noise)])
        # Where a path ends in pure noise σ is infinite: there it is the largest, e^7.5.
        low, high = jnp.exp(-0.5 * jnp.maximum(log_snr(path, ends), -15.0) / self.rho)
        return low, high


@register_dataclass
@dataclass(frozen=True)
class UniformLogSNR:
    """The uniform density of log-SNR: `p(t) ∝ |dλ/dt|` where `λ(t) >= lowest`, else 0.

    With it, the unweighted loss of the noise is the diffusion term of the variational bound up to
    a constant factor. Kingma et al. 2021 (arXiv:2107.00630).

    Attributes:
        lowest: the smallest log-SNR that is sampled, needed on paths that end in pure noise, where
            log-SNR is minus infinity. At -15 the signal is e^-7.5 = 5.5e-4 times the noise.
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
    """The Beta density of times: `p(v) ∝ v^(alpha - 1)·(1 - v)^(beta - 1)`.

    Its mean is `alpha/(alpha + beta)`; with `alpha > beta` noisy times are sampled more often, and
    `alpha = beta = 1` is uniform. π0 is trained with `Beta(1.5, 1)`, written here with time from
    clean to noisy: Black et al. 2024 (arXiv:2410.24164).

    Attributes:
        alpha: above 1 the density vanishes at the clean end, below 1 it is infinite there.
        beta: above 1 the density vanishes at the noisy end, below 1 it is infinite there.
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
    """The density of log-SNR, `p(λ) = p(t)/|dλ/dt|`, at times `t`, of the shape of `t`."""
    _, speed = _log_sigma_and_speed(t, path)
    return jnp.exp(times.log_density(t, path)) / (2.0 * speed)


def _log_sigma_and_speed(t: Array, path: Path) -> tuple[Array, Array]:
    """`log(s/a) = -λ/2` and its derivative in time."""
    return jax.jvp(lambda t: -0.5 * log_snr(path, t), (t,), (jnp.ones_like(t),))


def _solve(rising: Partial, value: Array) -> Array:
    """The `u` in [0, 1] at which an increasing function has given values."""
    return bisect(rising, value, jnp.zeros_like(value), jnp.ones_like(value), 26)


def _span(path: Path) -> Scalar:
    return path.t_noise - path.t_min


def _from_unit(u: Array, path: Path) -> Array:
    return path.t_min + u * _span(path)


def _to_unit(t: Array, path: Path) -> Array:
    return (t - path.t_min) / _span(path)
