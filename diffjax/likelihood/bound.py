"""Variational lower bounds on the log-likelihood of the ancestral sampler, in discrete and
continuous time.

With `x_t ~ q(x_t | x)` and SNR = a²/s², the bound has three terms:

    log p(x) >= -prior - diffusion + reconstruction
    prior          = KL(q(x_last | x) ‖ N(0, s²·I)) = a²·‖x‖²/(2·s²)    at the last time
    diffusion      = ½·Σ_i (SNR(t_i) - SNR(t_{i+1}))·E‖x - x0(x_{t_{i+1}}, t_{i+1})‖²      T steps
                   = ½·∫ E‖eps - eps(x_λ)‖² dλ                                  in continuous time
    reconstruction = E log p(x | x_{t_min})                      what the decoder makes of the rest

Each summand is KL(q(x_s | x_t, x) ‖ q(x_s | x_t, x0(x_t, t))): the model is DDPM's sampler with the
posterior's variance. Kingma et al. 2021 (arXiv:2107.00630), equations 11 to 18; Ho et al. 2020
(arXiv:2006.11239), equation 5.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

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
from diffjax.shapes import Keys, Labels, PerSample, Samples


class Bound(NamedTuple):
    """Lower bounds on the log-likelihoods of a batch.

    Attributes:
        log_p: `[B]`, nats: an unbiased estimate of `-prior - diffusion + reconstruction`.
        standard_error: `[B]`, nats, of the diffusion term's estimate; errs on the large side.
        nfe: evaluations of the network per sample.
        prior: `[B]`, exact.
        diffusion: `[B]`, estimated.
        reconstruction: `[B]`, exact for `gaussian_decoder`, else of one draw.
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
        at: `u -> (t, weight)`, of the shape of `u`.
        last: the noisiest time, where the prior takes over.
    """

    at: Callable[[Array], tuple[Array, Array]]
    last: Array


class Time(Protocol):
    """Through which noise levels the model goes from its prior to `t_min`."""

    def levels(self, path: Path) -> Levels:
        """Those of one path."""
        ...


@dataclass(frozen=True)
class ContinuousTime:
    """Infinitely many steps; times are drawn uniformly in log-SNR.

    Attributes:
        lowest: the prior takes over at this log-SNR if the path goes below it, as one that ends in
            pure noise does. That is still a bound.
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
    """A sampler of so many steps, on a grid of its own.

    Attributes:
        num_steps: from `t_noise` to `t_min`; the decoder is one more.
        grid: where they end.
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
"""`(the path at t_min, (x, eps)) -> log p(x | x_{t_min})`, `[B]`, with `x_{t_min}` their mix."""


def gaussian_decoder(c: Coeffs, pair: Pair) -> PerSample:
    """The mean of `log N(x; x_t/a, (s/a)²·I)` over `eps`: `-½·d·log(2πe·s²/a²)`.

    For data with a density. What is lost against the best decoder is `½·(s/a)²` times the squared
    norm of the score, on average.
    """
    d = math.prod(pair.x0.shape[1:])
    log_ratio = jnp.ravel(jnp.log(c.s / c.a))
    return -d * (0.5 * math.log(2.0 * math.pi * math.e) + log_ratio)


@dataclass(frozen=True)
class DiscreteDecoder:
    """For data on `levels` values in [-1, 1]: `p(x | x_t) ∝ N(x_t; a·x, s²)`, pixel by pixel.

    Gives a bound on the log-probability, so that nothing has to be dequantised. Kingma et al. 2021
    (arXiv:2107.00630), section 3.3 and appendix E.

    Attributes:
        levels: 256 for 8-bit images.
    """

    levels: int = LEVELS

    def __call__(self, c: Coeffs, pair: Pair) -> PerSample:
        x_t, centres = mix(c, pair), level_centres(self.levels)

        def add(total: Array, centre: Array) -> tuple[Array, None]:
            return jnp.logaddexp(total, -0.5 * jnp.square((x_t - c.a * centre) / c.s)), None

        # One value at a time: all at once would be 256 arrays as large as the images.
        total, _ = jax.lax.scan(add, jnp.full_like(x_t, -jnp.inf), centres)
        log_p = -0.5 * jnp.square(pair.eps) - total
        return jnp.sum(log_p, axis=tuple(range(1, x_t.ndim)))


def variational_bound(
    predict: Predict,
    path: Path,
    x: Samples,
    keys: Keys,
    labels: Labels | None = None,
    *,
    time: Time = ContinuousTime(),
    num_times: int = 64,
    decoder: Decoder = gaussian_decoder,
) -> Bound:
    """The evidence lower bound of the diffusion model, in nats.

    The noise levels of each sample are stratified: one in each of `num_times` equal shares of the
    range; with `DiscreteTime` of as many steps that is every step once. The standard error is that
    of neighbouring strata taken together in pairs, which errs on the large side. A pure function of
    arrays, as `ode_log_likelihood` is, and differentiable.

    Args:
        predict: the model.
        path: the path it was trained on.
        x: `[B, …]`, clean data in the model's units.
        keys: `[B]`, one for each sample.
        labels: `[B]`, or None for an unconditional model.
        time: `ContinuousTime(…)` or `DiscreteTime(…)`.
        num_times: evaluations for each sample; even, so that they make pairs.
        decoder: `gaussian_decoder`, or `DiscreteDecoder()` for images of 8 bits as they are.

    Raises:
        UserError: an odd `num_times`.

    Example:
        >>> from diffjax.process.paths import Linear, Pair, coeffs
        >>> def standard_normal(x, t, cond):  # the best denoiser of N(0, I)
        ...     c = coeffs(Linear(), t, x.ndim)
        ...     return Pair(c.a * x / (c.a**2 + c.s**2), c.s * x / (c.a**2 + c.s**2))
        >>> keys = jax.random.split(jax.random.key(0), 512)
        >>> x = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), (2,)))(keys)
        >>> bound = variational_bound(standard_normal, Linear(), x, keys)
        >>> bool(abs(bound.log_p.mean() + 2.838) < 0.2)  # minus the entropy, log 2πe = 2.838
        True
    """
    if num_times < 2 or num_times % 2:
        raise UserError(f"num_times={num_times} must be even and at least 2: errors need pairs")
    levels = time.levels(path)
    key_of = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    stratum_keys, noise_keys, decoder_keys = key_of[:, 0], key_of[:, 1], key_of[:, 2]
    jitter = jax.vmap(lambda key: jax.random.uniform(key, (num_times,)))(stratum_keys).T
    u = (jnp.arange(num_times, dtype=jitter.dtype)[:, None] + jitter) / num_times
    ts, weights = levels.at(u)

    def one_time(_: None, inputs: tuple[Array, Array, Array]) -> tuple[None, Array]:
        i, t, weight = inputs
        c = coeffs(path, t, x.ndim)
        eps = normal(jax.vmap(jax.random.fold_in, (0, None))(noise_keys, i), x.shape[1:])
        pair = Pair(x, eps)
        return None, weight * _x0_error(c, pair, predict(mix(c, pair), t, labels))

    _, terms = jax.lax.scan(one_time, None, (jnp.arange(num_times), ts, weights))
    diffusion = jnp.mean(terms, axis=0)
    standard_error = jnp.sqrt(jnp.sum(jnp.square(terms[0::2] - terms[1::2]), axis=0)) / num_times

    end = coeffs(path, levels.last[None], x.ndim)
    axes = tuple(range(1, x.ndim))
    prior = 0.5 * jnp.sum(jnp.square(end.a / end.s * x), axis=axes)
    start = coeffs(path, jnp.full(len(x), path.t_min), x.ndim)
    reconstruction = decoder(start, Pair(x, normal(decoder_keys, x.shape[1:])))
    return Bound(
        log_p=reconstruction - prior - diffusion,
        standard_error=standard_error,
        nfe=jnp.asarray(num_times),
        prior=prior,
        diffusion=diffusion,
        reconstruction=reconstruction,
    )


def _x0_error(c: Coeffs, truth: Pair, guess: Pair) -> PerSample:
    """`‖x - x0‖²`, `[B]`.

    An error of x0 is `-s/(a² + s²)` times one of `v = a·eps - s·x0`. By way of v neither end of the
    path loses its digits: at low noise x0 is a small difference, at high noise eps is.
    """
    v_error = c.a * (truth.eps - guess.eps) - c.s * (truth.x0 - guess.x0)
    error = c.s / (jnp.square(c.a) + jnp.square(c.s)) * v_error
    return jnp.sum(jnp.square(error), axis=tuple(range(1, error.ndim)))
