"""Solvers of the reverse SDE, with any diffusion coefficient.

The flow's velocity v and any `w(t) ≥ 0` give an SDE with the same marginals. Backwards it is

    dx = (v + ½·w·eps/s) dt + √w dW̄,    since the score is -eps/s.

Ma et al. 2024 (SiT, arXiv:2401.08740), section 2.4; Song et al. 2021 (arXiv:2011.13456).
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.tree_util import register_dataclass

from diffjax.kinds import NotNegative
from diffjax.process.paths import Coeffs, Path, Scalar, coeffs
from diffjax.sampling import solvers
from diffjax.sampling.solvers import Denoise, Solver, same_for_equal
from diffjax.shapes import OneNumber, Samples

Diffusion = Callable[[Coeffs], Array]
"""`coefficients -> w`, of their shape: the variance of fresh noise per time."""


@register_dataclass
@dataclass(frozen=True)
class NoiseScale:
    """`w = scale·s`: none at clean data. SiT's default."""

    scale: NotNegative[Scalar] = 1.0

    def __call__(self, c: Coeffs) -> Array:
        return self.scale * c.s


@register_dataclass
@dataclass(frozen=True)
class ConstantRate:
    """`w = scale`."""

    scale: NotNegative[Scalar] = 1.0

    def __call__(self, c: Coeffs) -> Array:
        return self.scale * jnp.ones_like(c.s)


@register_dataclass
@dataclass(frozen=True)
class ForwardRate:
    """`w = scale·g²` with `g² = 2·s·(s' - s·a'/a)`, the rate of the forward SDE.

    With `scale = 1` it is Anderson's reversal. Infinite in pure noise (`a = 0`).
    """

    scale: NotNegative[Scalar] = 1.0

    def __call__(self, c: Coeffs) -> Array:
        return self.scale * 2.0 * c.s * (c.ds - c.s * c.da / c.a)


@same_for_equal
def euler_maruyama(diffusion: Diffusion = NoiseScale()) -> Solver:
    """Euler–Maruyama on the reverse SDE: drift and noise as at the beginning of the step.

    Ma et al. 2024 (arXiv:2401.08740), section 2.4.
    """

    def step(
        denoise: Denoise,
        path: Path,
        memory: tuple,
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, tuple]:
        z = solvers.normal(keys, x.shape[1:])
        w = rate(path, diffusion, t, x.ndim)
        change = (t_next - t) * drift(denoise, path, diffusion, x, t)
        return x + change + jnp.sqrt(w * (t - t_next)) * z, memory

    return Solver(lambda x: (), step, nfe=1, order=1, fresh_noise=True)


@same_for_equal
def stochastic_heun(diffusion: Diffusion = NoiseScale()) -> Solver:
    """Fresh noise, then Heun's step along the drift of the reverse SDE.

    SiT's `Heun`, Ma et al. 2024 (arXiv:2401.08740).
    """

    def step(
        denoise: Denoise,
        path: Path,
        memory: tuple,
        x: Samples,
        t: OneNumber,
        t_next: OneNumber,
        keys: Array,
    ) -> tuple[Samples, tuple]:
        dt = t_next - t
        w = rate(path, diffusion, t, x.ndim)
        x = x + jnp.sqrt(-dt * w) * solvers.normal(keys, x.shape[1:])
        first = drift(denoise, path, diffusion, x, t)
        second = drift(denoise, path, diffusion, x + dt * first, t_next)
        return x + 0.5 * dt * (first + second), memory

    return Solver(lambda x: (), step, nfe=2, order=1, fresh_noise=True)


def rate(path: Path, diffusion: Diffusion, t: Array, ndim: int) -> Array:
    """`w` at `t[]`, to broadcast against `ndim` axes."""
    return diffusion(coeffs(path, t[None], ndim))


def drift(denoise: Denoise, path: Path, diffusion: Diffusion, x: Array, t: Array) -> Array:
    """`v + ½·w·eps/s` of the reverse SDE, `[B, …]`."""
    c = coeffs(path, t[None], x.ndim)
    pair = denoise(x, t)
    return c.da * pair.x0 + (c.ds + 0.5 * diffusion(c) / c.s) * pair.eps
