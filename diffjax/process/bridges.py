"""Bridge noise: the noise of a stochastic interpolant between two data sets, and a bridge as path.

An interpolant `x_t = a·x0 + s·x1 + γ(t)·z` adds noise `z ~ N(0, I)` between two ends. The scale
`γ(t)` is 0 at both, `γ(0) = γ(1) = 0`, so it changes the distributions in between and not those
at the ends. Albergo et al. 2023 (arXiv:2303.08797).
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
"""`t -> γ(t)`, of the shape of `t`; the derivative is computed by `jax.jvp`."""


@register_dataclass
@dataclass(frozen=True)
class NoBridge:
    """No bridge noise, `γ(t) = 0`: the interpolant is a mix of the two ends alone."""

    def __call__(self, t: AnyShape) -> AnyShape:
        return jnp.zeros_like(t)


@register_dataclass
@dataclass(frozen=True)
class Brownian:
    """The bridge noise of a Brownian bridge: `γ(t) = scale·√(t(1 - t))`.

    Its derivative is infinite at both ends, and so is the variance of a velocity there. Use it on a
    path that ends before 1, such as `Linear(t_noise=0.999)`. Albergo et al. 2023
    (arXiv:2303.08797), table 2.

    Attributes:
        scale: twice the standard deviation at `t = ½`; 1 is the standard Brownian bridge.

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
    """A smooth bridge noise, `γ(t) = scale·sin²(πt)`, with derivative 0 at both ends.

    Albergo et al. 2023 (arXiv:2303.08797), section 4.

    Attributes:
        scale: the standard deviation at `t = ½`, where it is largest. The default, 0.5, is about
            that of images in [-1, 1].
    """

    scale: Positive[Scalar] = 0.5

    def __call__(self, t: AnyShape) -> AnyShape:
        return self.scale * jnp.sin(jnp.pi * t) ** 2


@register_dataclass
@dataclass(frozen=True)
class BrownianBridge:
    """The Brownian bridge from data to a given source: `a = 1 - t`, `s = scale·√(t(1 - t))`.

    A bridge from `x0` to the source `x1` is `x_t = (1 - t)·x0 + t·x1 + s·eps`. For a given source,
    `y_t = x_t - t·x1` is an ordinary path with log-SNR `λ = log((1 - t)/t) - 2·log(scale)`, which
    decreases with time. Every target, weight and solver works on it; the objective `SourceBridge`
    trains on it. The step of DDPM on this path is the bridge's own posterior,
    `x_u | x_t, x0 ~ N(u/t·x_t + (1 - u/t)·x0, scale²·u(t - u)/t)`. Chen et al. 2024
    (arXiv:2403.13724); Li et al. 2023 (arXiv:2205.07680).

    The path ends before 1, where the slope of `s` is infinite. At `t_noise` the signal is `a/s`
    times the noise, and deterministic solvers, which start from the source and noise alone, have a
    bias of that order. Prefer DDIM and DDPM on this path: they step in `s/a`, while solvers that
    step in the path's time meet the infinite slope.

    Attributes:
        scale: the scale of the noise; its standard deviation is `scale/2` at `t = ½`. 1 is the
            standard Brownian bridge; Li et al. have √2.
        t_min: the smallest time at which the network is evaluated.
        t_noise: the largest time, near the source, where sampling starts.
    """

    scale: Positive[Scalar] = 1.0
    t_min: NotNegative[Scalar] = 1e-3
    t_noise: UnitTime[Scalar] = 0.9999

    def alpha(self, t: AnyShape) -> AnyShape:
        return 1.0 - t

    def sigma(self, t: AnyShape) -> AnyShape:
        return self.scale * jnp.sqrt(t * (1.0 - t))
