"""Solvers of the reverse SDE, with any diffusion coefficient.

For the flow's velocity v and any `w(t) ≥ 0` there is an SDE with the marginals of the flow. In
reverse time it is

    dx = (v + ½·w·eps/s) dt + √w dW̄,    since the score is -eps/s.

Larger w removes more of the errors of earlier steps, and needs more steps itself.

Ma et al. 2024 (SiT, arXiv:2401.08740), section 2.4; Song et al. 2021 (arXiv:2011.13456).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import NotNegative
from diffjax.process.paths import Coeffs, Path, Scalar, coeffs_at
from diffjax.sampling import solvers
from diffjax.sampling.solvers import (
    Denoise,
    Interval,
    Solver,
    no_memory,
    same_for_equal,
)
from diffjax.shapes import OneNumber, Samples

Diffusion = Callable[[Coeffs], Array]
"""`coefficients -> w`, of their shape: the variance of fresh noise per unit of time."""


@register_dataclass
@dataclass(frozen=True)
class NoiseScale:
    """`w = scale·s`, which is 0 at clean data. SiT's default.

    Attributes:
        scale: typically 0.5 to 2; 0 is the probability flow.
    """

    scale: NotNegative[Scalar] = 1.0

    def __call__(self, c: Coeffs) -> Array:
        return self.scale * c.s


@register_dataclass
@dataclass(frozen=True)
class ConstantRate:
    """`w = scale`, at all times.

    Attributes:
        scale: typically 0.5 to 2 where time runs from 0 to 1.
    """

    scale: NotNegative[Scalar] = 1.0

    def __call__(self, c: Coeffs) -> Array:
        return self.scale * jnp.ones_like(c.s)


@register_dataclass
@dataclass(frozen=True)
class ForwardRate:
    """`w = scale·g²` with `g² = 2·s·(ṡ - s·ȧ/a)`, the rate of the forward SDE.

    Infinite in pure noise (`a = 0`).

    Attributes:
        scale: 1 is Anderson's reversal of the forward SDE, 0 the probability flow.
    """

    scale: NotNegative[Scalar] = 1.0

    def __call__(self, c: Coeffs) -> Array:
        return self.scale * 2.0 * c.s * (c.ds - c.s * c.da / c.a)


@same_for_equal
def euler_maruyama(diffusion: Diffusion = NoiseScale()) -> Solver:
    """Euler–Maruyama on the reverse SDE, with drift and noise of the beginning of the step.

        x' = x + (t' - t)·(v + ½·w·eps/s) + √(w·(t - t'))·z

    Ma et al. 2024 (arXiv:2401.08740), section 2.4.

    Args:
        diffusion: w, any function of the coefficients: `NoiseScale`, `ConstantRate`, `ForwardRate`.
    """

    def step(
        denoise: Denoise, interval: Interval, memory: tuple, x: Samples
    ) -> tuple[Samples, tuple]:
        t, dt = interval.t, interval.dt
        z = solvers.normal(interval.keys, x.shape[1:])
        change = dt * drift(denoise, interval.path, diffusion, x, t)
        return x + change + jnp.sqrt(diffusion(interval.coeffs) * -dt) * z, memory

    return Solver(no_memory, step, nfe=1, order=1, fresh_noise=True)


@same_for_equal
def stochastic_heun(diffusion: Diffusion = NoiseScale()) -> Solver:
    """Fresh noise, then Heun's step along the drift of the reverse SDE.

    SiT's `Heun`, Ma et al. 2024 (arXiv:2401.08740).

    Args:
        diffusion: w, any function of the coefficients: `NoiseScale`, `ConstantRate`, `ForwardRate`.
    """

    def step(
        denoise: Denoise, interval: Interval, memory: tuple, x: Samples
    ) -> tuple[Samples, tuple]:
        path, dt = interval.path, interval.dt
        z = solvers.normal(interval.keys, x.shape[1:])
        x = x + jnp.sqrt(-dt * diffusion(interval.coeffs)) * z
        first = drift(denoise, path, diffusion, x, interval.t)
        second = drift(denoise, path, diffusion, x + dt * first, interval.t_next)
        return x + 0.5 * dt * (first + second), memory

    return Solver(no_memory, step, nfe=2, order=1, fresh_noise=True)


def drift(denoise: Denoise, path: Path, diffusion: Diffusion, x: Samples, t: OneNumber) -> Samples:
    """The drift `v + ½·w·eps/s` of the reverse SDE at `x[B, …]` and `t[]`, by one evaluation."""
    c = coeffs_at(path, t)
    pair = denoise(x, t)
    return c.da * pair.x0 + (c.ds + 0.5 * diffusion(c) / c.s) * pair.eps
