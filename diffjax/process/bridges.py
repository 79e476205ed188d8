"""Noise between two ends: what an interpolant adds on the way, and the Brownian bridge as a path.

A bridge noise `γ(t)` vanishes at both ends, `γ(0) = γ(1) = 0`, so that it changes neither of the
two sets that an interpolant joins, only what lies between them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import NotNegative, Positive, UnitTime
from diffjax.process.paths import Scalar
from diffjax.shapes import AnyShape

BridgeNoise = Callable[[Array], Array]
"""`t -> γ(t)`, of the shape of `t`; its derivative comes from `jax.jvp`."""


@register_dataclass
@dataclass(frozen=True)
class NoBridge:
    """0: a straight interpolant of the two ends."""

    def __call__(self, t: AnyShape) -> AnyShape:
        return jnp.zeros_like(t)


@register_dataclass
@dataclass(frozen=True)
class Brownian:
    """`scale·√(t(1 - t))`, the deviation of a Brownian bridge.

    Its derivative is infinite at both ends, and so is the variance of a velocity there: use it on a
    path that stops short of 1, as `Linear(t_noise=0.999)`. Albergo et al. 2023 (arXiv:2303.08797),
    table 2.

    Example:
        >>> float(Brownian(scale=2.0)(jnp.array(0.5)))
        1.0
    """

    scale: Positive[Scalar] = 1.0

    def __call__(self, t: AnyShape) -> AnyShape:
        return self.scale * jnp.sqrt(t * (1.0 - t))


@register_dataclass
@dataclass(frozen=True)
class SineSquared:
    """`scale·sin²(πt)`, which is flat at both ends.

    Albergo et al. 2023 (arXiv:2303.08797), section 4.
    """

    scale: Positive[Scalar] = 0.5

    def __call__(self, t: AnyShape) -> AnyShape:
        return self.scale * jnp.sin(jnp.pi * t) ** 2


@register_dataclass
@dataclass(frozen=True)
class BrownianBridge:
    """`a = 1 - t`, `s = scale·√(t(1 - t))`: a Brownian bridge seen from its source.

    A bridge from `x0` to the source `x1` is `x_t = (1 - t)·x0 + t·x1 + s·eps`. For a given source
    `y_t = x_t - t·x1` is an ordinary path, of falling log-SNR `log((1 - t)/t) - 2·log(scale)`, and
    every target, weight and solver works on it; `SourceBridge` trains so. DDPM's step on it is the
    bridge's own posterior, `x_u | x_t, x0 ~ N(u/t·x_t + (1 - u/t)·x0, scale²·u(t - u)/t)`. Chen et
    al. 2024 (arXiv:2403.13724); Li et al. 2023 (arXiv:2205.07680).

    It stops short of 1, where `s` falls infinitely fast; what is left of `x0` there, `a/s` of the
    noise, biases deterministic solvers by as much. Solvers in the path's own time meet that
    slope: prefer DDIM and DDPM here, which step in `s/a`.

    Attributes:
        scale: of the noise; deviation `scale/2` half way.
        t_min: the smallest time that a network sees.
        t_noise: where sampling starts, beside the source.
    """

    scale: Positive[Scalar] = 1.0
    t_min: NotNegative[Scalar] = 1e-3
    t_noise: UnitTime[Scalar] = 0.9999

    def alpha(self, t: AnyShape) -> AnyShape:
        return 1.0 - t

    def sigma(self, t: AnyShape) -> AnyShape:
        return self.scale * jnp.sqrt(t * (1.0 - t))
