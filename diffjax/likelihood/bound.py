"""Variational lower bounds on the log-likelihood (ELBO), in discrete and in continuous time.

The model is DDPM's ancestral sampler with the posterior's variance. With `x_t ~ q(x_t | x)`,
SNR = a²/s² and log-SNR λ = log SNR, the bound has three terms:

    log p(x) >= -prior - diffusion + reconstruction
    prior          = KL(q(x_last | x) ‖ N(0, s²·I)) = a²·‖x‖²/(2·s²)    at the last time
    diffusion      = ½·Σ_i (SNR(t_i) - SNR(t_{i+1}))·E‖x - x0(x_{t_{i+1}}, t_{i+1})‖²      T steps
                   = ½·∫ E‖eps - eps(x_λ)‖² dλ                                  in continuous time
    reconstruction = E log p(x | x_{t_min})                      the decoder, from t_min to the data

Each term of the sum is KL(q(x_s | x_t, x) ‖ q(x_s | x_t, x0(x_t, t))). Kingma et al. 2021
(arXiv:2107.00630), equations 11 to 18; Ho et al. 2020 (arXiv:2006.11239), equation 5.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from diffjax.errors import UserError
from diffjax.likelihood.dequantise import LEVELS, level_centres
from diffjax.likelihood.ode import rising_times
from diffjax.process.paths import Coeffs, Pair, Path, coeffs, log_snr, mix, time_of_log_snr
from diffjax.process.precond import Predict
from diffjax.sampling.grids import Grid, UniformLogSNR
from diffjax.sampling.solvers import normal
from diffjax.shapes import Keys, PerSample, Samples


class Bound(NamedTuple):
    """Lower bounds on the log-likelihoods of a batch.

    Attributes:
        log_p: `[B]`, nats: an unbiased estimate of `-prior - diffusion + reconstruction`.
        standard_error: `[B]`, nats: that of the diffusion term's estimate; rather too large than
            too small.
        nfe: the number of network evaluations per sample.
        prior: `[B]`, nats, exact.
        diffusion: `[B]`, nats, estimated.
        reconstruction: `[B]`, nats: exact for `gaussian_decoder`, else an estimate from one sample
            of the noise.
    """

    log_p: Array
    standard_error: Array
    nfe: Array
    prior: Array
    diffusion: Array
    reconstruction: Array


class Levels(NamedTuple):
    """The diffusion term as an integral over `u` in [0, 1): `E_u[weight(u)·‖x - x0(x_t, t)‖²]`.

    Attributes:
        at: `u -> (t, weight)`, each of the shape of `u`.
        last: the noisiest time, where the prior term is computed.
    """

    at: Callable[[Array], tuple[Array, Array]]
    last: Array


class Time(Protocol):
    """The noise levels of the model between its prior and `t_min`: continuous or discrete time."""

    def levels(self, path: Path) -> Levels:
        """The noise levels on a path, as an integral."""
        ...


@dataclass(frozen=True)
class ContinuousTime:
    """Continuous time, the limit of infinitely many steps, with times uniform in log-SNR.

    Attributes:
        lowest: the smallest log-SNR. If the path goes below it, as paths that end in pure noise do,
            the prior term is computed at this log-SNR. The result is still a bound. At -14 the
            signal is e^-7 = 9e-4 of the noise.
    """

    lowest: float = -14.0

    def levels(self, path: Path) -> Levels:
        cleanest = log_snr(path, jnp.asarray(path.t_min))
        noisiest = jnp.maximum(log_snr(path, jnp.asarray(path.t_noise)), self.lowest)

        def at(u: Array) -> tuple[Array, Array]:
            value = cleanest + u * (noisiest - cleanest)
            return time_of_log_snr(path, value), 0.5 * (cleanest - noisiest) * jnp.exp(value)

        return Levels(at, time_of_log_snr(path, noisiest))


@dataclass(frozen=True)
class DiscreteTime:
    """Discrete time: a sampler of `num_steps` steps on a grid.

    Attributes:
        num_steps: the number of steps from `t_noise` to `t_min`; the decoder is one more. DDPM has
            1,000.
        grid: the times at which the steps end.
    """

    num_steps: int = 1000
    grid: Grid = field(default_factory=UniformLogSNR)

    def levels(self, path: Path) -> Levels:
        times = rising_times(path, self.num_steps, self.grid)
        snr = jnp.square(path.alpha(times) / path.sigma(times))

        def at(u: Array) -> tuple[Array, Array]:
            i = jnp.minimum((u * self.num_steps).astype(jnp.int32), self.num_steps - 1)
            return times[i + 1], 0.5 * self.num_steps * (snr[i] - snr[i + 1])

        return Levels(at, times[-1])


Decoder = Callable[[Coeffs, Pair], Array]
"""`(coefficients at t_min, (x, eps)) -> log p(x | x_{t_min})`, `[B]`; `x_{t_min}` is their mix."""


def gaussian_decoder(c: Coeffs, pair: Pair) -> PerSample:
    """The Gaussian decoder for continuous data: `-½·d·log(2πe·s²/a²)`, in nats.

    It is the mean of `log N(x; x_t/a, (s/a)²·I)` over the noise. On average, the bound is lower
    than with the best decoder by `½·(s/a)²` times the squared norm of the score.
    """
    d = math.prod(pair.x0.shape[1:])
    log_ratio = jnp.ravel(jnp.log(c.s / c.a))
    return -d * (0.5 * math.log(2.0 * math.pi * math.e) + log_ratio)


@dataclass(frozen=True)
class DiscreteDecoder:
    """The decoder for images of grey levels: `p(x | x_t) ∝ N(x_t; a·x, s²)` for each pixel.

    The result is a bound on the log-probability of the grey levels, without dequantisation. Kingma
    et al. 2021 (arXiv:2107.00630), section 3.3 and appendix E.

    Attributes:
        levels: the number of grey levels in [-1, 1]: 256 for 8-bit images.
    """

    levels: int = LEVELS

    def __call__(self, c: Coeffs, pair: Pair) -> PerSample:
        x_t, centres = mix(c, pair), level_centres(self.levels)

        def add(total: Array, centre: Array) -> tuple[Array, None]:
            return jnp.logaddexp(total, -0.5 * jnp.square((x_t - c.a * centre) / c.s)), None

        # One grey level at a time: all at once would need 256 arrays of the size of the images.
        total, _ = jax.lax.scan(add, jnp.full_like(x_t, -jnp.inf), centres)
        log_p = -0.5 * jnp.square(pair.eps) - total
        return jnp.sum(log_p, axis=tuple(range(1, x_t.ndim)))


@dataclass(frozen=True)
class VariationalBound:
    """The variational lower bound (ELBO) of a diffusion model on `log p(x)`, in nats.

    The noise levels of each sample are stratified: one is sampled in each of `num_times` equal
    parts of the range. With `DiscreteTime` of `num_times` steps, each step is evaluated once. The
    standard error is computed from pairs of neighbouring strata, and is rather too large than too
    small. Calls are pure and differentiable, like those of `OdeLogLikelihood`.

    Attributes:
        time: `ContinuousTime(…)` or `DiscreteTime(…)`.
        num_times: the number of network evaluations per sample; even, because errors are computed
            from pairs.
        decoder: `gaussian_decoder` for continuous or dequantised data, `DiscreteDecoder()` for
            8-bit images.

    Example:
        >>> from diffjax.process.paths import Linear, Pair, coeffs
        >>> def standard_normal(x, t, cond):  # the best denoiser of N(0, I)
        ...     c = coeffs(Linear(), t, x.ndim)
        ...     return Pair(c.a * x / (c.a**2 + c.s**2), c.s * x / (c.a**2 + c.s**2))
        >>> keys = jax.random.split(jax.random.key(0), 512)
        >>> x = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), (2,)))(keys)
        >>> bound = VariationalBound()(standard_normal, Linear(), x, keys)
        >>> bool(abs(bound.log_p.mean() + 2.838) < 0.2)  # minus the entropy, log 2πe = 2.838
        True
    """

    time: Time = ContinuousTime()
    num_times: int = 64
    decoder: Decoder = gaussian_decoder

    def __call__(
        self, predict: Predict, path: Path, x: Samples, keys: Keys, cond: Any = None
    ) -> Bound:
        """Estimates the bound of each of the data, with its three terms.

        Args:
            predict: the model.
            path: the path on which it was trained.
            x: `[B, …]`, clean data in the model's units.
            keys: `[B]`, one for each sample.
            cond: the condition, B rows, or None for the null condition.

        Raises:
            UserError: `num_times` is odd or below 2.
        """
        if self.num_times < 2 or self.num_times % 2:
            raise UserError(
                f"num_times={self.num_times} must be even and at least 2: errors need pairs"
            )
        levels = self.time.levels(path)
        key_of = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
        stratum_keys, noise_keys, decoder_keys = key_of[:, 0], key_of[:, 1], key_of[:, 2]
        jitter = jax.vmap(lambda key: jax.random.uniform(key, (self.num_times,)))(stratum_keys).T
        u = (jnp.arange(self.num_times, dtype=jitter.dtype)[:, None] + jitter) / self.num_times
        ts, weights = levels.at(u)

        def one_time(_: None, inputs: tuple[Array, Array, Array]) -> tuple[None, Array]:
            i, t, weight = inputs
            c = coeffs(path, t, x.ndim)
            eps = normal(jax.vmap(jax.random.fold_in, (0, None))(noise_keys, i), x.shape[1:])
            pair = Pair(x, eps)
            return None, weight * _x0_error(c, pair, predict(mix(c, pair), t, cond))

        _, terms = jax.lax.scan(one_time, None, (jnp.arange(self.num_times), ts, weights))
        diffusion = jnp.mean(terms, axis=0)
        standard_error = (
            jnp.sqrt(jnp.sum(jnp.square(terms[0::2] - terms[1::2]), axis=0)) / self.num_times
        )

        end = coeffs(path, levels.last[None], x.ndim)
        axes = tuple(range(1, x.ndim))
        prior = 0.5 * jnp.sum(jnp.square(end.a / end.s * x), axis=axes)
        start = coeffs(path, jnp.full(len(x), path.t_min), x.ndim)
        reconstruction = self.decoder(start, Pair(x, normal(decoder_keys, x.shape[1:])))
        return Bound(
            log_p=reconstruction - prior - diffusion,
            standard_error=standard_error,
            nfe=jnp.asarray(self.num_times),
            prior=prior,
            diffusion=diffusion,
            reconstruction=reconstruction,
        )


def _x0_error(c: Coeffs, truth: Pair, guess: Pair) -> PerSample:
    """The squared error of x0, `‖x - x0‖²`, `[B]`, computed from the error of v.

    An error of x0 is `-s/(a² + s²)` times that of `v = a·eps - s·x0`. The error of v is exact at
    both ends: at low noise the error of x0 is a small difference, at high noise that of eps.
    """
    v_error = c.a * (truth.eps - guess.eps) - c.s * (truth.x0 - guess.x0)
    error = c.s / (jnp.square(c.a) + jnp.square(c.s)) * v_error
    return jnp.sum(jnp.square(error), axis=tuple(range(1, error.ndim)))
