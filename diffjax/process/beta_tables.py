"""Variance-preserving paths from a table of betas, as in DDPM and the models that follow it.

A table of `T` steps has `ᾱ_k = Π_{j≤k} (1 - β_j)`, `a = √ᾱ_k` and `s = √(1 - ᾱ_k)` at `t = k/T`;
step 0 is clean data. Between two steps `log ᾱ` is linear in time, so that samplers may step to any
time. With the times `DiscreteUniform`, training samples the `T` steps of the table alone.

The fields of all tables are

    num_steps             T, the number of betas; 1000 in DDPM, 4000 in improved DDPM
    beta_start, beta_end  the first and the last beta: the variance of the noise that a step adds
    t_min                 the smallest time at which the network is evaluated: 1/T, the first step
    t_noise               the largest time, where sampling starts: 1, the last step
"""

from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import NotNegative, Positive, Range, UnitTime
from diffjax.process.paths import Scalar
from diffjax.shapes import AnyShape

T = TypeVar("T")
Beta = Annotated[T, Range("(0, 1)")]


class _Table:
    """A path by the logarithm of its ᾱ at any time."""

    def _log_alpha_bar(self, t: Array) -> Array:
        raise NotImplementedError

    def alpha(self, t: AnyShape) -> AnyShape:
        return jnp.exp(0.5 * self._log_alpha_bar(t))

    def sigma(self, t: AnyShape) -> AnyShape:
        return jnp.sqrt(-jnp.expm1(self._log_alpha_bar(t)))


@register_dataclass
@dataclass(frozen=True)
class LinearBetas(_Table):
    """DDPM's table: `β_k` increases linearly from `beta_start` to `beta_end`.

        β_k = beta_start + (beta_end - beta_start)·(k - 1)/(T - 1),    k = 1 … T

    `diffjax.process.paths.LinearBeta` is its limit in continuous time. Ho et al. 2020
    (arXiv:2006.11239), section 4.

    Attributes:
        num_steps: `T`.
        beta_start: 1e-4 in DDPM.
        beta_end: 0.02 in DDPM, for `T = 1000`: then `ᾱ_T = 4e-5`. For other `T`, scale both betas
            by `1000/T` to keep it approximately.
        t_min: the first step.
        t_noise: the last step.

    Example:
        >>> path = LinearBetas()
        >>> round(float(path.alpha(jnp.array(0.001)) ** 2), 6)  # one step: 1 - beta_start
        0.9999
    """

    num_steps: Positive[int] = field(default=1000, metadata={"static": True})
    beta_start: Beta[Scalar] = 1e-4
    beta_end: Beta[Scalar] = 0.02
    t_min: NotNegative[Scalar] = 1e-3
    t_noise: UnitTime[Scalar] = 1.0

    def _log_alpha_bar(self, t: Array) -> Array:
        betas = jnp.linspace(self.beta_start, self.beta_end, self.num_steps)
        return _interpolate(jnp.log1p(-betas), t)


@register_dataclass
@dataclass(frozen=True)
class ScaledLinearBetas(_Table):
    """Stable Diffusion's table: `√β_k` increases linearly ("scaled linear").

        √β_k = √beta_start + (√beta_end - √beta_start)·(k - 1)/(T - 1),    k = 1 … T

    Rombach et al. 2022 (arXiv:2112.10752), in their public code.

    Attributes:
        num_steps: `T`.
        beta_start: 0.00085 in Stable Diffusion 1, 2 and XL.
        beta_end: 0.012 in the same models; then `ᾱ_T = 0.0047`, so some signal is left.
        t_min: the first step.
        t_noise: the last step.
    """

    num_steps: Positive[int] = field(default=1000, metadata={"static": True})
    beta_start: Beta[Scalar] = 0.00085
    beta_end: Beta[Scalar] = 0.012
    t_min: NotNegative[Scalar] = 1e-3
    t_noise: UnitTime[Scalar] = 1.0

    def _log_alpha_bar(self, t: Array) -> Array:
        first, last = jnp.sqrt(self.beta_start), jnp.sqrt(self.beta_end)
        return _interpolate(jnp.log1p(-(jnp.linspace(first, last, self.num_steps) ** 2)), t)


@register_dataclass
@dataclass(frozen=True)
class CosineBetas(_Table):
    """Improved DDPM's cosine table, with each `β_k` clipped to at most `max_beta`.

        ᾱ_k ∝ cos²(π/2·(k/T + offset)/(1 + offset)),    β_k = min(1 - ᾱ_k/ᾱ_{k-1}, max_beta)

    Nichol & Dhariwal 2021 (arXiv:2102.09672), equation 17.

    Attributes:
        num_steps: `T`.
        offset: makes the first betas larger. With the paper's 0.008 and `T = 1000`, the standard
            deviation of the first step's noise is 0.0064, a little less than the distance of two
            grey levels of 8 bits, 1/127.5.
        max_beta: the largest beta, 0.999 in the paper; without it `a = 0` at the last step.
        t_min: the first step.
        t_noise: the step before the last one. At the last, `a = 5e-5`, and an error of a predicted
            noise would be 20,000 times as large in x0.
    """

    num_steps: Positive[int] = field(default=1000, metadata={"static": True})
    offset: NotNegative[Scalar] = 0.008
    max_beta: Beta[Scalar] = 0.999
    t_min: NotNegative[Scalar] = 1e-3
    t_noise: UnitTime[Scalar] = 0.999

    def _log_alpha_bar(self, t: Array) -> Array:
        steps = jnp.arange(self.num_steps) / self.num_steps
        angle = 0.5 * jnp.pi * (steps + self.offset) / (1.0 + self.offset)
        width = 0.5 * jnp.pi / (self.num_steps * (1.0 + self.offset))
        # cos²(x + w)/cos²(x) by the addition theorem, without a difference of near numbers.
        root = jnp.cos(width) - jnp.sin(width) * jnp.tan(angle)
        beta = jnp.minimum(1.0 - root**2, self.max_beta)
        small = 2.0 * jnp.log1p(-2.0 * jnp.sin(0.5 * width) ** 2 - jnp.sin(width) * jnp.tan(angle))
        return _interpolate(jnp.where(beta < self.max_beta, small, jnp.log1p(-beta)), t)


def _interpolate(log_kept: Array, t: Array) -> Array:
    """`log ᾱ` at times `t` in [0, 1], interpolated from `log(1 - β_k)` of each step."""
    num_steps = len(log_kept)
    log_alpha_bar = jnp.concatenate([jnp.zeros(1), jnp.cumsum(log_kept)])
    u = t * num_steps
    step = jnp.clip(jnp.floor(jax.lax.stop_gradient(u)).astype(jnp.int32), 0, num_steps - 1)
    return log_alpha_bar[step] + (u - step.astype(u.dtype)) * log_kept[step]
