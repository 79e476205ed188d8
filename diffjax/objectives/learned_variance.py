"""iDDPM's hybrid objective: the network learns the variance of the reverse step as well."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import log_ndtr
from jax.tree_util import register_dataclass

from diffjax.kinds import NotNegative, UnitTime
from diffjax.objectives.base import Batch, Progress, Traits
from diffjax.objectives.denoising import Denoising, pixel_mean
from diffjax.objectives.wrappers import Wrapper
from diffjax.process.paths import Coeffs, Path, Scalar, coeffs
from diffjax.process.precond import Apply
from diffjax.process.targets import decode
from diffjax.shapes import AnyShape, OneKey, PerSample


class Reverse(NamedTuple):
    """The reverse step from `t` to `t_next`, for given x0: `N(mean_x·x_t + mean_0·x0, variance)`.

    Attributes:
        mean_x: the coefficient of `x_t` in the mean.
        mean_0: the coefficient of `x0` in the mean.
        log_small: the log of the posterior's variance, which is right for data of one point.
        log_large: the log of the forward step's variance, which is right for normal data.
    """

    mean_x: Array
    mean_0: Array
    log_small: Array
    log_large: Array


@register_dataclass
@dataclass(frozen=True)
class LearnedVariance(Wrapper):
    """Learns the variance of the reverse step by the variational bound.

        loss + scale·(t_noise/gap)·KL(q(x_next | x_t, x0) || p(x_next | x_t)) in nats

    The network has a second output `o` per pixel. The log-variance of the reverse step p is
    `f·log_large + (1 - f)·log_small` with `f = (o + 1)/2`. The mean in the KL has no gradient, so
    the bound trains the variance alone. For the last step, to 8-bit data, the KL is replaced by
    their negative log-probability under the discretised normal. Nichol & Dhariwal 2021
    (arXiv:2102.09672), equations 15 and 16.

    Attributes:
        objective: the loss that trains the mean; its times should be `DiscreteUniform`.
        scale: the weight of the bound; 1e-3 in the paper.
        gap: the step between two times of the reverse process; 1e-3 is a thousand steps.
    """

    objective: Denoising
    scale: NotNegative[Scalar] = 1e-3
    gap: UnitTime[Scalar] = 1e-3

    @property
    def traits(self) -> Traits:
        return replace(self.objective.traits, outputs=2, learned_variance=True)

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        del teacher_params, progress
        objective = self.objective
        noised = objective.at_random_times(key, batch)
        output, fraction = jnp.split(objective.evaluate(apply, params, noised), 2, axis=-1)
        x0, x_t = noised.pair.x0, noised.x_t
        predicted = decode(noised.c, noised.k, jax.lax.stop_gradient(output), x_t).x0

        reverse, last = self.reverse(noised.c)
        log_variance = _between(reverse, fraction)
        wrong = reverse.mean_0 * (x0 - predicted)
        kl = _kl(wrong, reverse.log_small, log_variance)
        decoder = -discretised_log_probability(
            x0, reverse.mean_x * x_t + reverse.mean_0 * predicted, 0.5 * log_variance
        )
        bound = pixel_mean(jnp.where(last, decoder, kl))
        loss = objective.loss(noised, output) + self.scale * self.path.t_noise / self.gap * bound
        return loss, {**objective.metrics(noised), "bound": bound}

    def reverse(self, c: Coeffs) -> tuple[Reverse, Array]:
        """The reverse step from the times of `c`, and whether it ends at clean data."""
        gap = self.gap
        last = c.t < 1.5 * gap
        # The last posterior has variance 0; as in the paper, that of the step before is used.
        clipped = jnp.where(last, 2.0 * gap, c.t)
        return reverse_step(self.path, c.t, jnp.where(last, 0.0, c.t - gap), clipped, gap), last


def reverse_step(
    path: Path, t: AnyShape, t_next: AnyShape, t_clipped: AnyShape, gap: Scalar
) -> Reverse:
    """The posterior `q(x_next | x_t, x0)`, with the small variance of the step from `t_clipped`.

    With `r = a/a_next` and the forward variance `s² - r²·s_next²`: mean
    `r·s_next²/s²·x_t + a_next·forward/s²·x0`, variance `forward·s_next²/s²`. Ho et al. 2020
    (arXiv:2006.11239), equations 6 and 7, on any path.
    """

    def parts(t: Array, t_next: Array) -> tuple[Array, ...]:
        here, there = _at(path, t), _at(path, t_next)
        ratio = here.a / there.a
        forward = here.s**2 - (ratio * there.s) ** 2
        return ratio, there.a, (there.s / here.s) ** 2, forward, here.s**2

    ratio, a_next, kept, forward, variance = parts(t, t_next)
    _, _, kept_clipped, forward_clipped, _ = parts(t_clipped, t_clipped - gap)
    return Reverse(
        mean_x=ratio * kept,
        mean_0=a_next * forward / variance,
        log_small=jnp.log(forward_clipped * kept_clipped),
        log_large=jnp.log(forward),
    )


def discretised_log_probability(x: AnyShape, mean: AnyShape, log_std: AnyShape) -> AnyShape:
    """Log-probability of 8-bit values under a normal that is integrated over each value's bin.

    Values are `k/127.5 - 1` and bins extend half-way to the next value; the outer bins are open. Ho
    et al. 2020 (arXiv:2006.11239), equation 13.

    Args:
        x: 8-bit data in [-1, 1], any shape.
        mean: like `x`.
        log_std: the log of the normal's standard deviation, like `x`.
    """
    low = jnp.where(x < -0.999, -jnp.inf, (x - mean - 1.0 / 255.0) * jnp.exp(-log_std))
    high = jnp.where(x > 0.999, jnp.inf, (x - mean + 1.0 / 255.0) * jnp.exp(-log_std))
    # In the tail where both are small, log(Φ(high) - Φ(low)) loses no digits.
    flip = low > 0
    low, high = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    log_low, log_high = log_ndtr(low), log_ndtr(high)
    return log_high + jnp.log(-jnp.expm1(jnp.minimum(log_low - log_high, -1e-7)))


def _at(path: Path, t: Array) -> Coeffs:
    c = coeffs(path, jnp.ravel(t), ndim=1)
    return Coeffs(*(jnp.reshape(part, t.shape) for part in c))


def _between(reverse: Reverse, output: Array) -> Array:
    fraction = 0.5 * (output + 1.0)
    return fraction * reverse.log_large + (1.0 - fraction) * reverse.log_small


def _kl(wrong: Array, log_true: Array, log_model: Array) -> Array:
    """`KL(N(0, true) || N(wrong, model))` for each pixel, in nats."""
    ratio = jnp.exp(log_true - log_model)
    return 0.5 * (log_model - log_true + ratio + wrong**2 * jnp.exp(-log_model) - 1.0)
