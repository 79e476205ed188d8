"""Paths given by a table of betas, as DDPM and its descendants train them.

A table of `T` steps has `ᾱ_k = Π_{j≤k} (1 - β_j)`, `a = √ᾱ_k`, `s = √(1 - ᾱ_k)` at `t = k/T`;
step 0 is clean data. Between the steps `log ᾱ` is linear, a constant rate of noise, so that any
solver may stop anywhere. With `DiscreteUniform` times training sees the table's entries alone.
"""

from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import Interval, NotNegative, Positive, UnitTime
from diffjax.process.paths import Scalar
from diffjax.shapes import AnyShape

T = TypeVar("T")
Beta = Annotated[T, Interval("(0, 1)")]


@register_dataclass
@dataclass(frozen=True)
class LinearBetas:
    """DDPM's table: `β_k` linear from `beta_start` to `beta_end`.

    Ho et al. 2020 (arXiv:2006.11239), section 4. `LinearBeta` is its limit in continuous time.

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

    def alpha(self, t: AnyShape) -> AnyShape:
        return jnp.exp(0.5 * self._log_alpha_bar(t))

    def sigma(self, t: AnyShape) -> AnyShape:
        return jnp.sqrt(-jnp.expm1(self._log_alpha_bar(t)))

    def _log_alpha_bar(self, t: Array) -> Array:
        betas = jnp.linspace(self.beta_start, self.beta_end, self.num_steps)
        return _interpolate(jnp.log1p(-betas), t)


@register_dataclass
@dataclass(frozen=True)
class ScaledLinearBetas:
    """Stable Diffusion's table: `√β_k` linear between the roots of the ends.

    Rombach et al. 2022 (arXiv:2112.10752), in their public code.
    """

    num_steps: Positive[int] = field(default=1000, metadata={"static": True})
    beta_start: Beta[Scalar] = 0.00085
    beta_end: Beta[Scalar] = 0.012
    t_min: NotNegative[Scalar] = 1e-3
    t_noise: UnitTime[Scalar] = 1.0

    def alpha(self, t: AnyShape) -> AnyShape:
        return jnp.exp(0.5 * self._log_alpha_bar(t))

    def sigma(self, t: AnyShape) -> AnyShape:
        return jnp.sqrt(-jnp.expm1(self._log_alpha_bar(t)))

    def _log_alpha_bar(self, t: Array) -> Array:
        first, last = jnp.sqrt(self.beta_start), jnp.sqrt(self.beta_end)
        return _interpolate(jnp.log1p(-(jnp.linspace(first, last, self.num_steps) ** 2)), t)


@register_dataclass
@dataclass(frozen=True)
class CosineBetas:
    """iDDPM's table: `ᾱ_k` follows `cos²(π/2·(k/T + offset)/(1 + offset))`, each `β_k` clipped.

    Nichol & Dhariwal 2021 (arXiv:2102.09672), equation 17.

    Attributes:
        num_steps: `T`.
        offset: keeps the first steps from being too small.
        max_beta: the clip, without which `a = 0` at the end.
        t_min: the first step.
        t_noise: the last step but one: at the last `a = 5e-5`, and an error of a predicted noise
            would be 20,000 times as large in x0.
    """

    num_steps: Positive[int] = field(default=1000, metadata={"static": True})
    offset: NotNegative[Scalar] = 0.008
    max_beta: Beta[Scalar] = 0.999
    t_min: NotNegative[Scalar] = 1e-3
    t_noise: UnitTime[Scalar] = 0.999

    def alpha(self, t: AnyShape) -> AnyShape:
        return jnp.exp(0.5 * self._log_alpha_bar(t))

    def sigma(self, t: AnyShape) -> AnyShape:
        return jnp.sqrt(-jnp.expm1(self._log_alpha_bar(t)))

    def _log_alpha_bar(self, t: Array) -> Array:
        steps = jnp.arange(self.num_steps) / self.num_steps
        angle = 0.5 * jnp.pi * (steps + self.offset) / (1.0 + self.offset)
        width = 0.5 * jnp.pi / (self.num_steps * (1.0 + self.offset))
        # cos²(x + w)/cos²(x) by the addition theorem: no difference of nearly equal numbers.
        root = jnp.cos(width) - jnp.sin(width) * jnp.tan(angle)
        beta = jnp.minimum(1.0 - root**2, self.max_beta)
        small = 2.0 * jnp.log1p(-2.0 * jnp.sin(0.5 * width) ** 2 - jnp.sin(width) * jnp.tan(angle))
        return _interpolate(jnp.where(beta < self.max_beta, small, jnp.log1p(-beta)), t)


def _interpolate(log_kept: Array, t: Array) -> Array:
    """`log ᾱ` at times in [0, 1], from `log(1 - β_k)` of each step."""
    num_steps = len(log_kept)
    log_alpha_bar = jnp.concatenate([jnp.zeros(1), jnp.cumsum(log_kept)])
    u = t * num_steps
    step = jnp.clip(jnp.floor(jax.lax.stop_gradient(u)).astype(jnp.int32), 0, num_steps - 1)
    return log_alpha_bar[step] + (u - step.astype(u.dtype)) * log_kept[step]
